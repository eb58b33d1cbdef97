package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ztun/test/bench/report"
	"ztun/test/lab"
)

// idleSettles is when daemons are what idle ones are: directions rest after 2 to 4 s, and memory is returned after 3
// idle seconds and after 6.
const idleSettles = 10 * time.Second

// idleCases measure memory: of fresh daemons that have carried nothing, and with connections that are open and
// silent. Each repetition has a world of its own, because a daemon that has worked before holds memory that has
// nothing to do with the question.
func (b *bench) idleCases() []kase {
	n := b.o.Idle
	k := kase{
		suite: "idle", name: fmt.Sprintf("%d connections", n), lasts: 30*time.Second + time.Duration(n)*2*time.Millisecond,
		rows: []report.Row{
			{Metric: "RSS fresh, n1", Unit: "MiB", Subject: ztunName, Reference: "20"},
			{Metric: "RSS fresh, n2", Unit: "MiB", Subject: ztunName, Reference: "20"},
			{Metric: "RSS with them, n1", Unit: "MiB"},
			{Metric: "RSS with them, n2", Unit: "MiB"},
			{Metric: "each, n1", Unit: "KiB", Subject: ztunName, Reference: "4",
				Target: &report.Target{AtMost: true, Value: 24}},
			{Metric: "each, n2", Unit: "KiB", Subject: ztunName, Reference: "4",
				Target: &report.Target{AtMost: true, Value: 24}},
			{Metric: "each after a GC, n1", Unit: "KiB"},
			{Metric: "each after a GC, n2", Unit: "KiB"},
			{Metric: "CPU with them, n1", Unit: "%"}, {Metric: "CPU with them, n2", Unit: "%"},
			{Metric: "goroutines each, n1"}, {Metric: "goroutines each, n2"},
			{Metric: "kernel objects, each", Unit: "KiB"},
			{Metric: "RSS 3 s after closing, n1", Unit: "MiB"},
			{Metric: "RSS 3 s after closing, n2", Unit: "MiB"},
			{Metric: "open them", Unit: "s"},
		},
		subjects: []subject{{bareVeth, func(ctx context.Context, _ int) (outcome, error) {
			return b.idleMemory(ctx, variant{}, false)
		}}},
	}
	for _, v := range b.variants() {
		k.subjects = append(k.subjects, subject{v.name, func(ctx context.Context, rep int) (outcome, error) {
			return b.idleMemory(ctx, v, b.o.Profile != "" && v.name == ztunName && rep == b.o.Reps-1)
		}})
	}
	return []kase{k}
}

const mib, kib = 1 << 20, 1 << 10

// idleMemory is one repetition. With heap it also takes heap profiles, after all else is known.
func (b *bench) idleMemory(ctx context.Context, v variant, heap bool) (_ outcome, err error) {
	w, err := b.newWorld(ctx, v)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	p := w.bare
	if v.name != "" {
		p = w.ztun
	}
	if err := b.serve(ctx, w.lab, p.server); err != nil {
		return nil, err
	}
	settle(ctx, idleSettles)
	o, n := outcome{}, float64(b.o.Idle)
	rss := func() ([]float64, error) {
		out := make([]float64, len(p.daemons))
		for i, d := range p.daemons {
			m, err := b.r.proc.Mem(d.Pid())
			if err != nil {
				return nil, errors.Join(err, p.alive())
			}
			out[i] = float64(m.RSS)
		}
		return out, ctx.Err()
	}
	note := func(metric string, unit float64, vs []float64, minus []float64) {
		for i, d := range p.daemons {
			v := vs[i]
			if minus != nil {
				v -= minus[i]
			}
			o[metric+", "+d.Node.Name] = v / unit
		}
	}
	fresh, err := rss()
	if err != nil {
		return nil, err
	}
	goroutines := countGoroutines(ctx, p.daemons)
	slab, began := b.r.proc.Slab(), time.Now()
	note("RSS fresh", mib, fresh, nil)
	err = b.idle(ctx, w.lab, p.client, p.server, b.o.Idle, func() error {
		o["open them"] = time.Since(began).Seconds()
		settle(ctx, idleSettles)
		busy, since := make([]time.Duration, len(p.daemons)), time.Now()
		for i, d := range p.daemons {
			if st, err := b.r.proc.Stat(d.Pid()); err == nil {
				busy[i] = st.CPU
			}
		}
		settle(ctx, 2*time.Second)
		for i, d := range p.daemons {
			if st, err := b.r.proc.Stat(d.Pid()); err == nil {
				o["CPU with them, "+d.Node.Name] = 100 * (st.CPU - busy[i]).Seconds() / time.Since(since).Seconds()
			}
		}
		full, err := rss()
		if err != nil {
			return err
		}
		o["kernel objects, each"] = float64(b.r.proc.Slab()-slab) / kib / n
		note("RSS with them", mib, full, nil)
		note("each", kib*n, full, fresh)
		for _, d := range p.daemons {
			// Go's own handler collects the garbage first when it is asked; where it is not there we leave the row out.
			if _, err := get(ctx, target{d.Node.Name, d.Node.NS}, "/debug/pprof/heap?gc=1", 0); err != nil {
				return nil
			}
		}
		settle(ctx, 2*time.Second) // the runtime gives pages back in the background
		if full, err = rss(); err != nil {
			return err
		}
		note("each after a GC", kib*n, full, fresh)
		if !heap {
			return nil
		}
		// Last, because profiles of 10,000 goroutines need memory of their own.
		for i, g := range countGoroutines(ctx, p.daemons) {
			if g > 0 && goroutines[i] > 0 {
				o["goroutines each, "+p.daemons[i].Node.Name] = float64(g-goroutines[i]) / n
			}
		}
		ps, err := heapProfiles(ctx, b.o.Profile, "idle "+fmt.Sprint(b.o.Idle)+" connections", targets(p.daemons))
		b.r.rep.Profiles = append(b.r.rep.Profiles, ps...)
		return err
	})
	if err != nil {
		return nil, p.explain(err)
	}
	settle(ctx, 3*time.Second)
	after, err := rss()
	if err != nil {
		return nil, err
	}
	note("RSS 3 s after closing", mib, after, nil)
	return o, nil
}

// countGoroutines asks each daemon; 0 where it does not say.
func countGoroutines(ctx context.Context, ds []*lab.Daemon) []int {
	out := make([]int, len(ds))
	for i, t := range targets(ds) {
		body, err := get(ctx, t, "/debug/pprof/goroutine?debug=1", 0)
		if err != nil {
			continue
		}
		// The first line of the text form: "goroutine profile: total 42".
		if n, _ := fmt.Sscanf(string(body[:min(len(body), 100)]), "goroutine profile: total %d", &out[i]); n != 1 {
			out[i] = 0
		}
	}
	return out
}
