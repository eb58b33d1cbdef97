package netstack

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/fair"
)

// Datagrams says what becomes of the pod's UDP and ICMP. What it leaves out: port 53 while there is an OnDNS, ICMP
// errors about TCP, and multicast, which nobody carries.
//
// A pod with an Uplink has its packets forwarded as they are: its address is routed, so nothing is translated, and a
// server in the pod is reached by anybody whom Allow lets in. In the words of RFC 4787 that is the
// endpoint-independent mapping of REQ-1 (the identity) and the endpoint-independent filtering of REQ-8; ports keep
// their parity and contiguity (REQ-3, REQ-4), a pod's packet to another of the node is forwarded alike (hairpinning,
// REQ-9), ICMP errors pass both ways (REQ-12), fragments in any order (REQ-14), and what is larger than a path is
// told so (REQ-13). What there is of a flow here serves Allow, the bounds and the counters.
type Datagrams struct {
	// Allow is asked whether a UDP flow may pass: at its first packet, and at the next one after Version has changed.
	// It is called by readers of devices and must not wait. Nil: all may.
	Allow func(DatagramFlow) bool
	// Version is different whenever Allow might say something else. Nil: it never does.
	Version func() uint64
	// MaxFlows bounds the pod's flows (default 16384), MaxFlowsPerPeer those of one peer (fair.Group; default all).
	MaxFlows, MaxFlowsPerPeer int
	// Way carries the datagrams of a pod without Uplink; with one it must be nil. What comes by it is given to
	// Stack.DeliverDatagram and Stack.DeliverFailure. Close closes it. (Package usersock is one.)
	Way DatagramWay
}

// DatagramWay is a way to the network that takes datagrams and not packets.
type DatagramWay interface {
	// Send sends one. It is called by a device's reader: it must not wait, nor keep the payload.
	Send(Datagram) error
	// Close returns when nothing is delivered any more.
	Close()
}

// Datagram is what a DatagramWay carries, in either direction.
type Datagram struct {
	// Echo: a ping or its answer. Payload is the ICMP message then, and the pod's port its identifier.
	Echo      bool
	Pod, Peer netip.AddrPort
	Payload   []byte
	// Segment, if not 0, says that Payload is several datagrams of so many bytes each, the last perhaps shorter.
	Segment int
	// TTL and DF are those of the pod's packet.
	TTL uint8
	DF  bool
}

// DatagramFailure is an ICMP error about a datagram of the pod's.
type DatagramFailure struct {
	Echo       bool
	Pod, Peer  netip.AddrPort
	From       netip.Addr // who says so; the zero Addr: nobody with an address
	Type, Code uint8      // of ICMP, or of ICMPv6
	MTU        int
	Seq        uint16 // of the ping that it is about
}

// DatagramFlow is who speaks to whom: of UDP addresses and ports.
type DatagramFlow struct {
	Inbound   bool // the network speaks first
	Pod, Peer netip.AddrPort
}

// Lifetimes of flows; they are looked at every flowTick, so a flow lives up to two of those longer.
const (
	flowTick = 10 * time.Second
	// One side alone has spoken: RFC 4787 REQ-5 wants two minutes at least.
	flowOneWay = 2 * time.Minute
	// Both have: five minutes, as it recommends. Packets of either side keep a flow (REQ-6).
	flowBothWays = 5 * time.Minute
	// Echoes: RFC 5508 REQ-2.
	flowEcho = time.Minute

	defaultMaxDatagramFlows = 16384
	// nodeFlows bounds the flows of all pods of an Uplink: some 500 bytes each.
	nodeFlows = 65536

	// Refusals are told to the pod by ICMP as often as Linux tells its own (RFC 4443 section 2.4 f).
	refusalsPerSecond, refusalsBurst = 100, 50
)

// datagramKey tells the flows of a pod apart.
type datagramKey struct {
	proto     tcpip.TransportProtocolNumber
	pod, peer netip.AddrPort // of echoes one port is the identifier, the other 0
}

