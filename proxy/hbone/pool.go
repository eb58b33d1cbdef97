package hbone

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"ztun/proxy/identity"
	"ztun/proxy/rescue"
)

// Key says which tunnels may carry a request (spec 3.1). The authority is not part of it, nor is the address that a
// tunnel comes from: a pool is one pod's, whose tunnels all leave from its own address of the server's family.
type Key struct {
	// Source is the identity that the tunnel's certificate is for.
	Source identity.ID
	// Dest is the identities that the server may have, joined with "," in order (the order counts).
	Dest string
	// Addr is the server's HBONE port.
	Addr netip.AddrPort
}

// PoolOptions is what a Pool is told; zero values mean the defaults given here.
type PoolOptions struct {
	// Dial opens the connection beneath a tunnel: TCP, TLS (Client). Its context ends when nobody waits for it
	// any more, or the pool closes; timeouts are its own.
	Dial func(ctx context.Context, key Key) (Dialled, error)
	// MaxStreams is how many streams one tunnel carries (100), if the server allows that many.
	MaxStreams int
	// Unused is how long a tunnel without streams is kept after its last use (5 min; negative: for ever).
	Unused time.Duration
	// MaxConns bounds the tunnels in the pool (500). Beyond it the least recently used one leaves: it is closed,
	// or if it carries streams it ends with the last of them.
	MaxConns int
	Config   Config
}

// Dialled is the connection beneath a tunnel, and whoever has to hear of the tunnel.
type Dialled struct {
	Conn net.Conn
	// Opened, if set, is told of the tunnel before anything is sent on it; what it returns, if anything, is called when
	// the tunnel has ended. What the handshake has shown is the dialler's to keep here.
	Opened func(*ClientConn) (ended func())
}

// Pool shares tunnels among requests. Per key at most one dial is under way; its failure is everybody's who waits
// for it. A tunnel that is full is used again when streams end. All methods may be called at the same time.
type Pool struct {
	o      PoolOptions
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu     sync.Mutex // after conn.mu in the lock order: no method of a connection is called with it held
	closed bool
	keys   map[Key]*shelf
	all    map[*pooled]struct{} // open connections, also those that left the pool
	size   int                  // tunnels that requests are given
	stats  PoolStats            // the counters
	made   uint64               // the number of the newest tunnel
}

// shelf is what the pool knows of one key; it goes when there is nothing to know.
type shelf struct {
	key  Key
	list []*pooled // oldest first
	dial *dial
}

// pooled is one tunnel of the pool.
type pooled struct {
	pool    *Pool
	home    *shelf // nil: left the pool
	cc      *ClientConn
	active  int // streams, also those about to be opened
	limit   int
	lastUse time.Time
	idle    *time.Timer
	release func() // forgets one stream
	ended   func() // of Dialled.Opened; may be nil
	number  uint64 // counts tunnels in the order in which they came up
}

// dial is one that is under way.
type dial struct {
	done    chan struct{}
	err     error // after done
	waiting int
	cancel  context.CancelFunc
}

// PoolStats is a snapshot.
type PoolStats struct {
	Keys, Conns, Streams int
	// Since the start: Evicted counts tunnels that left because of MaxConns, Retried requests that were sent anew,
	// Stale tunnels that failed, or said nothing, when they were used again.
	Dials, DialFailures, Evicted, Retried, Stale uint64
}

