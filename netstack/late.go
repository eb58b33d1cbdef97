package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A client that takes the same source port again at once, after a reset or after the other side closed first, has
// ended the old connection, but here it may still be registered: its reset waits for a segment processor, or the
// endpoint is in TIME_WAIT. gVisor would queue the new SYN to the old endpoint and then refuse it. So such a SYN
// waits until the old endpoint has gone; if it stays, the connection lives, and gVisor challenges the SYN (RFC 5961
// section 4).

const (
	// The first pause is many times what a reset in the queue takes; all seven together outlast TIME_WAIT on the hop to
	// the kernel.
	lateFirst = 250 * time.Microsecond
	lateTries = 7
	// maxLate bounds the SYNs that wait, per pod. Beyond it they take gVisor's way at once.
	maxLate = 256
)

// synID tells a SYN from all others.
type synID struct {
	id  stack.TransportEndpointID
	seq uint32
}

// synOf reads it from the headers of a packet that parseHead found to be a SYN.
func synOf(head []byte, p *rxPacket) (s synID) {
	if p.proto == header.IPv4ProtocolNumber {
		h := header.IPv4(head)
		s.id.RemoteAddress, s.id.LocalAddress = h.SourceAddress(), h.DestinationAddress()
	} else {
		h := header.IPv6(head)
		s.id.RemoteAddress, s.id.LocalAddress = h.SourceAddress(), h.DestinationAddress()
	}
	th := header.TCP(head[p.ipLen:])
	s.id.RemotePort, s.id.LocalPort, s.seq = th.SourcePort(), th.DestinationPort(), th.SequenceNumber()
	return s
}

// wait takes a SYN that meets an older connection of the same ports, and delivers it later; false if there is none,
// or no room.
func (h *hop) wait(syn synID, p *rxPacket, pkt *stack.PacketBuffer) bool {
	f := h.s.flows
	if !h.taken(syn) || !f.beginLate() {
		return false
	}
	f.delayed.Add(1)
	h.deliverLate(syn, p.proto, pkt, lateFirst, lateTries)
	return true
}

func (h *hop) deliverLate(syn synID, proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer, pause time.Duration,
	tries int) {
	time.AfterFunc(pause, h.s.cfg.Panics.Func("a SYN that waited", func() {
		if tries > 1 && h.taken(syn) {
			h.deliverLate(syn, proto, pkt, 2*pause, tries-1)
			return
		}
		defer h.s.flows.endLate()
		h.port.deliver(proto, pkt)
	}, h.s.crash))
}

// taken reports whether something older stands in the way of a SYN: an endpoint, or a flow that awaits its verdict
// though its client has given it up. On the hop to the kernel that is certain, as nobody else can send in the
// client's name.
func (h *hop) taken(syn synID) bool {
	if h.endpoint(syn.id) != nil {
		return true
	}
	if h.network {
		return false
	}
	f := h.s.flows
	f.mu.Lock()
	fl := f.pending[flowKey{h, syn.id}]
	f.mu.Unlock()
	if fl == nil || fl.seq == syn.seq {
		return false
	}
	fl.evict()
	return true
}

func (f *forwarder) beginLate() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped || f.late >= maxLate {
		return false
	}
	f.late++
	f.active++
	return true
}

func (f *forwarder) endLate() {
	f.mu.Lock()
	f.late--
	f.mu.Unlock()
	f.done()
}
