package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztun/test/lab"
)

// end is where a program runs and the address at which the others reach it.
type end struct {
	ns *lab.NS
	ip netip.Addr
}

// path is a pair of ends and what lies between them.
type path struct {
	name           string // the subject's name in the table
	lab            *lab.World
	client, server end
	daemons        []*lab.Daemon // on the path, n1 first; none on the bare one
}

// The subjects of the suites that run in a world.
const (
	bareVeth = "bare veth"
	ztunName = "ztun"
	// otherName is the ztun of --versus and --versus-env.
	otherName = "other ztun"
)

// world is the laboratory with the two paths of the same hops: h1 - n1 - n2 - h2 and a - n1 - n2 - b. The passthrough
// paths end at h3, an uncaptured host on n1: h1 - n1 - h3 and a - n1 - h3. The local paths are those between two pods
// of n1, a - n1 - c, beside h1 - n1 - h3.
type world struct {
	lab       *lab.World
	bare      path
	ztun      path
	barePass  path
	ztunPass  path
	ztunLocal path
	attached  []*lab.Pod // with something outside of the world
}

// variant is a ztun to measure: normally the one that was just built, with --versus and --versus-env another one
// beside it.
type variant struct {
	name string   // the subject's name; "" for no ztun at all
	bin  string   // the program
	env  []string // K=V for its daemons
	// steering is how pods are captured (ZTUN_STEERING); "": as isolated ones
	steering string
}

// variants of this run, the main one first; none with --no-daemon.
func (b *bench) variants() []variant {
	if b.o.NoDaemon {
		return nil
	}
	vs := []variant{{name: ztunName, bin: b.tool("ztun"), env: b.o.Env}}
	if b.o.Versus != "" || len(b.o.VersusEnv) > 0 {
		v := variant{name: otherName, bin: b.tool("ztun"), env: append(slices.Clone(b.o.Env), b.o.VersusEnv...)}
		if b.o.Versus != "" {
			v.bin = b.o.Versus
		}
		vs = append(vs, v)
	}
	return vs
}

// sharedWorlds makes the worlds of the suites that do not bring their own: one for each variant, or one without any.
func (b *bench) sharedWorlds(ctx context.Context) error {
	vs := b.variants()
	if len(vs) == 0 {
		vs = []variant{{}}
	}
	for _, v := range vs {
		inhabitants := "two nodes, three hosts"
		if v.name != "" {
			inhabitants += ", three pods, two daemons"
		}
		b.progress("building a world: %s", inhabitants)
		w, err := b.newWorld(ctx, v)
		if err != nil {
			return err
		}
		b.worlds = append(b.worlds, w)
		for _, e := range w.servers() {
			if err := b.serve(ctx, w.lab, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// newWorld makes nodes and hosts, and for a ztun the pods and daemons. Close takes all of it down.
func (b *bench) newWorld(ctx context.Context, v variant) (_ *world, err error) {
	w := &world{}
	if w.lab, err = lab.New(lab.Options{Prefix: "ztb", Bin: v.bin, Logf: b.logf}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	h1, err := w.lab.AddHost(w.lab.N1, "h1")
	if err != nil {
		return nil, err
	}
	h2, err := w.lab.AddHost(w.lab.N2, "h2")
	if err != nil {
		return nil, err
	}
	h3, err := w.lab.AddHost(w.lab.N1, "h3")
	if err != nil {
		return nil, err
	}
	w.bare = path{name: bareVeth, lab: w.lab, client: b.end(h1.NS, h1.IPs), server: b.end(h2.NS, h2.IPs)}
	w.barePass = path{name: bareVeth, lab: w.lab, client: w.bare.client, server: b.end(h3.NS, h3.IPs)}
	if v.name == "" {
		return w, nil
	}
	a, err := w.lab.AddPod(w.lab.N1, lab.Pod{Name: "a"})
	if err != nil {
		return nil, err
	}
	p, err := w.lab.AddPod(w.lab.N2, lab.Pod{Name: "b"})
	if err != nil {
		return nil, err
	}
	c, err := w.lab.AddPod(w.lab.N1, lab.Pod{Name: "c"})
	if err != nil {
		return nil, err
	}
	env := map[string]string{"RUST_LOG": "warn"} // 7,000 access log lines a second would be a benchmark of the log
	for _, kv := range v.env {
		key, value, _ := strings.Cut(kv, "=")
		env[key] = value
	}
	if v.steering != "" {
		env["ZTUN_STEERING"], env["INPOD_ENABLED"] = v.steering, "false"
	}
	w.ztun = path{name: v.name, lab: w.lab, client: b.end(a.NS, a.IPs), server: b.end(p.NS, p.IPs)}
	for _, n := range w.lab.Nodes() {
		d, err := w.lab.StartDaemon(ctx, n, lab.DaemonOptions{Env: env})
		if err != nil {
			return nil, err
		}
		w.ztun.daemons = append(w.ztun.daemons, d)
	}
	for _, pod := range []*lab.Pod{a, p, c} {
		if err := eth0(ctx, w.lab, pod, v.steering); err != nil {
			return nil, err
		}
		if v.steering == "steered" {
			w.attached = append(w.attached, pod)
		}
		if err := w.lab.Attach(ctx, pod); err != nil {
			return nil, fmt.Errorf("attach pod %s: %w", pod.Name, err)
		}
	}
	w.ztunPass = path{name: v.name, lab: w.lab, client: w.ztun.client, server: w.barePass.server,
		daemons: w.ztun.daemons[:1]}
	w.ztunLocal = path{name: v.name, lab: w.lab, client: w.ztun.client, server: b.end(c.NS, c.IPs),
		daemons: w.ztun.daemons[:1]}
	return w, nil
}

// servers are the ends at which something must answer.
func (w *world) servers() []end {
	s := []end{w.bare.server, w.barePass.server}
	if w.ztun.server.ns != nil {
		s = append(s, w.ztun.server, w.ztunLocal.server)
	}
	return s
}

// Close takes the world down; none is no error.
func (w *world) Close() error {
	if w == nil || w.lab == nil {
		return nil
	}
	return errors.Join(w.letGo(), w.lab.Close())
}

// end picks the address of the family that the run is about.
func (b *bench) end(ns *lab.NS, ips []netip.Addr) end {
	for _, ip := range ips {
		if ip.Is4() != b.o.V6 {
			return end{ns, ip}
		}
	}
	return end{ns, ips[0]}
}

// alive tells whether the path's daemons still run; the error holds the end of the log of the one that does not.
func (p path) alive() error {
	for _, d := range p.daemons {
		if !d.Running() {
			return fmt.Errorf("the daemon of %s has ended: %v", d.Node.Name, d.Err())
		}
	}
	return nil
}

// explain adds to an error what the daemons of the path said last (they log at warn: little, and to the point), and
// whether they still run.
func (p path) explain(err error) error {
	if err == nil {
		return nil
	}
	for _, d := range p.daemons {
		if log := strings.TrimSpace(d.Log()); log != "" {
			err = fmt.Errorf("%w\n  log of %s: %s", err, d.Node.Name, strings.ReplaceAll(log[max(0, len(log)-800):], "\n",
				"\n    "))
		}
	}
	if dead := p.alive(); dead != nil {
		err = fmt.Errorf("%w\n  %w", err, dead)
	}
	return err
}

// settle gives queues and timers of a measurement that ended a moment to drain, so that the next one is not billed
// for it.
func settle(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