// NewPool makes an empty pool. Close it.
func NewPool(o PoolOptions) *Pool {
	if o.MaxStreams <= 0 {
		o.MaxStreams = 100
	}
	if o.Unused == 0 {
		o.Unused = 5 * time.Minute
	}
	if o.MaxConns <= 0 {
		o.MaxConns = 500
	}
	if o.Config.Buffers == nil {
		o.Config.Buffers = new(Buffers)
	}
	p := &Pool{o: o, keys: map[Key]*shelf{}, all: map[*pooled]struct{}{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// openTries bounds how often one request is sent anew because a tunnel turned out not to take it.
const openTries = 4

// Open opens a stream on a tunnel for key, dialling one if need be; see ClientConn.Open for what it returns. A
// request that a tunnel certainly did not process (GOAWAY, REFUSED_STREAM) is tried on another; one that a tunnel
// from before left without an answer, for whatever reason, is tried once on a fresh one: nothing but the request was
// sent, and the tunnel may be what is left of a peer that has gone. Errors of Dial come as they are; ErrPoolClosed.
func (p *Pool) Open(ctx context.Context, key Key, req *Request) (*Stream, *Response, error) {
	var after uint64 // the tunnel is to be newer than this
	known := p.newest()
	for try := 1; ; try++ {
		t, err := p.checkout(ctx, key, after)
		if err != nil {
			return nil, nil, err
		}
		used := t.number <= known
		s, resp, err := t.open(ctx, req, used)
		if used && after == 0 && ctx.Err() == nil && isStale(err) {
			after = p.staled()
			continue
		}
		var no *notOpened
		if errors.As(err, &no) {
			p.decline(t, no.err)
			err = no.err
			if ctx.Err() != nil || try == openTries {
				return nil, nil, err
			}
			p.retried()
			continue
		}
		var se *StreamError
		if !errors.As(err, &se) || !se.Unprocessed || ctx.Err() != nil || try == openTries {
			return s, resp, err
		}
		p.retried()
	}
}

// newest is the number of the newest tunnel.
func (p *Pool) newest() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.made
}

// staled counts a tunnel that did not answer, and returns newest.
func (p *Pool) staled() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stats.Stale++
	p.stats.Retried++
	return p.made
}

func (p *Pool) retried() {
	p.mu.Lock()
	p.stats.Retried++
	p.mu.Unlock()
}

// checkout gives a tunnel with room for a stream, which is counted already; one newer than number after.
func (p *Pool) checkout(ctx context.Context, key Key, after uint64) (*pooled, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if p.closed {
			return nil, ErrPoolClosed
		}
		ts := p.keys[key]
		if ts == nil {
			ts = &shelf{key: key}
			p.keys[key] = ts
		}
		for _, t := range ts.list {
			if t.active < t.limit && t.number > after && !t.cc.c.stuck() {
				t.use()
				return t, nil
			}
		}
		d := ts.dial
		if d == nil {
			d = p.startDial(ctx, ts)
		}
		d.waiting++
		p.mu.Unlock()
		var gaveUp error
		select {
		case <-d.done:
		case <-ctx.Done():
			gaveUp = ctx.Err()
		}
		p.mu.Lock()
		if d.waiting--; d.waiting == 0 {
			d.cancel() // nobody wants it any more (or it is over)
		}
		if gaveUp != nil {
			return nil, gaveUp
		}
		if d.err != nil {
			return nil, d.err
		}
	}
}

// use counts a stream in. p.mu is held.
func (t *pooled) use() {
	t.active++
	t.lastUse = time.Now()
	if t.idle != nil {
		t.idle.Stop()
	}
}

// startDial starts the one dial of a key. p.mu is held.
func (p *Pool) startDial(ctx context.Context, ts *shelf) *dial {
	// The first who asks may give up before the others: the dial lives as long as anybody waits.
	dctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(p.ctx, p.panics().Func("an HBONE dial's end", cancel, nil))
	d := &dial{done: make(chan struct{}), cancel: cancel}
	ts.dial = d
	p.stats.Dials++
	p.work.Add(1)
	go p.panics().Func("an HBONE dial", func() {
		defer p.work.Done()
		defer stop()
		dialled, err := p.o.Dial(dctx, ts.key)
		var t *pooled
		if err == nil {
			t = p.newTunnel(dialled)
		}
		p.mu.Lock()
		ts.dial = nil
		d.err = err
		var evicted *pooled
		switch {
		case t == nil:
			p.stats.DialFailures++
			if p.closed {
				d.err = ErrPoolClosed
			}
			p.forget(ts)
		case p.closed:
			d.err = ErrPoolClosed
			evicted = t
			p.all[t] = struct{}{}
		default:
			p.made++
			t.number = p.made
			t.home = ts
			ts.list = append(ts.list, t)
			p.all[t] = struct{}{}
			p.size++
			t.rest() // should everybody give up meanwhile
			evicted = p.overflow(t)
		}
		close(d.done)
		p.mu.Unlock()
		if t != nil {
			t.watch()
		}
		if evicted != nil {
			evicted.cc.c.drain()
		}
	}, func(err error) { p.dialCrashed(ts, d, err) })()
	return d
}

// dialCrashed tells those who wait for a dial that it has panicked.
func (p *Pool) dialCrashed(ts *shelf, d *dial, err error) {
	rescue.Seize(&p.mu)
	defer p.mu.Unlock()
	select {
	case <-d.done: // it came after all that they wait for
		return
	default:
	}
	d.err = err
	if ts.dial == d {
		ts.dial = nil
		p.stats.DialFailures++
		p.forget(ts)
	}
	close(d.done)
}

func (p *Pool) panics() *rescue.Panics { return p.o.Config.Panics }

// newTunnel puts HTTP/2 on a fresh connection. Nothing is sent before watch.
func (p *Pool) newTunnel(d Dialled) *pooled {
	t := &pooled{pool: p, cc: newClientConn(d.Conn, p.o.Config), limit: p.o.MaxStreams, lastUse: time.Now()}
	t.release = t.streamGone
	t.cc.c.onEnd = func() { // with conn.mu held
		p.mu.Lock()
		defer p.mu.Unlock()
		p.remove(t)
	}
	if d.Opened != nil {
		t.ended = d.Opened(t.cc)
	}
	t.cc.c.start()
	return t
}

