package report

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ztun/test/bench/stat"
)

// Target is what an issue asks of a figure.
type Target struct {
	OfRatio bool    `json:"of_ratio"` // of the subject's ratio to the base; else of its value
	AtMost  bool    `json:"at_most"`  // else at least
	Value   float64 `json:"value"`
	Versus  string  `json:"versus,omitempty"` // the subject whose ratio is meant; "": the suite's base
}

// Met tells whether s (of values or of ratios, as the target asks) reaches the target with its median.
func (t Target) Met(s stat.Summary) bool {
	if !s.Valid() {
		return false
	}
	if t.AtMost {
		return s.Median <= t.Value
	}
	return s.Median >= t.Value
}

func (t Target) String() string {
	op, x := ">=", ""
	if t.AtMost {
		op = "<="
	}
	if t.OfRatio {
		x = "x" + suffix(" ", t.Versus)
	}
	return op + " " + strconv.FormatFloat(t.Value, 'g', -1, 64) + x
}

// Row is one figure of one case, of all subjects.
type Row struct {
	Suite, Case, Metric, Unit string
	Target                    *Target            // of Subject; nil for none
	Subject                   string             // whom the target concerns
	Others                    map[string]*Target // what is asked of further subjects
	Reference                 string             // what real ztunnel had, as text, from design.md; "" for unknown

	values map[string][]float64 // by subject; index: repetition
	noisy  map[string]bool
}

// Report is everything that one run of the benchmark has to say.
type Report struct {
	Machine  Machine
	Started  time.Time
	Took     time.Duration
	Commands []string          // how to run the same again
	Base     map[string]string // by suite: the subject that the others are compared with
	Titles   map[string]string // by suite: what was measured
	Notes    []string
	Errors   []string // measurements that failed, in order
	Profiles []Profile

	subjects []string // in order of appearance
	suites   []string
	rows     []*Row
	noise    []float64 // foreign load in processors, per measurement
}

// Machine says where the figures come from.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory int64  `json:"memory_bytes"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Arch   string `json:"arch"`
	Commit string `json:"commit,omitempty"`
	// Congestion is TCP's congestion control here: BBR paces each stream by timers that the daemons pay for.
	Congestion string `json:"congestion_control,omitempty"`
}

// Profile is the head of one process's CPU profile.
type Profile struct {
	Title string   `json:"title"`
	File  string   `json:"file"`
	Top   []string `json:"top"` // lines as `go tool pprof -top` prints them
}

// Row declares a row, or finds the one declared before under the same suite, case and metric (whose unit, target and
// reference then stay).
func (r *Report) Row(w Row) *Row {
	for _, o := range r.rows {
		if o.Suite == w.Suite && o.Case == w.Case && o.Metric == w.Metric {
			return o
		}
	}
	w.values, w.noisy = map[string][]float64{}, map[string]bool{}
	at := len(r.rows)
	known := false
	for i, o := range r.rows {
		if o.Suite == w.Suite {
			known = true
			at = i + 1
		}
	}
	if !known {
		r.suites = append(r.suites, w.Suite)
	}
	// A row that appears late (a figure that only one subject has) goes to its case.
	for i, o := range r.rows {
		if o.Suite == w.Suite && o.Case == w.Case {
			at = i + 1
		}
	}
	r.rows = append(r.rows, nil)
	copy(r.rows[at+1:], r.rows[at:])
	r.rows[at] = &w
	return &w
}

// Add notes the value of a repetition (from 0). Repetitions without one read as missing. A second value for the same
// repetition replaces the first.
func (r *Report) Add(w *Row, subject string, rep int, v float64) {
	if !contains(r.subjects, subject) {
		r.subjects = append(r.subjects, subject)
	}
	for len(w.values[subject]) <= rep {
		w.values[subject] = append(w.values[subject], math.NaN())
	}
	w.values[subject][rep] = v
}

// Noise notes how many processors others kept busy, on average, during one measurement of the case; above noisyAbove
// the case's figures of that subject carry a mark.
func (r *Report) Noise(suite, kase, subject string, processors float64) {
	r.noise = append(r.noise, processors)
	if processors <= noisyAbove {
		return
	}
	for _, w := range r.rows {
		if w.Suite == suite && w.Case == kase {
			w.noisy[subject] = true
		}
	}
}

// noisyAbove is the foreign load, in processors, from which on a figure is marked.
const noisyAbove = 0.1

// Values returns a subject's values by repetition, missing ones NaN.
func (w *Row) Values(subject string) []float64 { return w.values[subject] }

// Summary of a subject's values.
func (w *Row) Summary(subject string) stat.Summary { return stat.Summarize(w.values[subject]) }

// Ratio of subject to base, by repetition.
func (w *Row) Ratio(subject, base string) stat.Summary {
	return stat.Summarize(stat.Ratios(w.values[subject], w.values[base]))
}

