package main

import (
	"context"
	"fmt"
	"time"

	"ztun/test/bench/proc"
	"ztun/test/bench/report"
	"ztun/test/lab"
	"ztun/test/load"
)

// paths are the subjects of the suites that run from node to node in the shared worlds, the base first. The paths are
// looked up when a measurement runs: the plan is made without a world.
func (b *bench) paths(run func(ctx context.Context, p path) (outcome, error)) []subject {
	return b.over(func(w *world) path { return w.bare }, func(w *world) path { return w.ztun }, run)
}

// over is paths for any two paths of a world.
func (b *bench) over(bare, ztun func(*world) path, run func(ctx context.Context, p path) (outcome, error)) []subject {
	s := []subject{{bareVeth, func(ctx context.Context, _ int) (outcome, error) { return run(ctx, bare(b.worlds[0])) }}}
	for i, v := range b.variants() {
		s = append(s, subject{v.name, func(ctx context.Context, _ int) (outcome, error) {
			p := ztun(b.worlds[i])
			if err := p.alive(); err != nil {
				return nil, p.explain(err)
			}
			o, err := run(ctx, p)
			return o, p.explain(err)
		}})
	}
	return s
}

// dirs in the words of ztload and of the table.
func dirs() []string { return []string{"up", "down"} }

// streamsText is "1 stream" or "8 streams".
func streamsText(n int) string {
	if n == 1 {
		return "1 stream"
	}
	return fmt.Sprintf("%d streams", n)
}

// meshCases are bulk transfers over both paths. Targets and references: issue 3 and design.md section 7.
func (b *bench) meshCases() []kase {
	var ks []kase
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			ref, cpu := "0.2x", "2.4-2.8"
			if streams == 8 {
				ref, cpu = "0.18x", "2.9-3.3"
			}
			ks = append(ks, kase{
				suite: "mesh", name: streamsText(streams) + " " + dir, lasts: b.length() + 100*time.Millisecond,
				rows: []report.Row{
					{Metric: "throughput", Unit: "Gb/s", Subject: ztunName, Reference: ref,
						Target: &report.Target{OfRatio: true, Value: 0.2}},
					{Metric: "CPU-s/GB, both daemons", Subject: ztunName, Reference: cpu},
					{Metric: "CPU-s/GB, n1"}, {Metric: "CPU-s/GB, n2"}, {Metric: "CPU-s/GB, all"},
				},
				subjects: b.paths(b.transfer(streams, dir)), profile: b.ofDaemons,
			})
		}
	}
	return ks
}

// localCases are bulk transfers and new connections between two pods of one node. Targets: 3x the throughput of
// ztunnel, 0.4x its CPU per GB, 2x its connection rate, with the references of ztunnel on another such machine.
func (b *bench) localCases() []kase {
	over := func(run func(ctx context.Context, p path) (outcome, error)) []subject {
		return b.over(func(w *world) path { return w.barePass }, func(w *world) path { return w.ztunLocal }, run)
	}
	var ks []kase
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			ks = append(ks, kase{
				suite: "local", name: "local, " + streamsText(streams) + " " + dir, lasts: b.length() + 100*time.Millisecond,
				rows: []report.Row{
					{Metric: "throughput", Unit: "Gb/s", Subject: ztunName, Reference: "3.4-3.6 (ztunnel)",
						Target: &report.Target{Value: 10.5}},
					{Metric: "CPU-s/GB, both daemons", Subject: ztunName, Reference: "2.4-3.0 (ztunnel)",
						Target: &report.Target{AtMost: true, Value: 1.1}},
					{Metric: "CPU-s/GB, n1"}, {Metric: "CPU-s/GB, all"},
				},
				subjects: over(b.transfer(streams, dir)), profile: b.ofDaemons,
			})
		}
	}
	for _, par := range []int{16, 1} {
		rate := report.Row{Metric: "rate", Unit: "per s", Subject: ztunName, Reference: "3450 (ztunnel, 2 nodes)",
			Target: &report.Target{Value: 6900}}
		if par == 1 {
			rate.Reference, rate.Target = "1290 (ztunnel, 2 nodes)", &report.Target{Value: 2580}
		}
		ks = append(ks, kase{
			suite: "local", name: fmt.Sprintf("local, %d at a time", par), lasts: b.length() + 300*time.Millisecond,
			rows:     append([]report.Row{rate}, connsRows()...),
			subjects: over(b.newConnections(par)), profile: b.ofDaemons,
		})
	}
	return ks
}

