package isolated

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"ztun/cmd/attach"
	"ztun/netstack"
	"ztun/proxy/ports"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// Node is the kind, and what all isolated pods of a daemon share: the node's TUN with netstack's Uplink, the device
// that ends with the daemon, the rules, the mesh's one listener.
type Node struct {
	o      attach.Options
	ns     *netns.NS  // the node's
	dev    tun.Device // stays when the daemon ends
	live   tun.Device // steer.LiveTUN, which ends with the daemon
	uplink *netstack.Uplink
	mesh   *net.TCPListener // not held for the next daemon: see doc.go

	mu     sync.Mutex // serialises changes of byAddr
	byAddr atomic.Pointer[map[netip.Addr]*pod]

	unknown atomic.Uint64 // mesh connections for an address that no pod has
}

var _ attach.Kind = (*Node)(nil)

// New makes the kind; nothing is touched before Open.
func New(o attach.Options) *Node {
	n := &Node{o: o}
	n.byAddr.Store(&map[netip.Addr]*pod{})
	return n
}

// Open implements attach.Kind.
func (n *Node) Open(ctx context.Context) (err error) {
	o := &n.o
	if n.ns, err = o.Namespace(); err != nil {
		return err
	}
	n.dev, err = tun.Open(tun.Options{Name: o.NodeTUN, NetNS: o.NetNS, MTU: o.MTU, Plain: o.Plain, Persistent: true})
	if err != nil {
		return err
	}
	n.mesh, err = netns.ListenTransparent(ctx, o.NetNS, ports.HBONE, o.IPv6, o.Socket)
	if err != nil {
		return fmt.Errorf("port %d (HBONE): %w", ports.HBONE, err)
	}
	// After the listener: of a killed process the kernel closes the higher descriptors first (its task work is a stack).
	if n.live, err = tun.Open(tun.Options{Name: steer.LiveTUN, NetNS: o.NetNS, MTU: o.MTU}); err != nil {
		return err
	}
	if why := n.dev.Offload().Why; why != "" {
		o.Logger("ztun").Warn("the TUN device runs without offload, which costs most of its speed", "reason", why)
	}
	n.uplink = netstack.NewUplink(n.dev, o.Panics, o.Logger("netstack"))
	plan := steer.NodePlan(steer.NodeConfig{TUN: o.NodeTUN, MTU: o.MTU, IPv6: o.IPv6})
	if err := n.remember(plan); err != nil {
		return err
	}
	if err := steer.Apply(ctx, plan, steer.Namespaces{Node: n.ns}); err != nil {
		return err
	}
	o.Serve("node TUN", func() error { return n.uplink.Run(context.Background()) })
	o.Serve("port 15008", func() error { return n.serveMesh(n.mesh) })
	return nil
}

// Locate implements attach.Kind.
func (n *Node) Locate(p *attach.Pod) error { return attach.Locate(p) }

// Shares implements attach.Kind.
func (*Node) Shares() bool { return false }

// Outlives implements attach.Kind.
func (*Node) Outlives() bool { return true }

// Gone implements attach.Kind.
func (n *Node) Gone(p attach.Place) error { return p.Gone() }

// Clean implements attach.Kind: the pod's addresses and routes go with its device.
func (n *Node) Clean(p attach.Place) error {
	ns, err := netns.Open(p.Path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if dev, ino := ns.ID(); dev != p.Dev || ino != p.Ino {
		return nil // another one by now, where we have made nothing
	}
	return tun.Remove(ns, podTUN)
}

// Sweep implements attach.Kind.
func (n *Node) Sweep(keep []netip.Addr) error {
	swept, err := steer.Sweep(n.ns, keep)
	if len(swept) > 0 {
		n.o.Logger("ztun").Info("removed routes of an earlier run", "addresses", fmt.Sprint(swept))
	}
	return err
}

// Leave implements attach.Kind. Peers' SYNs have no answer from now on, as after the end of this process, until the
// next one listens.
func (n *Node) Leave() {
	if n.mesh == nil {
		return
	}
	if err := netns.Deafen(n.mesh); err != nil {
		n.o.Logger("ztun").Error("new connections to port 15008 are let in until the end", "error", err)
	}
}

// Close implements attach.Kind. The node's TUN stays as long as a pod is routed to it.
func (n *Node) Close() error {
	var errs []error
	if n.live != nil { // before the listener, without which callers of a pod would be refused
		errs = append(errs, n.live.Close())
	}
	switch {
	case n.uplink != nil:
		errs = append(errs, n.uplink.Close())
	case n.dev != nil:
		errs = append(errs, n.dev.Close())
	}
	if n.mesh != nil {
		errs = append(errs, n.mesh.Close())
	}
	if n.dev != nil { // also what an earlier life has left counts, which this one may not have come to
		seen, err := steer.Observe(n.ns)
		if errs = append(errs, err); err == nil && len(seen.Pods) == 0 {
			errs = append(errs, tun.Remove(n.ns, n.o.NodeTUN))
		}
	}
	return errors.Join(errs...)
}

// Stats implements attach.Kind.
func (n *Node) Stats() attach.NodeStats {
	s := attach.NodeStats{MeshUnknown: n.unknown.Load()}
	if n.uplink != nil {
		link := n.uplink.Stats()
		s.Link, s.Offload = &link, n.dev.Offload()
	}
	return s
}

// index changes the table by which accepted mesh connections find their pod.
func (n *Node) index(change func(map[netip.Addr]*pod)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t := map[netip.Addr]*pod{}
	for a, p := range *n.byAddr.Load() {
		t[a] = p
	}
	change(t)
	n.byAddr.Store(&t)
}
