package netstack

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

const (
	// probeFresh is how long one answer serves all who ask for the same port. A listener that goes away is told to the
	// client after its connect, by a reset, for no longer than this.
	probeFresh = 100 * time.Millisecond
	// maxOpenPorts bounds how many open ports are remembered.
	maxOpenPorts = 1024
)

// probePauses are those between the SYNs of a probe. The pod's kernel answers at once, or drops SYNs because the
// listener's queue is full.
var probePauses = [...]time.Duration{200 * time.Millisecond, time.Second, 3 * time.Second, 5 * time.Second}

// ProbeApp asks whether the pod's application would take a connection from src to dst, without one: it sends a SYN as
// src would, and takes it back by a reset when it is answered. An application sees nothing of that, since its kernel
// hands it connections only when the client's acknowledgement has come. Nil means that somebody listens;
// ECONNREFUSED, EHOSTUNREACH that the kernel said no; ETIMEDOUT that it did not answer within 9.2 s; or ctx's error.
func (s *Stack) ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	src, dst = src.Unmap(), netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	from := netip.AddrPortFrom(src, 0)
	if src.Is4() != dst.Addr().Is4() || !src.IsValid() || dst.Port() == 0 {
		return dialError(from, dst, os.NewSyscallError("connect", syscall.EINVAL))
	}
	for {
		a, mine := s.probes.ask(dst, time.Now())
		switch {
		case a == nil:
			return nil
		case mine:
			if err := s.probeForAll(ctx, src, dst, a); err != nil {
				return dialError(from, dst, err)
			}
			return nil
		}
		select {
		case <-a.known:
			if a.err == nil {
				return nil
			}
			if ctx.Err() == nil && (errors.Is(a.err, context.Canceled) || errors.Is(a.err, context.DeadlineExceeded)) {
				continue // whoever asked has given up
			}
			return dialError(from, dst, a.err)
		case <-ctx.Done():
			return dialError(from, dst, ctx.Err())
		}
	}
}

// probeForAll finds out what a is to say, and says it whatever becomes of it.
func (s *Stack) probeForAll(ctx context.Context, src netip.Addr, dst netip.AddrPort, a *answer) (err error) {
	err = net.ErrClosed
	defer func() { s.probes.tell(dst, a, err, time.Now()) }()
	err = s.probe(ctx, src, dst)
	return err
}

func (s *Stack) probe(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	gs, err := s.app.stack()
	if err != nil {
		return err
	}
	local, proto := fromAddr(src)
	remote, _ := fromAddr(dst.Addr())
	r, terr := gs.FindRoute(nic, local, remote, proto, false)
	if terr != nil {
		return toError(terr, "connect")
	}
	defer r.Release()
	id, terr := s.app.ports.draw(gs, stack.TransportEndpointID{LocalAddress: local, RemoteAddress: remote,
		RemotePort: dst.Port()})
	if terr != nil {
		return toError(terr, "bind")
	}
	defer s.app.ports.giveBack(id)
	p := &probe{seq: rand.Uint32(), answer: make(chan error, 1)}
	s.probes.add(id, p)
	defer s.probes.remove(id)
	for _, pause := range probePauses {
		if terr := p.send(r, id); terr != nil {
			return toError(terr, "connect")
		}
		t := time.NewTimer(pause)
		select {
		case err := <-p.answer:
			t.Stop()
			return err
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
	return os.NewSyscallError("connect", syscall.ETIMEDOUT)
}

// probe is a SYN that awaits its answer.
type probe struct {
	seq    uint32
	answer chan error // capacity 1
}

func (p *probe) tell(err error) {
	select {
	case p.answer <- err:
	default:
	}
}

// send sends the SYN.
func (p *probe) send(r *stack.Route, id stack.TransportEndpointID) tcpip.Error {
	const size = header.TCPMinimumSize + header.TCPOptionMSSLength
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: size + int(r.MaxHeaderLength())})
	defer pkt.DecRef()
	pkt.TransportProtocolNumber = tcp.ProtocolNumber
	h := header.TCP(pkt.TransportHeader().Push(size))
	h.Encode(&header.TCPFields{
		SrcPort: id.LocalPort, DstPort: id.RemotePort, SeqNum: p.seq, DataOffset: size, Flags: header.TCPFlagSyn,
		WindowSize: 0xffff,
	})
	header.EncodeMSSOption(header.TCPDefaultMSS, h[header.TCPMinimumSize:])
	h.SetChecksum(^h.CalculateChecksum(header.PseudoHeaderChecksum(tcp.ProtocolNumber, id.LocalAddress,
		id.RemoteAddress, size)))
	return r.WritePacket(stack.NetworkHeaderParams{Protocol: tcp.ProtocolNumber, TTL: r.DefaultTTL()}, pkt)
}

