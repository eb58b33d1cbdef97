package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"ztun/admin/guard"
	"ztun/admin/pb/citadelpb"
	"ztun/admin/pb/discoverypb"
	"ztun/proxy/fair"
)

// Options configure a control plane.
type Options struct {
	Dir    string   // made by Init
	Mesh   string   // the YAML files; "": mesh in Dir
	Listen []string // TLS addresses, host:port; none: ":15012"
	Hosts  []string // names and addresses by which nodes know this machine, besides those found; none: the host name
	Admin  string   // HTTP with the status, a loopback address; "": none
	Socket string   // with the status; "": control.sock in Dir
	// MaxLife is how long a workload's certificate lives at most, whatever its node asks for; 0: DefaultMaxLife.
	MaxLife time.Duration
	Logger  *slog.Logger
}

// DefaultListen is where istiod serves both of its services.
const DefaultListen = ":15012" // ports.XDS

// limits are the bounds of a server.
type limits struct {
	message       int // bytes of a response, unless one resource is larger
	receive       int // bytes of a request: what a node of 300,000 resources reports when it reconnects
	connections   int // of nodes
	strangers     int // connections whose caller is not known yet
	streams       int
	streamsOfNode int           // one, and another while it is being replaced
	connsOfNode   int           // one for each service, and others while they are being replaced
	signBurst     int           // a node with thousands of pods starts
	signRate      int           // per second
	signOfNode    int           // certificates asked for at once; a request may be as large as receive
	certsOfNode   int           // that have not expired: what leaving revokes
	handshake     time.Duration // TLS, and HTTP/2's first frames
	firstRequest  time.Duration // of a stream; and until a connection has made a call that is admitted
	rescan        time.Duration // until a node that left is noticed
}

func defaultLimits() limits {
	return limits{
		message: 3 << 20, receive: 32 << 20, connections: 4096, strangers: 2048, streams: 2048, streamsOfNode: 4,
		connsOfNode: 32,
		signBurst:   2000, signRate: 50, signOfNode: 16, certsOfNode: 20_000, handshake: 5 * time.Second,
		firstRequest: 30 * time.Second, rescan: 2 * time.Second,
	}
}

// fit makes the connections fit into the process's open files, of which it leaves some for its own work.
func (l limits) fit(files uint64) limits {
	if room := int(min(files, 1<<20)) - 256; room < l.connections+l.strangers {
		l.connections, l.strangers = max(room*2/3, 16), max(room/3, 16)
	}
	return l
}

// Server is a control plane. New binds everything, Run works, Close ends.
type Server struct {
	limits    limits
	logger    *slog.Logger
	authority *authority
	cert      *serverCert
	nodes     *nodeStore
	issued    *issuedStore
	maxLife   time.Duration
	source    *source
	feed      *feed
	rates     *rates
	places    *places
	report    *fair.Report
	tokens    *fair.Lines   // of nodes whose certificate does not count
	signing   chan struct{} // one element per signature being made
	counters  counters
	refused   atomic.Int64 // when a refused call was logged last, Unix nanoseconds

	lock      *os.File
	socket    string
	listeners []net.Listener
	admin     []net.Listener
	grpc      *grpc.Server
	http      *http.Server
	local     *guard.Local
	readers   sync.WaitGroup
	close     sync.Once

	mu      sync.Mutex
	streams map[*stream]struct{}
}

// New loads the CA and the nodes' credentials and binds the addresses. The mesh itself is loaded by Run.
func New(ctx context.Context, o Options) (*Server, error) {
	l := defaultLimits()
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		l = l.fit(files.Cur)
	}
	return newServer(ctx, o, l)
}

