package guard

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"ztun/proxy/fair"
)

// Places of one server. A waiting connection costs a goroutine and about 10 KiB.
const (
	DefaultWaiting = 512
	DefaultBusy    = 128
)

// ConnsOptions are the bounds of one server.
type ConnsOptions struct {
	Resource string       // what the report calls its connections
	Waiting  int          // connections without a whole request: half open or idle; 0: DefaultWaiting
	Busy     int          // connections whose request is being answered; 0: DefaultBusy
	KeepBusy bool         // none of these is cut for a newer one, which is closed instead
	Report   *fair.Report // may be nil
}

// Conns bounds the connections of an http.Server, whose ConnState is to be Change. At a bound the source with most
// connections loses its oldest.
type Conns struct {
	o             ConnsOptions
	waiting, busy *fair.Ledger[netip.Addr]
	turned        atomic.Uint64

	mu   sync.Mutex
	open map[net.Conn]*fair.Place[netip.Addr]
}

// NewConns makes the bounds of one server.
func NewConns(o ConnsOptions) *Conns {
	if o.Waiting == 0 {
		o.Waiting = DefaultWaiting
	}
	if o.Busy == 0 {
		o.Busy = DefaultBusy
	}
	c := &Conns{o: o, open: map[net.Conn]*fair.Place[netip.Addr]{}}
	turned := func(source netip.Addr, evicted bool) {
		c.turned.Add(1)
		text := "local"
		if source.IsValid() {
			text = source.String()
		}
		o.Report.Turned(o.Resource, "", text, evicted)
	}
	c.waiting = fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: int64(o.Waiting), Turned: turned})
	c.busy = fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: int64(o.Busy), Turned: turned})
	return c
}

// Change is the ConnState of the server.
func (c *Conns) Change(conn net.Conn, st http.ConnState) {
	switch st {
	case http.StateNew, http.StateIdle:
		c.move(conn, c.waiting, conn.Close)
	case http.StateActive:
		if c.o.KeepBusy {
			c.move(conn, c.busy, nil)
		} else {
			c.move(conn, c.busy, conn.Close)
		}
	case http.StateClosed, http.StateHijacked:
		c.mu.Lock()
		p := c.open[conn]
		delete(c.open, conn)
		c.mu.Unlock()
		p.Release()
	}
}

// move gives a connection a place in to and frees the one it had. net/http changes the state of a connection from one
// goroutine at a time.
func (c *Conns) move(conn net.Conn, to *fair.Ledger[netip.Addr], cut func() error) {
	c.mu.Lock()
	had := c.open[conn]
	c.mu.Unlock()
	had.Release()
	var evict func()
	if cut != nil {
		evict = func() { _ = cut() }
	}
	p := to.Take(source(conn), 1, evict)
	if p == nil {
		conn.Close() // it stays in open until the server has noticed
	}
	c.mu.Lock()
	c.open[conn] = p
	c.mu.Unlock()
}

// source is whom a connection counts for; the zero value is who comes by a Unix socket.
func source(conn net.Conn) netip.Addr {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return fair.Group(a.AddrPort().Addr())
	}
	return netip.Addr{}
}

// Turned counts the connections that a bound closed.
func (c *Conns) Turned() uint64 { return c.turned.Load() }

// Open counts the connections that are open; each has a goroutine.
func (c *Conns) Open() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// Waiting counts the places of waiting connections that are taken.
func (c *Conns) Waiting() int { return int(c.waiting.Used()) }
