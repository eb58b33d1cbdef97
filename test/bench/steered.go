package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ztun/test/bench/report"
	"ztun/test/lab"
)

// ways are how the steered suite's pods are captured: a subject each, by ZTUN_STEERING.
func ways() []struct{ subject, steering string } {
	return []struct{ subject, steering string }{
		{isolatedName, "isolated"}, {sandwichName, "steered"}, {redirectedName, "redirected"}}
}

const (
	isolatedName   = "isolated"
	sandwichName   = "sandwich"
	redirectedName = "redirected"
)

// eth0 gives a pod the device that a CNI would, and what its way of being captured wants beside it.
func eth0(ctx context.Context, w *lab.World, p *lab.Pod, steering string) error {
	if steering == "" || steering == "isolated" {
		return nil
	}
	if err := w.CNI(ctx, p, true, 1500); err != nil {
		return err
	}
	if steering != "redirected" {
		return nil
	}
	for _, c := range lab.IstioRules(true) {
		if _, err := w.Run(ctx, p.NS, c...); err != nil {
			return fmt.Errorf("istio-cni's rules: %w", err)
		}
	}
	return nil
}

// steeredWorlds makes one for each way of each variant, or one without any.
func (b *bench) steeredWorlds(ctx context.Context) error {
	var vs []variant
	for _, v := range b.variants() {
		for _, way := range ways() {
			one := variant{name: way.subject, bin: v.bin, env: v.env, steering: way.steering}
			if v.name != ztunName {
				one.name = "other " + one.name
			}
			vs = append(vs, one)
		}
	}
	if len(vs) == 0 {
		vs = []variant{{}}
	}
	for _, v := range vs {
		b.progress("building a world: %s", v.name)
		w, err := b.newWorld(ctx, v)
		if err != nil {
			return err
		}
		b.steered = append(b.steered, w)
		for _, e := range w.servers() {
			if err := b.serve(ctx, w.lab, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// steeredCases compare the ways of capturing a pod, from node to node. Targets: the sandwich at least 0.9 times as fast
// as an isolated pod; redirected 1.3 times ztunnel, which had 0.2 of bare veth, and its rate of connections.
func (b *bench) steeredCases(ctx context.Context) ([]kase, error) {
	if err := b.steeredWorlds(ctx); err != nil {
		return nil, err
	}
	over := func(run func(ctx context.Context, p path) (outcome, error)) []subject {
		s := []subject{{bareVeth, func(ctx context.Context, _ int) (outcome, error) { return run(ctx, b.steered[0].bare) }}}
		for _, w := range b.steered {
			if w.ztun.lab == nil {
				continue
			}
			s = append(s, subject{w.ztun.name, func(ctx context.Context, _ int) (outcome, error) {
				if err := w.ztun.alive(); err != nil {
					return nil, w.ztun.explain(err)
				}
				o, err := run(ctx, w.ztun)
				return o, w.ztun.explain(err)
			}})
		}
		return s
	}
	asFast := &report.Target{OfRatio: true, Value: 0.9, Versus: isolatedName}
	row := func(metric, unit, ztunnel string, redirected float64) report.Row {
		return report.Row{Metric: metric, Unit: unit, Subject: redirectedName, Reference: ztunnel,
			Target: &report.Target{OfRatio: true, Value: redirected}, Others: map[string]*report.Target{sandwichName: asFast}}
	}
	var ks []kase
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			ks = append(ks, kase{suite: "steered", name: "steered, " + streamsText(streams) + " " + dir,
				lasts: b.length() + 100*time.Millisecond, subjects: over(b.transfer(streams, dir)),
				rows: []report.Row{row("throughput", "Gb/s", "0.2x", 0.26), {Metric: "CPU-s/GB, both daemons"},
					{Metric: "CPU-s/GB, n1"}, {Metric: "CPU-s/GB, n2"}, {Metric: "CPU-s/GB, all"}},
				profile: b.ofSandwich})
		}
	}
	for _, c := range []struct {
		par   int
		ratio float64 // real ztunnel's
	}{{16, 0.34}, {1, 0.27}} {
		ks = append(ks, kase{suite: "steered", name: fmt.Sprintf("steered, %d at a time", c.par),
			lasts: b.length() + 300*time.Millisecond, subjects: over(b.newConnections(c.par)),
			rows: append([]report.Row{row("rate", "per s", fmt.Sprintf("%gx", c.ratio), c.ratio), {Metric: "p50", Unit: "ms"}},
				connsRows()...), profile: b.ofSandwich})
	}
	for _, perSecond := range b.o.Rates {
		rows := latencyRows([3]string{}, nil)
		rows[0].Others = map[string]*report.Target{
			sandwichName: {OfRatio: true, AtMost: true, Value: 1.1, Versus: isolatedName}}
		ks = append(ks, kase{suite: "steered", name: fmt.Sprintf("steered, echo %d per s", perSecond),
			lasts: b.length() + 300*time.Millisecond, rows: rows, profile: b.ofSandwich,
			subjects: over(b.echoes(perSecond))})
	}
	return ks, nil
}

// ofSandwich lets --profile look into the daemons of the sandwich.
func (b *bench) ofSandwich() (string, []target) {
	for _, w := range b.steered {
		if w.ztun.name == sandwichName {
			return sandwichName, targets(w.ztun.daemons)
		}
	}
	return "", nil
}

// letGo gives steered pods back: what is between them and the network is outside of the world.
func (w *world) letGo() error {
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, p := range w.attached {
		if p.Node.Daemon.Running() {
			errs = append(errs, w.lab.Detach(ctx, p))
		}
	}
	return errors.Join(errs...)
}
