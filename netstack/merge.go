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
// One whose acknowledged number is the same as the last one's counts as superseded only if it carries something; a
// super-packet is left alone, as is a packet whose checksum the device does not complete.

// mergeReach is how many packets back in the queue the connection's last one is looked for: those of other connections
// that one turn of a processor has queued meanwhile.
const mergeReach = 16

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

// merge makes p, whose mergePorts are ports, part of the last packet of the same connection in the queue, or puts it in
// that one's place. False: it is to be queued. mu is held; p's reference is the caller's.
func (t *txQueue) merge(p *stack.PacketBuffer, ports uint32) bool {
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
		case supersedes(old, p, oth, th):
			t.bytes += p.Size() - old.Size()
			t.q[i].pkt = p.IncRef()
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
		return false // order is kept within a connection
	}
	return false
}

func sameAddresses(a, b *stack.PacketBuffer) bool {
	if a.NetworkProtocolNumber != b.NetworkProtocolNumber {
		return false
	}
	an, bn := a.NetworkHeader().Slice(), b.NetworkHeader().Slice()
	from, n := header.IPv4MinimumSize-2*header.IPv4AddressSize, 2*header.IPv4AddressSize
	if a.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		from, n = header.IPv6MinimumSize-2*header.IPv6AddressSize, 2*header.IPv6AddressSize
	}
	return len(an) >= from+n && len(bn) >= from+n && bytes.Equal(an[from:from+n], bn[from:from+n])
}

// supersedes reports whether next says all that old does: old is a mere acknowledgement without a selective one (whose
// repetition tells of a loss), and next follows it and acknowledges more, or as much and carries something.
func supersedes(old, next *stack.PacketBuffer, oth, nth header.TCP) bool {
	more := int32(nth.AckNumber() - oth.AckNumber())
	return oth.Flags() == header.TCPFlagAck && old.Data().Size() == 0 && len(oth) == len(nth) &&
		oth.SequenceNumber() == nth.SequenceNumber() &&
		(more > 0 || more == 0 && (next.Data().Size() > 0 || nth.Flags().Contains(header.TCPFlagFin)))
}

// ends reports whether next is the FIN that follows old's bytes, which are one segment.
func ends(old, next *stack.PacketBuffer, oth, nth header.TCP) bool {
	size := old.Data().Size()
	return size > 0 && next.Data().Size() == 0 &&
		nth.Flags() == header.TCPFlagFin|header.TCPFlagAck && len(oth) == len(nth) &&
		oth.Flags()&^header.TCPFlagPsh == header.TCPFlagAck && oth.SequenceNumber()+uint32(size) == nth.SequenceNumber()
}