// probes are the probes under way of one stack, and what they have found.
type probes struct {
	n  atomic.Int32 // under way
	mu sync.Mutex
	by map[stack.TransportEndpointID]*probe
	// open are the ports that were found open, until when that is believed; asking are those that are being asked, by
	// one for all: a burst of connects is one question.
	open   map[netip.AddrPort]time.Time
	asking map[netip.AddrPort]*answer
}

// answer is what one probe will find for all who wait for it.
type answer struct {
	known chan struct{} // closed when there is err
	err   error
}

// ask says nil if dst is known to be open; else whom to wait for, or that it is the caller's to find out and tell.
func (ps *probes) ask(dst netip.AddrPort, now time.Time) (a *answer, mine bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if now.Before(ps.open[dst]) {
		return nil, false
	}
	if a = ps.asking[dst]; a != nil {
		return a, false
	}
	if ps.asking == nil {
		ps.asking = make(map[netip.AddrPort]*answer)
	}
	a = &answer{known: make(chan struct{})}
	ps.asking[dst] = a
	return a, true
}

// tell ends what ask has begun.
func (ps *probes) tell(dst netip.AddrPort, a *answer, err error, now time.Time) {
	ps.learn(dst, err == nil, now)
	ps.mu.Lock()
	delete(ps.asking, dst)
	ps.mu.Unlock()
	a.err = err
	close(a.known)
}

func (ps *probes) add(id stack.TransportEndpointID, p *probe) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.by == nil {
		ps.by = make(map[stack.TransportEndpointID]*probe)
	}
	ps.by[id] = p
	ps.n.Add(1)
}

func (ps *probes) remove(id stack.TransportEndpointID) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.by, id)
	ps.n.Add(-1)
}

func (ps *probes) find(id stack.TransportEndpointID) *probe {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.by[id]
}

// learn remembers what is known of dst.
func (ps *probes) learn(dst netip.AddrPort, open bool, now time.Time) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if !open {
		delete(ps.open, dst)
		return
	}
	if ps.open == nil || len(ps.open) >= maxOpenPorts {
		ps.open = make(map[netip.AddrPort]time.Time)
	}
	ps.open[dst] = now.Add(probeFresh)
}

// answer takes a packet that belongs to no connection and may answer a probe. False has gVisor reset what is not a
// reset itself: that takes a probe that was answered back.
func (ps *probes) answer(h *hop, id stack.TransportEndpointID, th header.TCP) bool {
	if ps.n.Load() == 0 || h != h.s.app {
		return false
	}
	p := ps.find(id)
	if p == nil || !th.Flags().Contains(header.TCPFlagAck) || th.AckNumber() != p.seq+1 {
		return false
	}
	switch {
	case th.Flags().Contains(header.TCPFlagRst):
		p.tell(os.NewSyscallError("connect", syscall.ECONNREFUSED))
	case th.Flags().Contains(header.TCPFlagSyn):
		p.tell(nil)
	}
	return false
}

