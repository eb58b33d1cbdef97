package zds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/zdspb"
)

// node is a server at work.
type node struct {
	*Server
	t        *testing.T
	path     string
	answered chan string
}

func newNode(t *testing.T, o ServerOptions) *node {
	t.Helper()
	n := &node{t: t, path: filepath.Join(t.TempDir(), "zds.sock"), answered: make(chan string, 1000)}
	o.Path, o.Logger, o.Answered = n.path, slog.New(slog.DiscardHandler), func(uid string) { n.answered <- uid }
	n.Server = NewServer(o)
	if err := n.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { n.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		n.listener.Close()
	})
	return n
}

// put has the proxies take a pod in a namespace: a file that is called so.
func (n *node) put(uid, netns string) error {
	p := Pod{Workload: Workload{UID: uid, Name: "n-" + uid, Namespace: "shop", ServiceAccount: "sa"}}
	if netns != "" {
		p.Netns = n.file(netns)
	}
	return n.Put(p)
}

func (n *node) file(name string) *os.File {
	n.t.Helper()
	f, err := os.OpenFile(filepath.Join(filepath.Dir(n.path), name), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	return f
}

func (n *node) inode(name string) uint64 {
	f := n.file(name)
	defer f.Close()
	return inode(n.t, f)
}

func inode(t *testing.T, f *os.File) uint64 {
	t.Helper()
	b := &books{known: map[string]uint64{}}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if err := b.Attach(ctx, Workload{UID: "x"}, f); err != nil {
		t.Fatal(err)
	}
	return b.known["x"]
}

// await waits for a pod to be acked; for the reason why not, at once where limit is 0.
func (n *node) await(uid string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return n.Await(ctx, uid)
}

// proxy is a real client and what it has made of the messages.
type proxy struct {
	*books
	*Client
	events chan string
	stop   func()
}

func (n *node) proxy() *proxy {
	n.t.Helper()
	p := &proxy{books: &books{known: map[string]uint64{}}, events: make(chan string, 100)}
	p.start(n)
	return p
}

func (p *proxy) start(n *node) {
	p.Client = New(Options{Path: n.path, Pods: p.books, Snapshot: func() { p.events <- "complete" },
		Lost: func() { p.events <- "lost" }, Failed: func(error) {}, Random: func(int64) int64 { return 0 },
		Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { p.Run(ctx) })
	p.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	n.t.Cleanup(p.stop)
	select {
	case <-p.events:
	case <-time.After(patience):
		n.t.Fatal("no snapshot came")
	}
}

// has waits until the proxy has these pods and no others: uid to inode.
func (p *proxy) has(t *testing.T, want map[string]uint64) {
	t.Helper()
	var got map[string]uint64
	eventually(t, func() bool {
		p.books.mu.Lock()
		defer p.books.mu.Unlock()
		got = maps.Clone(p.known)
		return maps.Equal(got, want)
	}, func() string { return fmt.Sprintf("the proxy has %v, want %v", got, want) })
}

func (b *books) failing(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = err
}

func eventually(t *testing.T, ok func() bool, what func() string) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what())
		}
	}
}

// The life of a node: a snapshot, pods that come, go and get another namespace, a proxy that comes back.
func TestServer(t *testing.T) {
	n := newNode(t, ServerOptions{})
	if err := errors.Join(n.put("a", "ns-a"), n.put("b", "ns-b"), n.put("k", "")); err != nil {
		t.Fatal(err)
	}
	if st, err := n.State("a"); st != Waiting || err == nil {
		t.Error("nobody has it yet:", st, err)
	}
	p := n.proxy()
	a, b := n.inode("ns-a"), n.inode("ns-b")
	p.has(t, map[string]uint64{"a": a, "b": b})
	if got := p.done(); got != "+a(shop/n-a sa) +b(shop/n-b sa)" {
		t.Error("the snapshot:", got)
	}
	if err := n.put("c", "ns-c"); err != nil {
		t.Fatal(err)
	}
	if err := n.await("c"); err != nil {
		t.Error(err)
	}
	// The same again is no news; another namespace is.
	if err := errors.Join(n.put("c", "ns-c"), n.put("b", "ns-b2")); err != nil {
		t.Fatal(err)
	}
	p.has(t, map[string]uint64{"a": a, "b": n.inode("ns-b2"), "c": n.inode("ns-c")})
	if got := p.done(); got != "+c(shop/n-c sa) +b(shop/n-b sa)" {
		t.Error("a new pod, and a new namespace:", got)
	}
	n.Remove("a")
	n.Remove("a")
	n.Remove("nobody")
	p.has(t, map[string]uint64{"b": n.inode("ns-b2"), "c": n.inode("ns-c")})
	if st, _ := n.State("a"); st != Unknown {
		t.Error("a removed pod is", st)
	}
	// While the proxy is away one goes and one comes; what it has kept is reconciled by the snapshot. A pod whose
	// namespace nobody knows is kept.
	p.stop()
	eventually(t, func() bool { return n.Stats().Proxies == 0 }, func() string { return "the proxy stays" })
	n.Remove("c")
	if err := n.put("d", "ns-d"); err != nil {
		t.Fatal(err)
	}
	p.books.mu.Lock()
	p.known["k"] = 7
	p.books.mu.Unlock()
	p.start(n)
	p.has(t, map[string]uint64{"b": n.inode("ns-b2"), "d": n.inode("ns-d"), "k": 7})
	if st, err := n.State("k"); st != Waiting {
		t.Error("a pod that is kept is not known to be captured:", st, err)
	}
	eventually(t, func() bool { return n.Stats().Complete == 1 }, func() string { return fmt.Sprint(n.Stats()) })
	want := ServerStats{Pods: 3, Proxies: 1, Complete: 1, Connections: 2, Adds: 6, Keeps: 2, Dels: 1}
	if s := n.Stats(); s != want {
		t.Errorf("%+v", s)
	}
}

