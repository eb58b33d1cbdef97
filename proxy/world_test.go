package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	mrand "math/rand/v2"

	"ztun/admin/ca"
	"ztun/admin/xds"
	"ztun/admin/zlog"
	"ztun/proxy/identity"
	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// world is two pods, a and b of samples/workloads.yaml, each with its Proxy, joined by loopback TCP in
// place of devices: what the mesh, the applications and the flows would be is faked, the rest is real.
type world struct {
	t       *testing.T
	know    *fakeKnowledge
	metrics [2]*Metrics
	logs    [2]*logText
	zlogs   [2]*zlog.Log
	proxies [2]*Proxy // a, b
	meshLn  net.Listener
	apps    map[netip.AddrPort]func(net.Conn) // what listens in the pods and outside
	stop    func()
	mu      sync.Mutex
	probes  int                           // of applications
	probed  func() error                  // answers them; nil: by apps
	stale   bool                          // they find every port open
	clients map[netip.AddrPort]netip.Addr // what the applications saw as their client, by destination
	certs   *ca.Manager

	revocation identity.Revocation // of both proxies, where a test gives it to them

	// In place of what the network would do, where a test wants something else.
	dialMesh func(dst netip.AddrPort) (net.Conn, error)
	dialApp  func(ctx context.Context) (Conn, error)
	tunnels  atomic.Int32 // TCP connections to b's port 15008 that are open

	short     bool         // flows can pass by shortcuts
	shortcuts atomic.Int32 // those that were made
}

var (
	addrA = netip.MustParseAddr("10.91.1.2")
	addrB = netip.MustParseAddr("10.91.2.2")
)

type fakeKnowledge struct {
	mu      sync.Mutex
	view    *state.View
	changed chan struct{}
}

func (k *fakeKnowledge) View() *state.View {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.view
}

func (k *fakeKnowledge) Changed() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changed
}

func (k *fakeKnowledge) publish(v *state.View) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.view = v
	close(k.changed)
	k.changed = make(chan struct{})
}

func loadView(t *testing.T, change func(text string) string) *state.View {
	t.Helper()
	data, err := os.ReadFile("../docs/samples/workloads.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	if change != nil {
		text = change(text)
	}
	l, err := xds.ParseLocal([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return l.View("")
}

func newWorld(t *testing.T) *world { return newWorldWith(t, nil) }

// newWorldWith lets change have a word about the options of each of the two proxies.
func newWorldWith(t *testing.T, change func(w *world, i int, o *Options)) *world {
	t.Helper()
	w := &world{
		t: t, know: &fakeKnowledge{view: loadView(t, nil), changed: make(chan struct{})},
		apps: map[netip.AddrPort]func(net.Conn){}, clients: map[netip.AddrPort]netip.Addr{},
	}
	certs := ca.NewManager(ca.ManagerOptions{Signer: ca.NewFake(), TTL: time.Hour})
	w.certs = certs
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { certs.Run(ctx) })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.meshLn = ln
	for i, name := range []string{"a", "b"} {
		w.logs[i] = &logText{}
		w.zlogs[i] = zlog.New(zlog.Options{Writer: w.logs[i]})
		w.metrics[i] = NewMetrics()
		o := Options{
			Info:    state.WorkloadInfo{Name: name, Namespace: "default", ServiceAccount: name},
			Network: &fakeNetwork{w: w, self: []netip.Addr{addrA, addrB}[i]}, Knowledge: w.know, Certs: certs,
			Resolver: net.DefaultResolver, Metrics: w.metrics[i], Access: w.zlogs[i].Logger("access"),
			Log:    slog.New(slog.DiscardHandler),
			Random: mrand.Uint64N, Config: Config{ResponseBaggage: true, PoolMaxStreams: 100, PoolUnused: time.Minute},
		}
		if change != nil {
			change(w, i, &o)
		}
		w.proxies[i] = New(o)
	}
	work.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				// The dialer says first who it is, as the real socket's address would.
				var n [1]byte
				io.ReadFull(c, n[:])
				src := make([]byte, n[0])
				io.ReadFull(c, src)
				w.tunnels.Add(1)
				defer w.tunnels.Add(-1)
				w.proxies[1].ServeMesh(&addressed{Conn: c, local: netip.AddrPortFrom(addrB, 15008),
					remote: netip.MustParseAddrPort(string(src))}, netip.AddrPort{})
			})
		}
	})
	w.stop = sync.OnceFunc(func() {
		for _, p := range w.proxies {
			p.Close()
		}
		ln.Close()
		cancel()
		work.Wait()
		for _, l := range w.zlogs {
			l.Close(context.Background())
		}
	})
	t.Cleanup(w.stop)
	return w
}

// addressed is a connection with the addresses that it would have on the wire.
type addressed struct {
	net.Conn
	local, remote netip.AddrPort
}

func (a *addressed) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(a.local) }
func (a *addressed) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(a.remote) }

type fakeNetwork struct {
	w    *world
	self netip.Addr
}

