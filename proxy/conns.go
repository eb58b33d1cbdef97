package proxy

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
	"ztun/proxy/rbac"
)

// live is one connection that can be listed, re-checked and cut.
type live struct {
	inbound     bool
	start       time.Time
	src         netip.AddrPort
	originalDst netip.AddrPort // zero: none
	actualDst   netip.AddrPort
	protocol    string // HBONE, TCP, DOUBLEHBONE
	policy      rbac.Conn

	mu    sync.Mutex
	cut   *Error             // set once, by the first who cuts
	books *connection        // set when bytes can flow
	ends  [2]Conn            // what is aborted by a cut
	stop  context.CancelFunc // ends a dial that is still under way
}

// cancel ends one side of a connection that we cut: CANCEL on a tunnel's stream, as ztunnel does, RST on TCP.
func cancel(c Conn) {
	if s, ok := c.(*hbone.Stream); ok {
		s.Reset(http2.ErrCodeCancel)
		return
	}
	abort(c)
}

// attach gives the connection's ends to be aborted by a cut. It reports the cut if it has come already.
func (l *live) attach(books *connection, down, up Conn) *Error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.books, l.ends = books, [2]Conn{down, up}
	l.stop = nil // nothing is under way any more: let go of the context
	return l.cut
}

// sever cuts the connection for the given reason; the first reason stays.
func (l *live) sever(why *Error) {
	l.mu.Lock()
	if l.cut != nil {
		l.mu.Unlock()
		return
	}
	l.cut = why
	ends, stop := l.ends, l.stop
	l.mu.Unlock()
	if stop != nil {
		stop()
	}
	for _, e := range ends {
		if e != nil {
			cancel(e)
		}
	}
}

// reason is why the connection was cut, nil if it was not.
func (l *live) reason() *Error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cut
}

// instead is the reason of the cut if there was one, else err: what failed because of a cut is no news.
func (l *live) instead(err *Error) *Error {
	if cut := l.reason(); cut != nil {
		return cut
	}
	return err
}

// conns is the table of one pod's live connections.
type conns struct {
	mu     sync.Mutex
	all    map[*live]struct{}
	idle   chan struct{} // closed when the table is empty; made by wait
	closed *Error        // new ones are cut at once for this reason
}

func (t *conns) add(l *live) {
	t.mu.Lock()
	if t.all == nil {
		t.all = map[*live]struct{}{}
	}
	t.all[l] = struct{}{}
	closed := t.closed
	t.mu.Unlock()
	if closed != nil {
		l.sever(closed)
	}
}

func (t *conns) remove(l *live) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.all, l)
	if len(t.all) == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}

// severAll cuts every connection, and from now on every new one.
func (t *conns) severAll(why *Error) {
	t.mu.Lock()
	t.closed = why
	list := t.list()
	t.mu.Unlock()
	for _, l := range list {
		l.sever(why)
	}
}

func (t *conns) list() []*live {
	out := make([]*live, 0, len(t.all))
	for l := range t.all {
		out = append(out, l)
	}
	return out
}

func (t *conns) snapshot() []*live {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.list()
}

// empty returns a channel that is closed when no connection is left.
func (t *conns) empty() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) == 0 {
		c := make(chan struct{})
		close(c)
		return c
	}
	if t.idle == nil {
		t.idle = make(chan struct{})
	}
	return t.idle
}
