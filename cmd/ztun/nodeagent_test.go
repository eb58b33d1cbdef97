package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ztun/admin"
	"ztun/admin/zds"
	"ztun/cmd/attach/attachtest"
)

// agentWorld is a daemon in memory whose pods a node agent names, with namespaces as descriptors.
type agentWorld struct {
	*memoryDaemon
	t     *testing.T
	agent *nodeAgent
	ready *admin.Ready
}

func newAgentWorld(t *testing.T) *agentWorld {
	m := newMemoryDaemon(t)
	m.knows(t, "")
	w := &agentWorld{memoryDaemon: m, t: t, ready: admin.NewReady(nil)}
	w.agent = newNodeAgent(m.pods, w.ready.Register("workload proxy manager"), "/nowhere", slog.New(slog.DiscardHandler),
		func() {})
	m.daemon.agent = w.agent
	return w
}

// host makes a namespace, and the descriptor of it.
func (w *agentWorld) host(name string, addrs ...string) (*attachtest.Host, *os.File) {
	w.t.Helper()
	f, err := os.Create(filepath.Join(w.t.TempDir(), name))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { f.Close() })
	var ips []netip.Addr
	for _, a := range addrs {
		ips = append(ips, netip.MustParseAddr(a))
	}
	return w.net.Host(f.Name(), ips...), f
}

// state lists the pods, and whether the node is ready as far as they go.
func (w *agentWorld) state() string {
	var all []string
	for _, p := range w.pods.List() {
		all = append(all, p.UID+" "+p.State)
	}
	slices.Sort(all)
	if len(w.ready.Pending()) == 0 {
		all = append(all, "ready")
	}
	return strings.Join(all, ", ")
}

// What a node agent asks for is done to the pods: the same again is nothing new, another namespace replaces the first,
// what cannot be attached waits, is tried again, and holds readiness back; each end is an end, also of what only
// waited, and pods that were added by hand are none of its business.
func TestNodeAgentsPods(t *testing.T) {
	w := newAgentWorld(t)
	p := w.agent.pods
	_, oneFile := w.host("one", "10.1.0.1")
	_, twoFile := w.host("two", "10.1.0.2")
	_, laterFile := w.host("later", "10.1.0.1")
	gone, goneFile := w.host("gone", "10.1.0.3")
	gone.Vanish()
	w.net.Host("by-hand", netip.MustParseAddr("10.1.0.9"))
	byHand := specOf("three")
	byHand.NetNS = "by-hand"
	attach := func(uid string, f *os.File) error {
		return p.Attach(t.Context(), zds.Workload{UID: uid, Name: "one", Namespace: "n", ServiceAccount: "sa-one"}, f)
	}
	steps := []struct {
		what string
		do   func() error
		fail bool
		want string
	}{
		{"an Add", func() error { return attach("u1", oneFile) }, false, "u1 Up"},
		{"once more", func() error { return attach("u1", oneFile) }, false, "u1 Up"},
		{"the snapshot", func() error { w.agent.named(true); return nil }, false, "u1 Up, ready"},
		{"by hand", func() error { return w.pods.Add(t.Context(), byHand) }, false, "n/three Up, u1 Up, ready"},
		{"one that fails", func() error { return attach("u2", goneFile) }, true, "n/three Up, u1 Up, u2 Pending, ready"},
		{"anything that goes well", func() error { return attach("u1", oneFile) }, false, "n/three Up, u1 Up, u2 Pending"},
		{"another namespace", func() error { return attach("u1", laterFile) }, false, "n/three Up, u1 Up, u2 Pending"},
		{"the failed one, elsewhere", func() error { return attach("u2", twoFile) }, false, "n/three Up, u1 Up, u2 Up, ready"},
		{"an end", func() error { return p.Detach("u2") }, false, "n/three Up, u1 Up, ready"},
		{"once more", func() error { return p.Detach("u2") }, false, "n/three Up, u1 Up, ready"},
		{"of whom nobody knows", func() error { return p.Detach("nobody") }, false, "n/three Up, u1 Up, ready"},
		{"of one by hand", func() error { return p.Detach("n/three") }, false, "n/three Up, u1 Up, ready"},
		{"one that fails", func() error { return attach("u3", goneFile) }, true, "n/three Up, u1 Up, u3 Pending, ready"},
		{"a lost agent", func() error { w.agent.named(false); w.agent.task.Again(); return nil }, false,
			"n/three Up, u1 Up, u3 Pending"},
		{"the next snapshot", func() error { w.agent.named(true); return nil }, false, "n/three Up, u1 Up, u3 Pending"},
		{"still", func() error { w.pods.retryPending(t.Context()); return nil }, false, "n/three Up, u1 Up, u3 Pending"},
		{"the end of what waits", func() error { return p.Detach("u3") }, false, "n/three Up, u1 Up, ready"},
	}
	for _, s := range steps {
		if err := s.do(); (err != nil) != s.fail {
			t.Errorf("%s: %v", s.what, err)
		}
		if got := w.state(); got != s.want {
			t.Errorf("%s: %s, want %s", s.what, got, s.want)
		}
	}
	if got := p.Known(); !slices.Equal(got, []string{"u1"}) {
		t.Errorf("known: %q", got)
	}
	// An operator's command does not take away what the agent would go on to believe in.
	if err := w.pods.Delete(t.Context(), "n", "one"); !errors.Is(err, admin.ErrPodConflict) {
		t.Errorf("deleted by hand: %v", err)
	}
	// The old namespace is free, and the list for the next daemon has the pod by hand alone.
	if err := attach("u4", oneFile); err == nil {
		t.Error("two pods have one address")
	}
	b, err := os.ReadFile(w.pods.stateFile())
	if err != nil {
		t.Fatal(err)
	}
	if saved, err := readSaved(b); err != nil || len(saved) != 1 || saved[0].Name != "three" {
		t.Errorf("saved %s (%v)", b, err)
	}
}

