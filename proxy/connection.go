package proxy

import (
	"context"
	"errors"
	"net/netip"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
	"ztun/proxy/rbac"
)

// connection is one connection's way through the proxy: from its SYN, its CONNECT or its SOCKS5 greeting to the end of
// its copying. It is entered, registered as soon as it is known where it goes, carried once both of its ends stand, and
// left.
type connection struct {
	p        *Proxy
	reporter string // whose socket it is; "" for a stream of a tunnel, which has none of its own
	// inner is the connection's own tunnel within a gateway's, where there is one. It ends with its only
	// stream; leave waits for that.
	inner   *hbone.ClientConn
	forget  func() // ends the watch over the revocation of the inner peer, or of one in memory; nil without
	carried bool   // its bytes are being copied, or pass
	// asks for packets that pass as they are; nil: the client's cannot. shortcut is what came of that, where the other end
	// is a pod of this daemon; nil: its bytes are copied.
	asks     shortcutFlow
	shortcut Shortcut
	passEnd  error // what that has ended with
	dir      uint8 // as profiles name it
	left     atomic.Bool

	mu         sync.Mutex
	registered bool
	path       path
	books      *books             // nil until there is something to count
	cut        *Error             // set once, by the first who cuts
	ends       [2]Conn            // what is aborted by a cut
	copying    *copying           // nil until it is carried
	passing    bool               // its packets pass by shortcut, which is aborted by a cut
	stop       context.CancelFunc // ends what is under way for it before it is carried
}

// path is where a connection comes from and goes to: by it a connection is listed, re-checked and cut.
type path struct {
	inbound     bool
	start       time.Time
	src         netip.AddrPort
	originalDst netip.AddrPort // zero: none
	actualDst   netip.AddrPort
	protocol    string        // HBONE, TCP, DOUBLEHBONE
	policy      rbac.Question // of an inbound one
	exempt      bool          // from policy: a probe of the node's
}

// The directions of a connection, as profiles and traces name them.
const (
	outbound = iota
	inbound
	passthrough
)

var directions = [...]string{outbound: "outbound", inbound: "inbound", passthrough: "passthrough"}

// enter lets a connection in; nil when the proxy drains and takes nothing new. The goroutine, and those
// that it starts, show the pod and the direction in profiles from here on.
func (p *Proxy) enter(dir int) *connection {
	pprof.SetGoroutineLabels(p.labels[dir])
	if !p.begin() {
		return nil
	}
	c := &connection{p: p, reporter: reporterDestination, dir: uint8(dir)}
	if dir == outbound {
		c.reporter = reporterSource
	}
	p.o.Metrics.socket(c.reporter, 1)
	return c
}

// begin counts work that Close waits for, until work.Done; false when the proxy drains and takes nothing new.
func (p *Proxy) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.draining {
		return false
	}
	p.work.Add(1)
	return true
}

// enterStream lets a stream of a tunnel in, which stays itself as long as the caller runs.
func (p *Proxy) enterStream(stop context.CancelFunc) *connection {
	p.work.Add(1)
	return &connection{p: p, stop: stop, dir: inbound}
}

// await gives the connection the context of what is done for it until it is carried: a cut ends it, and so does the
// flow's loss of its place.
func (c *connection) await(f Flow) (context.Context, context.CancelFunc) {
	ctx, stop := c.p.brief.Begin()
	c.stop = stop
	f.OnGone(func() { c.sever(fail(kindCrowded, nil)) })
	return ctx, stop
}

// register makes the connection one that can be listed, re-checked and cut, on the path given; again, when it takes
// another one.
func (c *connection) register(on path) {
	c.mu.Lock()
	c.registered, c.path = true, on
	c.mu.Unlock()
	c.p.table.add(c)
}

// where is the path of a registered connection.
func (c *connection) where() path {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.path
}

// open begins the connection's books.
func (c *connection) open(e entry) {
	b := c.p.openBooks(e)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.books = b
}

// settle ends a connection that is not being copied when its beginning returns: it was refused, or something panicked.
func (c *connection) settle() {
	if c.carried {
		return
	}
	if c.shortcut != nil {
		c.shortcut.Reset()
	}
	if c.books != nil {
		c.books.record(fail(kindIO, errUnfinished)) // no news if it was recorded
	}
	c.leave()
}

var errUnfinished = errors.New("internal error")

// leave takes the connection off the table; only the first call counts.
func (c *connection) leave() {
	if c.left.Swap(true) {
		return
	}
	if c.registered {
		c.p.table.remove(c)
	}
	if c.reporter != "" {
		c.p.o.Metrics.socket(c.reporter, -1)
	}
	if c.inner != nil {
		c.inner.Shutdown(c.p.ctx)
		c.inner.Close()
	}
	if c.forget != nil {
		c.forget()
	}
	c.p.work.Done()
}

// stand gives the connection's ends to be aborted by a cut. It reports the cut if it has come already.
func (c *connection) stand(down, up Conn) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ends = [2]Conn{down, up}
	return c.stands()
}

// stands is the rest of it. mu is held.
func (c *connection) stands() (cut *Error) {
	c.stop = nil // nothing is under way any more: let go of the context
	return c.cut
}

// sever cuts the connection for the given reason; the first reason stays.
func (c *connection) sever(why *Error) {
	c.mu.Lock()
	if c.cut != nil {
		c.mu.Unlock()
		return
	}
	c.cut = why
	ends, passing, stop := c.ends, c.passing, c.stop
	c.mu.Unlock()
	if stop != nil {
		stop()
	}
	if passing {
		c.shortcut.Reset()
	}
	for _, e := range ends {
		if e != nil {
			cancel(e)
		}
	}
}

// reason is why the connection was cut, nil if it was not.
func (c *connection) reason() *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

// instead is the reason of the cut if there was one, else err: what failed because of a cut is no news.
func (c *connection) instead(err *Error) *Error {
	if cut := c.reason(); cut != nil {
		return cut
	}
	return err
}

// cancel ends one end of a connection that we cut: CANCEL on a tunnel's stream, as ztunnel does, RST on TCP.
func cancel(c Conn) {
	if s, ok := c.(resetter); ok {
		s.Reset(http2.ErrCodeCancel)
		return
	}
	abort(c)
}
