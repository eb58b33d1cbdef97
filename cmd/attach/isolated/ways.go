package isolated

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"ztun/ports"
	"ztun/proxy"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// A pod's ways out: netstack towards the application and for plaintext (attach.Stack), the kernel's TCP with the
// pod's own address for the mesh's port.

// DialApp implements proxy.Network.
func (p *pod) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	if src.Addr() == dst.Addr() {
		// A pod that reaches itself through a service, or an application tunnel on its loopback. Its kernel takes
		// no packet from outside that claims its own address, and would answer one over its loopback; so the pod's
		// own TCP does it (spec 1: "self-load-balancing").
		c, err := p.dialKernel(ctx, p.ns, src.Addr(), dst, p.node.o.Socket)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
	return p.Stack.DialApp(ctx, src, dst)
}

// ProbeApp implements proxy.Network.
func (p *pod) ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	if src == dst.Addr() {
		return nil // the stack cannot ask in the pod's own name; DialApp will tell
	}
	return p.Stack.ProbeApp(ctx, src, dst)
}

// DialMesh implements proxy.Network: it goes by the kernel's sockets where the node's rules bring the answers back to
// them. A waypoint or gateway may listen on another port than the mesh's (hboneMtlsPort): its answers come to the
// pod's stack like any other's, so the stack has to call.
func (p *pod) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if dst.Port() != ports.HBONE {
		return p.DialPlain(ctx, dst)
	}
	for _, a := range p.spec.IPs {
		if a.Is4() == dst.Addr().Is4() {
			o := p.node.o.Socket
			// the node's rule knows the answers by them
			o.Ports = netns.PortRange{Min: steer.MeshPortMin, Max: steer.MeshPortMax}
			c, err := p.dialKernel(ctx, p.node.o.NetNS, a, dst, o)
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	// The pod has no address of the destination's family: what its own kernel would say.
	return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ENETUNREACH}
}

// dialKernel is DialTransparent within the pod's share of descriptors.
func (p *pod) dialKernel(ctx context.Context, ns *netns.NS, src netip.Addr, dst netip.AddrPort, o netns.SocketOptions) (
	*net.TCPConn, error) {
	return p.node.o.Descriptors.Dial(ctx, p.spec.Label, dst, func(ctx context.Context) (*net.TCPConn, error) {
		return netns.DialTransparent(ctx, ns, src, dst, o)
	})
}
