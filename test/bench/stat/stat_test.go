package stat

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestSummarize(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	for _, c := range []struct {
		name          string
		in            []float64
		med, min, max float64
		n             int
	}{
		{"one", []float64{3}, 3, 3, 3, 1},
		{"odd, unsorted", []float64{9, 1, 5}, 5, 1, 9, 3},
		{"even", []float64{4, 1, 2, 9}, 3, 1, 9, 4},
		{"failed repetitions are left out", []float64{nan, 7, inf, 9, 8, nan}, 8, 7, 9, 3},
		{"huge", []float64{math.MaxFloat64, math.MaxFloat64}, math.MaxFloat64, math.MaxFloat64, math.MaxFloat64, 2},
	} {
		got := Summarize(c.in)
		if got.Median != c.med || got.Min != c.min || got.Max != c.max || got.N != c.n {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
	for _, in := range [][]float64{nil, {nan}, {inf, nan}} {
		if got := Summarize(in); got.Valid() || !math.IsNaN(got.Median) || !math.IsNaN(got.Min) || !math.IsNaN(got.Max) {
			t.Errorf("%v: %+v, want nothing but NaN", in, got)
		}
	}
}

func TestSummarizeLeavesItsInputAlone(t *testing.T) {
	in := []float64{3, 1, 2}
	Summarize(in)
	if !slices.Equal(in, []float64{3, 1, 2}) {
		t.Error("the input was reordered:", in)
	}
}

func TestSummarizeProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := rapid.SliceOfN(rapid.Float64Range(-1e9, 1e9), 1, 20).Draw(t, "in")
		s := Summarize(in)
		if s.Min > s.Median || s.Median > s.Max || s.N != len(in) {
			t.Fatalf("%v: %+v", in, s)
		}
		below, above := 0, 0
		for _, v := range in {
			if v <= s.Median {
				below++
			}
			if v >= s.Median {
				above++
			}
		}
		if 2*below < len(in) || 2*above < len(in) {
			t.Fatalf("%v: %v is no median", in, s.Median)
		}
	})
}

func TestRatios(t *testing.T) {
	nan := math.NaN()
	got := Ratios([]float64{1, nan, 4, 5, 6}, []float64{2, 2, 0, 10})
	if len(got) != 5 || got[0] != 0.5 || got[3] != 0.5 {
		t.Error(got)
	}
	for _, i := range []int{1, 2, 4} {
		if !math.IsNaN(got[i]) {
			t.Errorf("ratio %d is %v, want NaN", i, got[i])
		}
	}
	if got := Ratios(nil, nil); len(got) != 0 {
		t.Error(got)
	}
}

func TestSpread(t *testing.T) {
	if got := Summarize([]float64{8, 10, 12}).Spread(); got != 0.4 {
		t.Error(got)
	}
	if got := Summarize([]float64{5}).Spread(); got != 0 {
		t.Error(got)
	}
	if got := Summarize(nil).Spread(); !math.IsNaN(got) {
		t.Error(got)
	}
}
