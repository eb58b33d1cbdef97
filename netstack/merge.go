package netstack

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// What a connection's next packet says makes some of those before it needless, if they have not been written yet: FIN
// can travel with the last bytes, and an acknowledgement with what comes after it. Each packet to the pod's kernel is
// a walk through its layers, and mostly an answer that costs as much again. Nothing waits for it: only what lies in
// the queue at that moment is merged.
//
// What the peer would count as a duplicate acknowledgement is left alone: three of them tell it of a loss (RFC 5681,
// section 2), and one that came with data would be none. So are super-packets, and packets whose checksum the device
// does not complete.

// mergeReach is how many packets back in the queue the connection's last one is looked for: those of other connections
// that one turn of a processor has queued meanwhile.
const mergeReach = 16

// ackFlows is for how many connections a queue remembers the last acknowledgement number, 8 bytes for each. Of one that
// is forgotten, since another has taken its place, an acknowledgement counts as repeated and is written.
const ackFlows = 512

// lastAck is the acknowledgement number of a connection's last packet. flow is a hash; should two connections share
// one, a repeated acknowledgement may be lost.
type lastAck struct{ flow, ack uint32 }

// mergePorts is both ports of a packet that may be merged with others of its connection, 0 of one that may not.
func mergePorts(p *stack.PacketBuffer) uint32 {
	if p.TransportProtocolNumber != header.TCPProtocolNumber || !p.GSOOptions.NeedsCsum ||
		p.Data().Size() > int(p.GSOOptions.MSS) {
		return 0 // where the device does not complete the checksum it would have to be mended; nor super-packets
	}
	th := header.TCP(p.TransportHeader().Slice())
	if len(th) < header.TCPMinimumSize || th.Flags()&(header.TCPFlagSyn|header.TCPFlagRst) != 0 {
		return 0
	}
	return binary.BigEndian.Uint32(th)
}

// firstAck notes what p acknowledges, and reports whether it is known to be the first packet of its connection that
// acknowledges as much. mu is held.
func (t *txQueue) firstAck(p *stack.PacketBuffer) bool {
	if p.TransportProtocolNumber != header.TCPProtocolNumber {
		return false
	}
	th := header.TCP(p.TransportHeader().Slice())
	if len(th) < header.TCPMinimumSize || th.Flags()&header.TCPFlagRst != 0 {
		return false
	}
	if t.acks == nil {
		t.acks = new([ackFlows]lastAck)
	}
	flow := binary.BigEndian.Uint32(th)
	for b := addresses(p); len(b) >= 4; b = b[4:] {
		flow = (flow ^ binary.BigEndian.Uint32(b)) * 0x9e3779b1
		flow ^= flow >> 15
	}
	last := &t.acks[flow%ackFlows]
	// The numbers of a connection only grow, from the 0 of our own SYN.
	first := last.flow == flow && last.ack != th.AckNumber()
	*last = lastAck{flow, th.AckNumber()}
	return first
}

// merge makes p, whose mergePorts are ports, part of the last packet of the same connection in the queue, or puts it in
// that one's place; first is its firstAck. False: it is to be queued. mu is held; p's reference is the caller's.
//
// The connection's order is kept, except that the search passes over super-packets: an acknowledgement may get ahead of
// one that is sent again, whose bytes have lower numbers. It says as much there.
func (t *txQueue) merge(p *stack.PacketBuffer, ports uint32, first bool) bool {
	for i := len(t.q) - 1; i >= max(0, len(t.q)-mergeReach); i-- {
		if t.q[i].ports != ports {
			continue
		}
		old := t.q[i].pkt
		if !sameAddresses(old, p) {
			continue
		}
		oth, th := header.TCP(old.TransportHeader().Slice()), header.TCP(p.TransportHeader().Slice())
		switch {
		case supersedes(old, p, oth, th, t.q[i].first):
			t.bytes += p.Size() - old.Size()
			t.q[i].pkt, t.q[i].first = p.IncRef(), first
			old.DecRef()
			return true
		case ends(old, p, oth, th):
			// All of the newer header but the number of its first byte and its checksum, which is that of the
			// pseudo-header until the device completes it.
			oth.SetFlags(uint8(th.Flags() | header.TCPFlagPsh))
			oth.SetAckNumber(th.AckNumber())
			oth.SetWindowSize(th.WindowSize())
			copy(oth[header.TCPMinimumSize:], th[header.TCPMinimumSize:])
			return true
		}
		return false // nor with those before it, whatever they are
	}
	return false
}

func sameAddresses(a, b *stack.PacketBuffer) bool {
	an := addresses(a)
	return a.NetworkProtocolNumber == b.NetworkProtocolNumber && an != nil && bytes.Equal(an, addresses(b))
}

// addresses is both addresses of a packet, nil if it has no network header.
func addresses(p *stack.PacketBuffer) []byte {
	n := p.NetworkHeader().Slice()
	size, addrs := header.IPv4MinimumSize, 2*header.IPv4AddressSize
	if p.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		size, addrs = header.IPv6MinimumSize, 2*header.IPv6AddressSize
	}
	if len(n) < size {
		return nil
	}
	return n[size-addrs : size]
}

// supersedes reports whether next says all that old does: old is a mere acknowledgement, next follows it with as many
// bytes of options, and acknowledges more, or as much and carries something while old, as first says, repeats none.
// Their length tells most selective acknowledgements apart; data that comes with those of old tells the peer of them as
// well.
func supersedes(old, next *stack.PacketBuffer, oth, nth header.TCP, first bool) bool {
	more := int32(nth.AckNumber() - oth.AckNumber())
	return oth.Flags() == header.TCPFlagAck && old.Data().Size() == 0 && len(oth) == len(nth) &&
		oth.SequenceNumber() == nth.SequenceNumber() &&
		(more > 0 || more == 0 && first && (next.Data().Size() > 0 || nth.Flags().Contains(header.TCPFlagFin)))
}

// ends reports whether next is the FIN that follows old's bytes, which are one segment.
func ends(old, next *stack.PacketBuffer, oth, nth header.TCP) bool {
	size := old.Data().Size()
	return size > 0 && next.Data().Size() == 0 &&
		nth.Flags() == header.TCPFlagFin|header.TCPFlagAck && len(oth) == len(nth) &&
		oth.Flags()&^header.TCPFlagPsh == header.TCPFlagAck && oth.SequenceNumber()+uint32(size) == nth.SequenceNumber()
}
