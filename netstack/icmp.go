package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"ztun/proxy/refusal"
)

// icmpError builds the ICMP or ICMPv6 error that refuses a SYN, of which
// original is the IP and TCP header. The error comes from the address that was
// asked for: it passes a reverse path filter, and no router of ours has a name
// anyway. Nil if r needs no error.
//
// RFC 792, RFC 1812 section 5.2.7.1 and RFC 4443 section 3.1 for the codes; the
// quotation holds the whole TCP header, more than the 8 bytes that the client's
// kernel needs to find the socket.
func icmpError(original []byte, r refusal.Way) []byte {
	if len(original) < header.IPv4MinimumSize {
		return nil
	}
	if original[0]>>4 == 4 {
		return icmp4Error(original, r)
	}
	return icmp6Error(original, r)
}

func icmp4Error(original []byte, r refusal.Way) []byte {
	var code header.ICMPv4Code
	switch r {
	case refusal.HostUnreachable:
		code = header.ICMPv4HostUnreachable
	case refusal.NetUnreachable:
		code = header.ICMPv4NetUnreachable
	case refusal.AdminProhibited:
		code = header.ICMPv4AdminProhibited
	default:
		return nil
	}
	o := header.IPv4(original)
	n := header.IPv4MinimumSize + header.ICMPv4MinimumSize + len(original)
	b := make([]byte, n)
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(n),
		TTL:         64,
		Protocol:    uint8(header.ICMPv4ProtocolNumber),
		SrcAddr:     o.DestinationAddress(),
		DstAddr:     o.SourceAddress(),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	ic := header.ICMPv4(b[header.IPv4MinimumSize:])
	ic.SetType(header.ICMPv4DstUnreachable)
	ic.SetCode(code)
	copy(ic[header.ICMPv4MinimumSize:], original)
	ic.SetChecksum(^checksum.Checksum(ic, 0))
	return b
}

func icmp6Error(original []byte, r refusal.Way) []byte {
	var code header.ICMPv6Code
	switch r {
	case refusal.HostUnreachable:
		code = header.ICMPv6AddressUnreachable
	case refusal.NetUnreachable:
		code = header.ICMPv6NetworkUnreachable
	case refusal.AdminProhibited:
		code = header.ICMPv6Prohibited
	default:
		return nil
	}
	o := header.IPv6(original)
	size := header.ICMPv6DstUnreachableMinimumSize + len(original)
	b := make([]byte, header.IPv6MinimumSize+size)
	ip := header.IPv6(b)
	ip.Encode(&header.IPv6Fields{
		PayloadLength:     uint16(size),
		TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit:          64,
		SrcAddr:           o.DestinationAddress(),
		DstAddr:           o.SourceAddress(),
	})
	ic := header.ICMPv6(b[header.IPv6MinimumSize:])
	ic.SetType(header.ICMPv6DstUnreachable)
	ic.SetCode(code)
	copy(ic[header.ICMPv6DstUnreachableMinimumSize:], original)
	ic.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
		Header: ic, Src: ip.SourceAddress(), Dst: ip.DestinationAddress(),
	}))
	return b
}

// knownICMP6 rewrites, in place, the codes of an incoming ICMPv6 destination
// unreachable that gVisor does not know to "no route to destination". Without
// it a dial would wait for its deadline although the network has answered: Linux
// routers say "address unreachable" when neighbour discovery fails, firewalls
// say "prohibited". The price is ENETUNREACH where the kernel has EHOSTUNREACH
// or EACCES. b is the packet's first bytes.
func knownICMP6(b []byte) {
	const at = header.IPv6MinimumSize
	if len(b) < at+header.ICMPv6MinimumSize || b[0]>>4 != 6 ||
		header.IPv6(b).NextHeader() != uint8(header.ICMPv6ProtocolNumber) {
		return
	}
	h := header.ICMPv6(b[at:])
	if h.Type() != header.ICMPv6DstUnreachable || h.Code() == header.ICMPv6NetworkUnreachable ||
		h.Code() == header.ICMPv6PortUnreachable {
		return
	}
	// RFC 1624: the checksum's complement shrinks by what the code loses.
	sum := checksum.Combine(^h.Checksum(), ^uint16(h.Code()))
	h.SetCode(header.ICMPv6NetworkUnreachable)
	h.SetChecksum(^sum)
}
