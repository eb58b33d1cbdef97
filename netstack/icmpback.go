package netstack

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"ztun/proxy/ports"
)

// The way back for ICMP errors about the mesh's own connections. Towards the
// network HBONE runs on sockets of the node's kernel that carry the pod's
// address (package tun/netns), but only TCP of the mesh's port is routed to
// them: an ICMP error about such a connection is, for the node's routing, one
// more packet for the pod, and comes out of the node's TUN. The pod's stack
// knows nothing of the connection, and the kernel's socket would wait for its
// timeout, or send segments that are too large for ever. So the uplink writes
// such a packet into the TUN again, marked, and a routing rule for the mark
// (tun/steer) delivers it to the kernel.

const (
	// hbonePort tells the mesh's connections from the stacks': the node's rules
	// send TCP to this port, and from it to the ports of the mesh's own calls, to
	// the kernel. ztunnel's port of the same name; fixed, since every peer
	// expects it.
	hbonePort = ports.HBONE

	// MeshPortMin is the first of the local ports of the mesh's own calls. The stacks call from the ports below.
	MeshPortMin = ports.MeshMin

	// ReturnTOS is the DS field of packets for the kernel, by which the node's
	// routing rule knows them (a test in tun/steer holds the two together).
	// Without it the rule would also take the ICMP errors that one pod's stack
	// sends to another pod's of the same node. DSCP 3 is of the pool for local
	// use (RFC 2474 section 6); the bits are among those that every kernel
	// compares (IPTOS_RT_MASK, 0x1c).
	ReturnTOS = 0x0c

	// returnTTL: a packet that is not delivered on this very host is dropped by
	// the kernel where it would be forwarded, and about an ICMP error no other
	// is sent (RFC 1122 section 3.2.2). So it can neither come out of the TUN
	// again nor leave the node, whatever rules and routes there are.
	returnTTL = 1
)

// giveBack writes an ICMP error that belongs to a socket of the kernel's into
// the device again and reports whether it did; n bytes of it are in bufs. It is
// called by the reader, before anything has been changed.
func (u *Uplink) giveBack(bufs [][]byte, n int) bool {
	pod, ok := hboneError(bufs[0][:min(n, headSize)])
	if !ok || (*u.table.Load())[pod] == nil {
		return false
	}
	b := make([]byte, n)
	if m := copy(b, bufs[0][:min(n, headSize)]); m < n {
		copy(b[m:], bufs[1])
	}
	forKernel(b)
	u.pump.rx.returned.Add(1)
	u.pump.send(rawPacket(b))
	return true
}

// hboneError reports whether a packet, of which head is the beginning, is an
// ICMP error about a TCP packet of the kernel's from or to the mesh's port, and which address
// had sent that one. The error's own destination must be the same, as it is
// unless somebody translates addresses. No length in the packet is trusted: what
// does not fit in head is not recognised.
//
// RFC 792: destination unreachable (fragmentation needed among them), time
// exceeded, parameter problem. RFC 4443: the same, and packet too big.
func hboneError(head []byte) (pod netip.Addr, ok bool) {
	if len(head) < header.IPv4MinimumSize {
		return pod, false
	}
	switch head[0] >> 4 {
	case 4:
		l4, ok := l4IPv4(head, uint8(header.ICMPv4ProtocolNumber))
		if !ok || len(l4) < header.ICMPv4MinimumSize {
			return pod, false
		}
		switch header.ICMPv4(l4).Type() {
		case header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		default:
			return pod, false
		}
		quoted := l4[header.ICMPv4MinimumSize:]
		tcp, ok := l4IPv4(quoted, uint8(header.TCPProtocolNumber))
		if !ok || !onHBONEPort(tcp) || [4]byte(quoted[12:16]) != [4]byte(head[16:20]) {
			return pod, false
		}
		return netip.AddrFrom4([4]byte(quoted[12:16])), true
	case 6:
		l4, ok := l4IPv6(head, uint8(header.ICMPv6ProtocolNumber))
		if !ok || len(l4) < header.ICMPv6MinimumSize {
			return pod, false
		}
		switch header.ICMPv6(l4).Type() {
		case header.ICMPv6DstUnreachable, header.ICMPv6PacketTooBig, header.ICMPv6TimeExceeded, header.ICMPv6ParamProblem:
		default:
			return pod, false
		}
		quoted := l4[header.ICMPv6MinimumSize:]
		tcp, ok := l4IPv6(quoted, uint8(header.TCPProtocolNumber))
		if !ok || !onHBONEPort(tcp) || [16]byte(quoted[8:24]) != [16]byte(head[24:40]) {
			return pod, false
		}
		return netip.AddrFrom16([16]byte(quoted[8:24])), true
	}
	return pod, false
}

// l4IPv4 returns what follows the header of a packet of the protocol; false for
// what has no whole header, is of another protocol, or is a later fragment (or,
// of an error itself, any fragment: it is not ours to reassemble).
func l4IPv4(b []byte, proto uint8) ([]byte, bool) {
	if len(b) < header.IPv4MinimumSize || b[0]>>4 != 4 {
		return nil, false
	}
	h := header.IPv4(b)
	ihl := int(h.HeaderLength())
	if ihl < header.IPv4MinimumSize || ihl > len(b) || h.Protocol() != proto || h.FragmentOffset() != 0 ||
		(h.More() && proto == uint8(header.ICMPv4ProtocolNumber)) {
		return nil, false
	}
	return b[ihl:], true
}

// l4IPv6 is l4IPv4 for IPv6. Extension headers are not looked behind: neither
// does a kernel put any before its TCP, nor a router before its errors.
func l4IPv6(b []byte, proto uint8) ([]byte, bool) {
	if len(b) < header.IPv6MinimumSize || b[0]>>4 != 6 || header.IPv6(b).NextHeader() != proto {
		return nil, false
	}
	return b[header.IPv6MinimumSize:], true
}

// onHBONEPort looks at the ports, all that need be left of a quoted TCP header:
// an answer from a pod's mesh port, or a call to a peer's by one of the ports kept
// for it. From other ports the stacks call port 15008 of hosts outside the mesh.
func onHBONEPort(tcp []byte) bool {
	if len(tcp) < 4 {
		return false
	}
	h := header.TCP(tcp)
	return h.SourcePort() == hbonePort || h.DestinationPort() == hbonePort && h.SourcePort() >= MeshPortMin
}

// forKernel marks a packet that hboneError has recognised. What the error says,
// and its checksum, stay as they are.
//
// An IPv4 error gets the pod's own address as its source: the kernel's reverse
// path filter is the stricter of the device's and the namespace's, refuses on a
// device without addresses whatever is not routed to it (also in the "loose" mode
// that many distributions set), and any filter refuses the node's own addresses,
// from which the node's own "host unreachable" comes. The pod's address is routed
// to the device. Sockets are found by the quotation, never by the source.
func forKernel(b []byte) {
	if b[0]>>4 == 6 {
		h := header.IPv6(b)
		_, flow := h.TOS()
		h.SetTOS(ReturnTOS, flow)
		h.SetHopLimit(returnTTL)
		return
	}
	h := header.IPv4(b)
	h.SetTOS(ReturnTOS, 0)
	h.SetTTL(returnTTL)
	h.SetSourceAddress(h.DestinationAddress())
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
}