// ofDaemons lets --profile look into the daemons.
func (b *bench) ofDaemons() (string, []target) { return ztunName, targets(b.worlds[0].ztun.daemons) }

// transfer measures streams in one direction over a path of the shared world.
func (b *bench) transfer(streams int, dir string) func(ctx context.Context, p path) (outcome, error) {
	return func(ctx context.Context, p path) (outcome, error) {
		return watched(ctx, targets(p.daemons), lab.StatsPort, []*lab.NS{p.client.ns, p.lab.N1.NS, p.lab.N2.NS, p.server.ns},
			func() (outcome, error) {
				return b.meter(p, func() (float64, outcome, error) {
					r, err := b.bulk(ctx, p.lab, p.client, p.server, streams, dir, b.length())
					if err != nil {
						return 0, nil, err
					}
					return float64(r.Bytes) / 1e9, outcome{"throughput": r.Gbps}, nil
				})
			})
	}
}

// meter adds the CPU time per GB of the path's daemons, and of everything that the transfer cost (kernel and
// generators included, foreign processes not), to what a transfer found.
func (b *bench) meter(p path, transfer func() (gigabytes float64, o outcome, err error)) (outcome, error) {
	before, err := b.cpu(p)
	if err != nil {
		return nil, err
	}
	others := b.r.foreign()
	all, err := b.r.proc.CPUTimes()
	if err != nil {
		return nil, err
	}
	gb, o, err := transfer()
	if err != nil {
		return nil, err
	}
	allAfter, err := b.r.proc.CPUTimes()
	if err != nil {
		return nil, err
	}
	after, err := b.cpu(p)
	if err != nil {
		return nil, err
	}
	o["CPU-s/GB, all"] = max(0, allAfter.Sub(all).Busy-(b.r.foreign()-others)).Seconds() / gb
	var both time.Duration
	for i, d := range p.daemons {
		spent := after[i].CPU - before[i].CPU
		both += spent
		o["CPU-s/GB, "+d.Node.Name] = spent.Seconds() / gb
	}
	if len(p.daemons) > 0 {
		o["CPU-s/GB, both daemons"] = both.Seconds() / gb
	}
	return o, nil
}

func (b *bench) cpu(p path) ([]proc.Stat, error) {
	var out []proc.Stat
	for _, d := range p.daemons {
		st, err := b.r.proc.Stat(d.Pid())
		if err != nil {
			return nil, fmt.Errorf("the daemon of %s: %w", d.Node.Name, err)
		}
		out = append(out, st)
	}
	return out, nil
}

// connsCases are new connections over a warm tunnel.
func (b *bench) connsCases() []kase {
	var ks []kase
	for _, par := range []int{16, 1} {
		rate := report.Row{Metric: "rate", Unit: "per s", Subject: ztunName, Reference: "0.34x"}
		p50 := report.Row{Metric: "p50", Unit: "ms", Subject: ztunName}
		switch par {
		case 16:
			rate.Target = &report.Target{OfRatio: true, Value: 0.35}
		case 1:
			rate.Reference = "0.27x"
			p50.Target, p50.Reference = &report.Target{OfRatio: true, AtMost: true, Value: 4}, "3.7x (0.9)"
		}
		ks = append(ks, kase{
			suite: "conns", name: fmt.Sprintf("%d at a time", par), lasts: b.length() + 300*time.Millisecond,
			profile:  b.ofDaemons,
			rows:     append([]report.Row{rate, p50}, connsRows()...),
			subjects: b.paths(b.newConnections(par)),
		})
	}
	return ks
}

// connsRows are the metrics of new connections that have no targets.
func connsRows() []report.Row {
	return []report.Row{{Metric: "p99", Unit: "ms"}, {Metric: "failed", Unit: "of 1000"},
		{Metric: "CPU-ms, both daemons", Unit: "each"}}
}

