package netstack

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/tun"
)

// sendPacket gives a packet of the pod's, n bytes in bufs, to the Way. Errors of the pod's kernel about what has come
// to it end here: a socket cannot say them.
func (d *datagrams) sendPacket(bufs *rxBuffers, n int, vh *tun.VNetHdr, s *sight) {
	if s.kind != sightUDP && s.kind != sightEcho {
		d.stray.Add(1)
		return
	}
	head := bufs.iov[0]
	out := Datagram{Echo: s.kind == sightEcho, Pod: s.src, Peer: s.dst, DF: true}
	if s.src.Addr().Is4() {
		out.TTL, out.DF = head[8], header.IPv4(head).Flags()&header.IPv4FlagDontFragment != 0
	} else {
		out.TTL = head[7]
	}
	at := s.l4
	if !out.Echo {
		at += header.UDPMinimumSize
		if vh.GSOType == tun.GSOUDPL4 {
			out.Segment = int(vh.GSOSize)
		}
	}
	out.Payload = bufs.from(at, n)
	d.leaves(&out)
}

// sendWhole gives a datagram of the pod's to the Way that the stack has put together.
func (d *datagrams) sendWhole(src, dst netip.AddrPort, pkt *stack.PacketBuffer) {
	s := sight{kind: sightUDP, proto: header.UDPProtocolNumber, src: src, dst: dst}
	if d.mayLeave(&s) == passes {
		out := Datagram{Pod: src, Peer: dst, Payload: pkt.Data().AsRange().ToSlice()}
		d.outPackets.Add(1)
		d.outBytes.Add(uint64(len(out.Payload)))
		d.send(&out, 1)
	}
}

// DeliverDatagram gives the pod what a Way has received for it, if policy and bounds let it pass. It may be called
// from any goroutine.
func (s *Stack) DeliverDatagram(in Datagram) {
	d, size := s.dg, len(in.Payload)
	k := datagramKey{header.UDPProtocolNumber, in.Pod, in.Peer}
	ipLen := header.IPv4MinimumSize
	if in.Pod.Addr().Is6() {
		ipLen = header.IPv6MinimumSize
	}
	if in.Echo {
		k.proto = echoProto(in.Pod.Addr())
	}
	if d == nil || d.pass(k, true, !in.Echo) != passes {
		return
	}
	d.inPackets.Add(1)
	d.inBytes.Add(uint64(size))
	whole := ipLen + size
	if !in.Echo {
		whole += header.UDPMinimumSize
	}
	several := !in.Echo && in.Segment > 0 && in.Segment < size
	switch {
	case whole > 0xffff || in.Echo && whole > int(s.app.port.mtu.Load()):
		d.stray.Add(1)
		return
	case !several && whole > int(s.app.port.mtu.Load()):
		if s.app.sendUDP(in.Peer, in.Pod, in.Payload) != nil {
			d.full.Add(1)
		}
		return
	}
	if in.Echo {
		b := make([]byte, whole)
		encodeIP(b, whole, k.proto, in.Peer.Addr(), in.Pod.Addr())
		copy(b[ipLen:], in.Payload)
		fillEchoSum(b, ipLen)
		if !s.pump.tx.forward(rawPacket(b), &tun.VNetHdr{}, &d.in) {
			d.full.Add(1)
		}
		return
	}
	head := make([]byte, ipLen+header.UDPMinimumSize)
	encodeIP(head, whole, k.proto, in.Peer.Addr(), in.Pod.Addr())
	u := header.UDP(head[ipLen:])
	u.Encode(&header.UDPFields{SrcPort: in.Peer.Port(), DstPort: in.Pod.Port(), Length: uint16(whole - ipLen)})
	src, _ := fromAddr(in.Peer.Addr())
	dst, _ := fromAddr(in.Pod.Addr())
	// the rest is the device's
	u.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, src, dst, u.Length()))
	vh := tun.VNetHdr{Flags: tun.FlagNeedsCSum, CSumStart: uint16(ipLen), CSumOffset: 6}
	n := 1
	if several {
		vh.GSOType, vh.GSOSize, vh.HdrLen = tun.GSOUDPL4, uint16(in.Segment), uint16(len(head))
		n = (size + in.Segment - 1) / in.Segment
	}
	if !s.pump.tx.writeNow(s.pump.dev, &vh, head, in.Payload) &&
		!s.pump.tx.forward(rawPacket(slices.Concat(head, in.Payload)), &vh, &d.in) {
		d.full.Add(uint64(n))
	}
}