// unreachable takes an ICMP error about a SYN.
func (ps *probes) unreachable(q *quotedTCP) {
	if ps.n.Load() == 0 || !q.unreachable {
		return
	}
	if p := ps.find(q.id); p != nil && q.seq == p.seq {
		p.tell(os.NewSyscallError("connect", q.errno))
	}
}

// unreachable looks for an ICMP error about a SYN of ours in a packet of which head is the beginning. A pod's own
// packet filter may refuse so.
func (s *Stack) unreachable(head []byte) {
	if s.probes.n.Load() == 0 && s.shortcuts.n.Load() == 0 {
		return
	}
	if q, ok := quoted(head); ok {
		s.probes.unreachable(&q)
		s.shortcuts.unreachable(s.pump, &q)
	}
}

// quotedTCP is what an ICMP error says of the TCP packet that it is about.
type quotedTCP struct {
	id          stack.TransportEndpointID // local: who had sent it, and is told
	seq         uint32
	unreachable bool // and not: too large, too many hops, a header that somebody does not like
	errno       syscall.Errno
}

// quoted reads an ICMP error.
func quoted(head []byte) (q quotedTCP, ok bool) {
	if len(head) < header.IPv4MinimumSize {
		return q, false
	}
	var t header.TCP
	q.errno = syscall.ECONNREFUSED
	if head[0]>>4 == 4 {
		l4, ok := l4IPv4(head, uint8(header.ICMPv4ProtocolNumber))
		if !ok || len(l4) < header.ICMPv4MinimumSize || icmpKind(header.ICMPv4ProtocolNumber, l4[0]) != sightError {
			return q, false
		}
		code := header.ICMPv4(l4).Code()
		q.unreachable = header.ICMPv4(l4).Type() == header.ICMPv4DstUnreachable && code != header.ICMPv4FragmentationNeeded
		switch code { // as Linux has them (icmp_err_convert), but for those that a connect has no name for
		case header.ICMPv4PortUnreachable, header.ICMPv4ProtoUnreachable:
		case header.ICMPv4NetUnreachable, header.ICMPv4DestinationNetworkUnknown, header.ICMPv4NetProhibited,
			header.ICMPv4NetUnreachableForTos:
			q.errno = syscall.ENETUNREACH
		default:
			q.errno = syscall.EHOSTUNREACH
		}
		ip := l4[header.ICMPv4MinimumSize:]
		if t, ok = l4IPv4(ip, uint8(header.TCPProtocolNumber)); !ok || [4]byte(ip[12:16]) != [4]byte(head[16:20]) {
			return q, false
		}
		q.id.LocalAddress, q.id.RemoteAddress = header.IPv4(ip).SourceAddress(), header.IPv4(ip).DestinationAddress()
	} else {
		l4, ok := l4IPv6(head, uint8(header.ICMPv6ProtocolNumber))
		if !ok || len(l4) < header.ICMPv6DstUnreachableMinimumSize ||
			icmpKind(header.ICMPv6ProtocolNumber, l4[0]) != sightError {
			return q, false
		}
		q.unreachable = header.ICMPv6(l4).Type() == header.ICMPv6DstUnreachable
		switch header.ICMPv6(l4).Code() {
		case header.ICMPv6PortUnreachable:
		case header.ICMPv6NetworkUnreachable:
			q.errno = syscall.ENETUNREACH
		default:
			q.errno = syscall.EHOSTUNREACH
		}
		ip := l4[header.ICMPv6DstUnreachableMinimumSize:]
		if t, ok = l4IPv6(ip, uint8(header.TCPProtocolNumber)); !ok || [16]byte(ip[8:24]) != [16]byte(head[24:40]) {
			return q, false
		}
		q.id.LocalAddress, q.id.RemoteAddress = header.IPv6(ip).SourceAddress(), header.IPv6(ip).DestinationAddress()
	}
	if len(t) < 8 { // ports and sequence number, which is all that a router must quote
		return q, false
	}
	q.id.LocalPort, q.id.RemotePort, q.seq = t.SourcePort(), t.DestinationPort(), t.SequenceNumber()
	return q, true
}
