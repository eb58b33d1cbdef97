package steered

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"

	"ztun/cmd/attach"
	"ztun/tun/netns"
	"ztun/tun/sandwich"
)

// podDevice is what every CNI calls a pod's first device.
const podDevice = "eth0"

// Node is the kind.
type Node struct {
	o       attach.Options
	ns      *netns.NS // the node's
	records string    // the directory of what there was in pods
	kernel  bool      // UDP and ICMP are to go by the kernel, if it can
	native  bool      // and it can
	rules   bool      // eth0 stays in the pod

	mu      sync.Mutex
	leaving bool // the daemon is about to end
	meshes  map[*net.TCPListener]struct{}
}

var _ attach.Kind = (*Node)(nil)

// New makes the kind; nothing is touched before Open. Without kernel, UDP and ICMP go by netstack wherever pods are.
// With rules the CNI's device stays in the pod.
func New(o attach.Options, kernel, rules bool) *Node {
	return &Node{o: o, records: Records(o.Record), kernel: kernel, rules: rules, meshes: map[*net.TCPListener]struct{}{}}
}

// Records is the directory beside the file of attach.Options.Record in which pods are written down.
func Records(record string) string { return filepath.Join(filepath.Dir(record), "steered") }

// Open implements attach.Kind: it finds out what the kernel can do.
func (n *Node) Open(ctx context.Context) (err error) {
	if n.ns, err = n.o.Namespace(); err != nil {
		return err
	}
	if n.o.Stack.Datagrams == nil && !n.rules {
		return nil // nothing is to pass
	}
	if !n.kernel && !n.rules {
		return nil
	}
	err = sandwich.ProbeCopy(ctx)
	if n.rules {
		if err != nil {
			return fmt.Errorf("ZTUN_STEERING=rules needs what copies ICMP errors (cls_u32, act_mirred): a path MTU would be "+
				"learnt by the pod alone, and the mesh's connections stand still; steered does without: %w", err)
		}
		n.native = n.kernel && n.o.Stack.Datagrams != nil
		return nil
	}
	if err != nil {
		n.o.Logger("ztun").Warn("UDP and ICMP of steered pods go by netstack: the kernel cannot copy ICMP (cls_u32, "+
			"act_mirred)", "reason", err)
		return nil
	}
	n.native = true
	return nil
}

// Locate implements attach.Kind.
func (n *Node) Locate(p *attach.Pod) error { return attach.LocateAddrs(p) }

// Shares implements attach.Kind.
func (*Node) Shares() bool { return false }

// Outlives implements attach.Kind.
func (*Node) Outlives() bool { return true }

// Gone implements attach.Kind.
func (n *Node) Gone(p attach.Place) error { return p.Gone() }

// Has says whether there is a record of a pod: it was captured, or about to be, when it was last heard of.
func (n *Node) Has(p attach.Place) bool {
	r, _ := sandwich.Find(n.records, p.Dev, p.Ino)
	return r != nil
}

// Clean implements attach.Kind.
func (n *Node) Clean(p attach.Place) error {
	r, err := sandwich.Find(n.records, p.Dev, p.Ino)
	if r == nil {
		return err
	}
	return r.Restore(context.Background(), n.records)
}

// Sweep implements attach.Kind: pods that went away while no daemon ran have left S and their CNI's device in it.
func (n *Node) Sweep(keep []netip.Addr) error { return Undo(n.records, keep) }

// Leave implements attach.Kind. Peers' SYNs have no answer until the next daemon listens (sandwich.Live).
func (n *Node) Leave() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leaving = true
	for l := range n.meshes {
		n.deafen(l)
	}
}

func (n *Node) deafen(l *net.TCPListener) {
	if err := netns.Deafen(l); err != nil {
		n.o.Logger("pods").Error("new connections to port 15008 are let in until the end", "error", err)
	}
}

// listens remembers a pod's listener for Leave, until forget.
func (n *Node) listens(l *net.TCPListener) (forget func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.meshes[l] = struct{}{}
	if n.leaving {
		n.deafen(l)
	}
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.meshes, l)
	}
}

// Close implements attach.Kind.
func (n *Node) Close() error { return nil }

// Stats implements attach.Kind.
func (n *Node) Stats() attach.NodeStats { return attach.NodeStats{} }

// Look tells which pods there are a record of, as commands that look at them.
func Look(records string) (out []string, err error) {
	all, err := sandwich.Records(records)
	for _, r := range all {
		out = append(out, fmt.Sprintf("%s (in %s)", r.Facts.Dev, r.Name()))
	}
	return out, err
}

// HasDevice says whether a pod's namespace has an eth0.
func HasDevice(ns *netns.NS) (bool, error) {
	all, err := ns.Addrs()
	return slices.ContainsFunc(all, func(a netns.Addr) bool { return a.Device == podDevice }), err
}