// datagramFlow is a flow that may pass. Datagrams.mu guards it.
type datagramFlow struct {
	key           datagramKey
	inbound, both bool
	gone          bool
	version       uint64
	seen          uint32 // datagrams.tick at the last packet
	place         *fair.Place[netip.Addr]
	nodePlace     *fair.Place[*datagrams]
}

// fragmentID is what the fragments of a packet have in common, its addresses apart.
type fragmentID struct {
	v6, known bool
	ident     uint32
}

// datagrams is what a stack has for its UDP and ICMP.
type datagrams struct {
	s     *Stack
	o     Datagrams
	peers *fair.Ledger[netip.Addr]
	node  *fair.Ledger[*datagrams] // of all pods of the uplink; nil without one
	errs  *fair.Rate[struct{}]

	out, in txShare // of the uplink's queue, of the App device's
	batch   wayBatch

	// queries are the fragments of queries that are captured: the App device's reader has them by the first one's ident.
	queries  [16]fragmentID
	queriesN uint8

	mu     sync.Mutex
	flows  map[datagramKey]*datagramFlow
	tick   uint32
	timer  *time.Timer // runs while there are flows
	closed bool

	opened, evicted, over, expired           atomic.Uint64
	denied, stray, full                      atomic.Uint64
	outPackets, outBytes, inPackets, inBytes atomic.Uint64
}

func newDatagrams(s *Stack, o Datagrams) *datagrams {
	orInt(&o.MaxFlows, defaultMaxDatagramFlows)
	d := &datagrams{s: s, o: o, flows: map[datagramKey]*datagramFlow{}, errs: fair.NewRate[struct{}](refusalsPerSecond,
		refusalsBurst, 1)}
	d.peers = fair.NewLedger(fair.LedgerOptions[netip.Addr]{
		Limit: int64(o.MaxFlows), PerSource: int64(o.MaxFlowsPerPeer), Turned: d.turned,
	})
	if s.cfg.Uplink != nil {
		d.node = s.cfg.Uplink.flows
	}
	return d
}

// turned counts and reports a flow that a bound of the pod's turned away.
func (d *datagrams) turned(peer netip.Addr, evicted bool) {
	if evicted {
		d.evicted.Add(1)
	} else {
		d.over.Add(1)
	}
	if d.s.cfg.OnBound != nil {
		d.s.cfg.OnBound("datagram flows", peer.String(), evicted)
	}
}

// nodeTurned is turned for the bound that all pods share: the greediest pod loses.
func (d *datagrams) nodeTurned(evicted bool) {
	if evicted {
		d.evicted.Add(1)
	} else {
		d.over.Add(1)
	}
	if d.s.cfg.OnBound != nil {
		d.s.cfg.OnBound("datagram flows of the node", "the pod", evicted)
	}
}

// passage is what becomes of a packet.
type passage uint8

const (
	passes passage = iota
	denied         // by policy
	turned         // by a bound, or because it belongs to nothing
)

// pass judges a packet of a flow. opens: it may begin one; a packet that cannot is a stray one.
func (d *datagrams) pass(k datagramKey, inbound, opens bool) passage {
	version := d.version()
	d.mu.Lock()
	f := d.flows[k]
	if f != nil {
		f.seen = d.tick
		f.both = f.both || f.inbound != inbound
		current := f.version == version
		inbound = f.inbound
		d.mu.Unlock()
		if current {
			return passes
		}
		// Something is known that was not when the flow was let in.
		if !d.allows(k, inbound) {
			d.denied.Add(1)
			d.end(f)
			return denied
		}
		d.mu.Lock()
		f.version = version
		d.mu.Unlock()
		return passes
	}
	d.mu.Unlock()
	if !opens {
		d.stray.Add(1)
		return turned
	}
	if !d.allows(k, inbound) {
		d.denied.Add(1)
		return denied
	}
	if !d.open(k, inbound, version) {
		return turned
	}
	return passes
}

