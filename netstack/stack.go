package netstack

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztun/tun"
)

// Stack is one pod's TCP/IP stack: the far end of everything that the pod's
// kernel sends into its TUN, and of the plaintext that the network sends to the
// pod. All methods may be called from any goroutine.
type Stack struct {
	cfg   Config
	log   *slog.Logger
	pump  *pump // owned: the App device's reader and writer
	app   *hop
	up    *hop // nil without a way to the network; app itself if UplinkIsApp
	own   map[netip.Addr]struct{}
	flows *forwarder
	dns   *dnsTap
	dg    *datagrams // nil: not carried

	probes    probes
	shortcuts shortcuts

	timers            *wheel        // gVisor's, and those of handshakes
	handshakePatience time.Duration // of Flow.Accept; tests are less patient

	conns connList

	weighing   sync.Mutex
	weight     int64 // what Config.Memory is charged with
	weightless bool  // the stack is closed

	lent sync.Pool // of *lent

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

		handshakePatience: handshakePatience,
	}
	s.timers = newWheel(s.cfg.Panics, s.crash)
	s.lent.New = func() any { return &lent{pieces: make([][]byte, 0, 64)} }
	for _, a := range cfg.Addrs {
		s.own[a] = struct{}{}
	}
	s.flows = newForwarder(s)
	s.dns = newDNSTap(s)
	s.pump = newPump(cfg.App, s.log, cfg.Panics)
	s.app = newHop(s, "app", s.pump, false)
	if cfg.OnDNS != nil {
		s.app.port.dns = s.dns
	}
	s.pump.only = s.app.port
	s.pump.unreachable = s.unreachable
	s.shortcuts.begin(&s.cfg)
	if cfg.Datagrams != nil {
		s.dg = newDatagrams(s, *cfg.Datagrams)
		s.app.port.dg = s.dg
		if try, ok := cfg.App.(tun.TryReader); ok && cfg.Datagrams.Way != nil {
			s.pump.batching, s.pump.try = s.dg, try
		}
	}
	if _, err := s.app.stack(); err != nil {
		return nil, err
	}
	switch {
	case cfg.UplinkIsApp:
		s.up = s.app
	case cfg.Uplink != nil:
		s.up = newHop(s, "uplink", cfg.Uplink.pump, true)
		s.up.port.dg = s.dg
		if err := cfg.Uplink.attach(cfg.Addrs, s.up.port); err != nil {
			s.app.destroy()
			return nil, err
		}
	}
	return s, nil
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
	stop := context.AfterFunc(ctx, s.cfg.Panics.Func("the end of a stack", func() {
		defer close(closing)
		s.shutdown()
	}, nil))
	err := s.pump.run()
	if !stop() {
		<-closing
	}
	return err
}

// crash ends a stack whose own work has panicked, with locks of gVisor's held
// perhaps: nothing of the network reaches it any more, so that nobody who serves
// other pods waits for those locks, and Run returns the error.
func (s *Stack) crash(err error) {
	if s.cfg.Uplink != nil {
		s.cfg.Uplink.detach(s.cfg.Addrs, s.up.port)
	}
	s.pump.fail(err)
}

// Close resets every connection and pending flow, waits for the OnFlow and OnDNS goroutines and for verdicts that are
// given elsewhere (each at most Config.CloseTimeout), flushes the resets, closes the App device and waits for Run and
// for gVisor's goroutines. It may be called more than once, but not from OnFlow or OnDNS.
func (s *Stack) Close() error {
	s.shutdown()
	if s.running.Load() {
		<-s.runDone
	}
	return nil
}

// Silence has whoever is not let in yet, and whoever comes later, left without an answer, whatever the verdict, also
// while the stack closes: another process is about to take the device over, and the client's next SYN is for it.
func (s *Stack) Silence() { s.flows.silent.Store(true) }

// shutdown does all of Close but wait for Run, which may be its caller.
func (s *Stack) shutdown() {
	s.closeOnce.Do(func() {
		defer close(s.closed)
		s.flows.stop() // no new flows from here on
		s.dns.stop()
		if s.dg != nil {
			s.dg.close()
		}
		s.shortcuts.close()
		s.conns.close()
		s.unweigh()
		s.app.abort()
		if s.up != nil {
			s.up.abort()
		}
		s.flows.close()
		if !s.flows.wait(s.cfg.CloseTimeout) {
			s.log.Error("netstack: flows still being handled at close", "count", s.flows.inFlight())
		}
		if !s.dns.wait(s.cfg.CloseTimeout) {
			s.log.Error("netstack: DNS queries still being handled at close", "count", s.dns.inFlight())
		}
		if s.cfg.Uplink != nil {
			s.cfg.Uplink.detach(s.cfg.Addrs, s.up.port)
			s.up.destroy()
		}
		// Let the resets out before the device goes.
		s.pump.flush(flushTimeout)
		s.app.destroy()
		s.timers.stop()
		s.pump.close()
		if !s.running.Load() {
			s.pump.tx.close() // nobody else gives the packets back
		}
	})
	<-s.closed
}

// isOwn reports whether a is one of the pod's own addresses.
func (s *Stack) isOwn(a netip.Addr) bool {
	_, ok := s.own[a.Unmap()]
	return ok
}

// mayCall reports whether a packet from src that came by h may open something: the pod speaks in its own name and in
// nobody else's, and only the network speaks to the pod.
func (s *Stack) mayCall(h *hop, src netip.Addr, inbound bool) bool {
	if h == s.app && (!inbound || !s.cfg.UplinkIsApp) {
		return s.isOwn(src)
	}
	return true
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
