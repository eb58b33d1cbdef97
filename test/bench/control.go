package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"ztun/test/bench/report"
	"ztun/test/lab"
	"ztun/test/load"
)

// The subjects of the control suite.
const (
	calm   = "calm"
	stormy = "storm"
)

// The pace of the measured work: few enough that the machine has most of its time left.
const (
	echoRate  = 500 // requests per second
	connRate  = 50  // new connections per second
	probeRate = 10  // questions to 15020 and to 15021 per second, each
)

// controlWorld is two nodes that know a big mesh, with a pod each.
type controlWorld struct {
	lab    *lab.World
	source source
	path   path
}

// Close takes the world down; none is no error.
func (w *controlWorld) Close() error {
	if w == nil {
		return nil
	}
	err := w.lab.Close()
	if w.source != nil {
		w.source.close()
	}
	return err
}

// controlCases: what a big mesh costs, and what the admin side's work does to the data plane.
func (b *bench) controlCases() []kase {
	if b.o.NoDaemon {
		return nil
	}
	atMost := func(v float64) *report.Target { return &report.Target{AtMost: true, Value: v} }
	ratio := &report.Target{AtMost: true, OfRatio: true, Value: 1.1}
	ks := []kase{{
		suite: "control", name: "ingest, cold start", lasts: 60 * time.Second,
		rows: []report.Row{
			{Metric: "ready after", Unit: "s", Subject: ztunName},
			{Metric: "CPU until ready", Unit: "s", Subject: ztunName, Target: atMost(4), Reference: "3.8"},
			{Metric: "peak RSS", Unit: "MiB", Subject: ztunName},
			{Metric: "RSS at rest", Unit: "MiB", Subject: ztunName, Reference: "177"},
			{Metric: "heap at rest", Unit: "MiB", Subject: ztunName},
			{Metric: "RSS per workload at rest", Unit: "bytes", Subject: ztunName, Target: atMost(1024), Reference: "1640"},
		},
		subjects: []subject{{ztunName, func(ctx context.Context, _ int) (outcome, error) { return b.ingest(ctx) }}},
	}, {
		suite: "control", name: "one update", lasts: 20 * time.Second,
		rows: []report.Row{
			{Metric: "visible after, p50", Unit: "ms", Subject: ztunName},
			{Metric: "visible after, p99", Unit: "ms", Subject: ztunName, Target: atMost(5)},
			{Metric: "visible after, max", Unit: "ms", Subject: ztunName},
			{Metric: "garbage", Unit: "KiB", Subject: ztunName},
		},
		subjects: []subject{{ztunName, func(ctx context.Context, _ int) (outcome, error) { return b.oneUpdate(ctx) }}},
	}, {
		suite: "control", name: "one dump", lasts: 40 * time.Second,
		rows: []report.Row{
			{Metric: "takes", Unit: "s", Subject: ztunName, Target: atMost(5), Reference: "4.6-5.6"},
			{Metric: "size", Unit: "MiB", Subject: ztunName},
			{Metric: "RSS grows by", Unit: "MiB", Subject: ztunName, Target: atMost(64), Reference: "538-1000"},
		},
		subjects: []subject{{ztunName, func(ctx context.Context, _ int) (outcome, error) { return b.oneDump(ctx) }}},
	}}
	for _, k := range []struct {
		name string
		bulk bool
	}{{"isolation, light load", false}, {"isolation, saturated", true}} {
		rows := []report.Row{
			{Metric: "echo p50", Unit: "ms"},
			{Metric: "echo p99", Unit: "ms", Subject: stormy, Target: ratio},
			{Metric: "echo p99.9", Unit: "ms"},
			{Metric: "connect p50", Unit: "ms"},
			{Metric: "connect p99", Unit: "ms", Subject: stormy, Target: ratio, Reference: "3900-4300"},
			{Metric: "connect p99.9", Unit: "ms"},
			{Metric: "15021 p50", Unit: "ms"},
			{Metric: "15021 p99", Unit: "ms", Subject: stormy, Target: atMost(50), Reference: "3700"},
			{Metric: "15020 p50", Unit: "ms"},
			{Metric: "15020 p99", Unit: "ms", Subject: stormy, Target: atMost(50), Reference: "4200"},
			{Metric: "bulk meanwhile", Unit: "Gb/s"},
			{Metric: "dumps", Unit: "per s"},
			{Metric: "one dump p50", Unit: "ms"},
			{Metric: "one dump max", Unit: "ms"},
			{Metric: "scrapes", Unit: "per s"},
			{Metric: "updates", Unit: "per s"},
			{Metric: "RSS grows by", Unit: "MiB", Subject: stormy, Target: atMost(64)},
			{Metric: "CPU, n1", Unit: "%"},
		}
		if k.bulk { // with the processors taken by bulk, it is 15020 and 15021 that matter
			rows[1].Target, rows[4].Target = nil, nil
		}
		run := func(storm bool) func(context.Context, int) (outcome, error) {
			return func(ctx context.Context, _ int) (outcome, error) {
				w, err := b.controlWorld(ctx)
				if err != nil {
					return nil, err
				}
				o, err := b.isolation(ctx, w, storm, k.bulk)
				return o, w.path.explain(err)
			}
		}
		ks = append(ks, kase{
			suite: "control", name: k.name, rows: rows, lasts: b.length() + 30*time.Second, // the first one makes the world
			subjects: []subject{{calm, run(false)}, {stormy, run(true)}},
			profile:  func() (string, []target) { return stormy, targets(b.ctl.path.daemons[:1]) },
		})
	}
	return ks
}

