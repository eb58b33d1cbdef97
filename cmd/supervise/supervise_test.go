package supervise_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin/fdstore"
	"ztun/cmd/supervise"
)

const patience = 20 * time.Second

// role is what this program is in a process that a test has started.
const role = "SUPERVISE_TEST_ROLE"

// again is set in a process that has executed itself.
const again = "SUPERVISE_TEST_AGAIN"

func init() {
	if os.Getenv(role) == "child" {
		runtime.LockOSThread() // the first, so that executeAgain has another
		supervise.EndWithParent(os.Getenv, os.Getenv(again) != "")
	}
}

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "parent":
		runtime.LockOSThread()
		os.Exit(supervise.Run(supervise.Options{Path: "/proc/self/exe", Args: os.Args, Often: 3,
			Env: append([]string{role + "=child"}, os.Environ()...), Pause: time.Millisecond}))
	case "child":
		os.Exit(child())
	}
	os.Exit(m.Run())
}

// child is the proxy: it serves one address, with a store, and says on standard output that it does. Who connects
// is told its process id, and may say what is to become of it.
func child() int {
	if os.Getenv("REEXEC") != "" && os.Getenv(again) == "" {
		if err := executeAgain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 9
		}
	}
	store := fdstore.Open(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if os.Getenv("EXIT") != "" {
		n, _ := strconv.Atoi(os.Getenv("EXIT"))
		return n
	}
	if os.Getenv("LISTEN_FDS")+os.Getenv("NOTIFY_SOCKET")+os.Getenv(fdstore.Supervised) != "" {
		fmt.Fprintln(os.Stderr, "the store is in the environment of what this process starts")
		return 9
	}
	name := fdstore.Name(1, 2, "tcp", netip.MustParseAddrPort("127.0.0.1:80"))
	var l net.Listener
	var err error
	if f := store.Take(name); f != nil {
		l, err = net.FileListener(f)
		f.Close()
	} else if l, err = net.Listen("tcp", "127.0.0.1:0"); err == nil {
		store.Keep(name, l.(*net.TCPListener))
		n, _ := strconv.Atoi(os.Getenv("KEEP"))
		for i := range n {
			store.Keep("more"+strconv.Itoa(i), l.(*net.TCPListener))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 9
	}
	if os.Getenv("ORPHAN") != "" { // one that we leave behind, for the parent to bury if it is process 1
		exec.Command("/bin/sh", "-c", "sleep 0 & ").Run()
	}
	store.Ready()
	store.Flush()
	fmt.Printf("%d %s\n", os.Getpid(), l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return 9
		}
		fmt.Fprintln(c, os.Getpid())
		word, _ := bufio.NewReader(c).ReadString('\n')
		switch code, err := strconv.Atoi(strings.TrimSpace(word)); {
		case err == nil:
			return code
		case word == "clear\n":
			store.Clear()
			return 7
		case word == "panic\n":
			panic("as asked")
		}
		c.Close()
	}
}

// executeAgain does so from another thread than the first, as the proxy does.
func executeAgain() error {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		failed <- syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), again+"=1"))
	}()
	return <-failed
}

// supervised is a parent with its child.
type supervised struct {
	t    *testing.T
	cmd  *exec.Cmd
	said *bufio.Reader
	addr string
	log  lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t *testing.T, env ...string) *supervised {
	t.Helper()
	return startBy(t, exec.Command("/proc/self/exe"), env...)
}

// startBy starts the parent by another command.
func startBy(t *testing.T, cmd *exec.Cmd, env ...string) *supervised {
	t.Helper()
	s := &supervised{t: t, cmd: cmd}
	s.cmd.Env = append(append(os.Environ(), role+"=parent"), env...)
	s.cmd.Stderr = &s.log
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.said = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		s.cmd.Wait()
	})
	return s
}

// begun waits until a child serves.
func (s *supervised) begun() (pid int) {
	s.t.Helper()
	line, err := s.said.ReadString('\n')
	if err != nil {
		s.t.Fatalf("%v: %s", err, s.log.String())
	}
	if _, err := fmt.Sscanf(line, "%d %s", &pid, &s.addr); err != nil {
		s.t.Fatalf("%q: %v", line, err)
	}
	return pid
}

// say tells the child that serves, and returns its process id.
func (s *supervised) say(word string) (pid int) {
	s.t.Helper()
	c, err := net.DialTimeout("tcp", s.addr, patience)
	if err != nil {
		s.t.Fatalf("refused: %v: %s", err, s.log.String())
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fscanln(c, &pid); err != nil {
		s.t.Fatalf("%v: %s", err, s.log.String())
	}
	fmt.Fprintln(c, word)
	io.Copy(io.Discard, c)
	return pid
}

// end is the code that the parent exits with.
func (s *supervised) end() int {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		io.Copy(io.Discard, s.said)
		done <- s.cmd.Wait()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		s.t.Fatalf("the parent does not end: %s", s.log.String())
	}
	return s.cmd.ProcessState.ExitCode()
}