// newConnections measures connections, par at a time, over a path of the shared world.
func (b *bench) newConnections(par int) func(ctx context.Context, p path) (outcome, error) {
	return func(ctx context.Context, p path) (outcome, error) {
		// The first connections pay for the tunnel; they are not counted.
		if _, err := b.rate(ctx, p.lab, p.client, p.server, par, 200*time.Millisecond); err != nil {
			return nil, err
		}
		before, err := b.cpu(p)
		if err != nil {
			return nil, err
		}
		r, err := b.rate(ctx, p.lab, p.client, p.server, par, b.length())
		if err != nil {
			return nil, err
		}
		after, err := b.cpu(p)
		if err != nil {
			return nil, err
		}
		o := outcome{"rate": r.PerSecond, "p50": r.Latency.P50, "p99": r.Latency.P99,
			"failed": 1000 * float64(r.Failed) / float64(r.N)}
		var spent time.Duration
		for i := range after {
			spent += after[i].CPU - before[i].CPU
		}
		if len(after) > 0 {
			o["CPU-ms, both daemons"] = spent.Seconds() * 1000 / float64(r.N)
		}
		return o, nil
	}
}

// echoConns is over how many connections the requests are spread.
const echoConns = 8

// echoCases are requests at fixed rates without other traffic.
func (b *bench) echoCases() []kase {
	var ks []kase
	for _, perSecond := range b.o.Rates {
		ref := [3]string{}
		if perSecond == 4000 {
			ref = [3]string{"1.3x (0.96)", "1.6x (12)", ""}
		}
		ks = append(ks, kase{
			suite: "echo", name: fmt.Sprintf("%d per s, %d connections", perSecond, echoConns), lasts: b.length() +
				300*time.Millisecond,
			rows:     latencyRows(ref, nil),
			subjects: b.paths(b.echoes(perSecond)),
		})
	}
	return ks
}

// echoes measures requests at a rate over a path.
func (b *bench) echoes(perSecond int) func(ctx context.Context, p path) (outcome, error) {
	return func(ctx context.Context, p path) (outcome, error) {
		r, err := b.echo(ctx, p.lab, p.client, p.server, echoConns, perSecond, b.length())
		if err != nil {
			return nil, err
		}
		return latencies(r), nil
	}
}

func latencyRows(ref [3]string, p50 *report.Target) []report.Row {
	return []report.Row{
		{Metric: "p50", Unit: "ms", Subject: ztunName, Reference: ref[0], Target: p50},
		{Metric: "p99", Unit: "ms", Subject: ztunName, Reference: ref[1]},
		{Metric: "p99.9", Unit: "ms", Subject: ztunName, Reference: ref[2]},
		{Metric: "answered", Unit: "per s"},
		{Metric: "sent late", Unit: "%"}, // by the client itself, more than 1 ms: how far the generator kept up
	}
}

// latencies adds requests without an answer only where there are some.
func latencies(r *load.EchoResult) outcome {
	o := outcome{"p50": r.Latency.P50, "p99": r.Latency.P99, "p99.9": r.Latency.P999, "answered": r.Rate}
	if r.Lost > 0 {
		o["lost"] = float64(r.Lost)
	}
	if r.Sent > 0 {
		o["sent late"] = 100 * float64(r.Late) / float64(r.Sent)
	}
	return o
}

// mixedCases are the same requests at 500/s beside 8 bulk streams between the same two pods.
func (b *bench) mixedCases() []kase {
	const perSecond, streams = 500, 8
	var ks []kase
	for _, dir := range dirs() {
		rows := latencyRows([3]string{"47-53", "87-112", ""}, &report.Target{AtMost: true, Value: 10})
		rows = append(rows, report.Row{Metric: "bulk meanwhile", Unit: "Gb/s"})
		ks = append(ks, kase{
			suite: "mixed", name: fmt.Sprintf("%d per s, bulk %s", perSecond, dir), lasts: b.length() + 2*time.Second,
			rows: rows, profile: b.ofDaemons,
			subjects: b.paths(func(ctx context.Context, p path) (outcome, error) {
				ctx, cancel := context.WithCancel(ctx)
				defer cancel()
				type result struct {
					r   *load.BulkResult
					err error
				}
				done := make(chan result, 1)
				go func() {
					// Longer than the echo on both sides, so that no request is measured without the bulk.
					r, err := b.bulk(ctx, p.lab, p.client, p.server, streams, dir, b.length()+1500*time.Millisecond)
					done <- result{r, err}
				}()
				settle(ctx, 700*time.Millisecond)
				e, err := b.echo(ctx, p.lab, p.client, p.server, echoConns, perSecond, b.length())
				if err != nil {
					cancel()
				}
				bulk := <-done
				if err != nil {
					return nil, err
				}
				if bulk.err != nil {
					return nil, fmt.Errorf("bulk: %w", bulk.err)
				}
				o := latencies(e)
				o["bulk meanwhile"] = bulk.r.Gbps
				return o, nil
			}),
		})
	}
	return ks
}
