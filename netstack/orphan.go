package netstack

import (
	"math/rand/v2"
	"net/netip"

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
	src, proto := fromAddr(remote.Addr())
	dst, other := fromAddr(local.Addr())
	if !local.IsValid() || !remote.IsValid() || proto != other {
		return
	}
	ip := header.IPv4MinimumSize
	if proto == header.IPv6ProtocolNumber {
		ip = header.IPv6MinimumSize
	}
	b := make([]byte, ip+header.TCPMinimumSize)
	if proto == header.IPv4ProtocolNumber {
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
			SrcAddr: src, DstAddr: dst})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: header.TCPMinimumSize, TransportProtocol: header.TCPProtocolNumber, HopLimit: 64, SrcAddr: src,
			DstAddr: dst,
		})
	}
	t := header.TCP(b[ip:])
	t.Encode(&header.TCPFields{
		SrcPort: remote.Port(), DstPort: local.Port(), SeqNum: rand.Uint32(), AckNum: rand.Uint32(),
		DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagAck,
	})
	t.SetChecksum(^t.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst,
		header.TCPMinimumSize)))
	s.app.port.pump.send(rawPacket(b))
}
