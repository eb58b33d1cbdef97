package gobench

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	const in = `goos: linux
goarch: amd64
pkg: ztun/proxy/hbone
cpu: AMD EPYC
BenchmarkTLS/up/1-2         	     100	  10523 ns/op	6228.11 MB/s	     12 B/op	       0 allocs/op
BenchmarkHBONE/up/64-streams-2         	      50	  21000 ns/op	        3.5 Gb/s
BenchmarkHBONE/dirty-2
    bench_test.go:10: a log line
BenchmarkHBONE/dirty-2 is a line that the code under test printed
BenchmarkOne 1 5 ns/op
PASS
ok  	ztun/proxy/hbone	3.1s
`
	got, err := Parse(strings.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	want := []Result{
		{Name: "TLS/up/1", N: 100, Values: map[string]float64{"ns/op": 10523, "MB/s": 6228.11, "B/op": 12, "allocs/op": 0}},
		{Name: "HBONE/up/64-streams", N: 50, Values: map[string]float64{"ns/op": 21000, "Gb/s": 3.5}},
		{Name: "One", N: 1, Values: map[string]float64{"ns/op": 5}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for i, want := range []float64{6228.11e6, 3.5e9 / 8} {
		if v, ok := got[i].Throughput(); !ok || v != want {
			t.Errorf("%s: throughput %v %v, want %v", got[i].Name, v, ok, want)
		}
	}
	if _, ok := got[2].Throughput(); ok {
		t.Error("a throughput without bytes")
	}
}

func TestParseRefusesDamage(t *testing.T) {
	for _, in := range []string{"BenchmarkX-2 10 5 ns/op 7", "BenchmarkX-2 10 x ns/op"} {
		if _, err := Parse(strings.NewReader(in)); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("BenchmarkTLS/up/1-2 100 10523 ns/op 6228.11 MB/s")
	f.Add("Benchmark 1 2 3")
	f.Add("BenchmarkX-2 10 NaN ns/op")
	f.Fuzz(func(t *testing.T, in string) {
		rs, err := Parse(strings.NewReader(in))
		for _, r := range rs {
			if r.Name == "" || len(r.Values) == 0 {
				t.Errorf("%q (%v): empty result %+v", in, err, r)
			}
		}
	})
}
