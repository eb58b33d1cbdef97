package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/proxy/state"
)

// Knowledge is what the control side publishes.
type Knowledge interface {
	// View is the newest published state; immutable.
	View() *state.View
	// Changed is closed when a newer View than that of the last call of View may exist.
	Changed() <-chan struct{}
}

// Config says for whom a Server works and how it asks others. The zero value of
// every field from Metrics on means its default.
type Config struct {
	// Client is the pod whose queries these are, whatever address they come from.
	Client    state.WorkloadInfo
	Knowledge Knowledge
	Upstream  Upstream
	// Options of Answer. Without Shuffle the order is random.
	Options Options
	// Nameservers are asked for what is not ours when the pod asked us and not
	// them (15053), in this order; those of resolv.conf.
	Nameservers []netip.AddrPort
	// Own is a nameserver's address that nobody has and that stands for us in the pod's resolv.conf: what comes to it is
	// for Nameservers. Not valid: there is none.
	Own netip.Addr
	// Packets and Listeners are the sockets of 127.0.0.1:15053 and [::1]:15053 in
	// the pod's namespace. The Server owns them from a successful New on.
	Packets   []net.PacketConn
	Listeners []net.Listener

	Panics  *rescue.Panics // catches those of the server's goroutines; nil: nobody does
	Metrics *Metrics       // of the node; nil: counted for nobody
	Logger  *slog.Logger   // nil discards; target "dns" has a line per query at level debug

	// MaxQueries bounds the queries at work that came to Packets (default 1024),
	// MaxConns the TCP clients (default 256), MaxForwards the queries that wait for
	// upstream, whatever way they came (default 512).
	MaxQueries, MaxConns, MaxForwards int
	// Rate bounds the datagrams that come to Packets, per second (default 1000; at once twice as many). What is beyond is
	// dropped before it is looked at.
	Rate int
	// Timeout is how long upstream has for an answer, IdleTimeout how long a TCP
	// client may be silent or take to receive, ClientWait how long a query waits
	// for the pod's record to arrive (default 5 s each, as ztunnel).
	Timeout, IdleTimeout, ClientWait time.Duration
}

const (
	defaultMaxQueries  = 1024
	defaultMaxConns    = 256
	defaultMaxForwards = 512
	defaultRate        = 1000
	defaultTimeout     = 5 * time.Second
	retryAfter         = 50 * time.Millisecond // after an error of a socket, such as no memory
)

// Server answers the DNS queries of one pod. All methods may be called from any
// goroutine.
type Server struct {
	cfg    Config
	access *slog.Logger

	queries  chan struct{} // a token for each query at work that came to Packets
	forwards chan struct{} // a token for each query that waits for upstream
	rate     *fair.Rate[struct{}]

	ctx    context.Context // ended by the hard end of Shutdown
	cancel context.CancelFunc
	done   chan struct{} // closed when stopping

	mu       sync.Mutex
	stopping bool
	conns    map[net.Conn]struct{}
	work     sync.WaitGroup // queries and connections; grows only while !stopping
}

