package dedicated

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/proxy/ports"
	"ztun/tun"
)

// namespace is the daemon's own.
const namespace = "/proc/self/ns/net"

// Kind is the way of attaching.
type Kind struct {
	o       attach.Options
	log     *slog.Logger
	dial    net.Dialer
	leaving atomic.Bool
	ports   [3]uint16 // where mesh, outbound and inbound plaintext arrive; 0: any (tests)
	ln      [3]*net.TCPListener
}

var _ attach.Kind = (*Kind)(nil)

// New makes the kind.
func New(o attach.Options) *Kind {
	return newKind(o, [3]uint16{ports.HBONE, ports.Outbound, ports.InboundPlaintext})
}

func newKind(o attach.Options, at [3]uint16) *Kind {
	k := &Kind{o: o, log: o.Logger("pods"), ports: at}
	k.o.Socket.NotSentLowat = 0 // tunnels see to that themselves
	k.dial = net.Dialer{KeepAliveConfig: o.Socket.KeepAlive, Control: k.control}
	return k
}

// control gives a socket PACKET_MARK, by which a redirect knows us, and what all have in common.
func (k *Kind) control(network, address string, rc syscall.RawConn) error {
	inner := k.o.Socket.Tune(network, address, rc)
	if inner != nil || k.o.Socket.Mark == 0 {
		return inner
	}
	err := rc.Control(func(fd uintptr) {
		inner = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(k.o.Socket.Mark))
	})
	if inner != nil {
		inner = fmt.Errorf("PACKET_MARK (CAP_NET_ADMIN is needed): %w", inner)
	}
	return errors.Join(err, inner)
}

// Open implements attach.Kind.
func (k *Kind) Open(ctx context.Context) error {
	lc := net.ListenConfig{KeepAliveConfig: k.o.Socket.KeepAlive, Control: k.control}
	lc.SetMultipathTCP(false) // which has no original destination
	network, host := "tcp4", netip.IPv4Unspecified()
	if k.o.IPv6 {
		network, host = "tcp", netip.IPv6Unspecified()
	}
	for i, port := range k.ports {
		ln, err := lc.Listen(ctx, network, netip.AddrPortFrom(host, port).String())
		if err != nil {
			k.Close()
			return err
		}
		k.ln[i] = ln.(*net.TCPListener)
	}
	return nil
}

// Locate implements attach.Kind.
func (k *Kind) Locate(p *attach.Pod) error {
	p.NetNS = namespace
	if err := attach.Locate(p); err != nil {
		return err
	}
	if len(p.IPs) > 0 {
		return nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("%w: %w", admin.ErrPodUnavailable, err)
	}
	for _, v4 := range []bool{true, false} {
		for _, a := range all {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue
			}
			if ip := prefix.Addr().Unmap(); ip.Is4() == v4 && ip.IsGlobalUnicast() && (v4 || k.o.IPv6) {
				p.IPs = append(p.IPs, ip)
				break
			}
		}
	}
	if len(p.IPs) == 0 {
		return fmt.Errorf("%w: this host has no address to be reached by, and INSTANCE_IP names none", admin.ErrPodUnavailable)
	}
	return nil
}

// Shares implements attach.Kind.
func (*Kind) Shares() bool { return false }

// Outlives implements attach.Kind.
func (*Kind) Outlives() bool { return false }

// Gone implements attach.Kind: it is our own.
func (*Kind) Gone(attach.Place) error { return nil }

// Clean implements attach.Kind: nothing outlives the daemon.
func (*Kind) Clean(attach.Place) error { return nil }

// Sweep implements attach.Kind.
func (*Kind) Sweep([]netip.Addr) error { return nil }

// Leave implements attach.Kind.
func (k *Kind) Leave() { k.leaving.Store(true) }

// Close implements attach.Kind.
func (k *Kind) Close() error {
	for _, ln := range k.ln {
		if ln != nil {
			ln.Close()
		}
	}
	return nil
}

// Stats implements attach.Kind.
func (*Kind) Stats() attach.NodeStats { return attach.NodeStats{} }

// workload is what is attached.
type workload struct {
	kind    *Kind
	spec    attach.Pod
	h       attach.Handler
	fds     *attach.Share
	running sync.WaitGroup
	stopped sync.Once
}

