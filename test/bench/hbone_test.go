package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ztun/test/bench/gobench"
)

func TestBenchOutcome(t *testing.T) {
	for line, want := range map[string]outcome{
		"BenchmarkMux/tls=own/up/1-2 50 1.2 CPUs/GB 1000 MB/s": {"throughput": 8, "CPU-s/GB": 1.2},
		"BenchmarkMuxLatency/bulk=8-2 50 45.0 p50-us 162 p99-us 250 bulk-MB/s": {"p50": 0.045, "p99": 0.162,
			"bulk meanwhile": 2},
		"BenchmarkX-2 50 7 ns/op": {"ns/op": 7},
		"BenchmarkX-2 50 7 ns/op 3.5 Gb/s 12 B/op 1 allocs/op 5 wakeups/packet": {"throughput": 3.5, "wakeups/packet": 5},
	} {
		rs, err := gobench.Parse(strings.NewReader(line))
		if err != nil || len(rs) != 1 {
			t.Fatal(rs, err)
		}
		got, err := benchOutcome(rs[0])
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		if d := cmp.Diff(want, got, cmpopts.EquateApprox(1e-9, 0)); d != "" {
			t.Errorf("%s:\n%s", line, d)
		}
	}
	if o, err := benchOutcome(gobench.Result{Values: map[string]float64{"B/op": 1}}); err == nil {
		t.Error("no error for a result without figures:", o)
	}
}