func newServer(ctx context.Context, o Options, l limits) (s *Server, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Mesh == "" {
		o.Mesh = filepath.Join(o.Dir, meshDir)
	}
	if o.Socket == "" {
		o.Socket = filepath.Join(o.Dir, socketName)
	}
	if o.MaxLife == 0 {
		o.MaxLife = DefaultMaxLife
	}
	if o.MaxLife < minLife || o.MaxLife > maxTTL {
		return nil, fmt.Errorf("the longest life of a certificate, %v, is not between %v and %v", o.MaxLife, minLife, maxTTL)
	}
	if len(o.Listen) == 0 {
		o.Listen = []string{DefaultListen}
	}
	if len(o.Hosts) == 0 {
		if name, err := os.Hostname(); err == nil {
			o.Hosts = []string{name}
		}
	}
	s = &Server{
		limits: l, logger: o.Logger, maxLife: o.MaxLife, feed: newFeed(), nodes: newNodeStore(filepath.Join(o.Dir, nodesDir)),
		rates: newRates(l.signBurst, l.signRate, l.signOfNode), signing: make(chan struct{}, 4),
		streams: make(map[*stream]struct{}),
		report:  fair.NewReport(o.Logger), local: guard.NewLocal(guard.LocalOptions{Logger: o.Logger}),
		tokens: fair.NewLines(fair.LinesOptions{Log: o.Logger, PerSecond: 1.0 / 3600, Burst: 1}),
	}
	s.places = newPlaces(l, &s.counters, s.report)
	defer func() {
		if err != nil {
			s.Close()
			s = nil
		}
	}()
	if s.authority, err = loadAuthority(ctx, filepath.Join(o.Dir, caDir)); err != nil {
		return s, fmt.Errorf("%w; ztun control init makes the directory of a control plane", err)
	}
	s.source = newSource(o.Mesh, s.authority.TrustDomain(), l.message, o.Logger, s.feed)
	if err = s.takeLock(o.Dir); err != nil {
		return s, err
	}
	s.issued = newIssuedStore(o.Dir, l.certsOfNode, s.authority)
	s.revoke()
	for _, addr := range o.Listen {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return s, err
		}
		s.listeners = append(s.listeners, &boundedListener{Listener: l, server: s})
	}
	if o.Admin != "" {
		l, err := listenLoopback(o.Admin)
		if err != nil {
			return s, err
		}
		s.admin = append(s.admin, l)
	}
	sock, err := listenSocket(o.Socket)
	if err != nil {
		return s, err
	}
	s.admin, s.socket = append(s.admin, sock), o.Socket
	s.cert = &serverCert{authority: s.authority, hosts: o.Hosts, logger: o.Logger}
	for _, l := range s.listeners {
		s.cert.listen = append(s.cert.listen, l.Addr())
	}
	if err = s.cert.renew(); err != nil {
		return s, fmt.Errorf("the server's certificate: %w", err)
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(connCredentials{credentials.NewTLS(s.cert.config()), s.authority.pool()}),
		grpc.InTapHandle(s.admit),
		grpc.MaxRecvMsgSize(l.receive),
		grpc.MaxConcurrentStreams(64),
		grpc.MaxHeaderListSize(64<<10),
		grpc.ConnectionTimeout(l.handshake),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)
	discoverypb.RegisterAggregatedDiscoveryServiceServer(s.grpc, adsServer{Server: s})
	s.grpc.RegisterService(caServiceDesc(), caServer{Server: s})
	s.grpc.RegisterService(revocationsDesc(), s)
	page, err := s.page()
	if err != nil {
		return s, err
	}
	bounds := guard.NewConns(guard.ConnsOptions{Resource: "control_status_connections", Report: s.report})
	s.http = &http.Server{Handler: s.local.Handler(s.handler(page)), ConnState: bounds.Change,
		ReadHeaderTimeout: 2 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	return s, nil
}

// Addrs are the TLS addresses that the server is bound to.
func (s *Server) Addrs() []net.Addr {
	out := make([]net.Addr, len(s.listeners))
	for i, l := range s.listeners {
		out[i] = l.Addr()
	}
	return out
}

// AdminAddr is the HTTP address of the status; nil if there is none.
func (s *Server) AdminAddr() net.Addr {
	for _, l := range s.admin {
		if a, ok := l.Addr().(*net.TCPAddr); ok {
			return a
		}
	}
	return nil
}

// Run serves until ctx ends (nil) or a listener fails. It can be called once; Close follows.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var work sync.WaitGroup
	work.Go(func() { s.source.run(ctx) })
	work.Go(func() { s.cert.run(ctx) })
	work.Go(func() { s.rescan(ctx) })
	// Calls that come before the first snapshot could not be answered; nodes that wait for a connection try again.
	select {
	case <-s.source.loaded:
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
	}
	for _, l := range s.listeners {
		work.Go(func() {
			if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) && ctx.Err() == nil {
				cancel(fmt.Errorf("serving %s: %w", l.Addr(), err))
			}
		})
		s.logger.Info("control plane is listening", "address", l.Addr())
	}
	for _, l := range s.admin {
		work.Go(func() {
			if err := s.http.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
				cancel(fmt.Errorf("serving the status on %s: %w", l.Addr(), err))
			}
		})
	}
	<-ctx.Done()
	s.Close()
	work.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// rescan notices nodes that have left.
