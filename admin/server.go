package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"ztun/admin/guard"
)

// Limits shared by all HTTP servers here.
const (
	headerTimeout = 2 * time.Second  // to receive a request's header, as ztunnel
	headerBytes   = 8 << 10          // of a request, as ztunnel
	idleTimeout   = 60 * time.Second // of a keep-alive connection
	writeTimeout  = 30 * time.Second // of a reply; those that take longer set their own
	bodyTimeout   = 2 * time.Second  // to receive a body that nobody reads
	bodyBytes     = 64 << 10         // of a request's body
)

// Server is one HTTP server with one or more listening sockets. New* functions bind them, so that a
// conflict is known early; Serve answers; Shutdown ends.
type Server struct {
	name      string
	listeners []net.Listener
	http      http.Server
	conns     *guard.Conns
	local     *guard.Local  // of the admin server
	drain     chan struct{} // closed when Shutdown begins: long replies come to an end
	drainOnce sync.Once
	logger    *slog.Logger
	took      histogram // of requests, from header to the end of the answer
	dumps     *dumper   // of the admin server
}

// newServer wraps handler with what all servers share; bounds need no Resource. The listeners must be bound.
func newServer(name string, ls []net.Listener, h http.Handler, logger *slog.Logger, bounds guard.ConnsOptions) *Server {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	bounds.Resource = name + "_connections"
	s := &Server{name: name, listeners: ls, conns: guard.NewConns(bounds), drain: make(chan struct{}), logger: logger}
	s.http = http.Server{
		Handler:           s.guard(h),
		ReadHeaderTimeout: headerTimeout,
		// net/http adds 4096 bytes of slack to what it is told.
		MaxHeaderBytes: headerBytes - 4096,
		IdleTimeout:    idleTimeout,
		WriteTimeout:   writeTimeout,
		ConnState:      s.conns.Change,
		ErrorLog:       slog.NewLogLogger(logger.With("server", name).Handler(), slog.LevelDebug),
	}
	return s
}

// guard contains panics of handlers and bounds the time that an unread request body may take.
func (s *Server) guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			// Without this the server would wait for the body of a sender that never sends it.
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
			r.Body = http.MaxBytesReader(w, r.Body, bodyBytes)
		}
		defer func() {
			p := recover()
			if p == nil || p == http.ErrAbortHandler {
				if p != nil {
					panic(p)
				}
				return
			}
			s.logger.Error("panic in an HTTP handler", "server", s.name, "path", r.URL.Path, "panic", fmt.Sprint(p), "stack",
				string(debug.Stack()))
			panic(http.ErrAbortHandler) // net/http closes the connection and stays quiet
		}()
		started := time.Now()
		defer func() { s.took.add(time.Since(started)) }()
		h.ServeHTTP(w, r)
	})
}

// Addrs are the bound addresses, the IPv4 one first.
func (s *Server) Addrs() []netip.AddrPort {
	var as []netip.AddrPort
	for _, l := range s.listeners {
		if a, ok := l.Addr().(*net.TCPAddr); ok {
			as = append(as, a.AddrPort())
		}
	}
	return as
}

// Serve answers on all listeners until Shutdown or Close; then it returns nil. Call it once.
func (s *Server) Serve() error {
	errs := make(chan error, len(s.listeners))
	for _, l := range s.listeners {
		go func() { errs <- s.http.Serve(l) }()
	}
	var first error
	for range s.listeners {
		if err := <-errs; !errors.Is(err, http.ErrServerClosed) && first == nil {
			first = fmt.Errorf("%s server: %w", s.name, err)
			s.http.Close() // one socket less is a server that lies: end all
		}
	}
	return first
}

