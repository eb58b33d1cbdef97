package netstack

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/tun"
)

const (
	// headSize is the first buffer of a scattered read. IP and TCP headers take
	// 40 to 120 bytes, so they always end in it, and gVisor's PullUp (which
	// clones a shared chunk whole) never touches the payload's chunk.
	headSize = 128
	// chunkSize is the largest buffer that gVisor pools. Payload is read to
	// headSize and beyond, so that the piece which landed in the head can be
	// moved in front of it and the payload is one contiguous slice.
	chunkSize = buffer.MaxChunkSize
	// copyLimit: payloads up to this size are copied into a view of their own
	// size. A 64 KiB chunk costs a 64 KiB clear when it is next taken, and
	// would pin 64 KiB for every small message waiting in a receive queue.
	copyLimit = 16 << 10
)

// What the reader of a device does with a packet.
type verdict uint8

const (
	rxDeliver   verdict = iota
	rxMalformed         // not an IP packet, or lengths that contradict each other
	rxUDP               // for the few who wait for some: see readUDP
	rxNotTCP            // a protocol that the stacks do not speak
	rxChecksum          // TCP checksum wrong
)

// rxPacket is what the reader learns from a packet's first bytes.
type rxPacket struct {
	proto  tcpip.NetworkProtocolNumber
	dst    netip.Addr
	hdrLen int // IP and TCP or UDP headers; the whole packet (at most headSize) for what is neither
	ipLen  int
	tcp    bool
	part   bool   // a fragment
	syn    bool   // a TCP packet that asks for a connection
	dport  uint16 // of a UDP packet
}

// parseHead looks at the first bytes of a packet of n bytes in all. head holds
// min(n, headSize) of them.
func parseHead(head []byte, n int, p *rxPacket) verdict {
	p.syn = false
	if len(head) < header.IPv4MinimumSize {
		return rxMalformed
	}
	p.part = false
	switch head[0] >> 4 {
	case 4:
		h := header.IPv4(head)
		ihl := int(h.HeaderLength())
		if ihl < header.IPv4MinimumSize || ihl > len(head) || int(h.TotalLength()) != n {
			return rxMalformed
		}
		p.proto, p.ipLen = header.IPv4ProtocolNumber, ihl
		p.dst = netip.AddrFrom4([4]byte(head[16:20]))
		// A fragment has no TCP header worth reading; gVisor reassembles.
		if h.More() || h.FragmentOffset() != 0 {
			p.tcp, p.part, p.hdrLen = false, true, min(n, headSize)
			return rxDeliver
		}
		return parseL4(head, n, h.Protocol(), p)
	case 6:
		if len(head) < header.IPv6MinimumSize {
			return rxMalformed
		}
		h := header.IPv6(head)
		if int(h.PayloadLength())+header.IPv6MinimumSize != n {
			return rxMalformed
		}
		p.proto, p.ipLen = header.IPv6ProtocolNumber, header.IPv6MinimumSize
		p.dst = netip.AddrFrom16([16]byte(head[24:40]))
		switch h.NextHeader() {
		case uint8(header.IPv6HopByHopOptionsExtHdrIdentifier), uint8(header.IPv6RoutingExtHdrIdentifier),
			uint8(header.IPv6FragmentExtHdrIdentifier), uint8(header.IPv6DestinationOptionsExtHdrIdentifier):
			// Rare enough: gVisor walks the extension headers.
			p.tcp, p.part, p.hdrLen = false, isPart(head, h.NextHeader()), min(n, headSize)
			return rxDeliver
		}
		return parseL4(head, n, h.NextHeader(), p)
	}
	return rxMalformed
}

// isPart reports whether one of an IPv6 packet's extension headers makes it a fragment; also if they reach beyond head.
func isPart(head []byte, next uint8) bool {
	for at := header.IPv6MinimumSize; ; {
		switch next {
		case uint8(header.IPv6FragmentExtHdrIdentifier):
			return true
		case uint8(header.IPv6HopByHopOptionsExtHdrIdentifier), uint8(header.IPv6RoutingExtHdrIdentifier),
			uint8(header.IPv6DestinationOptionsExtHdrIdentifier):
			if at+2 > len(head) {
				return true
			}
			next, at = head[at], at+8+8*int(head[at+1])
		default:
			return false
		}
	}
}

