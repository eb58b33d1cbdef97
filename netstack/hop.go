package netstack

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// nic is the one link of every gVisor stack. It is named on every bind all the
// same: an unnamed bind takes the first route that fits, which would be wrong
// the day there are two.
const nic tcpip.NICID = 1

// hop is one gVisor stack on one link. A pod has two: the hop to its own kernel,
// microseconds long and without loss, and the hop to the network, which may be
// anything. They want different options, gVisor's options are per stack, and
// nothing ever passes between them but through a relay.
type hop struct {
	s    *Stack
	name string
	port *port
	// network is set on the hop to the network.
	network bool

	sizes atomic.Int32 // the sizes of buffers in force (memory.go)
	ports dialPorts

	mu     sync.Mutex
	gs     *stack.Stack // nil until it is first needed
	fwd    *tcp.Forwarder
	closed bool
}

func newHop(s *Stack, name string, p *pump, network bool) *hop {
	h := &hop{s: s, name: name, port: newPort(p, s.cfg.MTU), network: network,
		ports: dialPorts{first: s.cfg.PortMin, last: s.cfg.PortMax}}
	h.port.shortcuts = &s.shortcuts
	h.port.first = func() { h.stack() }
	h.port.wait = h.wait
	h.port.crashed = s.crash
	return h
}

// endpoint returns the TCP endpoint that packets with this id go to, nil if there is none.
func (h *hop) endpoint(id stack.TransportEndpointID) *tcp.Endpoint {
	h.mu.Lock()
	gs := h.gs
	h.mu.Unlock()
	if gs == nil {
		return nil
	}
	ep, _ := gs.FindTransportEndpoint(protoOf(id.LocalAddress), tcp.ProtocolNumber, id, nic).(*tcp.Endpoint)
	return ep
}

// stack returns the gVisor stack and makes it first if need be: an idle one
// costs some 60 KiB, and most pods never have plaintext to or from the network.
func (h *hop) stack() (*stack.Stack, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, net.ErrClosed
	}
	if h.gs != nil {
		return h.gs, nil
	}
	gs := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol,
			// No DAD, no router solicitation, no SLAAC: the stack owns no
			// address and has no neighbours, it stands in for all of them.
			ipv6.NewProtocolWithOptions(ipv6.Options{}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		// A packet from the pod to the pod's own address must leave by a link,
		// not loop inside: with spoofing every address would count as local.
		HandleLocal: false,
		Clock:       newClock(h.s),
	})
	if err := h.configure(gs); err != nil {
		gs.Destroy()
		return nil, fmt.Errorf("netstack: %s: %w", h.name, err)
	}
	h.gs = gs
	return gs, nil
}

