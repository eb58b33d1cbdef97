package netstack

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"ztun/proxy/fair"
	"ztun/proxy/grow"
	"ztun/proxy/refusal"
)

// forwarder turns SYNs that no endpoint claims into Flows, within bounds.
type forwarder struct {
	s *Stack
	// opened are the places of flows that the pod opens, arriving of those that are opened to it: neither direction can
	// take the other's.
	opened, arriving *places

	mu      sync.Mutex
	pending map[flowKey]*Flow
	// unanswered are SYNs that were refused by silence: what comes again is the same attempt.
	unanswered lately[synKey]
	late       int // SYNs that wait for an older connection to go
	stopped    bool
	silent     atomic.Bool   // Stack.Silence
	active     int           // OnFlow goroutines, and late SYNs
	none       chan struct{} // closed when stopped, active == 0 and nothing is pending

	flows, duplicates, foreign, evicted, over, delayed atomic.Uint64
	accepted, failed, refused, shortcuts               atomic.Uint64
}

// flowKey tells flows apart; the two hops may see the same addresses.
type flowKey struct {
	h  *hop
	id stack.TransportEndpointID
}

// synKey tells a SYN from all others of the same ports: a retransmission has its sequence number.
type synKey struct {
	flowKey
	seq uint32
}

const (
	// unansweredSpan outlives the longest pause between two SYNs of one connect on Linux (32 s, the sixth of
	// tcp_syn_retries).
	unansweredSpan  = time.Minute
	unansweredLimit = 4096
)

func newForwarder(s *Stack) *forwarder {
	f := &forwarder{
		s:          s,
		pending:    make(map[flowKey]*Flow),
		unanswered: lately[synKey]{span: unansweredSpan, limit: unansweredLimit},
		none:       make(chan struct{}),
	}
	f.opened = newPlaces(s.cfg.MaxInFlight, s.cfg.MaxInFlightPerDst, f.turned("connects"))
	f.arriving = newPlaces(s.cfg.MaxInFlight, s.cfg.MaxInFlightPerDst, f.turned("arriving connections"))
	return f
}

// turned counts and reports what a bound turned away.
func (f *forwarder) turned(resource string) func(netip.AddrPort, bool) {
	return func(party netip.AddrPort, evicted bool) {
		if evicted {
			f.evicted.Add(1)
		} else {
			f.over.Add(1)
		}
		if f.s.cfg.OnBound == nil {
			return
		}
		source := party.String()
		if party.Port() == 0 { // a client
			source = party.Addr().String()
		}
		f.s.cfg.OnBound(resource, source, evicted)
	}
}

// handle is called inline by the reader for every TCP packet that belongs to no
// connection. False makes gVisor answer with a reset.
func (f *forwarder) handle(h *hop, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	th := header.TCP(pkt.TransportHeader().Slice())
	if !opens(th.Flags()) {
		return f.s.shortcuts.passWhole(h, id, th, pkt) || f.s.probes.answer(h, id, th)
	}
	fl := &Flow{
		f:     f,
		src:   addrPort(id.RemoteAddress, id.RemotePort),
		dst:   addrPort(id.LocalAddress, id.LocalPort),
		key:   flowKey{h, id},
		seq:   th.SequenceNumber(),
		start: time.Now(),
	}
	fl.inbound = f.s.isOwn(fl.dst.Addr())
	fault(fl.dst)
	if !f.s.mayCall(h, fl.src.Addr(), fl.inbound) {
		f.foreign.Add(1)
		return true
	}
	if fl.inbound {
		fl.places, fl.party = f.arriving, netip.AddrPortFrom(fair.Group(fl.src.Addr()), 0)
	} else {
		fl.places, fl.party = f.opened, fl.dst
	}

	f.mu.Lock()
	switch {
	case f.stopped:
		f.mu.Unlock()
		return f.silent.Load()
	case f.pending[fl.key] != nil:
		f.mu.Unlock()
		f.duplicates.Add(1)
		return true
	}
	fl.again = f.unanswered.has(synKey{fl.key, fl.seq}, fl.start)
	f.pending[fl.key] = fl
	f.active++
	f.mu.Unlock()

	// Not with f.mu held: who loses its place for this one is told here.
	if fl.place = fl.places.take(fl.party, fl.again, fl.evict); fl.place == nil {
		f.forget(fl)
		f.done()
		return true // silence: the client tries again in a second
	}
	// What an ICMP error quotes; the packet itself is not kept.
	fl.syn = slices.Concat(pkt.NetworkHeader().Slice(), th)
	if !h.fwd.HandlePacket(id, pkt) {
		// A TCP header that gVisor does not accept.
		f.forget(fl)
		f.done()
	}
	return true
}

