package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// proxyOf is the process id of the proxy itself under its supervisor.
func proxyOf(d *lab.Daemon) (int, error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.Pid()))
	if err != nil {
		return 0, err
	}
	for _, t := range threads {
		if b, err := os.ReadFile(t); err == nil && len(b) > 0 {
			return strconv.Atoi(strings.TrimSpace(string(b)))
		}
	}
	return 0, errors.New("it has no child")
}

// killProxy kills the proxy of a daemon and returns when another one is its supervisor's child.
func killProxy(t *testing.T, d *lab.Daemon) {
	t.Helper()
	was, err := proxyOf(d)
	must(t, err)
	must(t, syscall.Kill(was, syscall.SIGKILL))
	eventually(t, 30*time.Second, func() error {
		if !d.Running() {
			return errors.New("the supervisor has ended")
		}
		now, err := proxyOf(d)
		if err == nil && now == was {
			err = errors.New("it lives")
		}
		return err
	})
}

// caller connects again and again, one call after the other.
type caller struct {
	what   string
	calls  int
	failed []error
}

// callers are some, which call until all are told to end. call is one call.
type callers struct {
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup
	all  []*caller
}

func (c *callers) add(what string, n int, call func(context.Context) error) {
	for range n {
		one := &caller{what: what}
		c.all = append(c.all, one)
		c.wg.Go(func() {
			for c.ctx.Err() == nil {
				one.calls++
				if err := call(context.WithoutCancel(c.ctx)); err != nil {
					one.failed = append(one.failed, err)
				}
				time.Sleep(5 * time.Millisecond) // or all local ports are used up in a while
			}
		})
	}
}

// judge ends them. Of each one call is under way when a proxy is killed, which may be lost, and none is to be
// refused. A second one is let pass: it may go by a tunnel that the caller's own proxy does not know to be dead
// yet.
func (c *callers) judge(t *testing.T, kills int) {
	t.Helper()
	c.stop()
	c.wg.Wait()
	lost, calls := 0, 0
	for _, one := range c.all {
		calls += one.calls
		lost += len(one.failed)
		if len(one.failed) > 2*kills {
			t.Errorf("%s: %d of %d calls failed, with %d kills: %v", one.what, len(one.failed), one.calls, kills,
				errors.Join(one.failed...))
		}
		for _, err := range one.failed {
			if errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: refused: %v", one.what, err)
			}
		}
	}
	t.Logf("%d calls by %d callers, %d were under way at %d kills and lost", calls, len(c.all), lost, kills)
}

func newCallers(ctx context.Context) *callers {
	c := &callers{}
	c.ctx, c.stop = context.WithCancel(ctx)
	return c
}

// knock only connects.
func knock(ctx context.Context, ns *lab.NS, to netip.AddrPort) error {
	c, err := ns.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	return c.Close()
}

const kills = 3

// TestKilledRedirected: a redirected node's proxy is killed, again and again, under callers from the pod, from
// a peer's pod and from outside of the mesh: nobody is refused, each loses no more than what was under way, and
// nothing of the mesh is on the wire in the clear. A name that is asked meanwhile is answered. What nobody has
// by then is let go of.
func TestKilledRedirected(t *testing.T) {
	r := newRedirected(t)
	n1, n2 := r.N1, r.N2
	r.env[n1]["ZTUN_SUPERVISE"] = "true"
	for _, n := range r.Nodes() {
		r.begin(n)
	}
	r.snapshot(n1, r.a, r.b)
	r.snapshot(n2, r.c)
	for _, n := range r.Nodes() {
		must(t, n.Daemon.WaitReady(r.ctx, 60*time.Second))
	}
	for _, ns := range []*lab.NS{r.a.NS, r.c.NS, r.h2.NS} {
		r.serve(ns)
	}
	r.works("at first")

	wire, err := r.Capture(n1.NS, "eth0", lab.CaptureOptions{Filter: "tcp", Immediate: true})
	must(t, err)
	c := newCallers(r.ctx)
	at := func(ip netip.Addr) netip.AddrPort { return netip.AddrPortFrom(ip, 9001) }
	c.add("out of the pod", 3, func(ctx context.Context) error { return takeByte(ctx, r.a.NS, at(r.c.V4())) })
	c.add("out of the pod, IPv6", 1, func(ctx context.Context) error { return takeByte(ctx, r.a.NS, at(r.c.V6())) })
	c.add("from a peer", 3, func(ctx context.Context) error { return takeByte(ctx, r.c.NS, at(r.a.V4())) })
	c.add("from outside", 3, func(ctx context.Context) error { return takeByte(ctx, r.h2.NS, at(r.a.V4())) })
	c.add("to the mesh's port", 1, func(ctx context.Context) error {
		return knock(ctx, r.h2.NS, netip.AddrPortFrom(r.a.V4(), lab.HBONEPort))
	})
	agent := r.agents[n1]
	for i := range kills {
		killProxy(t, n1.Daemon)
		if old := agent.accept(); old != nil {
			old.Close()
		}
		// Nobody listens yet, and this is asked now.
		asked := make(chan error, 1)
		go func() {
			_, err := r.Run(r.ctx, r.a.NS, "dig", "+notcp", "+time=30", "+tries=1", "+short", "@"+r.h2.V4().String(),
				"shop.default.svc.cluster.local", "A")
			asked <- err
		}()
		if i == kills-1 { // b has gone meanwhile
			r.snapshot(n1, r.a)
		} else {
			r.snapshot(n1, r.a, r.b)
		}
		must(t, n1.Daemon.WaitReady(r.ctx, 60*time.Second))
		if err := <-asked; err != nil {
			t.Errorf("a name that was asked meanwhile: %v", err)
		}
		r.works("after a kill") // between two kills each caller gets a call through
	}
	c.judge(t, kills)
	for _, p := range stop(t, wire) {
		if (p.Src.Port() == 9001 || p.Dst.Port() == 9001) && p.Src.Addr() != r.h2.V4() && p.Dst.Addr() != r.h2.V4() {
			t.Fatalf("plaintext of the mesh on the wire: %+v", p)
		}
	}
	if log := n1.Daemon.Log(); strings.Count(log, "it is started again") != kills ||
		!strings.Contains(log, "listeners of an earlier run are let go of") {
		t.Errorf("the log of the node: %s", log)
	}
	// b's rules are there, and nobody listens any more.
	if err := takeByte(r.ctx, r.h2.NS, at(r.b.V4())); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("to a pod that the agent has not named again: %v", err)
	}
	if exit, err := n1.Daemon.Stop(60 * time.Second); err != nil || exit != 0 {
		t.Errorf("the end: %d, %v", exit, err)
	}
	if err := takeByte(r.ctx, r.h2.NS, at(r.a.V4())); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after the end: %v", err)
	}
}