// configure sets what differs from gVisor's defaults or must not change with
// them; every line carries its reason.
func (h *hop) configure(gs *stack.Stack) error {
	cfg := &h.s.cfg
	var (
		// Selective acknowledgement: with 64 KiB segments a retransmission of
		// what already arrived is dear.
		sack = tcpip.TCPSACKEnabled(true)
		// RACK with its tail loss probes is right for a network (and usable
		// since gVisor takes the RTT at arrival, 9adc33f23). On the hop to the
		// kernel there is nothing to lose and the probes are due after twice a
		// round trip of 50 us, that is whenever the other side has to wait for
		// a processor: measured with 8 streams (2026-11-23), 1 % of all packets
		// was sent twice, the windows halved at each cut packets to 30 KiB, and
		// the relay took 1.4 CPU-s per GB instead of 1.05.
		recovery = tcpip.TCPRecovery(0)
		// Reno or cubic made no difference on a lossless local link; reno is
		// the cheaper one. A network is left to cubic, like Linux.
		cc = tcpip.CongestionControlOption("reno")
		// A fast reader gets a larger window, an idle connection keeps the small one.
		mrb = tcpip.TCPModerateReceiveBufferOption(true)
		// Nagle off: the relay already writes in the pieces it was given, and
		// holding the last one back costs a round trip of the application.
		delay = tcpip.TCPDelayEnabled(false)
		// The pod's kernel may take a new SYN from the same port at once; a
		// long TIME_WAIT here would answer it with an ACK and cost the
		// application a second. If the last ACK was lost the retransmitted FIN
		// meets a reset, which is harmless then: its sender has closed already.
		timeWait = tcpip.TCPTimeWaitTimeoutOption(10 * time.Millisecond)
		// FIN_WAIT_2 of a connection that we closed altogether.
		linger = tcpip.TCPLingerTimeoutOption(10 * time.Second)
		// 1+2+4+8 s: dials have their own deadline, and a client that went away
		// during the handshake must not hold a flow for two minutes.
		syn = tcpip.TCPSynRetriesOption(4)
		rcv = tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: cfg.ReceiveBuffer,
			Max: cfg.MaxReceiveBuffer}
		snd = tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: cfg.SendBuffer, Max: cfg.MaxSendBuffer}
	)
	if h.network {
		recovery = tcpip.TCPRACKLossDetection
		cc = "cubic"
		// Old duplicates exist out there; a second outlives them in a data
		// centre, and ports are drawn at random from many.
		timeWait = tcpip.TCPTimeWaitTimeoutOption(time.Second)
		// A round trip may be long: let moderation go as far as gVisor's own
		// bound.
		rcv.Max, snd.Max = max(rcv.Max, tcp.MaxBufferSize), max(snd.Max, tcp.MaxBufferSize)
	}
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &recovery, &cc, &mrb, &delay, &timeWait, &linger,
		&syn, &rcv, &snd} {
		if err := gs.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("option %T: %s", o, err)
		}
	}
	ttl := tcpip.DefaultTTLOption(64) // Linux's
	for _, p := range []tcpip.NetworkProtocolNumber{ipv4.ProtocolNumber, ipv6.ProtocolNumber} {
		if err := gs.SetNetworkProtocolOption(p, &ttl); err != nil {
			return fmt.Errorf("option %T: %s", ttl, err)
		}
	}
	if err := gs.SetPortRange(cfg.PortMin, cfg.PortMax); err != nil {
		return fmt.Errorf("port range: %s", err)
	}
	// The handler comes before the NIC: a packet that arrives in between would
	// be answered with a reset (tun2socks learned this the hard way). gVisor's
	// own bound on SYNs is out of the way: ours counts, and knows destinations.
	h.fwd = tcp.NewForwarder(gs, cfg.ReceiveBuffer, 1<<30, h.s.flows.serve(h))
	gs.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		return h.s.flows.handle(h, id, pkt)
	})
	gs.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		return h.s.dns.handle(h, id, pkt)
	})
	if err := gs.CreateNIC(nic, h.port); err != nil {
		return fmt.Errorf("link: %s", err)
	}
	// Take packets to every address, and send from every address.
	if err := gs.SetPromiscuousMode(nic, true); err != nil {
		return fmt.Errorf("link: %s", err)
	}
	if err := gs.SetSpoofing(nic, true); err != nil {
		return fmt.Errorf("link: %s", err)
	}
	gs.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: nic})
	gs.AddRoute(tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: nic})
	return nil
}

// abort resets what is registered, handshakes under way included, which wakes
// whoever waits for them. No stack is made from here on.
func (h *hop) abort() {
	h.mu.Lock()
	gs := h.gs
	h.closed = true
	h.mu.Unlock()
	if gs != nil {
		for _, e := range gs.RegisteredEndpoints() {
			e.Abort()
		}
	}
}

// destroy ends gVisor's goroutines and timers.
func (h *hop) destroy() {
	if h.gs != nil {
		h.gs.Destroy()
	}
}

// stats returns gVisor's counters, which may be zero ones.
func (h *hop) stats() tcpip.Stats {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gs == nil {
		return tcpip.Stats{}.FillIn()
	}
	return h.gs.Stats()
}