// target is what is asked of a subject, nil for nothing, and the figure that it is asked of.
func (w *Row) target(subject, base string) (*Target, stat.Summary) {
	t := w.Others[subject]
	if t == nil && subject == w.Subject {
		t = w.Target
	}
	if t == nil || !t.OfRatio {
		return t, w.Summary(subject)
	}
	if t.Versus != "" {
		base = t.Versus
	}
	return t, w.Ratio(subject, base)
}

// Text prints the whole report as tables of at most 140 or so columns.
func (r *Report) Text(out io.Writer) error {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "machine   %s, %d cores, %.0f GiB, %s, kernel %s%s, %s\n", m.CPU, m.Cores, float64(m.Memory)/(1<<30),
		m.Arch, m.Kernel, suffix(" with TCP ", m.Congestion), m.Go)
	fmt.Fprintf(&b, "run       %s, took %s%s\n", r.Started.UTC().Format("2006-01-02 15:04 UTC"), r.Took.Round(time.Second),
		suffix(", commit ", m.Commit))
	for i, c := range r.Commands {
		head := ""
		if i == 0 {
			head = "commands"
		}
		fmt.Fprintf(&b, "%-9s %s\n", head, c)
	}
	if s := stat.Summarize(r.noise); s.Valid() {
		fmt.Fprintf(&b, "others    kept %s processors busy meanwhile (median %s; ~ marks figures with more than %.1f)\n",
			rangeText(s), Number(s.Median), noisyAbove)
	}
	fmt.Fprintf(&b,
		"figures   median (smallest-largest) of the repetitions; the ratio is the median of the repetitions' own ratios; "+
			"GB = 1e9 bytes\n")
	for _, suite := range r.suites {
		b.WriteString("\n" + suite + suffix(": ", r.Titles[suite]) + "\n")
		b.WriteString(grid(r.lines(suite)))
	}
	for _, p := range r.Profiles {
		fmt.Fprintf(&b, "\nprofile of %s (%s)\n", p.Title, p.File)
		for _, l := range p.Top {
			b.WriteString("  " + l + "\n")
		}
	}
	items(&b, "notes", r.Notes)
	items(&b, "measurements that FAILED", r.Errors)
	_, err := io.WriteString(out, b.String())
	return err
}

// items prints a list under a title, if there is anything in it.
func items(b *strings.Builder, title string, list []string) {
	if len(list) > 0 {
		fmt.Fprintf(b, "\n%s\n", title)
	}
	for _, s := range list {
		fmt.Fprintf(b, "- %s\n", s)
	}
}

// lines are the cells of a suite's table, head first.
func (r *Report) lines(suite string) [][]string {
	base := r.Base[suite]
	table := [][]string{{"case", "metric", base, "subject", "value", "ratio", "target", "ztunnel"}}
	last := ""
	for _, w := range r.rows {
		if w.Suite != suite || len(w.values) == 0 {
			continue // declared and never measured, as a daemon's figures in a run without one
		}
		kase := w.Case
		if kase == last {
			kase = ""
		}
		metric := w.Metric + suffix(" ", w.Unit)
		shown := 0
		for _, s := range r.subjects {
			if _, has := w.values[s]; !has || s == base {
				continue
			}
			ratio, target := w.Ratio(s, base), ""
			if t, of := w.target(s, base); t != nil {
				target = t.String()
				switch {
				case !of.Valid():
				case t.Met(of):
					target += " met"
				default:
					target += " MISSED"
				}
			}
			ref := ""
			if s == w.Subject {
				ref = w.Reference
			}
			table = append(table, []string{kase, metric, w.cell(base), s, w.cell(s), cell(ratio, false), target, ref})
			kase, metric = "", ""
			shown++
		}
		if shown == 0 {
			target := ""
			if w.Target != nil {
				target = w.Target.String()
			}
			table = append(table, []string{kase, metric, w.cell(base), "", "", "", target, w.Reference})
		}
		last = w.Case
	}
	return table
}

func (w *Row) cell(subject string) string {
	return cell(w.Summary(subject), w.noisy[subject])
}

func cell(s stat.Summary, noisy bool) string {
	if !s.Valid() {
		return "-"
	}
	t := Number(s.Median)
	if s.N > 1 {
		t += " (" + rangeText(s) + ")"
	}
	if noisy {
		t += " ~"
	}
	return t
}

func rangeText(s stat.Summary) string { return Number(s.Min) + "-" + Number(s.Max) }

// Number writes v with about three significant digits and no exponent; "-" for a missing one.
func Number(v float64) string {
	a := math.Abs(v)
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case v == 0:
		return "0"
	case a >= 99.95:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 9.995:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 0.9995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}

