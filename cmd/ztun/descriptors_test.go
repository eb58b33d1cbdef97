package main

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ztun/admin"
	"ztun/proxy/fair"
	"ztun/tun/netns"
)

// A daemon without descriptors, or one that may not look, does not know whether a pod is gone, and keeps it. What is surely gone is told from that.
func TestShortageIsNoVanishedPod(t *testing.T) {
	kept, none := ownNamespace(t, "kept", "10.1.0.2"), ownNamespace(t, "none", "10.1.0.3")
	file := ownNamespace(t, "file", "10.1.0.4")
	file.NetNS = filepath.Join(t.TempDir(), "file") // what `ip netns` leaves of a name whose mount is gone
	if err := os.WriteFile(file.NetNS, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	none.NetNS = filepath.Join(t.TempDir(), "none")
	loop := ownNamespace(t, "loop", "10.1.0.5") // an error that says nothing: ELOOP
	loop.NetNS = filepath.Join(t.TempDir(), "loop")
	if err := os.Symlink(loop.NetNS, loop.NetNS); err != nil {
		t.Fatal(err)
	}
	err := withoutDescriptors(t, func() error {
		_, err := netns.Open(kept.NetNS)
		if !errors.Is(err, syscall.EMFILE) {
			t.Errorf("the shortage is none: %v", err)
		}
		if err := kept.gone(); err != nil {
			t.Errorf("with the namespace there: %v", err)
		}
		return namespaceError(err)
	})
	if !errors.Is(err, admin.ErrPodUnavailable) || errors.Is(err, admin.ErrPodInvalid) {
		t.Errorf("a shortage is the request's fault: %v", err)
	}
	for _, c := range []struct {
		s    savedPod
		gone bool
	}{{kept, false}, {loop, false}, {none, true}, {file, true}} {
		if err := c.s.gone(); (err != nil) != c.gone {
			t.Errorf("%s: gone: %v", c.s.Name, err)
		}
	}
	if m, _ := testManager(t, loop); len(m.List()) != 1 || m.List()[0].State != "Pending" {
		t.Errorf("at start: %+v", m.List())
	}
}

// withoutDescriptors runs f while this process may open nothing more.
func withoutDescriptors(t *testing.T, f func() error) error {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
	}()
	return f()
}

// A list of pods that cannot be read ends the start, so that the next change does not overwrite it; one that is no list is kept aside.
func TestUnreadableListOfPods(t *testing.T) {
	m, _ := testManager(t)
	want := []byte(`[{"name":"a"}]`)
	if err := os.WriteFile(m.stateFile(), want, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := withoutDescriptors(t, func() error { return m.adopt(t.Context()) }); !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), m.stateFile()) {
		t.Errorf("adopt: %v", err)
	}
	if b, err := os.ReadFile(m.stateFile()); err != nil || string(b) != string(want) {
		t.Errorf("the list is %q now (%v)", b, err)
	}
	if err := os.WriteFile(m.stateFile(), []byte("{torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.adopt(t.Context()); err != nil {
		t.Errorf("no list: %v", err)
	}
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(m.stateFile() + ".bad"); err != nil || string(b) != "{torn" {
		t.Errorf("what was there is %q (%v)", b, err)
	}
}

// What a pod that was let go of has left in the node is removed later, when it can be.
func TestTracesAreSweptAgain(t *testing.T) {
	m, swept := testManager(t)
	m.sweepTraces()
	if *swept != 0 {
		t.Error("swept without traces")
	}
	failing := true
	m.sweep = func([]netip.Addr) error {
		*swept++
		if failing {
			return syscall.EMFILE
		}
		return nil
	}
	m.traces.Store(true)
	m.sweepTraces()
	failing = false
	m.sweepTraces()
	m.sweepTraces()
	if *swept != 2 {
		t.Errorf("swept %d times, want until it works and no more", *swept)
	}
}

// pipe is a TCP connection of this host, as it is accepted.
func tcpPair(t *testing.T) (client net.Conn, accepted *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return client, c.(*net.TCPConn)
}

// closed tells whether our end of a connection is closed.
func closed(c *net.TCPConn) bool {
	rc, err := c.SyscallConn()
	return err != nil || rc.Control(func(uintptr) {}) != nil
}

