package netstack

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"ztun/proxy/fair"
)

const (
	dnsPort = 53
	// maxDNSBytes bounds the payloads of a pod's queries in flight: a query is
	// some 50 bytes long, but nothing keeps a pod from sending 64 KiB.
	maxDNSBytes = 4 << 20
)

// DNSQuery is a UDP packet that the pod's application sent to port 53 of some
// address. A query that nobody answers costs nothing but the client's patience.
type DNSQuery struct {
	h        *hop
	src, dst netip.AddrPort
	payload  []byte
}

// Src is the client's address and port.
func (q *DNSQuery) Src() netip.AddrPort { return q.src }

// Dst is the server that the client asked.
func (q *DNSQuery) Dst() netip.AddrPort { return q.dst }

// Payload is the message, the receiver's to keep and to change.
func (q *DNSQuery) Payload() []byte { return q.payload }

// Reply sends payload to the client as the server that it asked, in IP fragments
// where the link's MTU calls for them. It may be called from any goroutine, and
// more than once. An error says that the packet could not be built or queued.
func (q *DNSQuery) Reply(payload []byte) error {
	if err := q.reply(payload); err != nil {
		return fmt.Errorf("netstack: answer from %v to %v: %w", q.dst, q.src, err)
	}
	return nil
}

func (q *DNSQuery) reply(payload []byte) error { return q.h.sendUDP(q.dst, q.src, payload) }

// sendUDP sends a datagram out of the link as if from src, in fragments where the MTU calls for them.
func (h *hop) sendUDP(src, dst netip.AddrPort, payload []byte) error {
	local, proto := fromAddr(src.Addr())
	remote, _ := fromAddr(dst.Addr())
	gs, err := h.stack()
	if err != nil {
		return err
	}
	r, terr := gs.FindRoute(nic, local, remote, proto, false)
	if terr != nil {
		return toError(terr, "route")
	}
	defer r.Release()
	length := header.UDPMinimumSize + len(payload)
	if length > 0xffff {
		return toError(&tcpip.ErrMessageTooLong{}, "send")
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(r.MaxHeaderLength()),
		Payload:            buffer.MakeWithData(payload),
	})
	defer pkt.DecRef()
	pkt.TransportProtocolNumber = udp.ProtocolNumber
	u := header.UDP(pkt.TransportHeader().Push(header.UDPMinimumSize))
	u.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(length)})
	// RFC 768: a sum of zero is sent as all ones, since zero means none.
	sum := u.CalculateChecksum(pseudoSum(local, remote, length, pkt))
	if sum != 0xffff {
		sum = ^sum
	}
	u.SetChecksum(sum)
	if terr := r.WritePacket(stack.NetworkHeaderParams{Protocol: udp.ProtocolNumber, TTL: r.DefaultTTL()},
		pkt); terr != nil {
		return toError(terr, "send")
	}
	return nil
}

// dnsTap takes the pod's UDP packets to port 53 out of its traffic and hands
// them to Config.OnDNS, within bounds.
type dnsTap struct {
	s    *Stack
	rate *fair.Rate[struct{}] // the pod's

	mu      sync.Mutex
	stopped bool
	active  int // OnDNS goroutines
	bytes   int // their payloads
	none    chan struct{}

	queries, over, malformed, stray atomic.Uint64
}

func newDNSTap(s *Stack) *dnsTap {
	return &dnsTap{s: s, rate: fair.NewRate[struct{}](float64(s.cfg.DNSRate), 2*s.cfg.DNSRate, 1),
		none: make(chan struct{})}
}

// allow is asked by the reader before anything is made of a packet to port 53.
func (d *dnsTap) allow() bool {
	if d.rate.Allow(struct{}{}) {
		return true
	}
	d.turnedAway()
	return false
}

// turnedAway counts a query that was dropped because of a bound.
func (d *dnsTap) turnedAway() {
	d.over.Add(1)
	if d.s.cfg.OnBound != nil {
		d.s.cfg.OnBound("DNS queries", "the pod", false)
	}
}

// handle is called inline by the reader for every UDP packet that no socket of
// DialUDP claims. It always takes the packet: a refusal would be an ICMP error
// from a host that the pod did not ask.
func (d *dnsTap) handle(h *hop, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
	if d.s.cfg.OnDNS == nil || h != d.s.app || dst.Port() != dnsPort || d.s.isOwn(dst.Addr()) {
		if dg := d.s.dg; dg != nil && dg.o.Way != nil && h == d.s.app {
			dg.sendWhole(src, dst, pkt)
			return true
		}
		d.stray.Add(1)
		return true
	}
	if !d.s.mayCall(h, src.Addr(), false) {
		d.s.flows.foreign.Add(1)
		return true
	}
	u := header.UDP(pkt.TransportHeader().Slice())
	n := int(u.Length()) - header.UDPMinimumSize
	if n < 0 || n > pkt.Data().Size() || src.Port() == 0 || !answerable(src.Addr()) || !answerable(dst.Addr()) {
		d.malformed.Add(1)
		return true
	}
	d.mu.Lock()
	if d.stopped || d.active >= d.s.cfg.MaxDNS || d.bytes+n > maxDNSBytes {
		stopped := d.stopped
		d.mu.Unlock()
		if stopped {
			d.over.Add(1)
		} else {
			d.turnedAway()
		}
		return true
	}
	d.active++
	d.bytes += n
	d.mu.Unlock()
	d.queries.Add(1)
	q := &DNSQuery{h: h, src: src, dst: dst, payload: pkt.Data().AsRange().ToSlice()[:n]}
	go d.s.cfg.Panics.Func("a DNS query", func() {
		defer d.done(n)
		d.s.cfg.OnDNS(q)
	}, nil)()
	return true
}

// answerable reports whether one host can be asked by this address, or answered.
func answerable(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func (d *dnsTap) done(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.active--
	d.bytes -= n
	if d.stopped && d.active == 0 {
		close(d.none)
	}
}

// stop takes no further queries.
func (d *dnsTap) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.stopped {
		d.stopped = true
		if d.active == 0 {
			close(d.none)
		}
	}
}

// wait waits for the OnDNS goroutines after stop, at most t.
func (d *dnsTap) wait(t time.Duration) bool {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-d.none:
		return true
	case <-timer.C:
		return false
	}
}

func (d *dnsTap) inFlight() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.active
}

// pseudoSum is the checksum of what a UDP header does not hold: the addresses,
// the length of header and payload, and the payload.
func pseudoSum(local, remote tcpip.Address, length int, pkt *stack.PacketBuffer) uint16 {
	return checksum.Combine(header.PseudoHeaderChecksum(udp.ProtocolNumber, local, remote, uint16(length)),
		pkt.Data().Checksum())
}