// A pod that could not be attached is tried again without its agent, which then need not say anything for the node to
// become ready.
func TestNodeAgentsPodsAreRetried(t *testing.T) {
	w := newAgentWorld(t)
	_, file := w.host("one", "10.1.0.1")
	w.net.Host("by-hand", netip.MustParseAddr("10.1.0.1"))
	byHand := specOf("two")
	byHand.NetNS = "by-hand"
	if err := w.pods.Add(t.Context(), byHand); err != nil {
		t.Fatal(err)
	}
	add := zds.Workload{UID: "u1", Name: "one", Namespace: "n", ServiceAccount: "sa-one"}
	if err := w.agent.pods.Attach(t.Context(), add, file); !errors.Is(err, admin.ErrPodConflict) {
		t.Fatalf("with its address taken: %v", err)
	}
	file.Close() // the agent's own; what is kept is another
	w.agent.named(true)
	if got := w.state(); got != "n/two Up, u1 Pending" && got != "u1 Pending, n/two Up" {
		t.Errorf("%s", got)
	}
	if pending := w.ready.Pending(); len(pending) != 1 || pending[0].LastError == nil ||
		!strings.Contains(pending[0].LastError.Error(), "n/one") {
		t.Errorf("pending: %+v", pending)
	}
	if err := w.pods.Delete(t.Context(), "n", "two"); err != nil {
		t.Fatal(err)
	}
	w.pods.retryPending(t.Context())
	if got := w.state(); got != "u1 Up, ready" {
		t.Errorf("%s", got)
	}
}

// A daemon that is about to end says nothing to an agent any more, whenever it is told.
func TestNodeAgentLeaves(t *testing.T) {
	for _, early := range []bool{true, false} {
		w := newAgentWorld(t)
		w.ready.Register(stateManager)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		if early {
			w.agent.leave()
		}
		go func() { ended <- w.agent.run(ctx, w.ready) }()
		if !early {
			w.agent.leave()
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// A daemon that ends still lets go of pods for an agent that ends with it, for a moment at least: nobody else can give
// them their network back. A new pod is the next daemon's.
func TestNodeAgentGoesWithUs(t *testing.T) {
	w := newAgentWorld(t)
	_, oneFile := w.host("one", "10.1.0.1")
	_, twoFile := w.host("two", "10.1.0.2")
	attach := func(uid string, f *os.File) error {
		return w.agent.pods.Attach(t.Context(), zds.Workload{UID: uid, Name: uid, Namespace: "n", ServiceAccount: "sa-one"}, f)
	}
	if err := attach("u1", oneFile); err != nil {
		t.Fatal(err)
	}
	hungUp := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	over := make(chan struct{})
	begin := time.Now()
	go func() { defer close(over); w.pods.shutdown(ctx, func() { w.agent.leave(); close(hungUp) }, nil) }()
	eventually(t, "the end's beginning", func() bool {
		w.pods.mu.Lock()
		defer w.pods.mu.Unlock()
		return w.pods.closed
	})
	if time.Since(begin) < brief/2 { // else this machine was too busy to be in time
		select {
		case <-hungUp:
			t.Error("the agent is not listened to any more")
		default:
		}
	}
	left := func() bool {
		w.agent.mu.Lock()
		defer w.agent.mu.Unlock()
		return w.agent.left
	}
	if err := w.agent.pods.Detach("u1"); err != nil {
		t.Error(err)
	}
	if got := w.state(); got != "" {
		t.Errorf("%s is left", got)
	}
	if err := attach("u2", twoFile); err == nil || !left() {
		t.Errorf("a new pod: %v, and the connection is kept: %v", err, !left())
	}
	<-over
	<-hungUp
}

// Before the mesh is known nothing is said to an agent: what it took for a pod that works would refuse every
// connection.
func TestNodeAgentWaitsForTheMesh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ready := admin.NewReady(nil)
		mesh := ready.Register(stateManager)
		a := newNodeAgent(nil, ready.Register("workload proxy manager"), "/nowhere", slog.New(slog.DiscardHandler),
			func() {})
		tried := func() bool { // there is no socket, and each try to reach it says so
			time.Sleep(time.Minute)
			synctest.Wait()
			return slices.ContainsFunc(ready.Pending(), func(p admin.PendingTask) bool { return p.LastError != nil })
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- a.run(ctx, ready) }()
		if tried() {
			t.Error("the agent is asked before the mesh is known")
		}
		mesh.Done()
		if !tried() {
			t.Error("the mesh is known, and the agent is not asked")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