// DeliverFailure tells the pod's kernel of an ICMP error that a Way has heard of, if it is about a flow.
func (s *Stack) DeliverFailure(f DatagramFailure) {
	d := s.dg
	if d == nil {
		return
	}
	from, proto := f.From, header.UDPProtocolNumber
	if !from.IsValid() || from.Is4() != f.Pod.Addr().Is4() {
		from = f.Peer.Addr() // as icmpError does
	}
	if f.Echo {
		proto = echoProto(f.Pod.Addr())
	}
	about := sight{proto: proto, quotedSrc: f.Pod, quotedDst: f.Peer}
	if d.passError(f.Pod.Addr(), f.Pod, f.Peer, &about) != passes {
		return
	}
	ipLen := header.IPv4MinimumSize
	if f.Pod.Addr().Is6() {
		ipLen = header.IPv6MinimumSize
	}
	// The error, and the IP header and the first 8 bytes of what it is about.
	b := make([]byte, ipLen+8+ipLen+8)
	encodeIP(b, len(b), echoProto(f.Pod.Addr()), from, f.Pod.Addr())
	quoted := b[ipLen+8:]
	encodeIP(quoted, len(quoted), proto, f.Pod.Addr(), f.Peer.Addr())
	if f.Echo {
		quoted[ipLen] = byte(header.ICMPv4Echo)
		if f.Pod.Addr().Is6() {
			quoted[ipLen] = byte(header.ICMPv6EchoRequest)
		}
		binary.BigEndian.PutUint16(quoted[ipLen+4:], f.Pod.Port())
		binary.BigEndian.PutUint16(quoted[ipLen+6:], f.Seq)
	} else {
		header.UDP(quoted[ipLen:]).Encode(&header.UDPFields{SrcPort: f.Pod.Port(), DstPort: f.Peer.Port(),
			Length: header.UDPMinimumSize})
	}
	icmp := b[ipLen:]
	icmp[0], icmp[1] = f.Type, f.Code
	if f.Pod.Addr().Is6() {
		binary.BigEndian.PutUint32(icmp[4:], uint32(f.MTU)) // RFC 4443 section 3.2
	} else {
		binary.BigEndian.PutUint16(icmp[6:], uint16(min(f.MTU, 0xffff))) // RFC 1191 section 4
	}
	fillEchoSum(b, ipLen)
	if !s.pump.tx.forward(rawPacket(b), &tun.VNetHdr{}, &d.in) {
		d.full.Add(1)
	}
}

// echoProto is the family's ICMP.
func echoProto(a netip.Addr) tcpip.TransportProtocolNumber {
	if a.Is4() {
		return header.ICMPv4ProtocolNumber
	}
	return header.ICMPv6ProtocolNumber
}

// encodeIP writes the IP header of a packet of n bytes, of which b is the beginning.
func encodeIP(b []byte, n int, proto tcpip.TransportProtocolNumber, src, dst netip.Addr) {
	s, _ := fromAddr(src)
	d, _ := fromAddr(dst)
	if src.Is6() {
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(n - header.IPv6MinimumSize), TransportProtocol: proto, HopLimit: 64, SrcAddr: s,
			DstAddr: d,
		})
		return
	}
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{TotalLength: uint16(n), TTL: 64, Protocol: uint8(proto), SrcAddr: s, DstAddr: d})
	h.SetChecksum(^h.CalculateChecksum())
}

// fillEchoSum fills in the checksum of an ICMP message in the packet b.
func fillEchoSum(b []byte, ipLen int) {
	if b[0]>>4 == 6 {
		h := header.ICMPv6(b[ipLen:])
		h.SetChecksum(0)
		ip := header.IPv6(b)
		h.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: h, Src: ip.SourceAddress(),
			Dst: ip.DestinationAddress()}))
		return
	}
	h := header.ICMPv4(b[ipLen:])
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(h, 0))
}
