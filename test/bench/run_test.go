package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"ztun/test/bench/proc"
	"ztun/test/bench/report"
)

// fakes is a plan of two cases whose subjects write down when they ran.
func fakes(log *[]string) []kase {
	sub := func(k, name string, v float64) subject {
		return subject{name: name, run: func(_ context.Context, rep int) (outcome, error) {
			*log = append(*log, fmt.Sprintf("%d %s %s", rep, k, name))
			if name == "ztun" && k == "two" && rep == 1 {
				return nil, errors.New("broken pipe")
			}
			return outcome{"throughput": v + float64(rep), "extra " + name: 1}, nil
		}}
	}
	return []kase{
		{suite: "mesh", name: "one", rows: []report.Row{{Metric: "throughput", Unit: "Gb/s"}}, lasts: time.Second,
			subjects: []subject{sub("one", "bare", 10), sub("one", "ztun", 2)}},
		{suite: "mesh", name: "two", rows: []report.Row{{Metric: "throughput", Unit: "Gb/s"}}, lasts: time.Second,
			subjects: []subject{sub("two", "bare", 20), sub("two", "ztun", 4)}},
	}
}

func newRunner(t *testing.T) *runner {
	return &runner{rep: &report.Report{Base: map[string]string{"mesh": "bare"}}, proc: proc.FS{FS: fstest.MapFS{}},
		progress: t.Logf}
}

func TestRunInterleavesAndGoesOnAfterAFailure(t *testing.T) {
	var log []string
	r, ks := newRunner(t), fakes(&log)
	if err := r.run(context.Background(), ks, 3); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"0 one bare", "0 one ztun", "0 two bare", "0 two ztun",
		"1 one ztun", "1 one bare", "1 two ztun", "1 two bare", // the order is turned round
		"2 one bare", "2 one ztun", "2 two bare", "2 two ztun",
	}
	if d := cmp.Diff(want, log); d != "" {
		t.Error(d)
	}
	row := r.rep.Row(report.Row{Suite: "mesh", Case: "two", Metric: "throughput"})
	if s := row.Summary("ztun"); s.N != 2 || s.Min != 4 || s.Max != 6 {
		t.Errorf("the failed repetition is in the figures: %+v", s)
	}
	if s := row.Ratio("ztun", "bare"); s.N != 2 {
		t.Errorf("%+v", s)
	}
	if len(r.rep.Errors) != 1 || !strings.Contains(r.rep.Errors[0], "two, ztun, repetition 2: broken pipe") {
		t.Error(r.rep.Errors)
	}
}

func TestRunStopsWithItsContext(t *testing.T) {
	var log []string
	ctx, cancel := context.WithCancel(context.Background())
	r, ks := newRunner(t), fakes(&log)
	ks[0].subjects[1].run = func(context.Context, int) (outcome, error) { cancel(); return nil, ctx.Err() }
	if err := r.run(ctx, ks, 3); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if len(log) != 1 {
		t.Error("measured on after the end:", log)
	}
}

func TestMetricsOrder(t *testing.T) {
	k := kase{rows: []report.Row{{Metric: "p50"}, {Metric: "p99"}, {Metric: "absent"}}}
	got := metrics(k, outcome{"b": 1, "p99": 1, "a": 1, "p50": 1})
	if d := cmp.Diff([]string{"p50", "p99", "a", "b"}, got); d != "" {
		t.Error(d)
	}
}

func TestExpectedIsFiniteAndQuickIsQuick(t *testing.T) {
	o, err := parseArgs([]string{"mesh", "--quick"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{o: o}
	if d := expected(b.meshCases(), o.Reps); d > 45*time.Second {
		t.Errorf("mesh --quick measures for %v: more than leaves room for the rest of a minute", d)
	}
}