// A child that is killed is another one, with the same listener: nobody who connects at any time is refused, and who
// waits is served. Its own end, and one by a signal to the parent, is the parent's.
func TestKilled(t *testing.T) {
	s := start(t)
	first := s.begun()
	addr := s.addr
	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				failed <- nil
				return
			default:
			}
			c, err := net.DialTimeout("tcp", addr, patience)
			if err != nil {
				failed <- err
				return
			}
			c.Close() // what is under way at the kill may be lost, connecting may not
		}
	}()
	syscall.Kill(first, syscall.SIGKILL)
	second := s.begun()
	if s.addr != addr || second == first {
		t.Errorf("%d at %s after %d at %s", second, s.addr, first, addr)
	}
	if got := s.say("hello"); got != second {
		t.Errorf("%d serves, not %d", got, second)
	}
	s.say("panic")
	third := s.begun()
	if got := s.say("hello"); got != third {
		t.Errorf("%d serves, not %d", got, third)
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Error(err)
	}
	if log := s.log.String(); !strings.Contains(log, "SIGKILL") || !strings.Contains(log, "exit code 2") ||
		!strings.Contains(log, "\terror\tztun\t") {
		t.Errorf("said: %s", log)
	}
	s.say("5")
	if code := s.end(); code != 5 {
		t.Errorf("exit code %d: %s", code, s.log.String())
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("somebody listens")
	}
}

// What the child decides itself stands: an exit code 2 before it was ready (its configuration), any after it has said
// that it is about to end.
func TestGoodOrder(t *testing.T) {
	for _, code := range []int{0, 1, 2} {
		s := start(t, "EXIT="+strconv.Itoa(code))
		if got := s.end(); got != code || strings.Contains(s.log.String(), "started again") {
			t.Errorf("exit code %d: %d, %s", code, got, s.log.String())
		}
	}
	s := start(t)
	s.begun()
	s.say("clear")
	if got := s.end(); got != 7 {
		t.Errorf("exit code %d: %s", got, s.log.String())
	}
}

// A signal goes on to the child, whose end is ours; a kill after it too.
func TestSignals(t *testing.T) {
	for sig, code := range map[syscall.Signal]int{syscall.SIGTERM: 128 + 15, syscall.SIGHUP: 128 + 1, syscall.SIGQUIT: 2} {
		s := start(t)
		s.begun()
		s.cmd.Process.Signal(sig)
		if got := s.end(); got != code || strings.Contains(s.log.String(), "started again") {
			t.Errorf("%v: exit code %d, want %d: %s", sig, got, code, s.log.String())
		}
	}
}

// A child that does not live is given up, with its code.
func TestGivesUp(t *testing.T) {
	s := start(t)
	for range 4 {
		syscall.Kill(s.begun(), syscall.SIGKILL)
	}
	if code := s.end(); code != 128+9 || !strings.Contains(s.log.String(), "too often") {
		t.Errorf("exit code %d: %s", code, s.log.String())
	}
}

// However many sockets a child wants held, the next one can be started with those that are.
func TestFewDescriptors(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := startBy(t, exec.Command("/bin/sh", "-c", `ulimit -n 256 && exec "$0"`, exe), "KEEP=300")
	first := s.begun()
	addr := s.addr
	syscall.Kill(first, syscall.SIGKILL)
	if second := s.begun(); s.addr != addr || second == first {
		t.Errorf("%d at %s after %d at %s", second, s.addr, first, addr)
	}
	if log := s.log.String(); !strings.Contains(log, "there is no room for") {
		t.Errorf("said: %s", log)
	}
	s.say("0")
	if code := s.end(); code != 0 {
		t.Errorf("exit code %d: %s", code, s.log.String())
	}
}

// A parent that is killed takes its child along, also one that has executed itself.
func TestParentKilled(t *testing.T) {
	for _, env := range []string{"REEXEC=", "REEXEC=1"} {
		t.Run(env, func(t *testing.T) { testParentKilled(t, env) })
	}
}

func testParentKilled(t *testing.T, env string) {
	s := start(t, env)
	child := s.begun()
	fd, err := unix.PidfdOpen(child, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	s.cmd.Process.Kill()
	s.cmd.Process.Wait() // cmd's own waits for the child as well, which has its standard error
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds())); n != 1 {
		t.Errorf("the child lives: %v", err)
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// A child whose parent has ended while it executed itself ends, too. Whoever has the variable from elsewhere does not.
func TestParentGone(t *testing.T) {
	for env, want := range map[string]int{again + "=1": 1, again + "=": 5} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), role+"=child", fdstore.Supervised+"=999999999", "EXIT=5", env)
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("%s: exit code %d, want %d: %s", env, code, want, out)
		}
	}
}