// opens reports whether a packet with these flags asks for a connection.
func opens(fl header.TCPFlags) bool {
	return fl.Contains(header.TCPFlagSyn) && fl&(header.TCPFlagAck|header.TCPFlagRst|header.TCPFlagFin) == 0
}

// serve returns what gVisor runs in a goroutine of its own for every flow of h.
func (f *forwarder) serve(h *hop) func(*tcp.ForwarderRequest) {
	return func(r *tcp.ForwarderRequest) {
		grow.Stack()
		defer f.done()
		f.mu.Lock()
		fl := f.pending[flowKey{h, r.ID()}]
		f.mu.Unlock()
		fl.req = r
		f.flows.Add(1)
		defer func() {
			if fl.decide() {
				f.s.log.Error("netstack: flow left undecided", "src", fl.src, "dst", fl.dst)
				fl.refuse(refusal.Reset)
			}
		}()
		f.s.cfg.Panics.Run("a connection's beginning", func() { f.s.cfg.OnFlow(fl) }, nil)
	}
}

// forget frees the flow's place within the bounds. It is the last act of a verdict: a flow that is not pending any more
// holds nothing and has been counted, and a stack that stops waits for it.
func (f *forwarder) forget(fl *Flow) {
	fl.place.Release()
	f.mu.Lock()
	delete(f.pending, fl.key)
	f.quiet()
	f.mu.Unlock()
}

func (f *forwarder) done() {
	f.mu.Lock()
	f.active--
	f.quiet()
	f.mu.Unlock()
}

// quiet tells wait when the last of what it waits for has gone. f.mu is held.
func (f *forwarder) quiet() {
	if f.stopped && f.active == 0 && len(f.pending) == 0 {
		close(f.none)
	}
}

// stop refuses further flows.
func (f *forwarder) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped {
		f.stopped = true
		f.quiet()
	}
}

// close ends the handshakes under way, and those that begin later: what hop.abort finds registered is not all, as a
// flow may be just before its Accept.
func (f *forwarder) close() {
	f.mu.Lock()
	flows := slices.Collect(maps.Values(f.pending))
	f.mu.Unlock()
	for _, fl := range flows {
		fl.close()
	}
}

// wait waits for the OnFlow goroutines and for all verdicts after stop, at most d.
func (f *forwarder) wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-f.none:
		return true
	case <-t.C:
		return false
	}
}

// inFlight is the number of flows that await a verdict.
func (f *forwarder) inFlight() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.pending)
}

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(toAddr(a), port)
}

func toAddr(a tcpip.Address) netip.Addr {
	if a.Len() == 4 {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}

// protoOf is an address's family.
func protoOf(a tcpip.Address) tcpip.NetworkProtocolNumber {
	if a.Len() == header.IPv4AddressSize {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func fromAddr(a netip.Addr) (tcpip.Address, tcpip.NetworkProtocolNumber) {
	if a = a.Unmap(); a.Is4() {
		return tcpip.AddrFrom4(a.As4()), header.IPv4ProtocolNumber
	}
	return tcpip.AddrFrom16(a.As16()), header.IPv6ProtocolNumber
}

// unansweredBy remembers a SYN that was refused by silence. A destination that did not answer is none of the known
// ones any more; a client is not blamed, as anybody can send in its name.
func (f *forwarder) unansweredBy(fl *Flow) {
	if !fl.inbound {
		fl.places.silent(fl.party)
	}
	f.mu.Lock()
	f.unanswered.note(synKey{fl.key, fl.seq}, time.Now())
	f.mu.Unlock()
}
