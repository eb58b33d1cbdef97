package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"ztun/test/bench/proc"
	"ztun/test/bench/report"
)

// runner works a plan off and fills the report.
type runner struct {
	rep      *report.Report
	proc     proc.FS
	progress func(format string, args ...any)
	patience time.Duration // how long a measurement waits for others to leave the machine alone
}

// quiet is the foreign load, in processors, that counts as alone.
const quiet = 0.15

// run measures every case reps times. A measurement that fails is noted in the report and the rest goes on; only the
// end of ctx stops it.
func (r *runner) run(ctx context.Context, ks []kase, reps int) error {
	for _, k := range ks {
		for _, w := range k.rows {
			r.row(k, w)
		}
	}
	for rep := range reps {
		for _, k := range ks {
			for i := range k.subjects {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				r.measure(ctx, k, k.subjects[turn(len(k.subjects), rep, i)], rep, reps)
			}
		}
	}
	return nil
}

func (r *runner) row(k kase, w report.Row) *report.Row {
	w.Suite, w.Case = k.suite, k.name
	return r.rep.Row(w)
}

func (r *runner) measure(ctx context.Context, k kase, s subject, rep, reps int) {
	r.await(ctx)
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, k.limit())
	defer cancel()
	before, started := r.foreign(), time.Now()
	out, err := s.run(ctx, rep)
	took := time.Since(started)
	others := max(0, (r.foreign()-before).Seconds()/took.Seconds())
	label := fmt.Sprintf("%d/%d %-6s %-28s %-12s", rep+1, reps, k.suite, k.name, s.name)
	if whole.Err() != nil {
		return // the user has had enough: neither a figure nor a failure
	}
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			err = fmt.Errorf("%w (%w)", err, ctx.Err())
		}
		r.progress("%s FAILED: %v", label, err)
		r.rep.Errors = append(r.rep.Errors, fmt.Sprintf("%s, %s, %s, repetition %d: %v", k.suite, k.name, s.name, rep+1, err))
		return
	}
	for _, m := range metrics(k, out) {
		r.rep.Add(r.row(k, report.Row{Metric: m}), s.name, rep, out[m])
	}
	text := r.text(k, out)
	r.rep.Noise(k.suite, k.name, s.name, others)
	if others > 0.1 {
		text += fmt.Sprintf("  (others: %.1f processors)", others)
	}
	r.progress("%s%s", label, text)
}

// await waits until others use little of the machine, at most as long as the user has patience.
func (r *runner) await(ctx context.Context) {
	const window = 250 * time.Millisecond
	for end := time.Now().Add(r.patience); time.Now().Before(end) && ctx.Err() == nil; {
		before, began := r.foreign(), time.Now()
		settle(ctx, window)
		if (r.foreign()-before).Seconds()/time.Since(began).Seconds() < quiet {
			return
		}
	}
}

// text is the first few figures of an outcome.
func (r *runner) text(k kase, out outcome) string {
	text := ""
	for _, m := range metrics(k, out) {
		if len(text) < 60 {
			text += "  " + m + " " + report.Number(out[m])
		}
	}
	return text
}

// metrics lists what a measurement found, those that the case declares first, the others by name.
func metrics(k kase, out outcome) []string {
	var ms []string
	for _, w := range k.rows {
		if _, ok := out[w.Metric]; ok {
			ms = append(ms, w.Metric)
		}
	}
	declared := len(ms)
	for m := range out {
		if !slices.Contains(ms[:declared], m) {
			ms = append(ms, m)
		}
	}
	slices.Sort(ms[declared:])
	return ms
}

// foreign is the CPU time of everything that is not ours; only differences mean something. Errors read as no load.
func (r *runner) foreign() time.Duration {
	all, err := r.proc.All()
	if err != nil {
		return 0
	}
	return proc.Foreign(all, os.Getpid())
}
