package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/zdspb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// books are Pods that write down what becomes of them.
type books struct {
	mu    sync.Mutex
	known map[string]uint64 // inode of the namespace
	fail  error
	did   []string
}

func (b *books) Attach(ctx context.Context, w Workload, netns *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(netns.Fd()), &st); err != nil {
		return err
	}
	if _, ok := ctx.Deadline(); !ok {
		return errors.New("no time limit")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.known[w.UID] = st.Ino
	b.did = append(b.did, fmt.Sprintf("+%s(%s/%s %s)", w.UID, w.Namespace, w.Name, w.ServiceAccount))
	return b.fail
}

func (b *books) Detach(uid string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.known, uid)
	b.did = append(b.did, "-"+uid)
	return nil
}

func (b *books) Known() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []string
	for uid := range b.known {
		all = append(all, uid)
	}
	return all
}

// done is what was done since it was last asked.
func (b *books) done() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := strings.Join(b.did, " ")
	b.did = nil
	return s
}

// agent is a node agent as istio-cni is one.
type agent struct {
	t    *testing.T
	l    *net.UnixListener
	conn *net.UnixConn
}

// accept waits for the next connection and its hello.
func (a *agent) accept() {
	a.t.Helper()
	a.l.SetDeadline(time.Now().Add(patience))
	c, err := a.l.AcceptUnix()
	if err != nil {
		a.t.Fatal(err)
	}
	if a.conn != nil {
		a.conn.Close()
	}
	a.conn = c
	if got := a.read(); string(got) != "\x08\x01" {
		a.t.Fatalf("hello is %x", got)
	}
}

func (a *agent) read() []byte {
	a.t.Helper()
	a.conn.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 1024)
	n, err := a.conn.Read(b)
	if err != nil {
		a.t.Fatal(err)
	}
	return b[:n]
}

// raw sends bytes with descriptors and returns the text of the ack.
func (a *agent) raw(b []byte, fds ...int) string {
	a.t.Helper()
	if len(b) == 0 {
		a.empty(unix.UnixRights(fds...))
	} else if _, _, err := a.conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil); err != nil {
		a.t.Fatal(err)
	}
	var r zdspb.WorkloadResponse
	if err := proto.Unmarshal(a.read(), &r); err != nil || r.GetAck() == nil {
		a.t.Fatalf("no ack: %v, %v", &r, err)
	}
	return r.GetAck().GetError()
}

// empty sends a packet without a byte, into which Go would put one.
func (a *agent) empty(oob []byte) {
	a.t.Helper()
	rc, err := a.conn.SyscallConn()
	if err != nil {
		a.t.Fatal(err)
	}
	h := unix.Msghdr{Control: &oob[0]}
	h.SetControllen(len(oob))
	var errno unix.Errno
	if err := rc.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&h)), 0)
	}); err != nil || errno != 0 {
		a.t.Fatal(err, errno)
	}
}

func (a *agent) say(r *zdspb.WorkloadRequest, fds ...int) string {
	a.t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.raw(b, fds...)
}

func (a *agent) add(uid string, fd int) string {
	a.t.Helper()
	return a.say(&zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{Uid: uid,
		WorkloadInfo: &zdspb.WorkloadInfo{Name: "n-" + uid, Namespace: "shop", ServiceAccount: "sa"}}}}, fd)
}

func (a *agent) keep(uid string) string {
	a.t.Helper()
	return a.say(&zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Keep{Keep: &zdspb.KeepWorkload{Uid: uid}}})
}

func (a *agent) del(uid string) string {
	a.t.Helper()
	return a.say(&zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Del{Del: &zdspb.DelWorkload{Uid: uid}}})
}

func (a *agent) snapshot() string {
	a.t.Helper()
	return a.say(&zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_SnapshotSent{SnapshotSent: &zdspb.SnapshotSent{}}})
}

// world is a client at work with an agent that it has connected to.
type world struct {
	*agent
	*books
	*Client
	events chan string // "complete", "lost", "failed"
}

