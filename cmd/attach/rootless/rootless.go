package rootless

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// deviceName is the TUN in the workload's namespace.
const deviceName = "ztun0"

// Kind is the way of attaching.
type Kind struct {
	o    attach.Options
	in   Inbound
	dial net.Dialer

	leaving atomic.Bool
	open    listeners
}

var _ attach.Kind = (*Kind)(nil)

// New makes the kind.
func New(o attach.Options, in Inbound) *Kind {
	// Tunnels see to what waits in the kernel unsent themselves.
	o.Socket.NotSentLowat = 0
	return &Kind{o: o, in: in, dial: net.Dialer{KeepAliveConfig: o.Socket.KeepAlive, Control: o.Socket.Tune}}
}

// Locate implements attach.Kind.
func (k *Kind) Locate(p *attach.Pod) error {
	if k.in.TUN != nil {
		return nil // who knows
	}
	return attach.Locate(p)
}

// Shares implements attach.Kind.
func (*Kind) Shares() bool { return false }

// Outlives implements attach.Kind.
func (*Kind) Outlives() bool { return false }

// Gone implements attach.Kind.
func (*Kind) Gone(p attach.Place) error { return p.Gone() }

// Clean implements attach.Kind: nothing outlives the daemon.
func (*Kind) Clean(attach.Place) error { return nil }

// Sweep implements attach.Kind.
func (*Kind) Sweep([]netip.Addr) error { return nil }

// Leave implements attach.Kind.
func (k *Kind) Leave() { k.leaving.Store(true) }

// Stats implements attach.Kind.
func (*Kind) Stats() attach.NodeStats { return attach.NodeStats{} }

// workload is what is attached.
type workload struct {
	attach.KernelTCP // but for the mesh and the network, which are the user's sockets'
	attach.Loopback
	kind    *Kind
	spec    attach.Pod
	h       attach.Handler
	ns      *netns.NS
	plan    steer.Plan
	fds     *attach.Share
	removed sync.Once
}

// Attach implements attach.Kind.
func (k *Kind) Attach(_ context.Context, spec attach.Pod, h attach.Handler) (_ attach.Attachment, err error) {
	o := &k.o
	mtu := spec.MTU
	if mtu == 0 {
		mtu = o.MTU
	}
	w := &workload{kind: k, spec: spec, h: h}
	w.plan = steer.InsidePlan(steer.PodConfig{Name: spec.Label, Addrs: spec.IPs, TUN: deviceName, MTU: mtu})
	defer func() {
		if err != nil {
			w.Remove()
		}
	}()
	if w.fds = o.Descriptors.ForPod(spec.Label); w.fds == nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, attach.ErrNoDescriptor)
	}
	w.KernelTCP = attach.KernelTCP{Descriptors: o.Descriptors, Label: spec.Label, Socket: o.Socket}
	if k.in.TUN != nil {
		dev, err := tun.Adopt(k.in.TUN, mtu)
		if err != nil {
			return nil, err
		}
		if w.Stack, err = attach.NewStack(o, spec, mtu, dev, nil, h); err != nil {
			dev.Close()
			return nil, err
		}
		return given{w}, nil
	}
	if w.ns, err = attach.Open(spec); err != nil {
		return nil, err
	}
	w.Loopback, w.Pod = attach.Loopback{NS: w.ns, Options: o}, w.ns
	dev, err := tun.Open(tun.Options{Device: k.in.Device, Name: deviceName, NetNS: w.ns, MTU: mtu, Plain: o.Plain})
	if err != nil {
		return nil, err
	}
	if w.Stack, err = attach.NewStack(o, spec, mtu, dev, nil, h); err != nil {
		dev.Close()
		return nil, err
	}
	if _, err = steer.LoopbackUp(w.ns); err != nil {
		return nil, fmt.Errorf("the loopback device of %s: %w", w.ns, err)
	}
	if err = allowPing(w.ns); err != nil {
		o.Logger("pods").Warn("the workload's own kernel lets it have no ping", "pod", spec.Label, "error", err)
	}
	return w, nil
}

// allowPing lets the user have ICMP sockets in the workload's namespace: a new one's range is empty, and ping has no
// capability here. Whether they leave the host is the host's to say.
func allowPing(ns *netns.NS) error {
	return ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", fmt.Appendf(nil, "%d %[1]d", os.Getegid()), 0)
	})
}

// Place implements attach.Attachment.
func (w *workload) Place() attach.Place { return w.spec.Place }

// Capture implements attach.Attachment.
func (w *workload) Capture(ctx context.Context) error {
	w.Run()
	if err := steer.Apply(ctx, w.plan, steer.Namespaces{Pod: w.ns}); err != nil {
		return err
	}
	if err := w.publishUDP(); err != nil {
		return err
	}
	w.kind.open.serve(w)
	return nil
}

// Remove implements attach.Attachment. Device, addresses and routes go with the stack.
func (w *workload) Remove() error {
	w.removed.Do(func() {
		w.kind.open.serve(nil)
		if w.Stack != nil {
			w.Stop()
		}
		if w.ns != nil {
			w.ns.Close()
		}
		w.fds.Release()
		w.kind.o.Descriptors.Forget(w.spec.Label)
	})
	return nil
}

// DialMesh implements proxy.Network.
func (w *workload) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return w.call(ctx, dst, w.kind.in.Announced)
}

// DialPlain implements proxy.Network, and is how questions go to a nameserver by TCP.
func (w *workload) DialPlain(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return w.call(ctx, dst, func(a netip.AddrPort) bool { return slices.Contains(w.kind.in.Nameservers, a) })
}

// call is a TCP connection by the user's own socket, within the workload's share of descriptors. Loopback is the host's
// own and no business of the workload's, but for what known says is there for it.
func (w *workload) call(ctx context.Context, dst netip.AddrPort, known func(netip.AddrPort) bool) (proxy.Conn, error) {
	if dst.Addr().Unmap().IsLoopback() && !known(dst) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ENETUNREACH}
	}
	return w.kind.o.Descriptors.DialBy(ctx, w.spec.Label, dst, &w.kind.dial)
}

// DialApp implements proxy.Network.
func (w *workload) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	return w.KernelTCP.DialApp(ctx, netip.AddrPortFrom(seenAs(src.Addr(), dst.Addr()), src.Port()), dst)
}

// ProbeApp implements proxy.Network.
func (w *workload) ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	return w.KernelTCP.ProbeApp(ctx, seenAs(src, dst.Addr()), dst)
}

// DialUDP implements attach.Ways. The host's nameserver may well be on its loopback.
func (w *workload) DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return w.kind.dial.DialContext(ctx, "udp", dst.String())
}
