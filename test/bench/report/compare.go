package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"time"

	"ztun/test/bench/stat"
)

// Run is a report as MarshalJSON wrote it, as far as a comparison needs it.
type Run struct {
	Machine Machine   `json:"machine"`
	Started time.Time `json:"started"`
	Rows    []figure  `json:"rows"`
	Others  struct {  // processors that others kept busy
		Median *float64 `json:"median"`
	} `json:"others_processors"`
}

type figure struct {
	Suite  string                `json:"suite"`
	Case   string                `json:"case"`
	Metric string                `json:"metric"`
	Unit   string                `json:"unit"`
	Base   string                `json:"base"`
	Values map[string][]*float64 `json:"values"` // by subject and repetition; nil for a missing one
}

// Load reads the file that --json wrote. Errors name the file.
func Load(name string) (*Run, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	r := new(Run)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s: not what scripts/bench --json writes: %w", name, err)
	}
	if len(r.Rows) == 0 {
		return nil, fmt.Errorf("%s: holds no figures of scripts/bench", name)
	}
	return r, nil
}

// Compare prints what became of each figure of a subject that both runs have: both medians, and new by old. The
// figures of two runs are two hours of a shared machine, therefore also what became of the ratio to the base, which was
// measured beside it. Only what lies outside the range of the repetitions is called a change, the rest is marked ~;
// with a repetition alone nothing is called a change.
func Compare(out io.Writer, before, after *Run) error {
	for _, r := range []struct {
		name string
		*Run
	}{{"old", before}, {"new", after}} {
		others := math.NaN()
		if r.Others.Median != nil {
			others = *r.Others.Median
		}
		if _, err := fmt.Fprintf(out, "%s  %s%s, %s, %d cores, kernel %s, %s; others kept %s processors busy\n", r.name,
			r.Started.UTC().Format("2006-01-02 15:04 UTC"), suffix(", commit ", r.Machine.Commit), r.Machine.CPU,
			r.Machine.Cores, r.Machine.Kernel, r.Machine.Go, Number(others)); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(out, "~: the ranges of the repetitions touch; no change is shown\n"); err != nil {
		return err
	}
	table := [][]string{{"suite", "case", "metric", "subject", "old", "new", "new/old", "old, of base", "new, of base",
		"new/old"}}
	for _, a := range after.Rows {
		b := before.find(a)
		if b == nil {
			continue
		}
		for _, s := range subjectsOf(a) {
			was, is := b.values(s), a.values(s)
			if !stat.Summarize(was).Valid() || !stat.Summarize(is).Valid() {
				continue
			}
			line := append([]string{a.Suite, a.Case, a.Metric + suffix(" ", a.Unit), s}, change(was, is)...)
			if s != a.Base && a.Base == b.Base {
				line = append(line, change(stat.Ratios(was, b.values(a.Base)), stat.Ratios(is, a.values(a.Base)))...)
			} else {
				line = append(line, "", "", "")
			}
			table = append(table, line)
		}
	}
	if len(table) == 1 {
		return errors.New("the two files have no figure in common")
	}
	_, err := io.WriteString(out, grid(table))
	return err
}

// change is the cells of old, new and their ratio.
func change(was, is []float64) []string {
	a, b := stat.Summarize(was), stat.Summarize(is)
	if !a.Valid() || !b.Valid() {
		return []string{"", "", ""}
	}
	ratio := "-" // to nothing
	if a.Median != 0 {
		ratio = Number(b.Median / a.Median)
	}
	if a.N < 2 || b.N < 2 || a.Min <= b.Max && b.Min <= a.Max {
		ratio += " ~"
	}
	return []string{cell(a, false), cell(b, false), ratio}
}

func (r *Run) find(like figure) *figure {
	for i, f := range r.Rows {
		if f.Suite == like.Suite && f.Case == like.Case && f.Metric == like.Metric && f.Unit == like.Unit {
			return &r.Rows[i]
		}
	}
	return nil
}

// subjectsOf are the base first and the others by name.
func subjectsOf(f figure) []string {
	var names []string
	if _, ok := f.Values[f.Base]; ok {
		names = append(names, f.Base)
	}
	for _, s := range slices.Sorted(maps.Keys(f.Values)) {
		if s != f.Base {
			names = append(names, s)
		}
	}
	return names
}

func (f figure) values(subject string) []float64 {
	vs := make([]float64, len(f.Values[subject]))
	for i, v := range f.Values[subject] {
		vs[i] = math.NaN()
		if v != nil {
			vs[i] = *v
		}
	}
	return vs
}