// controlWorld makes the world of the isolation cases when the first of them needs it.
func (b *bench) controlWorld(ctx context.Context) (*controlWorld, error) {
	if b.ctl != nil {
		return b.ctl, b.ctl.path.alive()
	}
	b.progress("building a world: two nodes that know %d workloads, a pod each", b.o.Workloads)
	w, err := b.newControlWorld(ctx, true)
	if err != nil {
		return nil, err
	}
	b.ctl = w
	return w, nil
}

// newControlWorld makes nodes, the mesh and its source; with daemons also the pods, attached and warm.
func (b *bench) newControlWorld(ctx context.Context, daemons bool) (_ *controlWorld, err error) {
	w := &controlWorld{}
	if w.lab, err = lab.New(lab.Options{Prefix: "ztc", Bin: b.tool("ztun"), Logf: b.logf}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	a, err := w.lab.AddPod(w.lab.N1, lab.Pod{Name: "a"})
	if err != nil {
		return nil, err
	}
	p, err := w.lab.AddPod(w.lab.N2, lab.Pod{Name: "b"})
	if err != nil {
		return nil, err
	}
	m := &bigMesh{workloads: b.o.Workloads, services: b.o.Services, real: w.lab.DefaultWorld()}
	if w.source, err = b.newSource(w.lab, m); err != nil {
		return nil, err
	}
	w.path = path{name: ztunName, lab: w.lab, client: b.end(a.NS, a.IPs), server: b.end(p.NS, p.IPs)}
	if !daemons {
		return w, nil
	}
	for _, n := range w.lab.Nodes() {
		d, err := b.startControl(ctx, w, n, w.source)
		if err != nil {
			return nil, err
		}
		w.path.daemons = append(w.path.daemons, d)
	}
	for _, pod := range []*lab.Pod{a, p} {
		if err := w.lab.Attach(ctx, pod); err != nil {
			return nil, fmt.Errorf("attach pod %s: %w", pod.Name, err)
		}
	}
	if err := b.serve(ctx, w.lab, w.path.server); err != nil {
		return nil, err
	}
	// The tunnel, the certificates, and the daemons' garbage of the ingest.
	if _, err := b.rate(ctx, w.lab, w.path.client, w.path.server, 4, 300*time.Millisecond); err != nil {
		return nil, w.path.explain(err)
	}
	settle(ctx, 8*time.Second)
	return w, nil
}

// startControl starts the daemon of a node with a source (nil: the world's own small file) and waits until it knows
// the mesh.
func (b *bench) startControl(ctx context.Context, w *controlWorld, n *lab.Node, s source) (*lab.Daemon, error) {
	env := map[string]string{"RUST_LOG": "warn"}
	for _, kv := range b.o.Env {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	if s != nil {
		more, err := s.offer(n)
		if err != nil {
			return nil, err
		}
		for k, v := range more {
			env[k] = v
		}
	}
	// It is ready when it has read the file, or has everything of the control plane.
	d, err := w.lab.StartDaemon(ctx, n, lab.DaemonOptions{Env: env, ReadyWait: 2 * time.Minute})
	if err == nil && s != nil {
		err = s.err()
	}
	return d, err
}

// atRest waits until the daemon has given back what the work before had left: it does so after seconds of doing
// nothing.
func (b *bench) atRest(ctx context.Context, d *lab.Daemon) (rss, heap float64, err error) {
	settle(ctx, 9*time.Second)
	m, err := b.r.proc.Mem(d.Pid())
	if err != nil {
		return 0, 0, err
	}
	x, err := d.Metrics(ctx)
	if err != nil {
		return 0, 0, err
	}
	return float64(m.RSS), x.Sum("go_memstats_heap_alloc_bytes"), nil
}

// ingest starts a daemon that knows only its world, for comparison, and one that has to learn the big mesh.
func (b *bench) ingest(ctx context.Context) (_ outcome, err error) {
	w, err := b.newControlWorld(ctx, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	small, err := b.startControl(ctx, w, w.lab.N2, nil) // before the big mesh is offered
	if err != nil {
		return nil, err
	}
	smallRSS, _, err := b.atRest(ctx, small)
	if err != nil {
		return nil, err
	}
	if _, err := small.Stop(10 * time.Second); err != nil {
		return nil, err
	}
	if _, err := w.source.offer(w.lab.N2); err != nil { // making the mesh is no part of the figure
		return nil, err
	}
	start := time.Now()
	d, err := b.startControl(ctx, w, w.lab.N1, w.source)
	if err != nil {
		return nil, err
	}
	o := outcome{"ready after": time.Since(start).Seconds()}
	st, err := b.r.proc.Stat(d.Pid())
	if err != nil {
		return nil, err
	}
	o["CPU until ready"] = st.CPU.Seconds()
	rss, heap, err := b.atRest(ctx, d)
	if err != nil {
		return nil, err
	}
	mem, err := b.r.proc.Mem(d.Pid())
	if err != nil {
		return nil, err
	}
	after, err := b.r.proc.Stat(d.Pid())
	if err != nil {
		return nil, err
	}
	o["CPU afterwards"] = (after.CPU - st.CPU).Seconds()
	o["peak RSS"], o["RSS at rest"], o["heap at rest"] = float64(mem.Peak)/mib, rss/mib, heap/mib
	o["RSS per workload at rest"] = (rss - smallRSS) / float64(b.o.Workloads)
	return o, nil
}

// oneDump is a dump on a daemon that does nothing else.
func (b *bench) oneDump(ctx context.Context) (outcome, error) {
	w, err := b.controlWorld(ctx)
	if err != nil {
		return nil, err
	}
	settle(ctx, time.Second)
	stop := b.watchRSS(ctx, w.path.daemons[0])
	var r probeResult
	err = b.probe(ctx, w, w.lab.N1.NS, &r, "http", "-url", fmt.Sprintf("http://127.0.0.1:%d/config_dump", lab.AdminPort),
		"-t", "1ms")
	grown, rssErr := stop()
	if err = errors.Join(err, rssErr); err != nil {
		return nil, w.path.explain(err)
	}
	return outcome{"takes": r.Latency.Max / 1000, "size": float64(r.Bytes) / mib, "RSS grows by": grown / mib}, nil
}

// isolation measures requests, new connections and questions for health and metrics, all at once, with or without a
// storm at node n1 and bulk streams between the pods.
func (b *bench) isolation(ctx context.Context, w *controlWorld, storm, bulk bool) (outcome, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all together
	d := b.length()
	whole := d + 1500*time.Millisecond // what goes on beside the measured work begins before it and ends after it
	o := outcome{}
	if bulk {
		all.start(cancel, func() error {
			r, err := b.bulk(ctx, w.lab, w.path.client, w.path.server, 8, "up", whole)
			if err == nil {
				all.note(o, "bulk meanwhile", r.Gbps)
			}
			return err
		})
	}
	if storm {
		b.storm(ctx, cancel, &all, w, o, whole)
	}
	settle(ctx, 700*time.Millisecond)
	before, err := b.cpu(w.path)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	all.start(cancel, func() error {
		r, err := b.echo(ctx, w.lab, w.path.client, w.path.server, echoConns, echoRate, d)
		if err == nil {
			all.note(o, "echo p50", r.Latency.P50, "echo p99", r.Latency.P99, "echo p99.9", r.Latency.P999)
			if r.Lost > 0 {
				all.note(o, "echo lost", float64(r.Lost))
			}
		}
		return err
	})
	all.start(cancel, func() error {
		var r probeResult
		err := b.probe(ctx, w, w.path.client.ns, &r, "conns", "-to", at(w.path.server.ip, bytePort), "-rate",
			fmt.Sprint(connRate), "-t", d.String())
		all.note(o, "connect p50", r.Latency.P50, "connect p99", r.Latency.P99, "connect p99.9", r.Latency.P999)
		return err
	})
	for port, page := range map[int]string{lab.StatsPort: "/metrics", lab.ReadyPort: "/healthz/ready"} {
		all.start(cancel, func() error {
			var r probeResult
			err := b.probe(ctx, w, w.lab.N1.NS, &r, "http", "-url", fmt.Sprintf("http://127.0.0.1:%d%s", port, page), "-rate",
				fmt.Sprint(probeRate), "-t", d.String())
			all.note(o, fmt.Sprintf("%d p50", port), r.Latency.P50, fmt.Sprintf("%d p99", port), r.Latency.P99)
			return err
		})
	}
	err = all.wait()
	after, cpuErr := b.cpu(w.path)
	if err = errors.Join(err, cpuErr); err != nil {
		return nil, err
	}
	o["CPU, n1"] = 100 * (after[0].CPU - before[0].CPU).Seconds() / time.Since(began).Seconds()
	return o, nil
}

// probeResult is what ztprobe prints.
type probeResult struct {
	Latency load.Latency `json:"latency"`
	Asked   int          `json:"asked"`
	Failed  int          `json:"failed"`
	Errors  []string     `json:"errors"`
	Bytes   int64        `json:"bytes"`
	Skipped int          `json:"skipped"`
	Seconds float64      `json:"seconds"`
}
