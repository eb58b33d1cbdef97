package netstack

import (
	"context"
	"net/netip"
	"os"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// DialApp connects to the pod's application at dst, by the App device, as the
// client src: the application sees src as its peer. Port 0 of src draws a free
// port. The error is a *net.OpError that wraps a syscall.Errno: ECONNREFUSED,
// EHOSTUNREACH, ENETUNREACH, ETIMEDOUT (no answer for 15 s), EADDRINUSE; or
// ctx's error.
func (s *Stack) DialApp(ctx context.Context, src, dst netip.AddrPort) (*Conn, error) {
	return s.dial(ctx, s.app, src, dst)
}

// DialPlain connects to dst in the network, by the Uplink, from the pod's own
// address of dst's family. Errors as DialApp; EAFNOSUPPORT if the pod has no
// such address, ENETUNREACH if the stack has no uplink or dst is none of the network's.
func (s *Stack) DialPlain(ctx context.Context, dst netip.AddrPort) (*Conn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	src, ok := s.ownAddr(dst.Addr())
	if !ok {
		return nil, dialError(netip.AddrPort{}, dst, os.NewSyscallError("connect", syscall.EAFNOSUPPORT))
	}
	if s.up == nil || !routable(dst.Addr()) {
		return nil, dialError(netip.AddrPort{}, dst, os.NewSyscallError("connect", syscall.ENETUNREACH))
	}
	return s.dial(ctx, s.up, netip.AddrPortFrom(src, 0), dst)
}

// routable reports whether a packet to a may be sent to the network. Loopback is each host's own: a node with
// route_localnet (kube-proxy sets it) would take it for the node's.
func routable(a netip.Addr) bool {
	return !a.IsLoopback() && answerable(a)
}

func (s *Stack) dial(ctx context.Context, h *hop, src, dst netip.AddrPort) (*Conn, error) {
	src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if err := ctx.Err(); err != nil {
		return nil, dialError(src, dst, err)
	}
	if !src.Addr().IsValid() || !dst.Addr().IsValid() || dst.Port() == 0 || src.Addr().Is4() != dst.Addr().Is4() {
		return nil, dialError(src, dst, os.NewSyscallError("connect", syscall.EINVAL))
	}
	srcA, proto := fromAddr(src.Addr())
	dstA, _ := fromAddr(dst.Addr())

	gs, err := h.stack()
	if err != nil {
		return nil, dialError(src, dst, err)
	}
	id, terr := h.ports.draw(gs, stack.TransportEndpointID{LocalAddress: srcA, LocalPort: src.Port(),
		RemoteAddress: dstA, RemotePort: dst.Port()})
	if terr != nil {
		return nil, dialError(src, dst, toError(terr, "bind"))
	}
	c := newConn(h, netip.AddrPortFrom(src.Addr(), id.LocalPort), dst)
	e, terr := gs.NewEndpoint(tcp.ProtocolNumber, proto, &c.wq)
	if terr != nil {
		h.ports.giveBack(id)
		return nil, dialError(src, dst, toError(terr, "socket"))
	}
	ep := e.(*tcp.Endpoint)
	// As Bind would leave them, but without gVisor's reservation of the port; see dialPorts.
	ep.LockUser()
	ep.TransportEndpointInfo.ID.LocalAddress, ep.TransportEndpointInfo.ID.LocalPort = srcA, id.LocalPort
	ep.UnlockUser()

	entry, ch := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	c.wq.EventRegister(&entry)
	terr = ep.Connect(tcpip.FullAddress{NIC: nic, Addr: dstA, Port: dst.Port()})
	h.ports.giveBack(id) // it is the endpoint's now, or nobody's
	if _, ok := terr.(*tcpip.ErrConnectStarted); ok {
		select {
		case <-ctx.Done():
			c.wq.EventUnregister(&entry)
			ep.Close()
			return nil, dialError(src, dst, ctx.Err())
		case <-ch:
		}
		terr = ep.LastError()
	}
	c.wq.EventUnregister(&entry)
	if terr == nil && !connected(ep) {
		// Aborted by Close between the two.
		terr = &tcpip.ErrConnectionAborted{}
	}
	if terr != nil {
		ep.Close()
		return nil, dialError(src, dst, toError(terr, "connect"))
	}
	if err := c.start(ep); err != nil {
		return nil, err
	}
	return c, nil
}

func connected(ep *tcp.Endpoint) bool {
	switch ep.EndpointState() {
	case tcp.StateError, tcp.StateClose, tcp.StateInitial, tcp.StateBound:
		return false
	}
	return true
}