func newWorld(t *testing.T, grace time.Duration) *world {
	t.Helper()
	path := filepath.Join(t.TempDir(), "zds.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{agent: &agent{t: t, l: l}, books: &books{known: map[string]uint64{}}, events: make(chan string, 100)}
	event := func(s string) func() { return func() { w.events <- s } }
	w.Client = New(Options{Path: path, Pods: w.books, Grace: grace, Snapshot: event("complete"), Lost: event("lost"),
		Failed: func(error) { w.events <- "failed" }, Random: func(int64) int64 { return 0 },
		Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { w.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		l.Close()
		w.conn.Close()
	})
	w.accept()
	return w
}

func (w *world) event(want string) {
	w.t.Helper()
	select {
	case got := <-w.events:
		if got != want {
			w.t.Errorf("%s, want %s", got, want)
		}
	case <-time.After(patience):
		w.t.Fatalf("nothing happened, want %s", want)
	}
}

func netnsFD(t *testing.T) int {
	t.Helper()
	f, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// The life of a node: snapshot, pods that come and go, an agent that restarts and has missed two ends.
func TestClient(t *testing.T) {
	w := newWorld(t, time.Hour)
	fd := netnsFD(t)
	if r := w.add("a", fd) + w.add("b", fd) + w.add("c", fd) + w.del("c"); r != "" {
		t.Error(r)
	}
	if w.Stats().Connected {
		t.Error("the snapshot is not complete yet")
	}
	if r := w.snapshot(); r != "" || !w.Stats().Connected {
		t.Error(r, w.Stats())
	}
	w.event("complete")
	if r := w.add("d", fd) + w.del("a") + w.del("a") + w.del("nobody"); r != "" {
		t.Error(r)
	}
	if got := w.done(); got != "+a(shop/n-a sa) +b(shop/n-b sa) +c(shop/n-c sa) -c +d(shop/n-d sa) -a -a -nobody" {
		t.Error(got)
	}
	// Nothing unasked: istio-cni takes it for a fault.
	w.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := w.conn.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v", n, err)
	}
	w.conn.Close()
	w.accept()
	if r := w.keep("b"); r != "" || w.done() != "" {
		t.Error(r)
	}
	if r := w.snapshot(); r != "" || w.done() != "-d" || !slices.Equal(w.Known(), []string{"b"}) {
		t.Error(r, w.Known())
	}
	w.event("complete")
	// A pod that cannot be attached: the agent is told, the connection stays.
	w.books.mu.Lock()
	w.fail = errors.New("port 15008 is taken")
	w.books.mu.Unlock()
	if r := w.add("e", fd); r != "failure to start proxy : port 15008 is taken" {
		t.Error(r)
	}
	if r := w.keep("b"); !strings.Contains(r, "failure to process message : Keep") {
		t.Error(r)
	}
	if r := w.snapshot(); !strings.Contains(r, "sent already") {
		t.Error(r)
	}
	if r := w.del("e"); r != "" {
		t.Errorf("after refusals: %s", r)
	}
	if s := w.Stats(); s.Connections != 2 || s.Refused != 3 {
		t.Errorf("%+v", s)
	}
}

// An agent that is away for a while is lost, once; one that is back in time is not.
func TestLostAgent(t *testing.T) {
	w := newWorld(t, 20*time.Millisecond)
	w.snapshot()
	w.event("complete")
	w.conn.Close()
	w.event("lost")
	w.accept()
	w.snapshot()
	w.event("complete")

	w = newWorld(t, time.Hour)
	w.snapshot()
	w.event("complete")
	w.conn.Close()
	w.accept()
	w.snapshot()
	w.event("complete") // and not lost
}

// What cannot be read is refused with a reason, the connection begun anew, and no descriptor is left open by it.
func TestMalformed(t *testing.T) {
	fd := netnsFD(t)
	add := "\x0a\x1a\x0a\x05uid-a\x12\x11\x0a\x03web\x12\x04shop\x1a\x04user"
	open := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	for _, c := range []struct {
		b    string
		fds  []int
		want string
	}{
		{add, nil, "no network namespace came with it"},
		{add, []int{fd, fd}, "2 descriptors"},
		{add, slices.Repeat([]int{fd}, 50), "ancillary data is cut off"},
		{"\x12\x06\x12\x04uid1", []int{fd}, "only Add has"},
		{"\x12\x06\x12\x04ui", []int{fd}, "no ZDS request"},
		{"\xff\xff\xff", nil, "no ZDS request"},
		{"\x0a\x00", []int{fd}, "Add without a uid"},
		{"\x7a\x01a", nil, "without a payload"},
		{add + strings.Repeat("\x7a\x01a", 2000), []int{fd}, "longer than 4096 bytes"},
		{"", []int{fd}, "empty message"},
		{"\x0a\x87\x02\x0a\x84\x02" + strings.Repeat("u", 260), []int{fd}, "260 bytes"},
	} {
		w := newWorld(t, time.Hour) // each its own: the sixth connection in a row would have to wait
		before := open()
		if r := w.raw([]byte(c.b), c.fds...); !strings.HasPrefix(r, "failure to read message : ") ||
			!strings.Contains(r, c.want) {
			t.Errorf("%.40q with %d descriptors: %q, want %q", c.b, len(c.fds), r, c.want)
		}
		w.conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := w.conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%.40q: the connection goes on: %v", c.b, err)
		}
		w.accept()
		if got := w.done(); got != "" {
			t.Errorf("%.40q: done: %s", c.b, got)
		}
		if after := open(); after != before {
			t.Errorf("%.40q: %d descriptors are open, %d were", c.b, after, before)
		}
		if r := w.raw([]byte(add), fd) + w.snapshot(); r != "" || w.done() != "+uid-a(shop/web user)" {
			t.Errorf("%.40q: a good one afterwards: %s", c.b, r)
		}
		if after := open(); after != before {
			t.Errorf("%.40q: %d descriptors are open after a good one, %d were", c.b, after, before)
		}
	}
}

// No agent yet: it is told once, and found when it comes.
func TestAgentComesLater(t *testing.T) {
	path := filepath.Join(t.TempDir(), "zds.sock")
	failed := make(chan error, 10)
	c := New(Options{Path: path, Pods: &books{known: map[string]uint64{}}, Snapshot: func() {}, Lost: func() {},
		Failed: func(err error) { failed <- err }, Random: func(int64) int64 { return 0 },
		Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	defer running.Wait()
	defer cancel()
	select {
	case err := <-failed:
		if !strings.Contains(err.Error(), path) {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("nobody is told")
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := &agent{t: t, l: l}
	a.accept()
	defer a.conn.Close()
	if r := a.snapshot(); r != "" {
		t.Error(r)
	}
}
