package netstack

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// forwarder turns SYNs that no endpoint claims into Flows, within bounds.
type forwarder struct {
	s *Stack

	mu      sync.Mutex
	pending map[flowKey]*Flow
	perDst  map[netip.AddrPort]int
	stopped bool
	active  int           // OnFlow goroutines
	none    chan struct{} // closed when stopped and active == 0

	flows, duplicates, overPod, overDst atomic.Uint64
	accepted, failed, refused           atomic.Uint64
}

// flowKey tells flows apart; the two hops may see the same addresses.
type flowKey struct {
	h  *hop
	id stack.TransportEndpointID
}

func newForwarder(s *Stack) *forwarder {
	return &forwarder{
		s:       s,
		pending: make(map[flowKey]*Flow),
		perDst:  make(map[netip.AddrPort]int),
		none:    make(chan struct{}),
	}
}

// handle is called inline by the reader for every TCP packet that belongs to no
// connection. False makes gVisor answer with a reset.
func (f *forwarder) handle(h *hop, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	th := header.TCP(pkt.TransportHeader().Slice())
	if fl := th.Flags(); !fl.Contains(header.TCPFlagSyn) || fl&(header.TCPFlagAck|header.TCPFlagRst|header.TCPFlagFin) != 0 {
		return false
	}
	key, dst := flowKey{h, id}, addrPort(id.LocalAddress, id.LocalPort)

	f.mu.Lock()
	switch {
	case f.stopped:
		f.mu.Unlock()
		return false
	case f.pending[key] != nil:
		f.mu.Unlock()
		f.duplicates.Add(1)
		return true
	case len(f.pending) >= f.s.cfg.MaxInFlight:
		f.mu.Unlock()
		f.overPod.Add(1)
		return true // silence: the client tries again in a second
	case f.perDst[dst] >= f.s.cfg.MaxInFlightPerDst:
		f.mu.Unlock()
		f.overDst.Add(1)
		return true
	}
	fl := &Flow{
		f:       f,
		src:     addrPort(id.RemoteAddress, id.RemotePort),
		dst:     dst,
		inbound: f.s.isOwn(dst.Addr()),
		key:     key,
		// What an ICMP error quotes; the packet itself is not kept.
		syn: slices.Concat(pkt.NetworkHeader().Slice(), th),
	}
	f.pending[key] = fl
	f.perDst[dst]++
	f.active++
	f.mu.Unlock()

	if !h.fwd.HandlePacket(id, pkt) {
		// A TCP header that gVisor does not accept.
		f.forget(fl)
		f.done()
	}
	return true
}

// serve returns what gVisor runs in a goroutine of its own for every flow of h.
func (f *forwarder) serve(h *hop) func(*tcp.ForwarderRequest) {
	return func(r *tcp.ForwarderRequest) {
		defer f.done()
		f.mu.Lock()
		fl := f.pending[flowKey{h, r.ID()}]
		f.mu.Unlock()
		fl.req = r
		f.flows.Add(1)
		defer func() {
			if fl.decide() {
				f.s.log.Error("netstack: flow left undecided", "src", fl.src, "dst", fl.dst)
				fl.refuse(Reset)
			}
		}()
		f.s.cfg.OnFlow(fl)
	}
}

// forget frees the flow's place within the bounds.
func (f *forwarder) forget(fl *Flow) {
	f.mu.Lock()
	delete(f.pending, fl.key)
	if f.perDst[fl.dst]--; f.perDst[fl.dst] <= 0 {
		delete(f.perDst, fl.dst)
	}
	f.mu.Unlock()
}

func (f *forwarder) done() {
	f.mu.Lock()
	f.active--
	if f.stopped && f.active == 0 {
		close(f.none)
	}
	f.mu.Unlock()
}

// stop refuses further flows.
func (f *forwarder) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped {
		f.stopped = true
		if f.active == 0 {
			close(f.none)
		}
	}
}

// wait waits for the OnFlow goroutines after stop, at most d.
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

func fromAddr(a netip.Addr) (tcpip.Address, tcpip.NetworkProtocolNumber) {
	if a = a.Unmap(); a.Is4() {
		return tcpip.AddrFrom4(a.As4()), header.IPv4ProtocolNumber
	}
	return tcpip.AddrFrom16(a.As16()), header.IPv6ProtocolNumber
}
