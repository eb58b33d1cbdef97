package netns_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref, want string
		notExist  bool
	}{
		{"", "empty reference", true},
		{"no-such-ns",
			`no such network namespace: file does not exist: "no-such-ns": is it a path, a name in /var/run/netns or a pid?`,
			true},
		{"/no/such/path", "is it a path, a name in /var/run/netns or a pid?", true},
		{file + "/x", "is it a path", true},
		{"..", "is it a path", true},
		{"2147483647", "neither a name in /var/run/netns nor the pid of a live process", true},
		{"99999999999999999999999", "is it a path", true},
		{"-1", "is it a path", true},
		{file, "is not a network namespace", false},
		{fifo, "is not a network namespace", false},
		{"/proc/self/ns/mnt", "is a namespace, but not a network namespace", false},
		{dir, "is not a network namespace", false},
	} {
		ns, err := netns.Open(c.ref)
		if err == nil {
			ns.Close()
			t.Errorf("Open(%q) succeeded", c.ref)
			continue
		}
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("Open(%q): %q does not say %q", c.ref, err, c.want)
		}
		if got := errors.Is(err, netns.ErrNotExist) && errors.Is(err, fs.ErrNotExist); got != c.notExist {
			t.Errorf("Open(%q): matches ErrNotExist: %v", c.ref, got)
		}
	}
}

func TestIdentity(t *testing.T) {
	a, b := nslab.New(t), nslab.New(t)
	again, err := netns.Open(a.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	byPath, err := netns.Open("/var/run/netns/" + a.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer byPath.Close()
	dup, err := a.Dup()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*netns.NS{again, byPath, dup} {
		if !a.Same(n) {
			t.Errorf("%v is not the same as %v", n, a)
		}
	}
	if a.Same(b.NS) || a.Same(nil) {
		t.Error("two namespaces are the same")
	}
	dup.Close()
	if err := a.Do(func() error { return nil }); err != nil {
		t.Errorf("closing a duplicate broke the original: %v", err)
	}
	if err := dup.Do(func() error { return nil }); err == nil {
		t.Error("Do in a closed namespace succeeded")
	}
	own, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	pid, err := netns.Open(strconv.Itoa(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer pid.Close()
	if !own.Same(pid) {
		t.Error("our pid's namespace is not our own")
	}
}

// threadNS is the namespace of the thread that runs it, as the kernel names it.
func threadNS(t *testing.T) string {
	s, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Error(err)
	}
	return s
}

func TestDo(t *testing.T) {
	a, b := nslab.New(t), nslab.New(t)
	home := threadNS(t)
	var inA, inB, nested string
	want := errors.New("from f")
	err := a.Do(func() error {
		inA = threadNS(t)
		// A goroutine of f's is not in the namespace, and neither is another Do's.
		var wg sync.WaitGroup
		wg.Go(func() { nested = threadNS(t) })
		wg.Wait()
		if err := b.Do(func() error { inB = threadNS(t); return nil }); err != nil {
			return err
		}
		if got := threadNS(t); got != inA {
			t.Errorf("after a nested Do: in %s", got)
		}
		return want
	})
	if err != want {
		t.Errorf("Do returned %v", err)
	}
	if inA == home || inB == home || inA == inB || nested != home {
		t.Errorf("home %s, in a %s, in b %s, goroutine %s", home, inA, inB, nested)
	}
	func() {
		defer func() {
			if got := recover(); got != "boom" {
				t.Errorf("recovered %v", got)
			}
		}()
		a.Do(func() error { panic("boom") })
	}()
	if err := a.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do whose function left its goroutine returned no error")
	}
}

// TestDoThreads looks at every thread of the process after many concurrent Do: none may be left in a foreign namespace.
func TestDoThreads(t *testing.T) {
	a, b := nslab.New(t), nslab.New(t)
	home := threadNS(t)
	var wg sync.WaitGroup
	for i := range 32 {
		ns := a
		if i%2 == 0 {
			ns = b
		}
		wg.Go(func() {
			for range 20 {
				if err := ns.Do(func() error {
					// A blocking system call makes the scheduler start threads: these must come from a clean one.
					l, err := net.Listen("tcp", "127.0.0.1:0")
					if err != nil {
						return err
					}
					return l.Close()
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatal("no threads found", err)
	}
	for _, task := range tasks {
		if s, err := os.Readlink(task); err == nil && s != home {
			t.Errorf("thread %s is in %s", task, s)
		}
	}
}
