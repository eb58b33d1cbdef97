package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ztun/test/bench/report"
	"ztun/test/lab"
	"ztun/test/load"
)

// rootlessMesh is the title under which HBONE between users' workloads stands beside HBONE between isolated pods.
const rootlessMesh = "rootless, HBONE"

// served are the workloads that users of a host run, one for each ztun that is measured.
func (r *rootlessWorld) served(host ...netip.Addr) []lab.Workload {
	var all []lab.Workload
	for i, name := range slices.Sorted(maps.Keys(r.runs)) {
		w := lab.Workload{UID: fmt.Sprintf("lab//v1/Pod/default/served%d", i), Name: fmt.Sprintf("served%d", i),
			Namespace: "default", ServiceAccount: "served", TrustDomain: "cluster.local", Protocol: "HBONE",
			WorkloadIPs: []string{fmt.Sprintf("10.91.67.%d", 4+i), fmt.Sprintf("fd91:0:0:67::%d", 4+i)},
			Services:    map[string]map[uint16]uint16{}}
		for _, ip := range host {
			w.MeshAddresses = append(w.MeshAddresses, lab.HostPort(ip, uint16(15018+i)))
		}
		r.peers[name] = w
		all = append(all, w)
	}
	return all
}

// isolatedPair adds a pod on each node, served by daemons: what HBONE without root is compared with.
func (b *bench) isolatedPair(ctx context.Context, r *rootlessWorld) error {
	if len(r.runs) == 0 {
		return nil
	}
	env := map[string]string{"RUST_LOG": "warn"}
	for _, kv := range b.o.Env {
		key, value, _ := strings.Cut(kv, "=")
		env[key] = value
	}
	for _, n := range r.lab.Nodes() {
		d, err := r.lab.StartDaemon(ctx, n, lab.DaemonOptions{Env: env})
		if err != nil {
			return err
		}
		r.isolated.daemons = append(r.isolated.daemons, d)
	}
	for _, p := range r.lab.Pods() {
		if err := r.lab.Attach(ctx, p); err != nil {
			return fmt.Errorf("attach pod %s: %w", p.Name, err)
		}
	}
	return b.serve(ctx, r.lab, r.isolated.server)
}

// serveAsUser runs the generators' server on the far node as the peer of a ztun's clients, until the world ends.
func (b *bench) serveAsUser(ctx context.Context, r *rootlessWorld, subject string) error {
	w := r.peers[subject]
	run := []string{r.runs[subject].bin, "run", "--name", w.Name, "--service-account", w.ServiceAccount, "--ip",
		strings.Join(w.WorkloadIPs, ","), "--", r.dir + "/ztload", "serve", "-listen", fmt.Sprintf(":%d", echoPort), "-byte",
		fmt.Sprintf(":%d", bytePort)}
	cmd, err := r.asUser(subject, run)
	if err != nil {
		return err
	}
	said, pw := io.Pipe()
	var errOut lockedBuffer
	cmd.Stdout, cmd.Stderr = pw, &errOut
	p, err := r.lab.Start(r.far, cmd)
	if err != nil {
		return err
	}
	listens := make(chan error, 1)
	go func() {
		_, err := said.Read(make([]byte, 64))
		listens <- err
		_, _ = io.Copy(io.Discard, said) // ends with the process
	}()
	go func() { <-p.Done(); pw.CloseWithError(io.EOF) }()
	select {
	case err = <-listens:
	case <-time.After(20 * time.Second):
		err = errors.New("not in 20 s")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("a server of `ztun run` did not start: %w: %s", err, errOut.String())
	}
	return nil
}

