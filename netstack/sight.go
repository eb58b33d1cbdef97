package netstack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// sightKind is what a packet that is no TCP is to the pod's datagrams.
type sightKind uint8

const (
	sightNone  sightKind = iota // nothing that is carried
	sightUDP                    // a datagram, or the first fragment of one
	sightEcho                   // ping
	sightReply                  // its answer
	sightError                  // an ICMP error about one of these
	sightLater                  // a later fragment, which has no ports
)

// sight is what a packet's first bytes say of a datagram.
type sight struct {
	kind     sightKind
	proto    tcpip.TransportProtocolNumber // what the flow's is: of an error that of the packet it is about
	src, dst netip.AddrPort                // of an echo the identifier is the port of whoever asks; the other has none
	// quoted are the ends of the packet that an error is about, as its sender had them. Ports are zero where that was a
	// later fragment.
	quotedSrc, quotedDst netip.AddrPort
	l4                   int    // where the transport header begins
	part                 bool   // the first fragment of several, or sightLater
	ident                uint32 // of a fragment
}

// see looks at a packet of which head is the beginning. It trusts no length in it: what does not fit in head is
// nothing.
func see(head []byte) (s sight) {
	l3, ok := seeIP(head)
	if !ok {
		return s
	}
	s.proto, s.l4, s.part, s.ident = l3.proto, l3.l4, l3.part, l3.ident
	s.src, s.dst = netip.AddrPortFrom(l3.src, 0), netip.AddrPortFrom(l3.dst, 0)
	if l3.later {
		if datagramProto(l3) {
			s.kind = sightLater
		}
		return s
	}
	b := head[l3.l4:]
	switch {
	case l3.proto == header.UDPProtocolNumber:
		if len(b) < header.UDPMinimumSize {
			return s
		}
		u := header.UDP(b)
		s.kind = sightUDP
		s.src, s.dst = netip.AddrPortFrom(l3.src, u.SourcePort()), netip.AddrPortFrom(l3.dst, u.DestinationPort())
	case datagramProto(l3):
		if len(b) < header.ICMPv4MinimumSize {
			return s
		}
		switch icmpKind(l3.proto, b[0]) {
		case sightEcho:
			s.kind, s.src = sightEcho, netip.AddrPortFrom(l3.src, header.ICMPv4(b).Ident())
		case sightReply:
			s.kind, s.dst = sightReply, netip.AddrPortFrom(l3.dst, header.ICMPv4(b).Ident())
		case sightError:
			s.quote(b[header.ICMPv4MinimumSize:], l3.v6)
		}
	}
	return s
}

// quote reads what an error is about.
func (s *sight) quote(b []byte, v6 bool) {
	q, ok := seeIP(b)
	if !ok || q.v6 != v6 || !datagramProto(q) {
		return
	}
	src, dst := netip.AddrPortFrom(q.src, 0), netip.AddrPortFrom(q.dst, 0)
	if !q.later {
		t := b[q.l4:]
		switch {
		case q.proto == header.UDPProtocolNumber:
			if len(t) < 4 { // the ports will do
				return
			}
			u := header.UDP(t)
			src, dst = netip.AddrPortFrom(q.src, u.SourcePort()), netip.AddrPortFrom(q.dst, u.DestinationPort())
		case len(t) < header.ICMPv4MinimumSize:
			return
		default:
			switch id := header.ICMPv4(t).Ident(); icmpKind(q.proto, t[0]) {
			case sightEcho:
				src = netip.AddrPortFrom(q.src, id)
			case sightReply:
				dst = netip.AddrPortFrom(q.dst, id)
			default:
				return // about an error there is none (RFC 1122 section 3.2.2)
			}
		}
	}
	s.kind, s.proto, s.quotedSrc, s.quotedDst = sightError, q.proto, src, dst
}

// l3 is an IP header and those behind it.
type l3 struct {
	v6, part, later bool // later: a fragment other than the first
	ident           uint32
	proto           tcpip.TransportProtocolNumber
	src, dst        netip.Addr
	l4              int
}

// seeIP walks the IP headers.
func seeIP(b []byte) (l l3, ok bool) {
	if len(b) < header.IPv4MinimumSize {
		return l, false
	}
	switch b[0] >> 4 {
	case 4:
		h := header.IPv4(b)
		l.l4 = int(h.HeaderLength())
		l.proto, l.later = h.TransportProtocol(), h.FragmentOffset() != 0
		l.part, l.ident = l.later || h.More(), uint32(h.ID())
		l.src, l.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		return l, l.l4 >= header.IPv4MinimumSize && l.l4 <= len(b)
	case 6:
		if len(b) < header.IPv6MinimumSize {
			return l, false
		}
		l.v6 = true
		l.src, l.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		next, at := b[6], header.IPv6MinimumSize
		for {
			switch next {
			case uint8(header.IPv6HopByHopOptionsExtHdrIdentifier), uint8(header.IPv6RoutingExtHdrIdentifier),
				uint8(header.IPv6DestinationOptionsExtHdrIdentifier):
				if at+2 > len(b) {
					return l, false
				}
				next, at = b[at], at+8+8*int(b[at+1])
			case uint8(header.IPv6FragmentExtHdrIdentifier):
				if at+header.IPv6FragmentExtHdrLength > len(b) {
					return l, false
				}
				l.part, l.later = true, (uint16(b[at+2])<<8|uint16(b[at+3]))>>3 != 0
				l.ident = binary.BigEndian.Uint32(b[at+4:])
				next, at = b[at], at+header.IPv6FragmentExtHdrLength
			default:
				l.proto, l.l4 = tcpip.TransportProtocolNumber(next), at
				return l, at <= len(b)
			}
			if l.later { // what follows is the middle of something
				l.proto, l.l4 = tcpip.TransportProtocolNumber(next), at
				return l, at <= len(b)
			}
		}
	}
	return l, false
}

// datagramProto reports whether a packet is UDP, or its family's ICMP.
func datagramProto(l l3) bool {
	if l.v6 {
		return l.proto == header.UDPProtocolNumber || l.proto == header.ICMPv6ProtocolNumber
	}
	return l.proto == header.UDPProtocolNumber || l.proto == header.ICMPv4ProtocolNumber
}

// icmpKind tells echoes and errors from the rest (RFC 792, RFC 4443). Redirects are none of these: nobody but the node
// says where a pod's packets go.
func icmpKind(proto tcpip.TransportProtocolNumber, typ uint8) sightKind {
	if proto == header.ICMPv6ProtocolNumber {
		switch header.ICMPv6Type(typ) {
		case header.ICMPv6EchoRequest:
			return sightEcho
		case header.ICMPv6EchoReply:
			return sightReply
		case header.ICMPv6DstUnreachable, header.ICMPv6PacketTooBig, header.ICMPv6TimeExceeded, header.ICMPv6ParamProblem:
			return sightError
		}
		return sightNone
	}
	switch header.ICMPv4Type(typ) {
	case header.ICMPv4Echo:
		return sightEcho
	case header.ICMPv4EchoReply:
		return sightReply
	case header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		return sightError
	}
	return sightNone
}

// foreignICMP reports whether a packet is ICMP of which a stack would make something that is not its business: it
// takes errors about its connections, and would answer pings in everybody's name, and put others together.
func foreignICMP(head []byte) bool {
	l, ok := seeIP(head)
	if !ok || l.proto == header.UDPProtocolNumber || !datagramProto(l) {
		return !ok
	}
	return l.part || len(head) <= l.l4 || icmpKind(l.proto, head[l.l4]) != sightError
}
