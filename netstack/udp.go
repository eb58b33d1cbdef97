package netstack

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// DialUDP gives a UDP socket from a free port of the pod's own address to dst in
// the network, by the Uplink: the way of a DNS query that the mesh does not
// answer itself. Nothing is sent yet. Only packets from dst are received; where
// the network says that nobody listens there, Read fails with ECONNREFUSED.
// Errors as DialPlain. The socket ends with the stack if it is not closed before.
func (s *Stack) DialUDP(ctx context.Context, dst netip.AddrPort) (*UDPConn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	c := &UDPConn{remote: dst}
	if err := ctx.Err(); err != nil {
		return nil, c.opError("dial", err)
	}
	if !dst.IsValid() || dst.Port() == 0 {
		return nil, c.opError("dial", os.NewSyscallError("connect", syscall.EINVAL))
	}
	src, ok := s.ownAddr(dst.Addr())
	if !ok {
		return nil, c.opError("dial", os.NewSyscallError("connect", syscall.EAFNOSUPPORT))
	}
	if s.up == nil || !routable(dst.Addr()) {
		return nil, c.opError("dial", os.NewSyscallError("connect", syscall.ENETUNREACH))
	}
	gs, err := s.up.stack()
	if err != nil {
		return nil, c.opError("dial", err)
	}
	srcA, proto := fromAddr(src)
	dstA, _ := fromAddr(dst.Addr())
	ep, terr := gs.NewEndpoint(udp.ProtocolNumber, proto, &c.wq)
	if terr != nil {
		return nil, c.opError("dial", toError(terr, "socket"))
	}
	c.ep, c.port = ep, s.up.port
	c.entry.Init(c, waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr)
	c.wq.EventRegister(&c.entry)
	c.port.udp.Add(1)
	if terr = ep.Bind(tcpip.FullAddress{NIC: nic, Addr: srcA}); terr == nil {
		terr = ep.Connect(tcpip.FullAddress{NIC: nic, Addr: dstA, Port: dst.Port()})
	}
	if terr != nil {
		c.Close()
		return nil, c.opError("dial", toError(terr, "connect"))
	}
	if l, terr := ep.GetLocalAddress(); terr == nil {
		c.local = netip.AddrPortFrom(src, l.Port)
	}
	return c, nil
}

// UDPConn is a UDP socket of the pod's towards one address in the network. While
// there is one, its link takes UDP packets for the pod. A packet longer than the
// slice given to Read is lost and an error. Reads are serialised.
type UDPConn struct {
	ep            tcpip.Endpoint
	port          *port
	wq            waiter.Queue
	entry         waiter.Entry
	local, remote netip.AddrPort

	rd     half
	mu     sync.Mutex // the read deadline
	closed atomic.Bool
}

var _ net.Conn = (*UDPConn)(nil)

// takesUDP reports whether anybody waits for a UDP packet that came by this
// link. Everybody else's is dropped before a stack is made for it.
func (l *port) takesUDP(p *rxPacket) bool {
	return l.udp.Load() > 0 || l.asksDNS(p)
}

// asksDNS reports whether a UDP packet is for the DNS tap.
func (l *port) asksDNS(p *rxPacket) bool { return l.dns != nil && p.dport == dnsPort }

// NotifyEvent is gVisor's: called with its locks held, it only wakes.
func (c *UDPConn) NotifyEvent(waiter.EventMask) { c.rd.wake() }

// Read implements net.Conn: one packet.
func (c *UDPConn) Read(b []byte) (int, error) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	c.rd.arm()
	defer c.rd.disarm()
	for {
		if c.closed.Load() {
			return 0, c.opError("read", net.ErrClosed)
		}
		if c.rd.expired() {
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		}
		w := tcpip.SliceWriter(b)
		res, terr := c.ep.Read(&w, tcpip.ReadOptions{})
		switch terr.(type) {
		case nil:
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
			c.rd.sleep()
		case *tcpip.ErrClosedForReceive: // the stack has closed
			return 0, c.opError("read", net.ErrClosed)
		default:
			return 0, c.opError("read", toError(terr, "recv"))
		}
	}
}

// Write implements net.Conn: one packet, queued or refused at once.
func (c *UDPConn) Write(b []byte) (int, error) {
	if c.closed.Load() {
		return 0, c.opError("write", net.ErrClosed)
	}
	n, terr := c.ep.Write(bytes.NewReader(b), tcpip.WriteOptions{})
	switch terr.(type) {
	case nil:
		return int(n), nil
	case *tcpip.ErrWouldBlock:
		return 0, c.opError("write", os.NewSyscallError("send", syscall.ENOBUFS))
	}
	return 0, c.opError("write", toError(terr, "send"))
}

// Close implements net.Conn. It wakes Read.
func (c *UDPConn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	c.port.udp.Add(-1)
	c.wq.EventUnregister(&c.entry)
	c.ep.Close()
	c.SetReadDeadline(time.Time{}) // its timer
	c.rd.wake()
	return nil
}

// LocalAddr implements net.Conn.
func (c *UDPConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.local) }

// RemoteAddr implements net.Conn.
func (c *UDPConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(c.remote) }

// SetDeadline implements net.Conn; see SetWriteDeadline.
func (c *UDPConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetReadDeadline implements net.Conn.
func (c *UDPConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rd.setDeadline(t)
	return nil
}

// SetWriteDeadline implements net.Conn and does nothing: Write never waits.
func (c *UDPConn) SetWriteDeadline(time.Time) error { return nil }

func (c *UDPConn) opError(op string, err error) error {
	oe := &net.OpError{Op: op, Net: "udp", Addr: net.UDPAddrFromAddrPort(c.remote), Err: err}
	if c.local.IsValid() {
		oe.Source = net.UDPAddrFromAddrPort(c.local)
	}
	return oe
}