// Attach implements attach.Kind.
func (k *Kind) Attach(_ context.Context, spec attach.Pod, h attach.Handler) (attach.Attachment, error) {
	w := &workload{kind: k, spec: spec, h: h}
	if w.fds = k.o.Descriptors.ForPod(spec.Label); w.fds == nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, attach.ErrNoDescriptor)
	}
	return w, nil
}

// Capture implements attach.Attachment: the listeners, which are bound, are served.
func (w *workload) Capture(context.Context) error {
	k := w.kind
	for i, serve := range [...]func(*net.TCPConn){
		w.mesh,
		func(c *net.TCPConn) {
			w.redirected(c, k.o.Descriptors.Outbound(w.spec.Label, func() {}), w.h.ServeOutbound)
		},
		func(c *net.TCPConn) {
			w.redirected(c, k.o.Descriptors.Inbound(w.spec.Label, c), w.h.ServePassthrough)
		},
	} {
		ln := k.ln[i]
		w.running.Go(k.o.Panics.Func("a listener", func() {
			attach.Accept(ln, k.log, func(conn *net.TCPConn) {
				if k.leaving.Load() {
					attach.Reset(conn)
					return
				}
				serve(conn)
			})
		}, nil))
	}
	return nil
}

// mesh serves a connection to 15008.
func (w *workload) mesh(conn *net.TCPConn) {
	if serve := w.kind.o.Admit(attach.Door{Label: w.spec.Label, Serve: w.h.ServeMesh}, conn); serve != nil {
		w.running.Go(w.kind.o.Panics.Func("a connection to port 15008", serve, nil))
	}
}

// redirected hands an accepted connection to serve, as one to where it was going before somebody redirected it.
func (w *workload) redirected(conn *net.TCPConn, place *attach.Share, serve func(proxy.Flow)) {
	if r := w.kind.o.Redirected(w.spec.Label, place, conn); r != nil {
		w.running.Go(w.kind.o.Panics.Func("a redirected connection", func() { serve(r) }, nil))
	}
}

// Addrs implements attach.Attachment.
func (w *workload) Addrs() []netip.Addr { return w.spec.IPs }

// Place implements attach.Attachment.
func (w *workload) Place() attach.Place { return w.spec.Place }

// Settle implements attach.Attachment: the kernel sends what is left.
func (*workload) Settle(context.Context) error { return nil }

// Silence implements attach.Attachment: this kind does not outlive the daemon.
func (*workload) Silence() {}

// Stop implements attach.Attachment.
func (w *workload) Stop() bool {
	w.stopped.Do(func() {
		w.kind.Close()
		w.fds.Release()
		w.kind.o.Descriptors.Forget(w.spec.Label)
	})
	return w.kind.o.Panics.Wait(&w.running)
}

// Remove implements attach.Attachment.
func (w *workload) Remove() error {
	w.Stop()
	return nil
}

// Status implements attach.Attachment.
func (*workload) Status() attach.Status { return attach.Status{} }

// Tap implements attach.Attachment.
func (*workload) Tap() *tun.Tap { return nil }

// Stats implements attach.Attachment.
func (*workload) Stats() *netstack.Stats { return nil }

// Weigh implements attach.Attachment: what waits for the application is the kernel's.
func (*workload) Weigh() {}

// DialApp implements proxy.Network.
func (w *workload) DialApp(ctx context.Context, _, dst netip.AddrPort) (proxy.Conn, error) {
	return w.call(ctx, dst)
}

// ProbeApp implements proxy.Network: DialApp will tell.
func (*workload) ProbeApp(context.Context, netip.Addr, netip.AddrPort) error { return nil }

// DialMesh implements proxy.Network.
func (w *workload) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return w.call(ctx, dst)
}

// DialPlain implements proxy.Network.
func (w *workload) DialPlain(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return w.call(ctx, dst)
}

func (w *workload) call(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return w.kind.o.Descriptors.DialBy(ctx, w.spec.Label, dst, &w.kind.dial)
}

// DialUDP implements attach.Ways.
func (w *workload) DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return w.kind.dial.DialContext(ctx, "udp", dst.String())
}

// Listen implements attach.Ways.
func (*workload) Listen(network, addr string) (net.Listener, error) { return net.Listen(network, addr) }

// ListenPacket implements attach.Ways.
func (*workload) ListenPacket(network, addr string) (net.PacketConn, error) {
	return net.ListenPacket(network, addr)
}
