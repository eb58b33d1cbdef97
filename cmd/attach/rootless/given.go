package rootless

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"ztun/proxy"
)

// given is a workload behind a TUN that somebody else has made: in a namespace, a VM, or nowhere that we could enter.
// Address, routes and resolver in there are his affair.
type given struct{ *workload }

// Capture implements attach.Attachment.
func (w given) Capture(context.Context) error {
	w.Run()
	if err := w.publishUDP(); err != nil {
		return err
	}
	w.kind.open.serve(w.workload)
	return nil
}

// Listen implements attach.Ways: there is no loopback that we could listen on.
func (given) Listen(network, _ string) (net.Listener, error) {
	return nil, &net.OpError{Op: "listen", Net: network, Err: syscall.EAFNOSUPPORT}
}

// ListenPacket implements attach.Ways.
func (given) ListenPacket(network, _ string) (net.PacketConn, error) {
	return nil, &net.OpError{Op: "listen", Net: network, Err: syscall.EAFNOSUPPORT}
}

// DialApp implements proxy.Network. A workload that reaches itself cannot be shown its own address from outside.
func (w given) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	return w.Stack.DialApp(ctx, netip.AddrPortFrom(strangerTo(src.Addr(), dst.Addr()), src.Port()), dst)
}

// ProbeApp implements proxy.Network.
func (w given) ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	return w.Stack.ProbeApp(ctx, strangerTo(src, dst.Addr()), dst)
}

// strangerTo is seenAs for who cannot be the application itself.
func strangerTo(src, dst netip.Addr) netip.Addr {
	if src.Unmap() != dst {
		return seenAs(src, dst)
	}
	return seenAs(netip.IPv6Loopback(), dst)
}
