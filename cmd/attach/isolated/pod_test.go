package isolated

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun/tuntest/nslab"
)

// openNode makes the node's side in a namespace of the test's own.
func openNode(t *testing.T) *Node { return openNodeIn(t, nslab.New(t)) }

func openNodeIn(t *testing.T, ns *nslab.NS) *Node {
	t.Helper()
	var serving sync.WaitGroup
	n := New(attach.Options{
		NetNS: ns.NS, NodeTUN: "ztun-node", MTU: 1500, IPv6: true, Descriptors: attach.NewDescriptors(1024, nil),
		Serve:  func(_ string, f func() error) { serving.Go(func() { f() }) },
		Logger: func(string) *slog.Logger { return slog.New(slog.DiscardHandler) },
	})
	t.Cleanup(func() { n.Close(); serving.Wait() })
	if err := n.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// nobody serves a pod that nothing arrives at.
type nobody struct{ attach.Handler }

// A namespace that comes as a descriptor is attached and given back like one that has a path, and the descriptor stays
// its owner's. What is no namespace is the request's fault.
func TestNamespaceAsDescriptor(t *testing.T) {
	ns, n := nslab.New(t), openNode(t)
	file, err := os.Open(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	pod := attach.Pod{PodSpec: admin.PodSpec{IPs: []netip.Addr{netip.MustParseAddr("10.91.1.2")}}, Label: "n/p",
		File: file}
	if err := n.Locate(&pod); err != nil {
		t.Fatal(err)
	}
	before := ns.State(t)
	at, err := n.Attach(t.Context(), pod, nobody{})
	if err != nil {
		t.Fatal(err)
	}
	if err := at.Capture(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := ns.IP(t, "addr", "show", "dev", podTUN); !strings.Contains(got, "10.91.1.2/32") {
		t.Errorf("the pod's device: %s", got)
	}
	place := at.Place()
	dev, ino := ns.ID()
	if want := (attach.Place{Dev: dev, Ino: ino}); place != want || !place.Same(pod.Place) || n.Gone(place) != nil {
		t.Errorf("place %+v, want %+v; gone: %v", place, want, n.Gone(place))
	}
	if err := at.Remove(); err != nil {
		t.Error(err)
	}
	if after := ns.State(t); after != before {
		t.Errorf("left behind: before\n%s\nafter\n%s", before, after)
	}
	if err := n.Locate(&pod); err != nil {
		t.Errorf("the descriptor afterwards: %v", err)
	}
	if pod.File, err = os.Open("/dev/null"); err != nil {
		t.Fatal(err)
	}
	defer pod.File.Close()
	if err := n.Locate(&pod); !errors.Is(err, admin.ErrPodInvalid) {
		t.Errorf("a descriptor of something else: %v", err)
	}
}