// New checks the configuration and makes a Server. Query and ServeConn may be
// called from then on. On error the sockets remain the caller's.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Knowledge == nil:
		return nil, errors.New("dns: no Knowledge")
	case cfg.Upstream == nil:
		return nil, errors.New("dns: no Upstream")
	}
	for _, n := range cfg.Nameservers {
		if !n.IsValid() || n.Port() == 0 {
			return nil, fmt.Errorf("dns: %v is no nameserver: an address and a port are needed", n)
		}
	}
	if cfg.Options.Shuffle == nil {
		cfg.Options.Shuffle = rand.Shuffle
	}
	cfg.Options = cfg.Options.normalized()
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	orDefault(&cfg.MaxQueries, defaultMaxQueries)
	orDefault(&cfg.MaxConns, defaultMaxConns)
	orDefault(&cfg.MaxForwards, defaultMaxForwards)
	orDefault(&cfg.Rate, defaultRate)
	orDefault(&cfg.Timeout, defaultTimeout)
	orDefault(&cfg.IdleTimeout, defaultTimeout)
	orDefault(&cfg.ClientWait, defaultTimeout)
	s := &Server{
		cfg:      cfg,
		access:   cfg.Logger.With("target", "dns"),
		queries:  make(chan struct{}, cfg.MaxQueries),
		forwards: make(chan struct{}, cfg.MaxForwards),
		rate:     fair.NewRate[struct{}](float64(cfg.Rate), 2*cfg.Rate, 1),
		done:     make(chan struct{}),
		conns:    make(map[net.Conn]struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

func orDefault[T int | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Run serves Packets and Listeners until Shutdown, or until ctx ends, which
// aborts what is under way. It returns when all its goroutines have ended, and
// is called once.
func (s *Server) Run(ctx context.Context) error {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, s.cfg.Panics.Func("the end of a DNS proxy", func() {
		defer close(aborted)
		s.Shutdown(ended)
	}, nil))
	var wg sync.WaitGroup
	for _, pc := range s.cfg.Packets {
		wg.Go(s.cfg.Panics.Func("a DNS socket", func() { s.servePackets(pc) }, nil))
	}
	for _, ln := range s.cfg.Listeners {
		wg.Go(s.cfg.Panics.Func("a DNS listener", func() { s.serveListener(ln) }, nil))
	}
	<-s.done
	wg.Wait()
	s.work.Wait()
	for _, pc := range s.cfg.Packets {
		pc.Close()
	}
	if !stop() {
		<-aborted
	}
	return nil
}

// Shutdown closes the sockets and lets queries under way finish, until ctx ends:
// then they are aborted, which is its error. It returns when nothing is under way.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.stopping {
		s.stopping = true
		close(s.done)
		for _, pc := range s.cfg.Packets {
			// Answers under way need the socket: only the reader is ended here.
			pc.SetReadDeadline(time.Unix(1, 0))
		}
		for _, ln := range s.cfg.Listeners {
			ln.Close()
		}
		for c := range s.conns { // those at work look at stopping before they read
			c.SetReadDeadline(time.Unix(1, 0))
		}
	}
	s.mu.Unlock()

	idle := make(chan struct{})
	go s.cfg.Panics.Func("the end of a DNS proxy", func() { // ends with the last query, at the latest soon after abort
		s.cfg.Panics.Wait(&s.work)
		close(idle)
	}, nil)()
	var err error
	select {
	case <-idle:
	case <-ctx.Done():
		select {
		case <-idle:
		default:
			err = fmt.Errorf("dns: queries aborted: %w", ctx.Err())
		}
		s.abort()
		<-idle
	}
	s.cancel()
	for _, pc := range s.cfg.Packets {
		pc.Close()
	}
	return err
}

func (s *Server) abort() {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}

// enter counts one piece of work in, unless the server is stopping.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.work.Add(1)
	return true
}

// Query answers one datagram that the pod sent to asked, port 53 of any address
// (zero: to us). Nil means that there is nothing to say. It blocks while the
// query is passed on, 10 s at most. raw is not kept.
func (s *Server) Query(raw []byte, asked netip.AddrPort) []byte {
	if !s.enter() {
		return nil
	}
	defer s.work.Done()
	return s.serve(s.ctx, &query{raw: raw, asked: asked}, s.relayUDP)
}

// servePackets reads datagrams until Shutdown and answers each in a goroutine of
// its own.
func (s *Server) servePackets(pc net.PacketConn) {
	buf := make([]byte, maxPacket)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			if s.failed("DNS socket", err) {
				return
			}
			continue
		}
		if !s.rate.Allow(struct{}{}) {
			s.cfg.Metrics.dropped[dropRate].Add(1)
			continue
		}
		if !s.enter() {
			return
		}
		select {
		case s.queries <- struct{}{}:
		default:
			s.cfg.Metrics.dropped[dropQueries].Add(1)
			s.work.Done()
			continue
		}
		raw := bytes.Clone(buf[:n])
		go s.cfg.Panics.Func("a DNS query", func() {
			defer s.work.Done()
			defer func() { <-s.queries }()
			if reply := s.serve(s.ctx, &query{raw: raw}, s.relayUDP); reply != nil {
				pc.WriteTo(reply, from) // a client that cannot be reached asks again or not
			}
		}, nil)()
	}
}

// serveListener accepts clients until Shutdown.
func (s *Server) serveListener(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			if s.failed("DNS listener", err) {
				return
			}
			continue
		}
		if s.admit(c) {
			go s.cfg.Panics.Func("a DNS connection", func() { s.serveConn(c, netip.AddrPort{}) }, func(error) { c.Close() })()
		}
	}
}

// failed waits a moment after an error of a socket, unless that is its end.
func (s *Server) failed(what string, err error) bool {
	select {
	case <-s.done:
		return true
	default:
	}
	s.cfg.Logger.Warn(what, "error", err)
	if errors.Is(err, net.ErrClosed) {
		return true
	}
	select {
	case <-s.done:
		return true
	case <-time.After(retryAfter):
		return false
	}
}