// As process 1 it buries what others leave behind, and ends with its child.
func TestProcessOne(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := startBy(t, exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", exe), "ORPHAN=1")
	s.begun()
	s.say("0")
	if code := s.end(); code != 0 {
		t.Errorf("exit code %d: %s", code, s.log.String())
	}
}

func TestWanted(t *testing.T) {
	for _, c := range []struct {
		args string
		env  map[string]string
		pid  int
		want bool
	}{
		{"ztun proxy", nil, 1, true},
		{"ztunnel proxy ztunnel", nil, 1, true},
		{"ztun proxy", nil, 2, false},
		{"ztun proxy", map[string]string{"ZTUN_SUPERVISE": "true"}, 2, true},
		{"ztun proxy", map[string]string{"ZTUN_SUPERVISE": "false"}, 1, false},
		{"ztun proxy", map[string]string{"ZTUN_SUPERVISE": "perhaps"}, 1, false},
		{"ztun proxy", map[string]string{"PROXY_MODE": "dedicated"}, 1, false},
		{"ztun proxy", map[string]string{fdstore.Supervised: "7"}, 1, false},
		{"ztun proxy", map[string]string{fdstore.Supervised: "8"}, 1, true}, // another one's
		{"ztun proxy --help", nil, 1, false},
		{"ztun run", nil, 1, false},
		{"ztun", nil, 1, false},
	} {
		got := supervise.Wanted(strings.Fields(c.args), func(k string) string { return c.env[k] }, c.pid, 7)
		if got != c.want {
			t.Errorf("%s, %v as process %d: %v", c.args, c.env, c.pid, got)
		}
	}
}

// serving is a shelf with room for limit descriptors that serves, the end that a process would have, and a wait for the
// end of its service, which comes when that is closed.
func serving(t *testing.T, limit int) (shelf *supervise.Shelf, far *os.File, ended func()) {
	t.Helper()
	shelf = supervise.NewShelf(limit, slog.New(slog.DiscardHandler))
	near, far, err := supervise.Pair()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		shelf.Serve(near)
	}()
	return shelf, far, func() {
		t.Helper()
		select {
		case <-done:
		case <-time.After(patience):
			t.Fatal("it serves on")
		}
		near.Close()
	}
}

// The shelf holds what it has room for, and nothing that it was not properly given; no descriptor is left open of what
// it refuses.
func TestShelf(t *testing.T) {
	shelf, far, ended := serving(t, 2)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	send := func(text string, n int) {
		t.Helper()
		var oob []byte
		if n > 0 {
			fds := make([]int, n)
			for i := range fds {
				fds[i] = int(w.Fd())
			}
			oob = unix.UnixRights(fds...)
		}
		if err := unix.Sendmsg(int(far.Fd()), []byte(text), oob, nil, 0); err != nil {
			t.Fatalf("%.40q: %v", text, err)
		}
	}
	send("FDSTORE=1\nFDNAME=a", 1)
	send("FDSTORE=1\nFDNAME=a", 1) // in its place
	send("FDSTORE=1\nFDNAME=b", 0)
	send("FDSTORE=1\nFDNAME=b", 2)
	send("FDSTORE=1\nFDNAME=b", 253)
	send("FDSTORE=1", 1)
	send("FDSTORE=1\nFDNAME=notify", 1)
	send("garbage", 1)
	send("READY=1", 1)
	send(strings.Repeat("X", 5000), 1)
	send("FDSTOREREMOVE=1\nFDNAME=never", 1)
	send("FDSTORE=1\nFDNAME=b", 1)
	send("FDSTORE=1\nFDNAME=c", 1) // one too many
	far.Close()
	ended()
	names, _ := shelf.Held()
	if got := strings.Join(names, " "); got != "a b" {
		t.Errorf("held: %s", got)
	}
	shelf.Clear()
	w.Close()
	r.SetReadDeadline(time.Now().Add(patience))
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a descriptor is left: %v", err)
	}
}

// The names of what is held fit into an environment: there is a bound before the kernel's.
func TestShelfNames(t *testing.T) {
	shelf, far, ended := serving(t, 1<<20)
	conn, err := net.FileConn(far)
	if err != nil {
		t.Fatal(err)
	}
	far.Close()
	store := fdstore.New(conn.(*net.UnixConn), map[string]*os.File{}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for i := range 600 {
		store.Keep(strings.Repeat("n", 200)+strconv.Itoa(i), null)
	}
	store.Flush()
	names, _ := shelf.Held()
	defer shelf.Clear()
	if all := len(strings.Join(names, ":")); all > 96<<10 || all < 90<<10 {
		t.Errorf("%d bytes of names", all)
	}
	cmd := exec.Command("/bin/true")
	cmd.Env = fdstore.Environ(nil, names, 1)
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
	conn.Close()
	ended()
}
