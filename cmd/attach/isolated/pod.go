package isolated

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// podTUN is the name of the TUN device in a pod's namespace.
const podTUN = "ztun0"

// pod is one attached pod.
type pod struct {
	attach.KernelTCP
	attach.Loopback
	node *Node
	spec attach.Pod
	h    attach.Handler
	ns   *netns.NS // the pod's
	plan steer.Plan
	fds  *attach.Share // what the pod itself takes of the daemon's descriptors
	log  *slog.Logger

	loDown   func() error // takes the loopback device down again, if it was
	captured bool
	removed  sync.Once
}

// Attach implements attach.Kind. What it has made is unmade when a later step fails.
func (n *Node) Attach(_ context.Context, spec attach.Pod, h attach.Handler) (_ attach.Attachment, err error) {
	o := &n.o
	mtu := spec.MTU
	if mtu == 0 {
		mtu = o.MTU
	}
	p := &pod{node: n, spec: spec, h: h, log: o.Logger("pods")}
	p.plan = steer.PodPlan(steer.PodConfig{Name: spec.Label, Addrs: spec.IPs, TUN: podTUN, NodeTUN: o.NodeTUN, MTU: mtu})
	var undo []func()
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()
	if p.fds = o.Descriptors.ForPod(spec.Label); p.fds == nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, attach.ErrNoDescriptor)
	}
	undo = append(undo, p.fds.Release)
	if p.ns, err = attach.OpenApart(spec, n.ns); err != nil {
		return nil, err
	}
	undo = append(undo, func() { p.ns.Close() })
	p.Loopback = attach.Loopback{NS: p.ns, Options: o}
	p.KernelTCP = attach.KernelTCP{Descriptors: o.Descriptors, Label: spec.Label, Socket: o.Socket,
		Pod: p.ns, Mesh: o.NetNS}
	dev, err := tun.Open(tun.Options{Name: podTUN, NetNS: p.ns, MTU: mtu, Persistent: true, Plain: o.Plain})
	if err != nil {
		return nil, err
	}
	// By name and not by handle: closing the stack closes the device, and a persistent one stays.
	undo = append(undo, func() {
		dev.Close()
		p.removeDevice()
	})
	if p.Stack, err = attach.NewStack(o, spec, mtu, dev, n.uplink, h); err != nil {
		return nil, err
	}
	undo = append(undo, func() { p.Stack.Stop() })
	// What stands in the way is found before the first change: the kernel keeps 127.0.0.1 on a loopback that was up once.
	if err = steer.Check(p.plan, p.namespaces()); err != nil {
		return nil, err
	}
	if p.loDown, err = steer.LoopbackUp(p.ns); err != nil {
		return nil, fmt.Errorf("the loopback device of %s: %w", p.ns, err)
	}
	return p, nil
}

func (p *pod) namespaces() steer.Namespaces { return steer.Namespaces{Node: p.node.ns, Pod: p.ns} }

// removeDevice is for a pod that was never captured: what is left is said, and the reason why it was not captured
// goes to the caller.
func (p *pod) removeDevice() {
	if err := tun.Remove(p.ns, podTUN); err != nil {
		p.log.Warn("a device may be left in the pod's namespace", "pod", p.spec.Label, "device", podTUN, "error", err)
	}
}

// Place implements attach.Attachment.
func (p *pod) Place() attach.Place { return attach.PlaceOf(p.spec, p.ns) }

// Capture implements attach.Attachment.
func (p *pod) Capture(ctx context.Context) error {
	// Listed before the stack runs: what it is going to know is not among them.
	left, err := attach.Orphans(p.ns, p.spec.IPs)
	if err != nil {
		p.log.Warn("the pod's connections of an earlier run cannot be listed", "pod", p.spec.Label, "error", err)
	}
	p.Run()
	// The first step that is applied may bring peers: those have waited since the last daemon, and whom nobody knows is
	// reset.
	p.node.index(func(t map[netip.Addr]*pod) {
		for _, a := range p.spec.IPs {
			t[a] = p
		}
	})
	// The pod's own routes come last in the plan: nothing leaves it before all else stands.
	if err := steer.Apply(ctx, p.plan, p.namespaces()); err != nil {
		return err
	}
	p.captured = true
	if len(left) > 0 {
		p.Go("a pod's connections of an earlier run", func(ctx context.Context) { p.EndOrphans(ctx, p.ns, left) })
	}
	return nil
}

// Remove implements attach.Attachment.
func (p *pod) Remove() (err error) {
	p.removed.Do(func() {
		p.Stop()
		if p.captured {
			err = errors.Join(steer.Undo(p.plan, p.namespaces()), tun.Remove(p.ns, podTUN))
		} else {
			if err := p.loDown(); err != nil {
				p.log.Warn("the loopback device of the pod's namespace is left up", "pod", p.spec.Label, "error", err)
			}
			p.removeDevice()
		}
		p.node.index(func(t map[netip.Addr]*pod) {
			for a, q := range t {
				if q == p {
					delete(t, a)
				}
			}
		})
		p.ns.Close()
		p.fds.Release()
		p.node.o.Descriptors.Forget(p.spec.Label)
	})
	return err
}
