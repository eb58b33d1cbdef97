package netstack

import (
	"bytes"
	"net/netip"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// carry takes a packet that is no TCP and that no stack waits for, n bytes of it in bufs, if the pod's datagrams are
// carried; false: it is somebody else's, if anybody's. It is called by the device's reader.
func (l *port) carry(bufs *rxBuffers, n int, pk *rxPacket, vh *tun.VNetHdr) bool {
	if l.dg == nil {
		return false
	}
	s := see(bufs.iov[0][:min(n, headSize)])
	if s.kind == sightNone {
		return false
	}
	d := l.dg
	if l == d.s.app.port {
		if l.dns != nil && d.asks(&s) || d.o.Way != nil && s.part {
			return false // the stack puts together what a way takes whole
		}
		switch d.mayLeave(&s) {
		case passes:
			d.leave(bufs, n, pk, vh, &s)
		case denied:
			d.refuse(bufs.iov[0][:min(n, headSize)], &s)
		}
		return true
	}
	switch {
	case s.kind == sightUDP && d.s.up.hasUDP(s.dst, s.src), s.kind == sightError &&
		d.s.up.hasUDP(s.quotedSrc, s.quotedDst):
		return false // the stack's own
	case s.kind == sightLater && l.udp.Load() > 0:
		// It may be of an answer to a query that was passed on, which the stack puts together, or the application's. Both
		// get it: who has no first fragment makes nothing of it.
		if d.knows(s.src.Addr()) {
			d.enter(bufs, n, pk, vh, &s)
		}
		return false
	case d.mayEnter(&s) == passes:
		d.enter(bufs, n, pk, vh, &s)
	}
	return true
}

// asks reports whether a packet of the pod's is a part of a captured query. A kernel sends the fragments of a packet
// in order.
func (d *datagrams) asks(s *sight) bool {
	id := fragmentID{v6: s.src.Addr().Is6(), known: true, ident: s.ident}
	switch {
	case s.kind == sightUDP && s.dst.Port() == dnsPort:
		if s.part {
			d.queries[d.queriesN%uint8(len(d.queries))] = id
			d.queriesN++
		}
		return true
	case s.kind == sightLater:
		return slices.Contains(d.queries[:], id)
	}
	return false
}

// refuse tells the pod that a datagram of its may not pass (RFC 1812 section 5.2.7.1, RFC 4443 section 3.1), so that
// its application has an error and not a timeout.
func (d *datagrams) refuse(head []byte, s *sight) {
	if s.kind != sightUDP || !d.errs.Allow(struct{}{}) {
		return
	}
	if b := icmpError(bytes.Clone(head[:s.l4+header.UDPMinimumSize]), refusal.AdminProhibited); b != nil {
		d.s.pump.send(rawPacket(b))
	}
}

// mayLeave judges a packet of the pod's. The pod speaks in its own name and in nobody else's.
func (d *datagrams) mayLeave(s *sight) passage {
	dst := s.dst.Addr()
	if !d.s.isOwn(s.src.Addr()) {
		d.s.flows.foreign.Add(1)
		return turned
	}
	if !routable(dst) || dst.Is6() && dst.IsLinkLocalUnicast() || d.s.isOwn(dst) {
		d.stray.Add(1)
		return turned
	}
	switch s.kind {
	case sightUDP, sightEcho:
		return d.pass(datagramKey{s.proto, s.src, s.dst}, false, true)
	case sightReply:
		return d.pass(datagramKey{s.proto, s.src, s.dst}, false, false)
	case sightLater:
		return d.passPart(dst)
	}
	// An error of the pod's kernel, about a packet that has come to it.
	return d.passError(dst, s.quotedDst, s.quotedSrc, s)
}

// mayEnter judges a packet of the network's.
func (d *datagrams) mayEnter(s *sight) passage {
	switch s.kind {
	case sightUDP, sightEcho:
		return d.pass(datagramKey{s.proto, s.dst, s.src}, true, true)
	case sightReply:
		return d.pass(datagramKey{s.proto, s.dst, s.src}, true, false)
	case sightLater:
		return d.passPart(s.src.Addr())
	}
	return d.passError(s.dst.Addr(), s.quotedSrc, s.quotedDst, s)
}

// passPart lets a later fragment pass if there is a flow with its peer: without the first one, which was judged, it
// serves nobody, so that is enough, and they may come in any order.
func (d *datagrams) passPart(peer netip.Addr) passage {
	if d.knows(peer) {
		return passes
	}
	d.stray.Add(1)
	return turned
}

// passError lets an ICMP error pass that is about a packet of a flow (RFC 5508 REQ-3 to 5), to who has sent that
// packet.
func (d *datagrams) passError(to netip.Addr, pod, peer netip.AddrPort, s *sight) passage {
	if to == s.quotedSrc.Addr() && d.s.isOwn(pod.Addr()) {
		d.mu.Lock()
		_, ok := d.flows[datagramKey{s.proto, pod, peer}]
		d.mu.Unlock()
		if ok || pod.Port() == 0 && peer.Port() == 0 && d.knows(peer.Addr()) {
			return passes
		}
	}
	d.stray.Add(1)
	return turned
}

// leave sends a packet of the pod's on its way.
func (d *datagrams) leave(bufs *rxBuffers, n int, pk *rxPacket, vh *tun.VNetHdr, s *sight) {
	if d.o.Way != nil {
		d.sendPacket(bufs, n, vh, s)
		return
	}
	d.outPackets.Add(1)
	d.outBytes.Add(uint64(n))
	if !d.s.up.port.pump.tx.forward(bufs.forwarded(n, pk, s), vh, &d.out) {
		d.full.Add(1)
	}
}

// enter sends a packet of the network's to the pod.
func (d *datagrams) enter(bufs *rxBuffers, n int, pk *rxPacket, vh *tun.VNetHdr, s *sight) {
	d.inPackets.Add(1)
	d.inBytes.Add(uint64(n))
	if !d.s.app.port.pump.tx.forward(bufs.forwarded(n, pk, s), vh, &d.in) {
		d.full.Add(1)
	}
}

// forwarded is the packet that was read. A later fragment is copied: the stack may want it, too.
func (b *rxBuffers) forwarded(n int, pk *rxPacket, s *sight) *stack.PacketBuffer {
	if s.kind != sightLater {
		return b.packet(n, pk)
	}
	return rawPacket(bytes.Join([][]byte{b.iov[0][:min(n, headSize)], b.iov[1][:max(0, n-headSize)]}, nil))
}

// hasUDP reports whether a socket of DialUDP's speaks from pod to peer.
func (h *hop) hasUDP(pod, peer netip.AddrPort) bool {
	if h.port.udp.Load() == 0 {
		return false
	}
	h.mu.Lock()
	gs := h.gs
	h.mu.Unlock()
	if gs == nil {
		return false
	}
	var id stack.TransportEndpointID
	var proto tcpip.NetworkProtocolNumber
	id.LocalAddress, proto = fromAddr(pod.Addr())
	id.RemoteAddress, _ = fromAddr(peer.Addr())
	id.LocalPort, id.RemotePort = pod.Port(), peer.Port()
	return gs.FindTransportEndpoint(proto, udp.ProtocolNumber, id, nic) != nil
}