// TestKilledSteered: the same for pods that are steered: the mesh's port refuses nobody, and after each kill
// the pods reach each other. Calls through the mesh are made beside it and not judged one by one: a caller may
// lose more than one at a kill, by a tunnel of which its own proxy has not heard yet that it is dead.
func TestKilledSteered(t *testing.T) {
	for _, way := range []string{"steered", "rules"} {
		t.Run(way, func(t *testing.T) {
			m := newMesh(t, meshOptions{noStart: true})
			for _, p := range []*lab.Pod{m.a, m.b, m.c} {
				m.cni(p, p == m.a)
			}
			must(t, m.WriteWorld(m.DefaultWorld()))
			m.start(m.N1, map[string]string{"ZTUN_STEERING": way, "ZTUN_SUPERVISE": "true"})
			m.start(m.N2, map[string]string{"ZTUN_STEERING": way})
			for _, p := range []*lab.Pod{m.a, m.c} {
				must(t, m.Attach(m.ctx, p))
			}
			for _, ns := range []*lab.NS{m.a.NS, m.c.NS} {
				m.serve(ns)
			}
			works := func(what string) {
				t.Helper()
				m.meet(what, 60*time.Second, func(from *lab.NS, to netip.Addr) error {
					return takeByte(m.ctx, from, netip.AddrPortFrom(to, 9001))
				})
			}
			works("at first")
			wire, err := m.Capture(m.N1.NS, "eth0", lab.CaptureOptions{Filter: "tcp", Immediate: true})
			must(t, err)
			c, beside := newCallers(m.ctx), newCallers(m.ctx)
			beside.add("out of the pod", 3, func(ctx context.Context) error {
				return takeByte(ctx, m.a.NS, netip.AddrPortFrom(m.c.V4(), 9001))
			})
			for _, ip := range m.a.IPs {
				beside.add("from a peer, "+ip.String(), 3, func(ctx context.Context) error {
					return takeByte(ctx, m.c.NS, netip.AddrPortFrom(ip, 9001))
				})
				c.add("to the mesh's port, "+ip.String(), 1, func(ctx context.Context) error {
					return knock(ctx, m.N2.NS, netip.AddrPortFrom(ip, lab.HBONEPort))
				})
			}
			for range kills {
				killProxy(t, m.N1.Daemon)
				must(t, m.N1.Daemon.WaitReady(m.ctx, 60*time.Second))
				works("after a kill")
			}
			c.judge(t, kills)
			beside.stop()
			beside.wg.Wait()
			for _, p := range stop(t, wire) {
				if p.Src.Port() == 9001 || p.Dst.Port() == 9001 {
					t.Fatalf("plaintext of the mesh on the wire: %+v", p)
				}
			}
			if exit, err := m.N1.Daemon.Stop(60 * time.Second); err != nil || exit != 0 {
				t.Errorf("the end: %d, %v", exit, err)
			}
		})
	}
}
