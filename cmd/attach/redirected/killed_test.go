package redirected_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin/fdstore"
	"ztun/cmd/supervise"
	"ztun/tun/tuntest/nslab"
)

// life is the store of one life of the daemon: what shelf holds is what it finds. kill has it end as a killed one does,
// untold; what it has still open is to be closed afterwards.
func life(t *testing.T, shelf *supervise.Shelf) (store *fdstore.Store, kill func()) {
	t.Helper()
	near, far, err := supervise.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	conn, err := net.FileConn(far)
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]*os.File{}
	names, fds := shelf.Held()
	for i, name := range names {
		fd, err := unix.FcntlInt(fds[i], unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		left[name] = os.NewFile(uintptr(fd), name)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		shelf.Serve(near)
	}()
	kill = func() {
		near.Close()
		<-served
	}
	t.Cleanup(func() {
		kill()
		conn.Close()
	})
	return fdstore.New(conn.(*net.UnixConn), left, slog.New(slog.DiscardHandler)), kill
}

// A daemon is killed, and who connects before the next one has the pod waits and is served by that: outbound, inbound,
// at the mesh's port and with a name. A pod that is let go of is closed, also with a store.
func TestKilled(t *testing.T) {
	w := newWorld(t)
	serve(t, w.peer, 80)
	serve(t, w.pod, 80)
	shelf := supervise.NewShelf(100, slog.New(slog.DiscardHandler))
	store, kill := life(t, shelf)
	k := kindWith(t, store)
	r, err := attachTo(t, k, w.pod, "a")
	if err != nil {
		t.Fatal(err)
	}
	names, err := r.att.ListenPacket("udp", "127.0.0.1:15053")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := call(t, w.pod, "10.7.0.2:80"); err != nil || got != "10.7.0.1" {
		t.Fatalf("before: %q, %v", got, err)
	}
	store.Flush()
	kill()
	names.Close()
	if err := r.att.Remove(); err != nil {
		t.Fatal(err)
	}
	if held, _ := shelf.Held(); len(held) != 4 {
		t.Fatalf("held: %v", held)
	}

	type caller struct {
		conn      net.Conn
		want, dst string
	}
	var callers []caller
	for _, c := range []struct {
		out       bool
		dst, want string
	}{{true, "10.7.0.2:80", "10.7.0.1"}, {true, "[fd07::2]:80", "fd07::1"}, {false, "10.7.0.1:80", "10.7.0.2"},
		{false, "[fd07::1]:15008", "mesh of a at [fd07::1]:15008 for fd07::2"}} {
		ns := w.peer
		if c.out {
			ns = w.pod
		}
		var conn net.Conn
		if err := ns.Do(func() (err error) {
			conn, err = net.DialTimeout("tcp", c.dst, patience)
			return err
		}); err != nil {
			t.Fatalf("without a daemon, to %s: %v", c.dst, err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		callers = append(callers, caller{conn: conn, want: c.want, dst: c.dst})
	}
	var asks net.Conn
	if err := w.pod.Do(func() (err error) {
		asks, err = net.Dial("udp", "10.7.0.2:53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer asks.Close()
	fmt.Fprint(asks, "question")

	store, _ = life(t, shelf)
	k = kindWith(t, store)
	if r, err = attachTo(t, k, w.pod, "a"); err != nil {
		t.Fatal(err)
	}
	for _, c := range callers {
		b := make([]byte, 100)
		if n, err := c.conn.Read(b); err != nil || string(b[:n]) != c.want {
			t.Errorf("who has waited at %s: %q, %v, want %q", c.dst, b[:n], err, c.want)
		}
	}
	said := strings.Split(r.said(), ", ")
	slices.Sort(said)
	if got := strings.Join(said, ", "); got != "in 10.7.0.2>10.7.0.1:80, mesh, out 10.7.0.1>10.7.0.2:80, "+
		"out fd07::1>[fd07::2]:80" {
		t.Errorf("said: %s", got)
	}
	if names, err = r.att.ListenPacket("udp", "127.0.0.1:15053"); err != nil {
		t.Fatal(err)
	}
	names.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 100)
	if n, _, err := names.ReadFrom(b); err != nil || string(b[:n]) != "question" {
		t.Errorf("a question that has waited: %q, %v", b[:n], err)
	}
	if n := store.Left(); n != 0 {
		t.Errorf("%d are left", n)
	}
	if got, err := call(t, w.pod, "10.7.0.2:80"); err != nil || got != "10.7.0.1" {
		t.Errorf("afterwards: %q, %v", got, err)
	}

	// Let go of: closed at once, and nothing is held.
	names.Close()
	if err := r.att.Remove(); err != nil {
		t.Error(err)
	}
	for from, dst := range map[*nslab.NS]string{w.pod: "10.7.0.2:80", w.peer: "10.7.0.1:15008"} {
		if got, err := call(t, from, dst); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("with the pod let go, to %s: %q, %v", dst, got, err)
		}
	}
	store.Flush()
	if held, _ := shelf.Held(); len(held) != 0 {
		t.Errorf("held: %v", held)
	}
}

// An old daemon ends in good order beside a new one: what its store holds takes no connection from that, not even
// before it has let go of the pod.
func TestKeptAndReplaced(t *testing.T) {
	store, _ := life(t, supervise.NewShelf(100, slog.New(slog.DiscardHandler)))
	replaced(t, kindWith(t, store))
}