// Two proxies in an upgrade: both hear of everything, either's ack is good, and the one that stays has all of it.
func TestTwoProxies(t *testing.T) {
	n := newNode(t, ServerOptions{})
	old := n.proxy()
	if err := errors.Join(n.put("a", "ns-a"), n.await("a")); err != nil {
		t.Fatal(err)
	}
	young := n.proxy()
	young.failing(errors.New("not yet"))
	if err := errors.Join(n.put("b", "ns-b"), n.await("b")); err != nil {
		t.Error("the old proxy's ack is good:", err)
	}
	n.Remove("a")
	want := map[string]uint64{"b": n.inode("ns-b")}
	old.has(t, want)
	young.has(t, want)
	old.stop()
	young.failing(nil)
	if err := errors.Join(n.put("c", "ns-c"), n.await("c")); err != nil {
		t.Fatal(err)
	}
	want["c"] = n.inode("ns-c")
	young.has(t, want)
}

// A refusal is told with its reason, the connection stays, and the next Put tries again: with the same namespace only
// those who have refused, and with another one all.
func TestRefused(t *testing.T) {
	n := newNode(t, ServerOptions{})
	p := n.proxy()
	p.failing(errors.New("port 15008 is taken"))
	if err := n.put("a", "ns-a"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.await("a"); err == nil || !strings.Contains(err.Error(), "port 15008 is taken") {
			t.Error(err)
		}
		if err := n.put("a", "ns-a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.await("a"); err == nil {
		t.Error("it is still refused")
	}
	p.failing(nil)
	if err := errors.Join(n.put("a", "ns-a2"), n.await("a")); err != nil {
		t.Error(err)
	}
	p.has(t, map[string]uint64{"a": n.inode("ns-a2")})
	if got := p.done(); got != strings.TrimSpace(strings.Repeat("+a(shop/n-a sa) ", 4)) {
		t.Error(got)
	}
	if s := n.Stats(); s.Connections != 1 || s.Refused != 3 {
		t.Errorf("%+v", s)
	}
	for range 4 {
		select {
		case uid := <-n.answered:
			if uid != "a" {
				t.Error(uid)
			}
		case <-time.After(patience):
			t.Fatal("nobody is told of an answer")
		}
	}
}

// raw is a proxy that says what it likes.
func (n *node) raw() *net.UnixConn {
	n.t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: n.path, Net: "unixpacket"})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// Who says nothing, nonsense, something unasked or no ack loses its connection, and others go on.
func TestBadProxies(t *testing.T) {
	const brief = 100 * time.Millisecond
	for _, c := range []struct {
		name string
		wait time.Duration
		says []string // "" is a message that it awaits
	}{
		{"nothing", brief, nil},
		{"no hello", patience, []string{"\xff\xff"}},
		{"another version", patience, []string{"\x08\x07"}},
		{"hello, but no ack", brief, []string{"\x08\x01"}},
		{"no ack", patience, []string{"\x08\x01", "", "\x08\x01"}},
		{"unasked", patience, []string{"\x08\x01", "", "\x0a\x00", "", "\x0a\x00", "\x0a\x00"}},
	} {
		n := newNode(t, ServerOptions{Wait: c.wait})
		if err := n.put("a", "ns-a"); err != nil {
			t.Fatal(err)
		}
		conn := n.raw()
		for _, say := range c.says {
			var err error
			if say == "" {
				_, err = conn.Read(make([]byte, 100))
			} else {
				_, err = conn.Write([]byte(say))
			}
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
		}
		eventually(t, func() bool { return n.Stats().Connections == 1 && n.Stats().Proxies == 0 },
			func() string { return c.name + ": the connection goes on" })
		if got := n.Stats().TimedOut; got != 0 != (c.wait == brief) {
			t.Errorf("%s: %d timed out", c.name, got)
		}
		if c.wait == patience {
			n.proxy().has(t, map[string]uint64{"a": n.inode("ns-a")})
		}
	}
}

