package fdstore

import (
	"bytes"
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

	"golang.org/x/sys/unix"
)

const patienceHere = 20 * time.Second

// manager is the far side of the protocol, as systemd is.
type manager struct {
	conn *net.UnixConn
	path string

	mu   sync.Mutex
	held map[string]int
	said []string
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := newSilentManager(t)
	m.serve(t)
	return m
}

// newSilentManager is one that reads nothing until it is told to serve.
func newSilentManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{path: filepath.Join(t.TempDir(), "notify"), held: map[string]int{}}
	var err error
	if m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.conn.Close() })
	return m
}

func (m *manager) serve(t *testing.T) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.run(t)
	}()
	t.Cleanup(func() {
		m.conn.Close()
		<-done
		for _, fd := range m.held {
			unix.Close(fd)
		}
	})
}

func (m *manager) run(t *testing.T) {
	b, oob := make([]byte, MaxMessage), make([]byte, 1024)
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		var fds []int
		if cs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(cs) > 0 {
			fds, _ = unix.ParseUnixRights(&cs[0])
		}
		msg, err := Parse(b[:n])
		if err != nil {
			t.Errorf("%q: %v", b[:n], err)
		}
		m.mu.Lock()
		m.said = append(m.said, strings.ReplaceAll(strings.TrimSpace(string(b[:n])), "\n", " "))
		if msg.Store && len(fds) == 1 {
			m.held[msg.Name] = fds[0]
			fds = nil
		}
		if fd, is := m.held[msg.Name]; msg.Remove && is {
			unix.Close(fd)
			delete(m.held, msg.Name)
		}
		m.mu.Unlock()
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

func (m *manager) names() (all []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := range m.held {
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}

func listener(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// What is kept outlives its owner: a connection made after the owner has closed it is served by the next life.
func TestStoreOutlives(t *testing.T) {
	m := newManager(t)
	log := slog.New(slog.DiscardHandler)
	s, err := open(inherited{path: m.path}, log)
	if err != nil {
		t.Fatal(err)
	}
	l := listener(t)
	s.Keep("a", l)
	s.Keep("b", listener(t))
	s.Drop("b")
	s.Drop("never kept")
	s.Ready()
	s.Flush()
	if got := m.names(); !slices.Equal(got, []string{"a"}) {
		t.Fatalf("held: %v", got)
	}
	l.Close() // as a kill does
	c, err := net.DialTimeout("tcp", l.Addr().String(), patienceHere)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "hello")

	m.mu.Lock()
	fd := m.held["a"]
	m.mu.Unlock()
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	next, err := open(inherited{path: m.path, named: []namedFile{{"a", os.NewFile(uintptr(dup), "a")}}}, log)
	if err != nil {
		t.Fatal(err)
	}
	if next.Take("b") != nil || next.Left() != 1 {
		t.Error("more or less is left than there was")
	}
	f := next.Take("a")
	if f == nil || next.Take("a") != nil {
		t.Fatal("not once")
	}
	again, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	served, err := again.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	served.SetDeadline(time.Now().Add(patienceHere))
	b := make([]byte, 5)
	if _, err := io.ReadFull(served, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	// The end in good order: told, and waited for.
	next.Clear()
	if got := m.names(); len(got) > 0 {
		t.Errorf("held after the end: %v", got)
	}
	next.Keep("late", listener(t))
	s.Flush()
	if got := m.names(); len(got) > 0 {
		t.Errorf("kept after the end: %v", got)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if got := strings.Join(m.said, ", "); got != "FDSTORE=1 FDNAME=a FDPOLL=0, FDSTORE=1 FDNAME=b FDPOLL=0, "+
		"FDSTOREREMOVE=1 FDNAME=b, READY=1, BARRIER=1, STOPPING=1, FDSTOREREMOVE=1 FDNAME=a, BARRIER=1, BARRIER=1" {
		t.Error(got)
	}
}

// What nobody takes is let go of, here and there: who connects is refused again.
func TestSweep(t *testing.T) {
	m := newManager(t)
	s, err := open(inherited{path: m.path}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l := listener(t)
	s.Keep("gone", l)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	next, err := open(inherited{path: m.path, named: []namedFile{{"gone", f}}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if n := next.Sweep(); n != 1 || next.Sweep() != 0 || next.Take("gone") != nil {
		t.Errorf("swept %d", n)
	}
	next.Flush()
	if c, err := net.DialTimeout("tcp", l.Addr().String(), patienceHere); err == nil {
		c.Close()
		t.Error("somebody still listens")
	}
}

// A far side that reads nothing, or has gone, holds nobody up for good and is said once each.
func TestDeafStore(t *testing.T) {
	var said bytes.Buffer
	path := filepath.Join(t.TempDir(), "notify")
	far, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	s, err := open(inherited{path: path}, slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	s.patience = 50 * time.Millisecond
	s.Keep("a", listener(t))
	s.Flush() // nobody reads
	s.Keep("b", listener(t))
	s.Flush()
	if n := strings.Count(said.String(), "descriptor store does not answer"); n != 1 || strings.Contains(said.String(), "work") {
		t.Errorf("said %d times: %s", n, said.String())
	}
	far.Close()
	s.Keep("c", listener(t))
	s.Flush()
	s.Clear()
	if n := strings.Count(said.String(), "descriptor store does not work"); n != 1 {
		t.Errorf("said %d times: %s", n, said.String())
	}
	if s, err := open(inherited{path: path + "none"}, slog.New(slog.DiscardHandler)); s != nil || err == nil {
		t.Error("a socket that is not there is a store")
	}
}

// A far side that was slow once is told everything else, and what it answers late is no answer to what is asked later.
func TestSlowStore(t *testing.T) {
	var said bytes.Buffer
	m := newSilentManager(t)
	s, err := open(inherited{path: m.path}, slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	s.patience = 50 * time.Millisecond
	s.Keep("a", listener(t))
	s.Flush() // nobody reads
	s.Drop("a")
	s.Keep("b", listener(t))
	m.serve(t)
	s.patience = deafly * patienceHere
	s.Flush()
	if got := m.names(); !slices.Equal(got, []string{"b"}) {
		t.Errorf("held: %v", got)
	}
	s.Clear()
	if got := m.names(); len(got) > 0 {
		t.Errorf("held after the end: %v", got)
	}
	if n := strings.Count(said.String(), "answers again"); n != 1 {
		t.Errorf("said %d times: %s", n, said.String())
	}
}

// A removal that did not get through, to a far side whose queue is full, is said again at the end.
func TestFullStore(t *testing.T) {
	m := newSilentManager(t)
	s, err := open(inherited{path: m.path}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.Keep("a", listener(t))
	s.patience = time.Millisecond
	for range 1 << 16 {
		if s.Ready(); s.deaf {
			break
		}
	}
	s.Drop("a")
	if s.closed || !s.deaf {
		t.Fatalf("given up: %v, deaf: %v", s.closed, s.deaf)
	}
	m.serve(t)
	s.patience = deafly * patienceHere
	s.Clear()
	if got := m.names(); len(got) > 0 {
		t.Errorf("held after the end: %v", got)
	}
}

// A process that is out of descriptors for a moment keeps its store.
func TestNoDescriptors(t *testing.T) {
	m := newManager(t)
	s, err := open(inherited{path: m.path}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	s.Flush()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	s.Keep("a", listener(t))
	s.Flush()
	if got := m.names(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("held: %v", got)
	}
}

// No store is one of which all is asked in vain.
func TestNoStore(t *testing.T) {
	s, err := open(inherited{}, slog.New(slog.DiscardHandler))
	if s != nil || err != nil {
		t.Fatal(s, err)
	}
	s.Keep("a", listener(t))
	s.Drop("a")
	s.Flush()
	s.Ready()
	s.Clear()
	if s.Take("a") != nil || s.Sweep() != 0 || s.Left() != 0 {
		t.Error("there is something")
	}
}

func TestWhoseDescriptors(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want int
		bad  bool
	}{
		{map[string]string{}, 0, false},
		{map[string]string{"LISTEN_FDS": "0", "LISTEN_PID": "7"}, 0, false},
		{map[string]string{"LISTEN_FDS": "3", "LISTEN_PID": "8"}, 0, false}, // another process's
		{map[string]string{"LISTEN_FDS": "3"}, 0, false},
		{map[string]string{"LISTEN_FDS": "3", Supervised: "5"}, 0, false},
		{map[string]string{"LISTEN_FDS": "x", "LISTEN_PID": "7"}, 0, true},
		{map[string]string{"LISTEN_FDS": "-1", Supervised: "6"}, 0, true},
		{map[string]string{"LISTEN_FDS": "70000", Supervised: "6"}, 0, true},
	} {
		in, err := inherit(func(k string) string { return c.env[k] }, 7, 6)
		if len(in.named) != c.want || (err != nil) != c.bad {
			t.Errorf("%v: %d, %v", c.env, len(in.named), err)
		}
	}
	env := Environ([]string{"A=b", "LISTEN_PID=9", "NOTIFY_SOCKET=/x", "LISTEN_FDS=9", Supervised + "=1"}, []string{Notify, "a.b"}, 6)
	if got := strings.Join(env, " "); got != "A=b ZTUN_SUPERVISED=6 LISTEN_FDS=2 LISTEN_FDNAMES=notify:a.b" {
		t.Error(got)
	}
}