func parseL4(head []byte, n int, proto uint8, p *rxPacket) verdict {
	switch tcpip.TransportProtocolNumber(proto) {
	case header.TCPProtocolNumber:
		if len(head) < p.ipLen+header.TCPMinimumSize {
			return rxMalformed
		}
		off := int(header.TCP(head[p.ipLen:]).DataOffset())
		if off < header.TCPMinimumSize || p.ipLen+off > n {
			return rxMalformed
		}
		p.tcp, p.hdrLen = true, p.ipLen+off
		p.syn = opens(header.TCP(head[p.ipLen:]).Flags())
		if p.hdrLen > len(head) { // 60 bytes of IPv4 and 60 of TCP options are 120
			return rxMalformed
		}
		return rxDeliver
	case header.UDPProtocolNumber:
		if len(head) < p.ipLen+header.UDPMinimumSize {
			return rxMalformed
		}
		p.tcp, p.hdrLen = false, p.ipLen+header.UDPMinimumSize
		p.dport = header.UDP(head[p.ipLen:]).DestinationPort()
		return rxUDP
	case header.ICMPv4ProtocolNumber, header.ICMPv6ProtocolNumber:
		// Errors about our connections come this way.
		p.tcp, p.hdrLen = false, min(n, headSize)
		return rxDeliver
	}
	return rxNotTCP
}

// rxBuffers are what one reader scatters a packet over: head and chunk, and
// what remains of them after a packet was taken out is read into again.
type rxBuffers struct {
	head, chunk *buffer.View
	iov         [2][]byte
}

// prepare returns the buffers for the next read.
func (b *rxBuffers) prepare() [][]byte {
	if b.head == nil {
		b.head = buffer.NewViewSize(headSize)
	}
	if b.chunk == nil {
		b.chunk = buffer.NewViewSize(chunkSize)
	}
	b.iov[0] = b.head.AsSlice()
	b.iov[1] = b.chunk.AsSlice()[headSize:]
	return b.iov[:]
}

func (b *rxBuffers) release() {
	if b.head != nil {
		b.head.Release()
	}
	if b.chunk != nil {
		b.chunk.Release()
	}
	*b = rxBuffers{}
}

// packet makes a PacketBuffer of the n bytes read, whose first view holds the
// headers and nothing else when there is more than fits in the head.
func (b *rxBuffers) packet(n int, p *rxPacket) *stack.PacketBuffer {
	head := b.head
	b.head = nil
	if n <= headSize {
		head.CapLength(n)
		return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(head)})
	}
	// Move the payload that landed in the head in front of the rest of it.
	chunk := b.chunk.AsSlice()
	start := p.hdrLen // == headSize - (headSize - hdrLen)
	copy(chunk[start:headSize], head.AsSlice()[p.hdrLen:headSize])
	head.CapLength(p.hdrLen)
	size := n - p.hdrLen

	var data *buffer.View
	if size <= copyLimit {
		data = buffer.NewViewWithData(chunk[start : start+size])
	} else {
		data, b.chunk = b.chunk, nil
		data.TrimFront(start)
		data.CapLength(size)
	}
	// Merge, not Append: Append would fill the head's chunk up with payload.
	buf, rest := buffer.MakeWithView(head), buffer.MakeWithView(data)
	buf.Merge(&rest)
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buf})
}

// from returns what follows the first at bytes, at most headSize, of a packet of n bytes as one slice, until the next
// read.
func (b *rxBuffers) from(at, n int) []byte {
	chunk := b.chunk.AsSlice()
	copy(chunk[at:headSize], b.head.AsSlice()[at:headSize])
	return chunk[at:n]
}

// checksumValid verifies the TCP or UDP checksum of a packet of n bytes that no
// device vouched for. bufs are the buffers it was read into.
func checksumValid(bufs [][]byte, n int, p *rxPacket) bool {
	head := bufs[0][:min(n, headSize)]
	var src, dst tcpip.Address
	if p.proto == header.IPv4ProtocolNumber {
		src, dst = header.IPv4(head).SourceAddress(), header.IPv4(head).DestinationAddress()
	} else {
		src, dst = header.IPv6(head).SourceAddress(), header.IPv6(head).DestinationAddress()
	}
	l4 := header.TCPProtocolNumber
	if !p.tcp {
		if l4 = header.UDPProtocolNumber; header.UDP(head[p.ipLen:]).Checksum() == 0 {
			// RFC 768: no checksum. RFC 8200 section 8.1: not in IPv6.
			return p.proto == header.IPv4ProtocolNumber
		}
	}
	xsum := header.PseudoHeaderChecksum(l4, src, dst, uint16(n-p.ipLen))
	var c checksum.Checksumer
	c.Add(head[p.ipLen:])
	if n > headSize {
		c.Add(bufs[1][:n-headSize])
	}
	return checksum.Combine(xsum, c.Checksum()) == 0xffff
}

// vouched reports whether the checksum of a packet needs no verification: the
// packet never left this host, or a device has verified it.
func vouched(h *tun.VNetHdr) bool {
	return h.Flags&(tun.FlagNeedsCSum|tun.FlagDataValid) != 0
}