func (s *Server) rescan(ctx context.Context) {
	tick := time.NewTicker(s.limits.rescan)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.revoke()
		}
	}
}

// Close ends every stream and frees the addresses. It may be called more than once.
func (s *Server) Close() {
	s.close.Do(func() {
		if s.grpc != nil {
			s.grpc.Stop() // waits for the handlers
			s.readers.Wait()
		}
		if s.http != nil {
			_ = s.http.Close()
		}
		s.local.Close()
		s.tokens.Close()
		for _, l := range slices.Concat(s.listeners, s.admin) {
			_ = l.Close() // once more, if it has been served
		}
		if s.socket != "" {
			_ = os.Remove(s.socket)
		}
		if s.lock != nil {
			_ = s.lock.Close()
		}
	})
}

// admit finds out who is calling before anything of the call is read.
func (s *Server) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	c, err := s.nodes.authenticate(ctx, info.Header)
	if err == nil {
		if err := connOf(ctx).admit(c.node); err != nil {
			s.refusal("call refused", "method", clip(info.FullMethodName, 100), "error", err.Error())
			return nil, status.Error(codes.ResourceExhausted, err.Error())
		}
		if c.certErr != nil {
			s.tokens.Log(ctx, slog.LevelWarn, c.node, "a node's client certificate does not count, its token does",
				slog.String("node", c.node), slog.String("error", c.certErr.Error()))
		}
		return context.WithValue(ctx, callerKey{}, c), nil
	}
	s.counters.unauthenticated.Add(1)
	s.refusal("call refused", "method", clip(info.FullMethodName, 100), "error", err.Error())
	text := "authentication failure"
	if info.FullMethodName == citadelpb.IstioCertificateService_CreateCertificate_FullMethodName {
		text = "request authenticate failure"
	}
	return nil, status.Errorf(codes.Unauthenticated, "%s: %v", text, err)
}

// refusal logs a refused call, at most one a second: anybody can make them. The counters have all.
func (s *Server) refusal(text string, args ...any) {
	now := time.Now().UnixNano()
	if last := s.refused.Load(); now-last >= int64(time.Second) && s.refused.CompareAndSwap(last, now) {
		s.logger.Warn(text, args...)
	}
}

// enter admits a stream.
func (s *Server) enter(st *stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.streams) >= s.limits.streams {
		return status.Errorf(codes.ResourceExhausted, "more than %d streams", s.limits.streams)
	}
	same := 0
	for other := range s.streams {
		if other.caller.node == st.caller.node {
			same++
		}
	}
	if same >= s.limits.streamsOfNode {
		return status.Errorf(codes.ResourceExhausted, "node %s has %d streams already", st.caller.node, same)
	}
	s.streams[st] = struct{}{}
	s.counters.streams.Add(1)
	return nil
}

func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st)
}

func (s *Server) open() []*stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*stream, 0, len(s.streams))
	for st := range s.streams {
		out = append(out, st)
	}
	return out
}

// listenLoopback binds the admin address: what it says is for this machine alone.
func listenLoopback(addr string) (net.Listener, error) {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--admin %s: %w", addr, err)
	}
	if !a.IP.IsLoopback() {
		return nil,
			fmt.Errorf("--admin %s: only a loopback address, such as 127.0.0.1:15014: the status is not for everybody", addr)
	}
	return net.ListenTCP("tcp", a)
}

// takeLock makes sure that one process serves a directory. The lock ends with the process.
func (s *Server) takeLock(dir string) error {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%s is served by another ztun control", dir)
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	s.lock = f
	return nil
}

// listenSocket binds a socket with mode 0600, in the place of one that nobody answers.
func listenSocket(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("%s exists and is not a socket: it is left alone", path)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("%s is in use by another process", path)
		}
	}
	// Under another name until the mode is right.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("status socket (a path of at most 103 characters): %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
