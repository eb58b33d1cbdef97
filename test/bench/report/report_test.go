package report

import (
	"encoding/json"
	"flag"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func sample() *Report {
	r := &Report{
		Machine: Machine{CPU: "AMD EPYC", Cores: 2, Memory: 24 << 30, Kernel: "6.18", Go: "go1.26", Arch: "amd64",
			Commit: "abc", Congestion: "cubic"},
		Started:  time.Date(2026, 11, 23, 7, 0, 0, 0, time.UTC),
		Took:     61 * time.Second,
		Commands: []string{"scripts/bench mesh", "ip netns exec x y"},
		Base:     map[string]string{"mesh": "bare veth", "relay": "bare veth"},
		Titles:   map[string]string{"mesh": "pod -> node -> node -> pod"},
		Errors:   []string{"mesh / 8 streams up / ztun, repetition 1: connection refused"},
		Notes:    []string{"a note"},
		Profiles: []Profile{{Title: "node n1", File: "/x/n1.pprof", Top: []string{" 0.5s 50% a", " 0.1s 10% b"}}},
	}
	one := r.Row(Row{Suite: "mesh", Case: "1 stream up", Metric: "throughput", Unit: "Gb/s", Subject: "ztun",
		Reference: "0.2x",
		Target:    &Target{OfRatio: true, Value: 0.2}})
	for i, v := range []float64{20, 18, 22} {
		r.Add(one, "bare veth", i, v)
		r.Add(one, "ztun", i, v/4)
	}
	eight := r.Row(Row{Suite: "mesh", Case: "8 streams up", Metric: "throughput", Unit: "Gb/s", Subject: "ztun",
		Target: &Target{OfRatio: true, Value: 0.2}})
	r.Add(eight, "bare veth", 0, 20)
	r.Add(eight, "bare veth", 2, 10)
	r.Add(eight, "ztun", 0, 2)
	r.Add(eight, "ztun", 1, math.NaN())
	r.Add(eight, "ztun", 2, 1)
	relay := r.Row(Row{Suite: "relay", Case: "1 stream up", Metric: "throughput", Unit: "Gb/s"})
	r.Add(relay, "bare veth", 0, 20)
	r.Add(relay, "ztun relay", 0, 10)
	r.Add(relay, "slirp4netns", 0, 5)
	// Declared last, belongs to the first case.
	cpu := r.Row(Row{Suite: "mesh", Case: "1 stream up", Metric: "CPU-s/GB, node n1", Subject: "ztun",
		Target: &Target{AtMost: true, Value: 2.4}})
	r.Add(cpu, "ztun", 2, 1.234)
	only := r.Row(Row{Suite: "mesh", Case: "bare only", Metric: "p50", Unit: "ms", Subject: "ztun",
		Target: &Target{AtMost: true, Value: 10}})
	r.Add(only, "bare veth", 0, 0.2401)
	r.Noise("mesh", "1 stream up", "ztun", 0.5)
	r.Noise("mesh", "1 stream up", "bare veth", 0.05)
	r.Noise("mesh", "8 streams up", "bare veth", 0)
	return r
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile("testdata/"+name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (go test -update writes it):\n%s", name, d)
	}
}

func TestText(t *testing.T) {
	var b strings.Builder
	if err := sample().Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.txt", b.String())
}

func TestJSON(t *testing.T) {
	b, err := json.MarshalIndent(sample(), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "report.json", string(b)+"\n")
}

func TestEmptyReport(t *testing.T) {
	var r Report
	var b strings.Builder
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	if _, err := json.Marshal(&r); err != nil {
		t.Fatal(err)
	}
}

func TestRowIsFoundAgain(t *testing.T) {
	r := &Report{}
	a := r.Row(Row{Suite: "s", Case: "c", Metric: "m", Unit: "ms"})
	b := r.Row(Row{Suite: "s", Case: "c", Metric: "m"})
	if a != b || b.Unit != "ms" {
		t.Error("the same row twice")
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.0012345: "0.001", 0.9996: "1.00", 1.2345: "1.23", 9.996: "10.0", 12.345: "12.3", 99.96: "100",
		7123.4: "7123", -3.14159: "-3.14",
		math.Inf(1): "-",
	} {
		if got := Number(v); got != want {
			t.Errorf("%v: %q, want %q", v, got, want)
		}
	}
	if got := Number(math.NaN()); got != "-" {
		t.Error(got)
	}
}

func TestTarget(t *testing.T) {
	r := sample()
	one := r.Row(Row{Suite: "mesh", Case: "1 stream up", Metric: "throughput"})
	ratio := one.Ratio("ztun", "bare veth")
	if !one.Target.Met(ratio) || (Target{AtMost: true, Value: 0.2}).Met(ratio) {
		t.Errorf("ratio %+v", ratio)
	}
	if one.Target.Met(one.Ratio("nobody", "bare veth")) {
		t.Error("met without a value")
	}
	// Of further subjects, beside another than the base.
	r = &Report{Base: map[string]string{"s": "bare veth"}}
	w := r.Row(Row{Suite: "s", Case: "c", Metric: "m", Subject: "b", Target: &Target{OfRatio: true, Value: 0.5},
		Others: map[string]*Target{"c": {OfRatio: true, Value: 0.9, Versus: "a"}}})
	for subject, v := range map[string]float64{"bare veth": 10, "a": 4, "b": 5, "c": 3.5} {
		r.Add(w, subject, 0, v)
	}
	var out strings.Builder
	if err := r.Text(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"0.500  >= 0.5x met", "0.350  >= 0.9x a MISSED"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, &out)
		}
	}
	b, err := json.Marshal(r)
	if want := `"other_targets":[{"subject":"c","target":{"of_ratio":true,"at_most":false,"value":0.9,"versus":"a"},` +
		`"met":false}]`; err != nil || !strings.Contains(string(b), want) {
		t.Errorf("%v: %s", err, b)
	}
}
