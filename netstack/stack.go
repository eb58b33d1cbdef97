package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// The two links of a pod's stack.
const (
	nicApp    tcpip.NICID = 1
	nicUplink tcpip.NICID = 2
)

// Stack is one pod's TCP/IP stack: the far end of everything that the pod's
// kernel sends into its TUN, and of the plaintext that the network sends to the
// pod. All methods may be called from any goroutine.
type Stack struct {
	cfg   Config
	log   *slog.Logger
	gs    *stack.Stack
	app   *pump // owned: the App device's reader and writer
	appP  *port
	upP   *port // nil without a way to the network; appP itself if UplinkIsApp
	upNIC tcpip.NICID
	own   map[netip.Addr]struct{}

	fwd   *forwarder
	conns connList
	lent  sync.Pool // of *lent

	closeOnce sync.Once
	closed    chan struct{} // closed when Close has finished
	running   atomic.Bool
	runDone   chan struct{} // closed when Run has returned
}

// New builds the stack and attaches its links; no goroutine of ours runs until
// Run (gVisor starts GOMAXPROCS segment processors of its own, which Close
// ends). On error cfg.App is left open and remains the caller's.
func New(cfg Config) (*Stack, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	s := &Stack{
		cfg:     cfg,
		log:     cfg.Logger,
		own:     make(map[netip.Addr]struct{}, len(cfg.Addrs)),
		closed:  make(chan struct{}),
		runDone: make(chan struct{}),
	}
	s.lent.New = func() any { return &lent{pieces: make([][]byte, 0, 64)} }
	for _, a := range cfg.Addrs {
		s.own[a] = struct{}{}
	}
	s.gs = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol,
			// No DAD, no router solicitation, no SLAAC: the stack owns no
			// address and has no neighbours, it stands in for all of them.
			ipv6.NewProtocolWithOptions(ipv6.Options{}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
		// A packet from the pod to the pod's own address must leave by a link,
		// not loop inside: with spoofing every address would count as local.
		HandleLocal: false,
		Clock:       newClock(),
	})
	if err := s.setOptions(); err != nil {
		s.gs.Destroy()
		return nil, err
	}
	// The handler comes before the NICs: a packet that arrives in between would
	// be answered with a reset (tun2socks learned this the hard way).
	s.fwd = newForwarder(s)
	s.gs.SetTransportProtocolHandler(tcp.ProtocolNumber, s.fwd.handle)

	s.app = newPump(cfg.App, s.log)
	s.appP = newPort(s.app, cfg.MTU)
	s.app.only = s.appP
	if err := s.addNIC(nicApp, s.appP); err != nil {
		s.gs.Destroy()
		return nil, err
	}
	switch {
	case cfg.UplinkIsApp:
		s.upP, s.upNIC = s.appP, nicApp
	case cfg.Uplink != nil:
		s.upP, s.upNIC = newPort(cfg.Uplink.pump, cfg.MTU), nicUplink
		if err := s.addNIC(nicUplink, s.upP); err != nil {
			s.gs.Destroy()
			return nil, err
		}
		if err := cfg.Uplink.attach(cfg.Addrs, s.upP); err != nil {
			s.gs.Destroy()
			return nil, err
		}
	}
	return s, nil
}

