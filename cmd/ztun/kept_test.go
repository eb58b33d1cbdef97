package main

import (
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"ztun/admin/fdstore"
	"ztun/cmd/attach"
	"ztun/cmd/supervise"
	"ztun/proxy/state"
)

// keptWorld is a store with a listener in it, and the shelf at its far end.
func keptWorld(t *testing.T) (*fdstore.Store, *supervise.Shelf) {
	t.Helper()
	shelf := supervise.NewShelf(10, slog.New(slog.DiscardHandler))
	near, far, err := supervise.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	conn, err := net.FileConn(far)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		shelf.Serve(near)
	}()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		conn.Close()
		<-served
		near.Close()
		shelf.Clear()
	})
	store := fdstore.New(conn.(*net.UnixConn), map[string]*os.File{}, slog.New(slog.DiscardHandler))
	store.Keep("a", l.(*net.TCPListener))
	store.Flush()
	return store, shelf
}

// leaving is a kind that says when it is told to leave.
type leaving struct {
	attach.Kind
	leave func()
}

func (k leaving) Leave() {
	k.leave()
	k.Kind.Leave()
}

// The store is empty before anybody stops accepting: a listener of its would take connections from a successor that is
// there already.
func TestStoreIsEmptyBeforeLeaving(t *testing.T) {
	m, _ := testManager(t)
	store, shelf := keptWorld(t)
	if held, _ := shelf.Held(); len(held) != 1 {
		t.Fatalf("held: %v", held)
	}
	told := false
	m.kind = leaving{m.kind, func() {
		told = true
		if held, _ := shelf.Held(); len(held) != 0 {
			t.Errorf("told to leave while the store holds %v", held)
		}
	}}
	m.shutdown(t.Context(), nil, store)
	if !told {
		t.Error("nobody was told to leave")
	}
}

// Whose listeners are held: a node's proxy's, and not that of one workload, whose parent has its own ideas of
// descriptors.
func TestOutlived(t *testing.T) {
	for _, c := range []struct {
		mode modeConfig
		want bool
	}{{modeConfig{}, true}, {modeConfig{Rootless: true}, false}, {modeConfig{Dedicated: true}, false},
		{modeConfig{Workload: state.WorkloadInfo{Name: "w"}}, false}} {
		if got := (&Config{Mode: c.mode}).outlived(); got != c.want {
			t.Errorf("%+v: %v", c.mode, got)
		}
	}
}

// The proxy ends with its supervisor also where that has ended while it executed itself: seen before main.
func TestEndsWithSupervisor(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), fdstore.Supervised+"=999999999", executedAgain+"=1")
	out, _ := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != exitFailure || !strings.Contains(string(out), "supervisor has ended") {
		t.Errorf("exit code %d: %s", code, out)
	}
}