func (d *datagrams) version() uint64 {
	if d.o.Version == nil {
		return 0
	}
	return d.o.Version()
}

// allows asks policy, which is about ports: an echo has none.
func (d *datagrams) allows(k datagramKey, inbound bool) bool {
	return d.o.Allow == nil || k.proto != header.UDPProtocolNumber ||
		d.o.Allow(DatagramFlow{Inbound: inbound, Pod: k.pod, Peer: k.peer})
}

// open makes a flow within the bounds. Its places are taken without d.mu: whoever loses one for them may be of another
// stack, or of this one.
func (d *datagrams) open(k datagramKey, inbound bool, version uint64) bool {
	f := &datagramFlow{key: k, inbound: inbound, version: version}
	evict := func() { d.end(f) }
	place := d.peers.Take(fair.Group(k.peer.Addr()), 1, evict)
	if place == nil {
		return false
	}
	var nodePlace *fair.Place[*datagrams]
	if d.node != nil {
		if nodePlace = d.node.Take(d, 1, evict); nodePlace == nil {
			place.Release()
			return false
		}
	}
	d.mu.Lock()
	before := d.flows[k] // of the other device's reader
	if d.closed || f.gone || before != nil {
		f.gone = true
		d.mu.Unlock()
		place.Release()
		nodePlace.Release()
		return before != nil
	}
	f.seen, f.place, f.nodePlace = d.tick, place, nodePlace
	d.flows[k] = f
	if d.timer == nil {
		d.timer = time.AfterFunc(flowTick, d.s.cfg.Panics.Func("the end of datagram flows", d.sweep, nil))
	}
	d.mu.Unlock()
	d.opened.Add(1)
	return true
}

// end forgets a flow. One that loses its place before it stands has none to give back yet: open sees to it.
func (d *datagrams) end(f *datagramFlow) {
	d.mu.Lock()
	f.gone = true
	if d.flows[f.key] == f {
		delete(d.flows, f.key)
	}
	place, nodePlace := f.place, f.nodePlace
	d.mu.Unlock()
	place.Release()
	nodePlace.Release()
}

// release gives a flow's places back, which stands no more.
func (f *datagramFlow) release() {
	f.place.Release()
	f.nodePlace.Release()
}

// sweep forgets the flows whose time is over.
func (d *datagrams) sweep() {
	var over []*datagramFlow
	d.mu.Lock()
	d.tick++
	for k, f := range d.flows {
		if time.Duration(d.tick-f.seen-1)*flowTick >= f.life() {
			f.gone = true
			delete(d.flows, k)
			over = append(over, f)
		}
	}
	switch {
	case d.closed:
	case len(d.flows) == 0:
		d.timer, d.flows = nil, map[datagramKey]*datagramFlow{} // a burst's memory is not kept
	default:
		d.timer.Reset(flowTick)
	}
	d.mu.Unlock()
	for _, f := range over {
		f.release()
	}
	d.expired.Add(uint64(len(over)))
}

func (f *datagramFlow) life() time.Duration {
	switch {
	case f.key.proto != header.UDPProtocolNumber:
		return flowEcho
	case f.both:
		return flowBothWays
	}
	return flowOneWay
}

// knows reports whether there is a flow with a peer, or with its /64.
func (d *datagrams) knows(peer netip.Addr) bool { return d.peers.Held(fair.Group(peer)) > 0 }

// count is how many flows there are.
func (d *datagrams) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.flows)
}

// close ends all flows, and lets none begin.
func (d *datagrams) close() {
	d.mu.Lock()
	d.closed = true
	flows := d.flows
	d.flows = nil
	if d.timer != nil {
		d.timer.Stop()
	}
	for _, f := range flows {
		f.gone = true
	}
	d.mu.Unlock()
	for _, f := range flows {
		f.release()
	}
	if d.o.Way != nil {
		d.o.Way.Close()
	}
}
