package netstack

import (
	"math/rand/v2"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// EndOrphan ends a connection that the pod's kernel has, with its application's end at local, and that no stack
// knows: one of a daemon that was killed. It writes a segment as if from remote whose sequence number is any. The
// kernel answers what is outside its window with an acknowledgement that tells the number it waits for (RFC 9293
// section 3.10.7.4), and this stack, to which the connection is unknown, answers that with a reset that has just this
// number; no other would be believed (RFC 5961). A kernel answers so at most once in half a second per connection,
// and by chance a number may be within the window: try again until the connection is gone. Of a connection that this
// stack does know, nothing comes of it.
func (s *Stack) EndOrphan(local, remote netip.AddrPort) {
	if !local.IsValid() || !remote.IsValid() || local.Addr().Unmap().Is4() != remote.Addr().Unmap().Is4() {
		return
	}
	s.app.port.pump.send(rawPacket(bareTCP(remote, local, &header.TCPFields{
		SeqNum: rand.Uint32(), AckNum: rand.Uint32(), Flags: header.TCPFlagAck}, nil)))
}

// bareTCP is a packet with a segment without payload, and with its checksums. Ports and data offset of f are filled in.
func bareTCP(from, to netip.AddrPort, f *header.TCPFields, opts []byte) []byte {
	src, proto := fromAddr(from.Addr())
	dst, _ := fromAddr(to.Addr())
	size := header.TCPMinimumSize + len(opts)
	ip := header.IPv4MinimumSize
	if proto == header.IPv6ProtocolNumber {
		ip = header.IPv6MinimumSize
	}
	b := make([]byte, ip+size)
	if proto == header.IPv4ProtocolNumber {
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
			SrcAddr: src, DstAddr: dst})
	} else {
		header.IPv6(b).Encode(&header.IPv6Fields{
			TransportProtocol: header.TCPProtocolNumber, HopLimit: 64, SrcAddr: src,
			DstAddr: dst,
		})
	}
	f.SrcPort, f.DstPort, f.DataOffset = from.Port(), to.Port(), uint8(size)
	t := header.TCP(b[ip:])
	t.Encode(f)
	copy(t[header.TCPMinimumSize:], opts)
	sealTCP(b)
	return b
}

// sealTCP sets the lengths and checksums of a packet without IP options.
func sealTCP(b []byte) {
	var t header.TCP
	var src, dst tcpip.Address
	if b[0]>>4 == 6 {
		h := header.IPv6(b)
		t, src, dst = header.TCP(b[header.IPv6MinimumSize:]), h.SourceAddress(), h.DestinationAddress()
		h.SetPayloadLength(uint16(len(t)))
	} else {
		h := header.IPv4(b)
		t, src, dst = header.TCP(b[header.IPv4MinimumSize:]), h.SourceAddress(), h.DestinationAddress()
		h.SetTotalLength(uint16(len(b)))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
	}
	t.SetChecksum(0)
	t.SetChecksum(^checksum.Checksum(t, header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(t)))))
}
