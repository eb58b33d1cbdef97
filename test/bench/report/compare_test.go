package report

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func saved(t *testing.T, r *Report) *Run {
	t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "run.json")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	run, err := Load(name)
	if err != nil {
		t.Fatal(err)
	}
	return run
}

// twice is the sample from a machine of half the speed, on which ztun's one stream has gained a half all the same, and
// its eight streams are as they were.
func twice() *Report {
	r := sample()
	for _, w := range r.rows {
		for s, vs := range w.values {
			for i := range vs {
				vs[i] /= 2
				if s == "ztun" && w.Case == "1 stream up" && w.Unit == "Gb/s" {
					vs[i] *= 1.5
				}
			}
		}
	}
	return r
}

func TestCompare(t *testing.T) {
	var b strings.Builder
	if err := Compare(&b, saved(t, sample()), saved(t, twice())); err != nil {
		t.Fatal(err)
	}
	golden(t, "compare.txt", b.String())
}

func TestCompareRefuses(t *testing.T) {
	other := sample()
	for _, w := range other.rows {
		w.Case = "another " + w.Case
	}
	var b strings.Builder
	if err := Compare(&b, saved(t, sample()), saved(t, other)); err == nil || !strings.Contains(err.Error(), "no figure") {
		t.Errorf("runs without a common figure: %v", err)
	}
	for text, want := range map[string]string{"{}": "holds no figures", "ok": "not what scripts/bench --json writes"} {
		name := filepath.Join(t.TempDir(), "x.json")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(name); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%q: %v, want %q and the file's name", text, err, want)
		}
	}
}
