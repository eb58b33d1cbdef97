package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun/netns"
)

// A daemon without descriptors, or one that may not look, does not know whether a pod is gone, and keeps it. What is
// surely gone is told from that.
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
		if err := kept.place().Gone(); err != nil {
			t.Errorf("with the namespace there: %v", err)
		}
		return attach.NamespaceError(err)
	})
	if !errors.Is(err, admin.ErrPodUnavailable) || errors.Is(err, admin.ErrPodInvalid) {
		t.Errorf("a shortage is the request's fault: %v", err)
	}
	for _, c := range []struct {
		s    savedPod
		gone bool
	}{{kept, false}, {loop, false}, {none, true}, {file, true}} {
		if err := c.s.place().Gone(); (err != nil) != c.gone {
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

// A list of pods that cannot be read ends the start, so that the next change does not overwrite it; one that is no
// list is kept aside.
func TestUnreadableListOfPods(t *testing.T) {
	m, _ := testManager(t)
	want := []byte(`[{"name":"a"}]`)
	if err := os.WriteFile(m.stateFile(), want, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := withoutDescriptors(t, func() error {
		return m.adopt(t.Context())
	}); !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), m.stateFile()) {
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
	m.kind.(*noKind).sweep = func() error {
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
	if n := count() - before; n > attach.PodDescriptors || n < attach.PodDescriptors/2 {
		t.Errorf("a pod takes %d descriptors, charged are %d", n, attach.PodDescriptors)
	}
	l.detach(t, p)
	if n := count() - before; n != 0 {
		t.Errorf("afterwards %d descriptors are left", n)
	}
	// What is booked is what it is charged for, no less and no more: beside one pod's share of 10 another one fits into
	// 20 and not into 19. (Of 26, 25 and 13 descriptors the daemon keeps a quarter.)
	for limit, fits := range map[uint64]bool{26: true, 25: false, 13: false} {
		fds := l.open(t, limit)
		if p, err = l.attach(t); err != nil {
			t.Fatal(err)
		}
		other := fds.ForPod("other")
		if (other != nil) != fits {
			t.Errorf("of %d descriptors another pod gets its share: %v, want %v", limit, other != nil, fits)
		}
		other.Release()
		l.detach(t, p)
		if other = fds.ForPod("other"); other == nil {
			t.Errorf("of %d descriptors some are booked when the pod is gone", limit)
		}
		other.Release()
	}
	// A pod for which there is no room is not attached, and says why.
	l.open(t, 8)
	if _, err := l.attach(t); !errors.Is(err, admin.ErrPodUnavailable) || !strings.Contains(err.Error(), "LimitNOFILE") {
		t.Errorf("without room: %v", err)
	}
}
