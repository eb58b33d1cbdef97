package e2e

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestRestartLosesNothing: one node's daemon after the other is told to go while a connection keeps it for a while, and
// is started anew when it has ended; and then each is killed. Nobody who connects or asks for a name meanwhile is
// refused: each waits, if anything, for the successor. Only what was on its way when a daemon was killed may be lost.
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
	var answered, lost, killed atomic.Int64 // killed: when, since start
	start := time.Now()
	byMesh := func(what string) bool { return what == "back" || strings.HasPrefix(what, "to a peer") }
	once := func(what string) {
		began := time.Since(start)
		err := clients[what]()
		at := time.Duration(killed.Load())
		switch {
		case err == nil:
			answered.Add(1)
		case at > 0 && began < at+inFlight, at > 0 && began < at+inMaking && byMesh(what):
			lost.Add(1)
		default:
			t.Errorf("%s, begun %v, %v: %v", what, start.Add(began).Format("05.000"), time.Now().Format("05.000"), err)
		}
	}
	for what := range clients {
		for range 2 {
			work.Go(func() {
				for ctx.Err() == nil {
					once(what)
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
	}
	again := func(n *lab.Node) {
		for range 20 { // until somebody has noticed; those above may all wait by now
			time.Sleep(25 * time.Millisecond)
			for what := range clients {
				work.Go(func() { once(what) })
			}
		}
		m.start(n, env)
		t.Log(n.Name, "is there again", time.Now().Format("05.000"))
		for _, ask := range clients {
			eventually(t, 30*time.Second, ask)
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
		again(n)
	}
	for _, n := range m.Nodes() {
		killed.Store(int64(time.Since(start)))
		n.Daemon.Kill()
		t.Log(n.Name, "is killed", time.Now().Format("05.000"))
		again(n)
	}
	stop()
	work.Wait()
	if n := answered.Load(); n < 240 {
		t.Errorf("%d requests in all", n)
	} else {
		t.Log(n, "requests,", lost.Load(), "lost with a daemon that was killed")
	}
}

// inFlight is how long after a daemon's death requests may begin that count as on their way: a peer may not have heard
// of it.
const inFlight = 200 * time.Millisecond

// inMaking is the same for what goes through the mesh: it may wait for a tunnel that was being made when the daemon was
// killed (proxy.TestPeerEndsDuringHandshake has those that end so).
const inMaking = time.Second