// watch waits for the tunnel's end in the background.
func (t *pooled) watch() {
	p := t.pool
	p.work.Add(1)
	go p.panics().Func("the end of an HBONE tunnel", func() {
		defer p.work.Done()
		<-t.cc.c.done
		p.panics().Wait(&t.cc.c.work)
		if t.ended != nil {
			t.ended()
		}
		p.mu.Lock()
		p.remove(t)
		delete(p.all, t)
		p.mu.Unlock()
	}, nil)()
}

// streamGone is called when one of t's streams is over, with its conn.mu held.
func (t *pooled) streamGone() {
	p := t.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	t.active--
	t.lastUse = time.Now()
	if t.active == 0 {
		t.rest()
	}
}

// decline takes back a stream that t did not take, and lets t learn from it.
func (p *Pool) decline(t *pooled, why error) {
	most := 0
	if errors.Is(why, ErrSaturated) {
		t.cc.c.mu.Lock()
		most = t.cc.c.maxStreams()
		t.cc.c.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case errors.Is(why, ErrSaturated):
		t.limit = min(p.o.MaxStreams, most) // the server's SETTINGS have come meanwhile
	case errors.Is(why, ErrGoAway), errors.Is(why, ErrClosed):
		p.remove(t)
	default:
		var ce *ConnError
		if errors.As(why, &ce) {
			p.remove(t)
		}
	}
	t.active--
	if t.active == 0 {
		t.rest()
	}
}

// rest starts the time after which an unused tunnel is closed. p.mu is held.
func (t *pooled) rest() {
	p := t.pool
	if p.o.Unused < 0 || t.home == nil || p.closed {
		return
	}
	if t.idle == nil {
		t.idle = time.AfterFunc(p.o.Unused, p.panics().Func("the end of an unused tunnel", t.expire, t.cc.c.crash))
	} else {
		t.idle.Reset(p.o.Unused)
	}
}

// expire is the idle timer.
func (t *pooled) expire() {
	p := t.pool
	p.mu.Lock()
	due := t.home != nil && t.active == 0 && time.Since(t.lastUse) >= p.o.Unused
	if due {
		p.remove(t)
	}
	p.mu.Unlock()
	if due {
		t.cc.c.drain() // without streams that is the end, with GOAWAY NO_ERROR
	}
}

// remove takes t out of the pool: it gets no further streams. p.mu is held.
func (p *Pool) remove(t *pooled) {
	ts := t.home
	if ts == nil {
		return
	}
	t.home = nil
	p.size--
	if t.idle != nil {
		t.idle.Stop()
	}
	for i, o := range ts.list {
		if o == t {
			ts.list = append(ts.list[:i], ts.list[i+1:]...)
			break
		}
	}
	p.forget(ts)
}

// forget drops the state of a key that has none. p.mu is held.
func (p *Pool) forget(ts *shelf) {
	if len(ts.list) == 0 && ts.dial == nil && p.keys[ts.key] == ts {
		delete(p.keys, ts.key)
	}
}

// overflow takes the least recently used tunnel other than t out of a pool that has become too large. p.mu is held.
func (p *Pool) overflow(t *pooled) (out *pooled) {
	if p.size <= p.o.MaxConns {
		return nil
	}
	for o := range p.all {
		if o != t && o.home != nil && (out == nil || o.better(out)) {
			out = o
		}
	}
	if out != nil {
		p.remove(out)
		p.stats.Evicted++
	}
	return out
}

// better reports whether t is the better one to give up.
func (t *pooled) better(o *pooled) bool {
	if (t.active == 0) != (o.active == 0) {
		return t.active == 0
	}
	return t.lastUse.Before(o.lastUse)
}

// Stats counts.
func (p *Pool) Stats() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.stats
	st.Keys, st.Conns = len(p.keys), len(p.all)
	for t := range p.all {
		st.Streams += t.active
	}
	return st
}

// Shutdown takes no further requests, lets streams end, then closes. When ctx ends first it closes at once and
// returns ctx's error.
func (p *Pool) Shutdown(ctx context.Context) error {
	for _, t := range p.stop() {
		t.cc.c.drain()
	}
	over := make(chan struct{})
	go p.panics().Func("the end of a pool", func() {
		p.panics().Wait(&p.work)
		close(over)
	}, nil)()
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		p.Close()
		<-over
		return ctx.Err()
	}
}

// Close ends all tunnels with GOAWAY; their streams fail. It returns when nothing of the pool runs any more.
func (p *Pool) Close() error {
	for _, t := range p.stop() {
		t.cc.c.hasten()
	}
	p.panics().Wait(&p.work)
	return nil
}

// stop lets nothing new in and lists what is open.
func (p *Pool) stop() (open []*pooled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.cancel()
	for t := range p.all {
		open = append(open, t)
		if t.idle != nil {
			t.idle.Stop()
		}
	}
	return open
}
