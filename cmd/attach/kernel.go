package attach

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"ztun/proxy"
	"ztun/proxy/ports"
	"ztun/tun/netns"
)

// KernelTCP is a Stack with the ways out that are the kernel's with the pod's own address: to the mesh's port, and from
// a pod to itself.
type KernelTCP struct {
	*Stack
	Descriptors *Descriptors
	Label       string
	Socket      netns.SocketOptions
	Pod         *netns.NS // the pod's namespace
	// Mesh is where rules bring the answers of mesh connections back to their sockets; nil: the process's own.
	Mesh *netns.NS
}

// DialApp implements proxy.Network.
func (k *KernelTCP) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	if src.Addr() == dst.Addr() {
		// A pod that reaches itself through a service, or an application tunnel on its loopback. Its kernel takes
		// no packet from outside that claims its own address, and would answer one over its loopback; so the pod's
		// own TCP does it (spec 1: "self-load-balancing").
		return k.dial(ctx, k.Pod, src.Addr(), dst, k.Socket)
	}
	return k.Stack.DialApp(ctx, src, dst)
}

// ProbeApp implements proxy.Network.
func (k *KernelTCP) ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	if src == dst.Addr() {
		return nil // the stack cannot ask in the pod's own name; DialApp will tell
	}
	return k.Stack.ProbeApp(ctx, src, dst)
}

// DialMesh implements proxy.Network: it goes by the kernel's sockets where the rules bring the answers back to them. A
// waypoint or gateway may listen on another port than the mesh's (hboneMtlsPort): its answers come to the pod's stack
// like any other's, so the stack has to call.
func (k *KernelTCP) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if dst.Port() != ports.HBONE {
		return k.DialPlain(ctx, dst)
	}
	for _, a := range k.Addrs() {
		if a.Is4() == dst.Addr().Is4() {
			o := k.Socket
			o.Ports = netns.PortRange{Min: ports.MeshMin, Max: ports.MeshMax} // the rules know the answers by them
			return k.dial(ctx, k.Mesh, a, dst, o)
		}
	}
	// The pod has no address of the destination's family: what its own kernel would say.
	return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ENETUNREACH}
}

// dial is DialTransparent within the pod's share of descriptors.
func (k *KernelTCP) dial(ctx context.Context, ns *netns.NS, src netip.Addr, dst netip.AddrPort,
	o netns.SocketOptions) (proxy.Conn, error) {
	return k.Descriptors.Dial(ctx, k.Label, dst, func(ctx context.Context) (*net.TCPConn, error) {
		return netns.DialTransparent(ctx, ns, src, dst, o)
	})
}