// setOptions sets what differs from gVisor's defaults or must not change with
// them; every line carries its reason.
func (s *Stack) setOptions() error {
	var (
		// Selective acknowledgement: with 64 KiB segments a retransmission of
		// what already arrived is dear.
		sack = tcpip.TCPSACKEnabled(true)
		// RACK: usable since gVisor takes the RTT at arrival (9adc33f23).
		rack = tcpip.TCPRACKLossDetection
		// Reno or cubic made no difference on a lossless local link; reno is
		// the cheaper one.
		cc = tcpip.CongestionControlOption("reno")
		// A fast reader gets a larger window, an idle connection keeps the small one.
		mrb = tcpip.TCPModerateReceiveBufferOption(true)
		// Nagle off: the relay already writes in the pieces it was given, and
		// holding the last one back costs a round trip of the application.
		delay = tcpip.TCPDelayEnabled(false)
		// The peer of most connections is the pod's kernel, which takes a new
		// SYN for the same ports at once; a long TIME_WAIT here would answer it
		// with an ACK and cost the application a second. If the last ACK was
		// lost the retransmitted FIN meets a reset, which is harmless then: its
		// sender has closed already.
		timeWait = tcpip.TCPTimeWaitTimeoutOption(10 * time.Millisecond)
		// FIN_WAIT_2 of a connection that we closed altogether.
		linger = tcpip.TCPLingerTimeoutOption(10 * time.Second)
		// 1+2+4+8 s: dials have their own deadline, and a client that went away
		// during the handshake must not hold a flow for two minutes.
		syn = tcpip.TCPSynRetriesOption(4)
		rcv = tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: s.cfg.ReceiveBuffer, Max: s.cfg.MaxReceiveBuffer}
		snd = tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: s.cfg.SendBuffer, Max: s.cfg.MaxSendBuffer}
	)
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &rack, &cc, &mrb, &delay, &timeWait, &linger, &syn, &rcv, &snd} {
		if err := s.gs.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("netstack: option %T: %s", o, err)
		}
	}
	ttl := tcpip.DefaultTTLOption(64) // Linux's
	for _, p := range []tcpip.NetworkProtocolNumber{ipv4.ProtocolNumber, ipv6.ProtocolNumber} {
		if err := s.gs.SetNetworkProtocolOption(p, &ttl); err != nil {
			return fmt.Errorf("netstack: option %T: %s", ttl, err)
		}
	}
	if err := s.gs.SetPortRange(s.cfg.PortMin, s.cfg.PortMax); err != nil {
		return fmt.Errorf("netstack: port range: %s", err)
	}
	return nil
}

// addNIC attaches a port that takes packets to every address (promiscuous) and
// may send from every address (spoofing), with default routes in both families.
func (s *Stack) addNIC(id tcpip.NICID, p *port) error {
	// Not the devices' names: they come from two namespaces and may be equal,
	// which gVisor does not accept.
	name := "app"
	if id == nicUplink {
		name = "uplink"
	}
	if err := s.gs.CreateNICWithOptions(id, p, stack.NICOptions{Name: name}); err != nil {
		return fmt.Errorf("netstack: link %d: %s", id, err)
	}
	if err := s.gs.SetPromiscuousMode(id, true); err != nil {
		return fmt.Errorf("netstack: link %d: %s", id, err)
	}
	if err := s.gs.SetSpoofing(id, true); err != nil {
		return fmt.Errorf("netstack: link %d: %s", id, err)
	}
	s.gs.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: id})
	s.gs.AddRoute(tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: id})
	return nil
}

// Run moves packets between the App device and the stack until Close, until ctx
// ends (it then closes the stack), or until the device fails, whose error it
// returns. It must be called at most once.
func (s *Stack) Run(ctx context.Context) error {
	if s.running.Swap(true) {
		return errors.New("netstack: Run called twice")
	}
	defer close(s.runDone)
	closing := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closing)
		s.shutdown()
	})
	err := s.app.run()
	if !stop() {
		<-closing
	}
	return err
}

// Close resets every connection and pending flow, waits for the OnFlow
// goroutines (at most Config.CloseTimeout), flushes the resets, closes the App
// device and waits for Run and for gVisor's goroutines. It may be called more
// than once, but not from OnFlow.
func (s *Stack) Close() error {
	s.shutdown()
	if s.running.Load() {
		<-s.runDone
	}
	return nil
}

// shutdown does all of Close but wait for Run, which may be its caller.
func (s *Stack) shutdown() {
	s.closeOnce.Do(func() {
		defer close(s.closed)
		s.fwd.stop() // no new flows from here on
		s.conns.close()
		// Handshakes under way (Accept, Dial) end here: their endpoints are
		// registered, and aborting them wakes whoever waits.
		for _, e := range s.gs.RegisteredEndpoints() {
			e.Abort()
		}
		if !s.fwd.wait(s.cfg.CloseTimeout) {
			s.log.Error("netstack: flows still being handled at close", "count", s.fwd.inFlight())
		}
		if s.cfg.Uplink != nil {
			s.cfg.Uplink.detach(s.cfg.Addrs, s.upP)
		}
		// Let the resets out before the device goes.
		s.app.flush(flushTimeout)
		s.gs.Destroy()
		s.app.close()
	})
	<-s.closed
}

// Inbound reports whether a is one of the pod's own addresses.
func (s *Stack) isOwn(a netip.Addr) bool {
	_, ok := s.own[a.Unmap()]
	return ok
}

// ownAddr returns the pod's first address of a's family.
func (s *Stack) ownAddr(a netip.Addr) (netip.Addr, bool) {
	for _, o := range s.cfg.Addrs {
		if o.Is4() == a.Is4() {
			return o, true
		}
	}
	return netip.Addr{}, false
}