// The greediest loses: a pod's calls, then a pod's clients; others keep theirs, attached pods get what they consist of, and who lost is said.
func TestDescriptorsAreShared(t *testing.T) {
	report := fair.NewReport(slog.New(slog.DiscardHandler))
	d := newDescriptors(64, report) // 16 of its own, 48 to share, 12 at most for one pod's calls
	greedy, other := admin.PodRef{Namespace: "default", Name: "greedy"}, admin.PodRef{Namespace: "default", Name: "other"}
	var calls []*net.TCPConn
	for i := range 20 {
		p := d.outbound(greedy, func() { t.Error("a call was given up") })
		if (p != nil) != (i < 12) {
			t.Fatalf("call %d: %v", i, p)
		}
		if p != nil {
			_, c := tcpPair(t)
			d.opened(p, c)
			calls = append(calls, c)
		}
	}
	var attached []*place
	for i := range 4 {
		p := d.forPod(admin.PodRef{Namespace: "default", Name: string(rune('a' + i))})
		if p == nil {
			t.Fatalf("pod %d has no room", i)
		}
		attached = append(attached, p)
	}
	// 48 are gone: 40 of the pods, and 8 of the 12 calls, of which the oldest 4 were ended for the pods.
	for i, c := range calls {
		if closed(c) != (i < 4) {
			t.Errorf("call %d closed: %v", i, closed(c))
		}
	}
	_, in := tcpPair(t)
	mine := d.inbound(other, in)
	if mine == nil || !closed(calls[4]) {
		t.Fatal("another pod's client got no place, or nobody lost one for it")
	}
	d.collect()
	if used := d.all.Used(); used != 48 {
		t.Errorf("%d are taken", used)
	}
	// A call that is still being made is given up.
	given := false
	for range 8 {
		reset(calls[len(calls)-1])
		calls = calls[:len(calls)-1]
	}
	d.collect()
	var slow []*place
	for range 7 {
		slow = append(slow, d.outbound(greedy, func() { given = true }))
	}
	if extra := d.outbound(other, func() {}); extra == nil || !given {
		t.Error("a call under way was not given up for another pod's")
	}
	// Evicted between the answer and its being told of.
	_, late := tcpPair(t)
	d.opened(slow[0], late)
	if !closed(late) {
		t.Error("a connection without a place goes on")
	}
	if closed(in) {
		t.Error("the other pod's client lost its connection")
	}
	for _, p := range append(append(attached, slow...), mine) {
		p.release()
		p.release()
	}
	d.collect()
	if used := d.all.Used(); used != 1 { // extra's
		t.Errorf("%d are taken in the end", used)
	}
	if c := report.Counts(); len(c) != 1 || c[0].Pod != "default/greedy" || c[0].Resource != "descriptors" || c[0].Evicted != 6 || c[0].Refused != 8 {
		t.Errorf("reported: %+v", c)
	}
}

// A crowd at one pod's door takes a part of the descriptors, by the fair share of its sources; another pod's clients find theirs.
func TestCrowdAtOnePod(t *testing.T) {
	d := newDescriptors(64, nil)
	crowded, other := admin.PodRef{Name: "crowded"}, admin.PodRef{Name: "other"}
	var held []*net.TCPConn
	for i := range 30 {
		_, c := tcpPair(t)
		if d.inbound(crowded, c) == nil {
			t.Fatalf("the crowd's connection %d got no place: its own oldest has to go", i)
		}
		held = append(held, c)
	}
	open := 0
	for _, c := range held {
		if !closed(c) {
			open++
		}
	}
	if open != 12 || closed(held[29]) {
		t.Errorf("%d of the crowd's connections are open, want its share of 12", open)
	}
	_, c := tcpPair(t)
	if d.inbound(other, c) == nil || closed(held[29]) {
		t.Error("another pod's client")
	}
}

// An attached pod takes no more descriptors than it is charged for.
func TestPodDescriptors(t *testing.T) {
	l := newPodLab(t)
	count := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	p, err := l.attach(t) // the first may open what all share
	if err != nil {
		t.Fatal(err)
	}
	l.detach(t, p)
	before := count()
	if p, err = l.attach(t); err != nil {
		t.Fatal(err)
	}
	if n := count() - before; n > podDescriptors || n < podDescriptors/2 {
		t.Errorf("a pod takes %d descriptors, charged are %d", n, podDescriptors)
	}
	if used := l.parts.fds.all.Used(); used != podDescriptors {
		t.Errorf("%d are booked", used)
	}
	l.detach(t, p)
	if n, used := count()-before, l.parts.fds.all.Used(); n != 0 || used != 0 {
		t.Errorf("afterwards %d descriptors are left, %d booked", n, used)
	}
	// A pod for which there is no room is not attached, and says why.
	l.parts.fds = newDescriptors(8, nil)
	if _, err := l.attach(t); !errors.Is(err, admin.ErrPodUnavailable) || !strings.Contains(err.Error(), "LimitNOFILE") {
		t.Errorf("without room: %v", err)
	}
}
