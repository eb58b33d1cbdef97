package redirected

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"ztun/cmd/attach"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/tun"
	"ztun/tun/netns"
)

// pod is one attached pod.
type pod struct {
	kind *Kind
	spec attach.Pod
	h    attach.Handler
	ns   *netns.NS
	fds  *attach.Share
	log  *slog.Logger

	doors   []door
	closing sync.Once
	running sync.WaitGroup
	removed sync.Once
}

// door is a listener in the pod's namespace, and who serves what comes to it.
type door struct {
	ln    *attach.Listener
	serve func(*net.TCPConn)
}

// Addrs implements attach.Attachment.
func (p *pod) Addrs() []netip.Addr { return p.spec.IPs }

// Place implements attach.Attachment.
func (p *pod) Place() attach.Place { return attach.PlaceOf(p.spec, p.ns) }

// Capture implements attach.Attachment: the rules are there, and what they have redirected waits in the queues.
func (p *pod) Capture(context.Context) error {
	for _, d := range p.doors {
		p.running.Go(p.kind.o.Panics.Func("a listener of a pod", func() {
			attach.Accept(d.ln, p.log, d.serve)
		}, nil))
	}
	return nil
}

// Settle implements attach.Attachment: the kernel sees to what was written to its sockets, whoever closes them.
func (p *pod) Settle(context.Context) error { return nil }

// closeListeners lets nobody in any more, but for those who stand in the queues already.
func (p *pod) closeListeners() {
	p.closing.Do(func() {
		for _, d := range p.doors {
			d.ln.Release()
		}
		p.kind.o.Store.Flush() // what the store still holds would go on taking connections
		for _, d := range p.doors {
			for conn := waiting(d.ln.TCPListener); conn != nil; conn = waiting(d.ln.TCPListener) {
				d.serve(conn)
			}
			d.ln.Close()
		}
	})
}

// waiting is a connection of a listener's queue; nil: it is empty.
func waiting(ln *net.TCPListener) *net.TCPConn {
	rc, err := ln.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	var inner error
	if err := rc.Control(func(l uintptr) {
		fd, _, inner = unix.Accept4(int(l), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	}); err != nil || inner != nil {
		return nil
	}
	file := os.NewFile(uintptr(fd), "tcp")
	defer file.Close() // net.FileConn works on a duplicate
	conn, err := net.FileConn(file)
	if err != nil {
		return nil
	}
	return conn.(*net.TCPConn)
}

// Silence implements attach.Attachment: this kind does not outlive the daemon.
func (*pod) Silence() {}

// Stop implements attach.Attachment.
func (p *pod) Stop() bool {
	p.closeListeners()
	return p.kind.o.Panics.Wait(&p.running)
}

// Remove implements attach.Attachment.
func (p *pod) Remove() error {
	p.removed.Do(func() {
		p.Stop()
		p.kind.mu.Lock()
		delete(p.kind.pods, p)
		p.kind.mu.Unlock()
		if p.ns != nil {
			p.ns.Close()
		}
		p.fds.Release()
		p.kind.o.Descriptors.Forget(p.spec.Label)
	})
	return nil
}

// Status, Tap, Stats and Weigh implement attach.Attachment: there is no device and no stack.
func (*pod) Status() attach.Status  { return attach.Status{} }
func (*pod) Tap() *tun.Tap          { return nil }
func (*pod) Stats() *netstack.Stats { return nil }
func (*pod) Weigh()                 {}

// mesh serves a connection to 15008.
func (p *pod) mesh(conn *net.TCPConn) {
	if serve := p.kind.o.Admit(attach.Door{Label: p.spec.Label, Serve: p.h.ServeMesh}, conn); serve != nil {
		go p.kind.o.Panics.Func("a connection to port 15008", serve, nil)()
	}
}

// outbound serves a connection of the application's that was redirected to 15001.
func (p *pod) outbound(conn *net.TCPConn) {
	p.redirected(conn, p.kind.o.Descriptors.Outbound(p.spec.Label, func() {}), p.h.ServeOutbound)
}

// passthrough serves one of the network's that was redirected to 15006.
func (p *pod) passthrough(conn *net.TCPConn) {
	p.redirected(conn, p.kind.o.Descriptors.Inbound(p.spec.Label, conn), p.h.ServePassthrough)
}

// redirected has a connection served as a flow to where it was going, until the proxy lets go of it.
func (p *pod) redirected(conn *net.TCPConn, place *attach.Share, serve func(proxy.Flow)) {
	r := p.kind.o.Redirected(p.spec.Label, place, conn)
	switch {
	case r == nil:
	case r.Straight(): // see doc.go
		attach.Reset(conn)
	default:
		go p.kind.o.Panics.Func("a redirected connection", func() { serve(r) }, nil)()
	}
}

// DialApp implements proxy.Network.
func (p *pod) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	from := src.Addr().Unmap()
	if to := dst.Addr().Unmap(); p.kind.ownSource || !from.IsValid() || from == to || from.Is4() != to.Is4() {
		return p.call(ctx, dst)
	}
	c, err := p.dial(ctx, dst, func(ctx context.Context) (*net.TCPConn, error) {
		return netns.DialTransparent(ctx, p.ns, from, dst, p.kind.o.Socket)
	})
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EINVAL) {
		// No address for a socket (multicast, say), or the ports towards dst are used up.
		return p.call(ctx, dst)
	}
	return c, err
}

// ProbeApp implements proxy.Network: whoever asks has been accepted already, and DialApp will tell.
func (*pod) ProbeApp(context.Context, netip.Addr, netip.AddrPort) error { return nil }

// DialMesh implements proxy.Network.
func (p *pod) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return p.call(ctx, dst)
}

// DialPlain implements proxy.Network.
func (p *pod) DialPlain(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return p.call(ctx, dst)
}

// call is a connection from the pod's own address.
func (p *pod) call(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return p.dial(ctx, dst, func(ctx context.Context) (*net.TCPConn, error) {
		return netns.Dial(ctx, p.ns, dst, p.kind.o.Socket)
	})
}

func (p *pod) dial(ctx context.Context, dst netip.AddrPort, dial func(context.Context) (*net.TCPConn, error)) (
	proxy.Conn, error) {
	return p.kind.o.Descriptors.Dial(ctx, p.spec.Label, dst, dial)
}

// DialUDP implements attach.Ways.
func (p *pod) DialUDP(ctx context.Context, dst netip.AddrPort) (c net.Conn, err error) {
	o := netns.SocketOptions{Mark: p.kind.o.Socket.Mark}
	err = p.ns.Do(func() error {
		d := net.Dialer{Control: o.Control}
		c, err = d.DialContext(ctx, "udp", dst.String())
		return err
	})
	return c, err
}

// Listen implements attach.Ways.
func (p *pod) Listen(network, addr string) (net.Listener, error) {
	return p.kind.o.Listen(p.ns, network, addr, p.kind.o.Socket)
}

// ListenPacket implements attach.Ways.
func (p *pod) ListenPacket(network, addr string) (net.PacketConn, error) {
	return p.kind.o.ListenPacket(p.ns, network, addr, p.kind.o.Socket)
}