// grid sets cells in columns as wide as their widest cell, indented by two; columns that hold nothing below their
// head are left out.
func grid(rows [][]string) string {
	if len(rows) < 2 {
		return ""
	}
	width := make([]int, len(rows[0]))
	for i := range width {
		used := false
		for _, r := range rows[1:] {
			used = used || r[i] != ""
		}
		if !used {
			width[i] = -1
			continue
		}
		for _, r := range rows {
			width[i] = max(width[i], utf8.RuneCountInString(r[i]))
		}
	}
	var b strings.Builder
	for _, r := range rows {
		var l strings.Builder
		for i, c := range r {
			if width[i] >= 0 {
				l.WriteString("  " + c + strings.Repeat(" ", width[i]-utf8.RuneCountInString(c)))
			}
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	return b.String()
}

func suffix(sep, s string) string {
	if s == "" {
		return ""
	}
	return sep + s
}

func contains(ss []string, s string) bool {
	for _, x := range ss {
		if x == s {
			return true
		}
	}
	return false
}

// num is a number that JSON can carry: null for a missing one.
type num float64

func (n num) MarshalJSON() ([]byte, error) {
	if f := float64(n); math.IsNaN(f) || math.IsInf(f, 0) {
		return []byte("null"), nil
	}
	return json.Marshal(float64(n))
}

type jsonSummary struct {
	Median num `json:"median"`
	Min    num `json:"min"`
	Max    num `json:"max"`
	N      int `json:"n"`
}

func summaryJSON(s stat.Summary) jsonSummary {
	return jsonSummary{num(s.Median), num(s.Min), num(s.Max), s.N}
}

type jsonRow struct {
	Suite     string                 `json:"suite"`
	Case      string                 `json:"case"`
	Metric    string                 `json:"metric"`
	Unit      string                 `json:"unit,omitempty"`
	Base      string                 `json:"base"`
	Values    map[string][]num       `json:"values"`
	Summary   map[string]jsonSummary `json:"summary"`
	Ratio     map[string]jsonSummary `json:"ratio,omitempty"` // subject / base
	Noisy     []string               `json:"noisy,omitempty"`
	Target    *Target                `json:"target,omitempty"`
	Met       *bool                  `json:"met,omitempty"`
	Others    []jsonTarget           `json:"other_targets,omitempty"`
	Reference string                 `json:"ztunnel,omitempty"`
}

// jsonTarget is one of a further subject.
type jsonTarget struct {
	Subject string `json:"subject"`
	Target  Target `json:"target"`
	Met     bool   `json:"met"`
}

// MarshalJSON writes the report with summaries and ratios worked out.
func (r *Report) MarshalJSON() ([]byte, error) {
	rows := make([]jsonRow, 0, len(r.rows))
	for _, w := range r.rows {
		base := r.Base[w.Suite]
		j := jsonRow{Suite: w.Suite, Case: w.Case, Metric: w.Metric, Unit: w.Unit, Base: base, Target: w.Target,
			Reference: w.Reference,
			Values:    map[string][]num{}, Summary: map[string]jsonSummary{}, Ratio: map[string]jsonSummary{}}
		for _, s := range r.subjects {
			vs, has := w.values[s]
			if !has {
				continue
			}
			ns := make([]num, len(vs))
			for i, v := range vs {
				ns[i] = num(v)
			}
			j.Values[s], j.Summary[s] = ns, summaryJSON(w.Summary(s))
			if ratio := w.Ratio(s, base); s != base && ratio.Valid() {
				j.Ratio[s] = summaryJSON(ratio)
			}
			if w.noisy[s] {
				j.Noisy = append(j.Noisy, s)
			}
		}
		if t, of := w.target(w.Subject, base); t != nil && of.Valid() {
			met := t.Met(of)
			j.Met = &met
		}
		for s := range w.Others {
			t, of := w.target(s, base)
			j.Others = append(j.Others, jsonTarget{s, *t, of.Valid() && t.Met(of)})
		}
		slices.SortFunc(j.Others, func(a, b jsonTarget) int { return strings.Compare(a.Subject, b.Subject) })
		rows = append(rows, j)
	}
	return json.Marshal(struct {
		Machine     Machine           `json:"machine"`
		Started     time.Time         `json:"started"`
		TookSeconds float64           `json:"took_seconds"`
		Commands    []string          `json:"commands"`
		Titles      map[string]string `json:"titles"`
		Others      jsonSummary       `json:"others_processors"`
		Rows        []jsonRow         `json:"rows"`
		Profiles    []Profile         `json:"profiles,omitempty"`
		Notes       []string          `json:"notes,omitempty"`
		Errors      []string          `json:"errors,omitempty"`
	}{r.Machine, r.Started, r.Took.Seconds(), r.Commands, r.Titles, summaryJSON(stat.Summarize(r.noise)), rows, r.Profiles,
		r.Notes, r.Errors})
}
