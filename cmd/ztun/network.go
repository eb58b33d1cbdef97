package main

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"ztun/admin"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// podNetwork is one pod's ways out: netstack towards the application and for plaintext, the kernel's
// TCP with the pod's own address for the mesh's port.
type podNetwork struct {
	stack *netstack.Stack
	addrs []netip.Addr
	ns    *netns.NS // the pod's
	sock  netns.SocketOptions
	ref   admin.PodRef
	fds   *descriptors
}

func (n *podNetwork) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	if src.Addr() == dst.Addr() {
		// A pod that reaches itself through a service, or an application tunnel on its loopback. Its kernel takes
		// no packet from outside that claims its own address, and would answer one over its loopback; so the pod's
		// own TCP does it (spec 1: "self-load-balancing").
		c, err := n.dialKernel(ctx, n.ns, src.Addr(), dst, n.sock)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
	c, err := n.stack.DialApp(ctx, src, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (n *podNetwork) ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	if src == dst.Addr() {
		return nil // the stack cannot ask in the pod's own name; DialApp will tell
	}
	return n.stack.ProbeApp(ctx, src, dst)
}

func (n *podNetwork) DialPlain(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	c, err := n.stack.DialPlain(ctx, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialMesh goes by the kernel's sockets where the node's rules bring the answers back to them. A waypoint or gateway may listen on
// another port than the mesh's (hboneMtlsPort): its answers come to the pod's stack like any other's, so the stack has to call.
func (n *podNetwork) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if dst.Port() != steer.PortHBONE {
		c, err := n.stack.DialPlain(ctx, dst)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
	for _, a := range n.addrs {
		if a.Is4() == dst.Addr().Is4() {
			o := n.sock
			o.Ports = netns.PortRange{Min: steer.MeshPortMin, Max: steer.MeshPortMax} // the node's rule knows the answers by them
			c, err := n.dialKernel(ctx, nil, a, dst, o)
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	// The pod has no address of the destination's family: what its own kernel would say.
	return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ENETUNREACH}
}

// dialKernel is DialTransparent within the pod's share of descriptors: without a place there it fails with EMFILE.
func (n *podNetwork) dialKernel(ctx context.Context, ns *netns.NS, src netip.Addr, dst netip.AddrPort, o netns.SocketOptions) (*net.TCPConn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	place := n.fds.outbound(n.ref, cancel)
	if place == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: errNoDescriptor}
	}
	c, err := netns.DialTransparent(ctx, ns, src, dst, o)
	if err != nil {
		place.release()
		return nil, err
	}
	n.fds.opened(place, c)
	return c, nil
}

// podFlow is a netstack flow as the proxy wants it.
type podFlow struct{ *netstack.Flow }

func (f podFlow) Accept() (proxy.Conn, error) {
	c, err := f.Flow.Accept()
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (f podFlow) Refuse(r proxy.Refusal) {
	switch r {
	case proxy.RefuseHostUnreachable:
		f.Flow.Refuse(netstack.HostUnreachable)
	case proxy.RefuseNetUnreachable:
		f.Flow.Refuse(netstack.NetUnreachable)
	case proxy.RefuseSilent:
		f.Flow.Refuse(netstack.Silent)
	default:
		f.Flow.Refuse(netstack.Reset)
	}
}