// Proxies, pods and what is queued for a slow proxy have bounds.
func TestServerBounds(t *testing.T) {
	n := newNode(t, ServerOptions{MaxPods: 3, MaxConns: 2, Wait: patience})
	slow := n.raw()
	if _, err := slow.Write(hello()); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		for _, uid := range []string{"a", "b", "c"} {
			if err := n.put(uid, "ns-"+uid); err != nil {
				t.Fatal(err)
			}
			n.Remove(uid)
		}
	}
	for _, uid := range []string{"a", "b", "c"} {
		if err := n.put(uid, "ns-"+uid); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.put("d", "ns-d"); err == nil || n.Stats().Full != 1 {
		t.Error("a fourth pod:", err, n.Stats())
	}
	if err := n.put("a", "ns-a2"); err != nil {
		t.Error("one of the three:", err)
	}
	eventually(t, func() bool { return n.Stats().Proxies == 1 }, func() string { return "no proxy" })
	n.mu.Lock()
	for p := range n.peers {
		if len(p.order) > 4 {
			t.Errorf("%d are queued for three pods", len(p.order))
		}
	}
	n.mu.Unlock()
	p := n.proxy()
	c := n.raw()
	if k, err := c.Read(make([]byte, 10)); err == nil && k > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a third proxy is not turned away:", err)
	}
	p.has(t, map[string]uint64{"a": n.inode("ns-a2"), "b": n.inode("ns-b"), "c": n.inode("ns-c")})
	if n.Stats().Turned != 1 {
		t.Errorf("%+v", n.Stats())
	}
}

// The server holds one descriptor for each pod, and none when it has ended.
func TestServerDescriptors(t *testing.T) {
	open := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	n := &node{t: t, path: filepath.Join(t.TempDir(), "zds.sock")}
	before := open()
	n.Server = NewServer(ServerOptions{Path: n.path, MaxPods: 2, Logger: slog.New(slog.DiscardHandler)})
	if err := n.Listen(); err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { n.Run(ctx) })
	p := n.proxy()
	for range 10 {
		for _, ns := range []string{"ns", "ns", "other"} {
			if err := errors.Join(n.put("a", ns), n.put("b", ns)); err != nil {
				t.Fatal(err)
			}
			n.put("c", ns) // no place
			n.put("a", "")
		}
		if err := errors.Join(n.await("a"), n.await("b")); err != nil {
			t.Fatal(err)
		}
	}
	p.stop()
	eventually(t, func() bool { return n.Stats().Proxies == 0 }, func() string { return "the proxy stays" })
	if got := open() - before; got > 2+1+3 { // two pods, the listener; the poller's own
		t.Errorf("%d descriptors more for two pods", got)
	}
	cancel()
	running.Wait()
	if got := open() - before; got > 3 {
		t.Errorf("%d descriptors more at the end", got)
	}
	if err := n.await("a"); err == nil {
		t.Error("a pod of a server that has ended is waited for")
	}
}

// A socket of an earlier process is replaced, one that is served is not, and a file is left alone.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := ListenUnix("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi.Mode(), err)
	}
	for _, network := range []string{"unixpacket", "unix"} {
		if _, err := ListenUnix(network, path); err == nil || !strings.Contains(err.Error(), "another process") {
			t.Errorf("%s: it is served: %v", network, err)
		}
	}
	l.Close()
	if l, err = ListenUnix("unixpacket", path); err != nil {
		t.Fatal(err)
	}
	l.Close()
	file := path + ".txt"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix("unixpacket", file); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Error(err)
	}
}

