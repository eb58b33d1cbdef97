package rig

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"sync"

	"ztun/proxy"
	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// network is a pod's ways out where the addresses are loopback's: kernel sockets bound to the address that the peer
// is to see.
type network struct {
	self    netip.Addr
	dialled *counter
}

func dial(ctx context.Context, from netip.Addr, dst netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	c, err := d.DialContext(ctx, "tcp4", dst.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (n *network) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	return conn(dial(ctx, src.Addr(), dst))
}

// ProbeApp leaves it to DialApp to find out.
func (n *network) ProbeApp(context.Context, netip.Addr, netip.AddrPort) error { return nil }

func (n *network) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	n.dialled.add(1)
	c, err := dial(ctx, n.self, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (n *network) DialPlain(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return conn(dial(ctx, n.self, dst))
}

// conn keeps a nil pointer from becoming an interface that is not nil.
func conn(c *net.TCPConn, err error) (proxy.Conn, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// knowledge never changes.
type knowledge struct{ view *state.View }

func (k knowledge) View() *state.View        { return k.view }
func (k knowledge) Changed() <-chan struct{} { return nil }

// flow is a captured SYN; Accept joins the application's end to the proxy's by a socket pair of loopback.
type flow struct {
	src, dst netip.AddrPort
	app      *net.TCPConn // before verdict
	verdict  chan error
}

func (f *flow) Src() netip.AddrPort { return f.src }
func (f *flow) Dst() netip.AddrPort { return f.dst }

func (f *flow) Accept() (proxy.Conn, error) {
	ours, app, err := pair()
	f.app = app
	f.verdict <- err
	return conn(ours, err)
}

func (f *flow) Again() bool          { return false }
func (f *flow) OnGone(func())        {}
func (f *flow) Refuse(r refusal.Way) { f.verdict <- &RefusedError{r} }

func pair() (a, b *net.TCPConn, err error) {
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	a, err = net.DialTCP("tcp4", nil, ln.Addr().(*net.TCPAddr))
	if err != nil {
		return nil, nil, err
	}
	if b, err = ln.AcceptTCP(); err != nil {
		a.Close()
		return nil, nil, err
	}
	return a, b, nil
}

type counter struct {
	mu sync.Mutex
	n  int
}

func (c *counter) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += n
}

func (c *counter) get() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
