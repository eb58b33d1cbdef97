package steered

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"ztun/ports"
	"ztun/proxy"
	"ztun/tun/netns"
)

// DialApp implements proxy.Network. A pod that reaches itself is dialled in its own namespace: its kernel takes no
// packet from outside that claims its own address.
func (p *pod) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	if src.Addr() == dst.Addr() {
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

// DialMesh implements proxy.Network: by S's kernel, with the pod's address, where S's rules bring the answers back.
func (p *pod) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if dst.Port() != ports.HBONE {
		return p.DialPlain(ctx, dst)
	}
	for _, a := range p.spec.IPs {
		if a.Is4() == dst.Addr().Is4() {
			o := p.node.o.Socket
			o.Ports = netns.PortRange{Min: ports.MeshMin, Max: ports.MeshMax}
			c, err := p.dialKernel(ctx, p.s, a, dst, o)
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ENETUNREACH}
}

// dialKernel is DialTransparent within the pod's share of descriptors.
func (p *pod) dialKernel(ctx context.Context, ns *netns.NS, src netip.Addr, dst netip.AddrPort, o netns.SocketOptions) (
	*net.TCPConn, error) {
	return p.node.o.Descriptors.Dial(ctx, p.spec.Label, dst, func(ctx context.Context) (*net.TCPConn, error) {
		return netns.DialTransparent(ctx, ns, src, dst, o)
	})
}

// acceptWait is the pause of the accept loop after a failure (out of descriptors, mostly).
const acceptWait = 100 * time.Millisecond

// serveMesh accepts HBONE connections until the listener is closed.
func (p *pod) serveMesh() {
	for {
		conn, err := p.mesh.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(acceptWait)
			continue
		}
		place := p.node.o.Descriptors.Inbound(p.spec.Label, conn)
		if place == nil || p.node.leaving.Load() {
			place.Release()
			conn.SetLinger(0)
			conn.Close()
			continue
		}
		go p.node.o.Panics.Func("a connection to port 15008", func() {
			defer place.Release()
			p.h.ServeMesh(conn)
		}, nil)()
	}
}