// The bytes that a real node agent sends are ours, too.
func TestRequests(t *testing.T) {
	w := Workload{"uid-a", "web", "shop", "user"}
	for _, c := range []struct {
		m    say
		want string
	}{
		{say{kind: kindAdd, workload: w}, "\x0a\x1a\x0a\x05uid-a\x12\x11\x0a\x03web\x12\x04shop\x1a\x04user"},
		{say{kind: kindDel, workload: w}, "\x12\x07\x12\x05uid-a"},
		{say{kind: kindKeep, workload: w}, "\x2a\x07\x0a\x05uid-a"},
		{say{kind: kindSnapshotSent}, "\x1a\x00"},
	} {
		if got := string(request(c.m)); got != c.want {
			t.Errorf("%s: %x, want %x", c.m.kind, got, c.want)
		}
	}
	ack := func(r *zdspb.WorkloadResponse) []byte {
		b, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		b           []byte
		reason, bad string
	}{
		{[]byte("\x0a\x00"), "", ""},
		{ack(&zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{Error: "no"}}}), "no", ""},
		{nil, "", "no ack"},
		{[]byte("\xff"), "", "no ack"},
	} {
		reason, err := readAck(c.b)
		if text(reason) != c.reason || !strings.Contains(text(err), c.bad) || (err != nil) != (c.bad != "") {
			t.Errorf("%x: %v, %v", c.b, reason, err)
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// What is queued is heard once and in order, and a change on the way is not lost.
func TestQueue(t *testing.T) {
	p := newPeer(nil)
	for _, uid := range []string{"a", "b", "a", "c", "b"} {
		p.queue(uid)
	}
	if !slices.Equal(p.order, []string{"a", "b", "c"}) {
		t.Error(p.order)
	}
	s := NewServer(ServerOptions{})
	s.peers[p] = true
	if m, ok := s.next(p); ok {
		t.Error("nobody wants these:", m)
	}
}

// TestFlush: it is over when a proxy has answered for the end of every pod, when no proxy is there, and with ctx; and
// it says how many pods are left with nobody who has heard of their end.
func TestFlush(t *testing.T) {
	n := newNode(t, ServerOptions{})
	flush := func(limit time.Duration, want int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		if got := n.Flush(ctx); got != want {
			t.Errorf("%d pods are left, want %d", got, want)
		}
	}
	for _, uid := range []string{"one", "two"} {
		if err := n.put(uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	n.Remove("two") // which nobody has had
	flush(patience, 0)
	p := n.proxy()
	if err := n.await("one"); err != nil {
		t.Fatal(err)
	}
	p.books.mu.Lock() // whoever detaches waits
	n.Remove("one")
	flush(50*time.Millisecond, 1)
	p.books.mu.Unlock()
	flush(patience, 0)
	p.has(t, map[string]uint64{})
	// A proxy that has left with a pod, and one that comes after it.
	if err := n.put("one", "one"); err != nil {
		t.Fatal(err)
	}
	if err := n.await("one"); err != nil {
		t.Fatal(err)
	}
	p.stop()
	eventually(t, func() bool { return n.Stats().Proxies == 0 }, func() string { return "the proxy stays" })
	n.Remove("one")
	flush(patience, 1)
	n.proxy()
	eventually(t, func() bool { return n.Stats().Complete == 1 }, func() string { return "no snapshot" })
	flush(patience, 0)
}

// What two proxies have answered adds up, and a namespace does not outlive its pod.
func TestState(t *testing.T) {
	s := NewServer(ServerOptions{Logger: slog.New(slog.DiscardHandler)})
	a, b := newPeer(nil), newPeer(nil)
	s.peers[a], s.peers[b] = true, true
	netns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(Pod{Workload: Workload{UID: "u"}, Netns: netns}); err != nil {
		t.Fatal(err)
	}
	is := func(what string, want State) {
		t.Helper()
		if st, err := s.State("u"); st != want || (err == nil) != (want == Acked) {
			t.Errorf("%s: %d (%v), want %d", what, st, err, want)
		}
	}
	answer := func(p *peer, err error) {
		t.Helper()
		m, ok := s.next(p)
		if !ok || m.kind != kindAdd {
			t.Fatal(m, ok)
		}
		s.answered(p, m, err)
	}
	is("told", Waiting)
	answer(a, errors.New("no"))
	is("one refuses, the other has not answered", Waiting)
	answer(b, errors.New("neither"))
	is("both refuse", Refused)
	again, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(Pod{Workload: Workload{UID: "u"}, Netns: again}); err != nil {
		t.Fatal(err)
	}
	is("another try", Waiting)
	answer(b, nil)
	is("one has it", Acked)
	s.leave(b)
	answer(a, errors.New("still not"))
	is("who is left refuses", Refused)
	s.leave(a)
	is("nobody is left: it was captured, and its proxy comes back", Acked)

	a.complete = true
	s.peers[a] = true
	if err := s.Put(Pod{Workload: Workload{UID: "kept"}}); err != nil {
		t.Fatal(err)
	}
	if m, ok := s.next(a); ok {
		t.Error("Keep belongs into the snapshot:", m)
	}
	s.Remove("u")
	for _, f := range []*os.File{netns, again} {
		if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Error("a namespace is still open:", err)
		}
	}
}
