package e2e

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestRestartLosesNothing: one node's daemon after the other is told to go while a connection keeps it for a while, and
// is started anew when it has ended. Nobody who connects or asks for a name meanwhile is refused: each waits, if
// anything, for the successor.
func TestRestartLosesNothing(t *testing.T) {
	for _, way := range []string{"isolated", "steered", "rules"} {
		t.Run(way, func(t *testing.T) { restartLosesNothing(t, way) })
	}
}

func restartLosesNothing(t *testing.T, way string) {
	env := map[string]string{"CONNECTION_TERMINATION_DEADLINE": "60s"}
	m := newMesh(t, meshOptions{env: env, noStart: way != "isolated"})
	if way != "isolated" {
		env["ZTUN_STEERING"] = way
		for _, p := range []*lab.Pod{m.a, m.c} {
			m.cni(p, false)
			m.between(p)
		}
		for _, n := range m.Nodes() {
			m.start(n, env)
		}
		for _, p := range []*lab.Pod{m.a, m.c} {
			m.serve(p.NS)
			must(t, m.Attach(m.ctx, p))
		}
		m.serve(m.h2.NS)
	}
	reach := func(from *lab.NS, to netip.Addr) func() error {
		return func() error {
			ctx, cancel := context.WithTimeout(m.ctx, 20*time.Second)
			defer cancel()
			_, err := load.WhoAmI(ctx, target(from, to))
			return err
		}
	}
	clients := map[string]func() error{
		"to a peer":         reach(m.a.NS, m.c.V4()),
		"to a peer, IPv6":   reach(m.a.NS, m.c.V6()),
		"back":              reach(m.c.NS, m.a.V4()),
		"to the outside":    reach(m.a.NS, m.h2.V4()),
		"from the outside":  reach(m.h2.NS, m.a.V4()),
		"from the outside2": reach(m.h1.NS, m.c.V6()),
		"a name": func() (err error) {
			for range 4 { // as a resolver asks again, whose 5 s it has
				if _, err = ask(m.a.NS, netip.MustParseAddrPort("192.0.2.53:53"), "localhost."); err == nil {
					break
				}
			}
			return err
		},
	}
	for _, ask := range clients {
		eventually(t, 30*time.Second, ask)
	}
	ctx, stop := context.WithCancel(m.ctx)
	defer stop()
	var work sync.WaitGroup
	var answered atomic.Int64
	for what, ask := range clients {
		for range 2 {
			work.Go(func() {
				for ctx.Err() == nil {
					if err := ask(); err != nil {
						t.Errorf("%s, %v: %v", what, time.Now().Format("05.000"), err)
					}
					answered.Add(1)
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
	}
	for _, n := range m.Nodes() {
		kept, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 2)
		must(t, err)
		must(t, n.Daemon.Signal(syscall.SIGTERM))
		t.Log(n.Name, "is told to go", time.Now().Format("05.000"))
		time.Sleep(2 * time.Second)
		if err := kept.Check(); err != nil || !n.Daemon.Running() {
			t.Errorf("what was open when %s was told to go: %v", n.Name, err)
		}
		kept.Close()
		wantExit(t, n.Daemon, 30*time.Second, 0)
		t.Log(n.Name, "has ended", time.Now().Format("05.000"))
		time.Sleep(500 * time.Millisecond) // until somebody has noticed
		m.start(n, env)
		for _, ask := range clients {
			eventually(t, 30*time.Second, ask)
		}
	}
	stop()
	work.Wait()
	if n := answered.Load(); n < 240 {
		t.Errorf("%d requests in all", n)
	} else {
		t.Log(n, "requests")
	}
}