// Shutdown closes the listeners, lets requests in flight finish and closes idle connections. When ctx
// ends first, the rest is cut off and the error of ctx returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.drainOnce.Do(func() { close(s.drain) })
	err := s.http.Shutdown(ctx) // closes the listeners that are being served, first of all
	if err != nil {
		s.http.Close()
	}
	for _, l := range s.listeners {
		l.Close() // those that never were
	}
	s.local.Close()
	return err
}

// Close ends the server at once.
func (s *Server) Close() error {
	s.drainOnce.Do(func() { close(s.drain) })
	err := s.http.Close()
	for _, l := range s.listeners {
		l.Close()
	}
	s.local.Close()
	return err
}

// Refused counts the connections that the bounds closed.
func (s *Server) Refused() uint64 { return s.conns.Turned() }

// Open counts the connections that are open; each has a goroutine.
func (s *Server) Open() int { return s.conns.Open() }

// listenLoopback binds 127.0.0.1 and, where the kernel has it, ::1. Port 0 picks one free on both.
func listenLoopback(name string, port uint16, ipv6 bool, logger *slog.Logger) ([]net.Listener, error) {
	if ipv6 && !loopbackIPv6(logger) {
		ipv6 = false
	}
	for try := 0; ; try++ {
		l4, err := net.Listen("tcp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port).String())
		if err != nil {
			return nil, bindError(name, "127.0.0.1", port, err)
		}
		if !ipv6 {
			return []net.Listener{l4}, nil
		}
		bound := l4.Addr().(*net.TCPAddr).AddrPort().Port()
		l6, err := net.Listen("tcp6", netip.AddrPortFrom(netip.IPv6Loopback(), bound).String())
		switch {
		case err == nil:
			return []net.Listener{l4, l6}, nil
		case errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT):
			logger.Warn("no ::1 on this machine, listening on 127.0.0.1 only", "server", name, "error", err)
			return []net.Listener{l4}, nil
		case port == 0 && errors.Is(err, syscall.EADDRINUSE) && try < 20:
			l4.Close()
		default:
			l4.Close()
			return nil, bindError(name, "::1", port, err)
		}
	}
}

// loopbackIPv6 reports whether lo has IPv6. Not being able to tell counts as yes, with a warning (ztunnel).
func loopbackIPv6(logger *slog.Logger) bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	if errors.Is(err, fs.ErrNotExist) {
		return false // a kernel without IPv6
	}
	if err != nil {
		logger.Warn("cannot tell whether lo has IPv6, assuming that it has", "error", err)
		return true
	}
	return strings.TrimSpace(string(b)) != "1"
}

// listenAt binds one address where there is one, and every address at port elsewhere.
func listenAt(name string, at netip.AddrPort, port uint16, ipv6 bool) ([]net.Listener, error) {
	if !at.IsValid() {
		return listenWildcard(name, port, ipv6)
	}
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		return nil, bindError(name, at.Addr().String(), at.Port(), err)
	}
	return []net.Listener{l}, nil
}

// listenWildcard binds every address: [::] for both families, or 0.0.0.0 without IPv6.
func listenWildcard(name string, port uint16, ipv6 bool) ([]net.Listener, error) {
	network, shown := "tcp", "[::]"
	if !ipv6 {
		network, shown = "tcp4", "0.0.0.0"
	}
	l, err := net.Listen(network, fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, bindError(name, shown, port, err)
	}
	return []net.Listener{l}, nil
}

// bindError names the port and what is likely behind the failure.
func bindError(name, addr string, port uint16, err error) error {
	hint := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "; another ztunnel or ztun, or an Envoy sidecar, is probably running in this network namespace"
	case errors.Is(err, syscall.EACCES):
		hint = "; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
	}
	return fmt.Errorf("cannot bind the %s server to %s port %d%s: %w", name, addr, port, hint, err)
}

// plain answers with text/plain and the exact content type that ztunnel sends.
func plain(w http.ResponseWriter, code int, body string) {
	w.Header().Set("Content-Type", "text/plain")
	w.WriteHeader(code)
	w.Write([]byte(body))
}
