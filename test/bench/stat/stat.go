package stat

import (
	"math"
	"slices"
)

// Summary is a median with the smallest and largest value and the number of values that it rests on.
type Summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

// Valid tells whether there was at least one value.
func (s Summary) Valid() bool { return s.N > 0 }

// Summarize returns the median and range of the finite values of vs; with an even number of values the median is the
// mean of the two in the middle. Without a finite value all figures but N are NaN. vs is not changed.
func Summarize(vs []float64) Summary {
	f := make([]float64, 0, len(vs))
	for _, v := range vs {
		if !math.IsNaN(v) && !math.IsInf(v, 0) {
			f = append(f, v)
		}
	}
	if len(f) == 0 {
		nan := math.NaN()
		return Summary{Median: nan, Min: nan, Max: nan}
	}
	slices.Sort(f)
	m := f[len(f)/2]
	if len(f)%2 == 0 {
		// Halved before the sum, so that two huge values do not overflow.
		m = f[len(f)/2-1]/2 + m/2
	}
	return Summary{Median: m, Min: f[0], Max: f[len(f)-1], N: len(f)}
}

// Ratios divides num by den pairwise: element i is the ratio of repetition i, NaN where either is missing or den is
// zero. The result is as long as the longer of the two.
func Ratios(num, den []float64) []float64 {
	out := make([]float64, max(len(num), len(den)))
	for i := range out {
		out[i] = math.NaN()
		if i < len(num) && i < len(den) && den[i] != 0 {
			out[i] = num[i] / den[i]
		}
	}
	return out
}

// Spread is (max-min)/median: how far the repetitions lie apart, 0 for a single one, NaN where it has no meaning.
func (s Summary) Spread() float64 {
	if !s.Valid() || s.Median == 0 {
		return math.NaN()
	}
	return (s.Max - s.Min) / math.Abs(s.Median)
}