func (n *fakeNetwork) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if n.w.dialMesh != nil {
		return n.w.dialMesh(dst)
	}
	if dst != netip.AddrPortFrom(addrB, 15008) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}
	}
	return n.w.dialB(netip.AddrPortFrom(n.self, 3134))
}

// dialB connects to b's port 15008 as src.
func (w *world) dialB(src netip.AddrPort) (net.Conn, error) {
	c, err := net.Dial("tcp", w.meshLn.Addr().String())
	if err != nil {
		return nil, err
	}
	c.Write(append([]byte{byte(len(src.String()))}, src.String()...))
	return c, nil
}

func (n *fakeNetwork) DialApp(ctx context.Context, src, dst netip.AddrPort) (Conn, error) {
	if n.w.dialApp != nil {
		return n.w.dialApp(ctx)
	}
	return n.w.dial(src.Addr(), dst)
}

func (n *fakeNetwork) ProbeApp(_ context.Context, _ netip.Addr, dst netip.AddrPort) error {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.probes++
	switch {
	case n.w.probed != nil:
		return n.w.probed()
	case n.w.stale:
		return nil
	}
	if n.w.apps[dst] == nil && n.w.dialApp == nil {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	return nil
}

func (n *fakeNetwork) DialPlain(ctx context.Context, dst netip.AddrPort) (Conn, error) {
	return n.w.dial(n.self, dst)
}

// dial reaches the application that the test put at dst.
func (w *world) dial(src netip.Addr, dst netip.AddrPort) (Conn, error) {
	w.mu.Lock()
	app := w.apps[dst]
	w.clients[dst] = src
	w.mu.Unlock()
	if app == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	here, there := tcpPair(w.t)
	go func() {
		defer there.Close()
		app(there)
	}()
	return here, nil
}

// listen puts an application at ap, or replaces it.
func (w *world) listen(ap netip.AddrPort, app func(net.Conn)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.apps[ap] = app
}

func tcpPair(t *testing.T) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// fakeFlow is a SYN: app is the application's end once it was accepted.
type fakeFlow struct {
	t        *testing.T
	src, dst netip.AddrPort
	decided  chan struct{}
	app      *net.TCPConn
	refusal  refusal.Way
	again    bool
	silent   bool // its client does not end the handshake

	mu   sync.Mutex
	gone func()
}

func (f *fakeFlow) Src() netip.AddrPort { return f.src }
func (f *fakeFlow) Dst() netip.AddrPort { return f.dst }
func (f *fakeFlow) Accept() (Conn, error) {
	if f.silent {
		close(f.decided)
		return nil, os.NewSyscallError("accept", syscall.ETIMEDOUT)
	}
	ours, app := tcpPair(f.t)
	f.app = app
	close(f.decided)
	return ours, nil
}
func (f *fakeFlow) Again() bool { return f.again }
func (f *fakeFlow) OnGone(gone func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gone = gone
}

// evict takes the flow's place away.
func (f *fakeFlow) evict() {
	f.mu.Lock()
	gone := f.gone
	f.mu.Unlock()
	gone()
}
func (f *fakeFlow) Refuse(r refusal.Way) { f.refusal = r; close(f.decided) }

var errRefused = errors.New("refused")

// connect sends a SYN through serve and waits for the verdict. done ends with the connection.
func (w *world) connect(serve func(Flow), src, dst string) (app *net.TCPConn, refusal refusal.Way, done <-chan struct{},
	err error) {
	f := &fakeFlow{t: w.t, src: netip.MustParseAddrPort(src), dst: netip.MustParseAddrPort(dst),
		decided: make(chan struct{})}
	over := make(chan struct{})
	go func() {
		defer close(over)
		if w.short {
			serve(&shortFlow{f, w})
			return
		}
		serve(f)
	}()
	select {
	case <-f.decided:
	case <-time.After(20 * time.Second):
		w.t.Fatalf("no verdict on %s -> %s", src, dst)
	}
	if f.app == nil {
		<-over
		return nil, f.refusal, over, errRefused
	}
	return f.app, 0, over, nil
}

// answer is an application that reads a request of n bytes and answers with reply.
func answer(n int, reply string) func(net.Conn) {
	return func(c net.Conn) {
		io.ReadFull(c, make([]byte, n))
		io.WriteString(c, reply)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
	}
}

// settle waits until both proxies have no connection left: the far one ends a moment after the near one.
func (w *world) settle() {
	w.t.Helper()
	for _, p := range w.proxies {
		select {
		case <-p.table.empty():
		case <-time.After(20 * time.Second):
			w.t.Fatal("connections are left")
		}
	}
}

// logText is a log to be read while it is still being written.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// Bytes is a copy of what was written so far.
func (l *logText) Bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}

// lines are the access lines of pod i so far.
func (w *world) lines(i int) []string {
	w.zlogs[i].Flush(context.Background())
	var out []string
	sc := bufio.NewScanner(bytes.NewReader(w.logs[i].Bytes()))
	for sc.Scan() {
		if strings.Contains(sc.Text(), "\taccess\t") {
			out = append(out, sc.Text())
		}
	}
	return out
}
