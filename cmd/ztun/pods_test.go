package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy/state"
	"ztun/tun/netns"
)

// noKind is a way of attaching that can attach nothing, with namespaces as they are.
type noKind struct {
	attach.Kind
	sweep func() error
}

func (*noKind) Locate(p *attach.Pod) error      { return attach.Locate(p) }
func (*noKind) Shares() bool                    { return false }
func (*noKind) Gone(p attach.Place) error       { return p.Gone() }
func (k *noKind) Sweep(keep []netip.Addr) error { return k.sweep() }
func (*noKind) Clean(attach.Place) error        { return nil }
func (*noKind) Outlives() bool                  { return true }
func (*noKind) Leave()                          {}

// noHost can build no pod, and knows none.
type noHost struct{}

func (noHost) newPod(context.Context, attach.Pod) (*pod, error) {
	return nil, errors.New("no devices here")
}
func (noHost) podsChanged()                  {}
func (noHost) known(state.WorkloadInfo) bool { return false }

// testManager makes a podManager that can attach nothing, in a directory of its own.
func testManager(t *testing.T, saved ...savedPod) (*podManager, *int) {
	t.Helper()
	swept := 0
	m := newPodManager(&Config{State: stateConfig{Dir: t.TempDir()}, Attach: attachConfig{MTU: 1500},
		Net: netConfig{IPv6: true}, Process: processConfig{TerminationDeadline: time.Second}},
		&noKind{sweep: func() error { swept++; return nil }}, noHost{}, nil, slog.New(slog.DiscardHandler))
	b, err := json.Marshal(saved)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.stateFile(), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m, &swept
}

func ownNamespace(t *testing.T, name, ip string) savedPod {
	t.Helper()
	ns, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	s := savedPod{PodSpec: admin.PodSpec{
		Name: name, Namespace: "default", ServiceAccount: "default", NetNS: "/proc/self/ns/net",
		IPs: []netip.Addr{netip.MustParseAddr(ip)},
	}}
	s.Dev, s.Ino = ns.ID()
	return s
}

// A pod whose namespace has been replaced by another of the same path is not given its identity.
func TestAdoptChecksTheNamespace(t *testing.T) {
	same, other, nowhere := ownNamespace(t, "same", "10.1.0.2"), ownNamespace(t, "other", "10.1.0.3"),
		ownNamespace(t, "nowhere", "10.1.0.4")
	other.Ino++
	nowhere.NetNS = filepath.Join(t.TempDir(), "gone")
	m, _ := testManager(t, same, other, nowhere)
	list := m.List()
	if len(list) != 1 || list[0].Name != "same" || list[0].State != "Pending" ||
		!strings.Contains(list[0].Error, "no devices here") {
		t.Fatalf("pods after a restart: %+v", list)
	}
	b, err := os.ReadFile(m.stateFile())
	if err != nil {
		t.Fatal(err)
	}
	var kept []savedPod
	if err := json.Unmarshal(b, &kept); err != nil || len(kept) != 1 || kept[0].Ino != same.Ino {
		t.Errorf("saved %s (%v)", b, err)
	}
}

// A pending pod that is deleted, or whose namespace goes, leaves neither a record nor routes.
func TestPendingPodLeavesNothing(t *testing.T) {
	a, b := ownNamespace(t, "a", "10.1.0.2"), ownNamespace(t, "b", "10.1.0.3")
	a.Dev, a.Ino = 0, 0 // as saved before the namespace was
	b.NetNS = filepath.Join(t.TempDir(), "b")
	if err := os.Symlink("/proc/self/ns/net", b.NetNS); err != nil {
		t.Fatal(err)
	}
	m, swept := testManager(t, a, b)
	if _, pending := m.counts(); pending != 2 {
		t.Fatalf("%d pending: %+v", pending, m.List())
	}
	if err := m.Delete(t.Context(), "default", "a"); err != nil || *swept != 1 {
		t.Errorf("delete: %v, swept %d times", err, *swept)
	}
	if err := os.Remove(b.NetNS); err != nil {
		t.Fatal(err)
	}
	m.retryPending(t.Context())
	if _, pending := m.counts(); pending != 0 || *swept != 2 {
		t.Errorf("%d pending, swept %d times", pending, *swept)
	}
	if got, err := os.ReadFile(m.stateFile()); err != nil || strings.TrimSpace(string(got)) != "[]" {
		t.Errorf("saved %q (%v)", got, err)
	}
}

func TestAddDuringShutdown(t *testing.T) {
	m, _ := testManager(t)
	m.shutdown(t.Context(), nil, nil)
	if err := m.Add(t.Context(), ownNamespace(t, "late", "10.1.0.9").PodSpec); !errors.Is(err, admin.ErrPodUnavailable) {
		t.Errorf("add during shutdown: %v", err)
	}
}

func TestAbsoluteNetNS(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"a": "a", "123": "123", "/run/netns/a": "/run/netns/a",
		"./a": filepath.Join(dir, "a"), "netns/a": filepath.Join(dir, "netns/a"),
	} {
		if got := absoluteNetNS(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// The error stays one line, whatever the value looks like.
func TestConfigErrorIsOneLine(t *testing.T) {
	_, err := loadConfig(func(name string) (string, bool) {
		if name == "PROXY_CONFIG" {
			return "proxyAdminPort: x\nstatsPort: y\n", true
		}
		return "", false
	}, os.Environ)
	var ce *configError
	if !errors.As(err, &ce) || ce.name != "PROXY_CONFIG" || strings.Contains(err.Error(), "\n") {
		t.Errorf("%q", err)
	}
}