// rootlessMeshCases compare HBONE from one user's workload to another's with that between isolated pods of two daemons,
// over the same hops. Target: 0.9 times as fast.
func (b *bench) rootlessMeshCases(r *rootlessWorld) []kase {
	if len(r.runs) == 0 {
		return nil
	}
	b.r.rep.Titles[rootlessMesh] = "HBONE from one user's workload to another's, on two nodes, beside isolated pods of two " +
		"daemons there"
	b.r.rep.Base[rootlessMesh] = isolatedName
	over := func(into func() any, result func(any) (float64, outcome, error), args ...string) []subject {
		measure := func(f func(ctx context.Context, got any) error) func(context.Context, int) (outcome, error) {
			return func(ctx context.Context, _ int) (outcome, error) {
				return b.meter(path{}, func() (float64, outcome, error) {
					got := into()
					if err := f(ctx, got); err != nil {
						return 0, nil, err
					}
					return result(got)
				})
			}
		}
		all := []subject{{isolatedName, measure(func(ctx context.Context, got any) error {
			to := r.isolated.server.ip
			return r.isolated.explain(b.client(ctx, r.lab, r.isolated.client, got, withHost(args, to.String())...))
		})}}
		for _, name := range []string{runName, otherRunName} {
			if w, ok := r.peers[name]; ok {
				to := w.WorkloadIPs[0]
				if b.o.V6 {
					to = w.WorkloadIPs[1]
				}
				all = append(all, subject{name, measure(func(ctx context.Context, got any) error {
					return b.rootlessRunIn(ctx, r, r.near, name, got, append([]string{r.dir + "/ztload"}, withHost(args, to)...)...)
				})})
			}
		}
		return all
	}
	target := &report.Target{OfRatio: true, Value: 0.9}
	var ks []kase
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			ks = append(ks, kase{suite: rootlessMesh, name: "HBONE, " + streamsText(streams) + " " + dir,
				lasts: b.length() + time.Second,
				rows: []report.Row{{Metric: "throughput", Unit: "Gb/s", Subject: runName, Target: target},
					{Metric: "CPU-s/GB, all", Unit: "s"}}, // a run's start included
				subjects: over(func() any { return new(load.BulkResult) }, func(got any) (float64, outcome, error) {
					g := got.(*load.BulkResult)
					if g.Failed > 0 || g.Bytes == 0 {
						return 0, nil, fmt.Errorf("%d of %d streams failed: %s", g.Failed, g.N, strings.Join(g.Errors, "; "))
					}
					return float64(g.Bytes) / 1e9, outcome{"throughput": g.Gbps}, nil
				}, "bulk", "-to", fmt.Sprint(echoPort), "-streams", fmt.Sprint(streams), "-dir", dir, "-t",
					b.length().String())})
		}
	}
	return append(ks, kase{suite: rootlessMesh, name: "HBONE, connections, 16 at a time", lasts: b.length() + time.Second,
		rows: []report.Row{{Metric: "rate", Unit: "per s", Subject: runName, Target: target}, {Metric: "p50", Unit: "ms"}},
		subjects: over(func() any { return new(load.RateResult) }, func(got any) (float64, outcome, error) {
			g := got.(*load.RateResult)
			if g.OK == 0 {
				return 0, nil, fmt.Errorf("no connection succeeded: %s", strings.Join(g.Errors, "; "))
			}
			return 1, outcome{"rate": g.PerSecond, "p50": g.Latency.P50}, nil
		}, "rate", "-to", fmt.Sprint(bytePort), "-par", "16", "-t", b.length().String())})
}

// withHost puts a host in front of the port that follows -to.
func withHost(args []string, host string) []string {
	args = slices.Clone(args)
	if i := slices.Index(args, "-to"); i >= 0 {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		args[i+1] = host + ":" + args[i+1]
	}
	return args
}

// quicCase is a QUIC library's client and server (test/quic): bytes there and back, as much as a line of a gigabit
// would carry in the time.
func (b *bench) quicCase(r *rootlessWorld, over func(func(context.Context, string) (outcome, error)) []subject) kase {
	return kase{suite: "rootless", name: "QUIC, there and back", lasts: b.length() + 2*time.Second,
		rows: []report.Row{{Metric: "each way", Unit: "Gb/s"}},
		subjects: over(func(ctx context.Context, subject string) (outcome, error) {
			var got struct {
				Bytes, Seconds float64
			}
			n := int64(b.o.Seconds * 60e6)
			err := b.rootlessRun(ctx, r, subject, &got, r.dir+"/quic", "echo", at(r.server.ip, quicPort), fmt.Sprint(n))
			if err == nil && got.Bytes != float64(n) {
				err = fmt.Errorf("%v of %d bytes came back", got.Bytes, n)
			}
			if err != nil {
				return nil, err
			}
			return outcome{"each way": got.Bytes * 8 / got.Seconds / 1e9}, nil
		})}
}

const quicPort = 4433

// serveQUIC builds test/quic, a module of its own, and serves at h2.
func (b *bench) serveQUIC(ctx context.Context, r *rootlessWorld) error {
	if err := buildQUIC(ctx, b.o.Root, r.dir+"/quic"); err != nil {
		return err
	}
	_, err := r.lab.Start(r.server.ns, lab.Cmd{Args: []string{r.dir + "/quic", "serve", fmt.Sprintf(":%d", quicPort)}})
	return err
}

func buildQUIC(ctx context.Context, root, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", to, ".")
	cmd.Dir = filepath.Join(root, "test/quic")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("test/quic: %w: %s", err, out)
	}
	return nil
}
