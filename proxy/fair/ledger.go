package fair

import (
	"container/heap"
	"net/netip"
	"sync"
)

// LedgerOptions is what a Ledger is made of.
type LedgerOptions[S comparable] struct {
	Limit     int64 // units in all
	PerSource int64 // at most so many of one source; 0: Limit
	// Turned, if set, is told of each place that was evicted, and of each newcomer that was refused. It is called
	// outside the ledger's lock.
	Turned func(source S, evicted bool)
}

// Ledger shares the units of one resource among sources. All methods may be called at the same time.
type Ledger[S comparable] struct {
	o LedgerOptions[S]

	mu      sync.Mutex
	used    int64
	seq     uint64
	holders map[S]*holder[S]
	greedy  ranking[S] // the holders that have something to lose, the greediest first
}

// NewLedger makes an empty ledger.
func NewLedger[S comparable](o LedgerOptions[S]) *Ledger[S] {
	if o.PerSource <= 0 || o.PerSource > o.Limit {
		o.PerSource = o.Limit
	}
	return &Ledger[S]{o: o, holders: map[S]*holder[S]{}}
}

// holder is what one source has.
type holder[S comparable] struct {
	source         S
	held           int64     // units, those of settled places included
	oldest, newest *Place[S] // the places that can be evicted, in the order of taking
	rank           int       // in Ledger.greedy; -1: nothing to lose
}

// Place is a share of the resource, held until Release or until it is evicted.
type Place[S comparable] struct {
	l            *Ledger[S]
	h            *holder[S]
	n            int64
	seq          uint64
	evict        func()
	older, newer *Place[S]
	state        placeState
}

type placeState uint8

const (
	evictable placeState = iota
	settled
	gone
)

// Take gives source a place of n units. When they are not there, the greediest source, the newcomer counted as if it
// had its place already, loses its oldest evictable places; of equals, the source with the oldest place. Take returns
// nil when the newcomer is itself the greediest and has nothing to lose, or nobody has. evict is called at most once,
// on the goroutine of the taker who needed the room and without any lock of the ledger held; it must not wait. nil:
// this place cannot be evicted.
func (l *Ledger[S]) Take(source S, n int64, evict func()) *Place[S] {
	l.mu.Lock()
	h := l.holders[source]
	if h == nil {
		h = &holder[S]{source: source, rank: -1}
		l.holders[source] = h
	}
	var out []*Place[S]
	for h.held+n > l.o.PerSource && h.oldest != nil {
		out = append(out, l.remove(h.oldest))
	}
	fits := h.held+n <= l.o.PerSource
	for fits && l.used+n > l.o.Limit {
		from := h
		if len(l.greedy) > 0 && l.greedy[0].held >= h.held+n {
			from = l.greedy[0]
		}
		if from.oldest == nil {
			fits = false
			break
		}
		out = append(out, l.remove(from.oldest))
	}
	if !fits {
		// Nobody loses a place for somebody who gets none.
		for i := len(out) - 1; i >= 0; i-- {
			l.restore(out[i])
		}
		l.forget(h)
		l.mu.Unlock()
		if l.o.Turned != nil {
			l.o.Turned(source, false)
		}
		return nil
	}
	p := l.enter(source, n, evict)
	l.mu.Unlock()
	for _, v := range out {
		v.evict()
		if l.o.Turned != nil {
			l.o.Turned(v.h.source, true)
		}
	}
	return p
}

// TakeFree is Take for a newcomer for whom nobody is to lose a place: nil when there is no room, which is told to
// nobody.
func (l *Ledger[S]) TakeFree(source S, n int64, evict func()) *Place[S] {
	l.mu.Lock()
	room := l.used+n <= l.o.Limit
	if h := l.holders[source]; h != nil {
		room = room && h.held+n <= l.o.PerSource
	} else {
		room = room && n <= l.o.PerSource
	}
	if !room {
		l.mu.Unlock()
		return nil
	}
	p := l.enter(source, n, evict)
	l.mu.Unlock()
	return p
}

// Release gives the place back. It may be called more than once, and on nil.
func (p *Place[S]) Release() {
	if p == nil {
		return
	}
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	if p.state != gone {
		p.l.remove(p)
	}
}

// Settle makes the place one that is not evicted any more; it still counts. False says that it is gone already.
func (p *Place[S]) Settle() bool {
	if p == nil {
		return false
	}
	l := p.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.state == evictable {
		p.unlink()
		p.state = settled
		l.reorder(p.h)
	}
	return p.state == settled
}

// Used is how many units are taken.
func (l *Ledger[S]) Used() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.used
}

// Held is how many of them source has.
func (l *Ledger[S]) Held(source S) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.holders[source]; h != nil {
		return h.held
	}
	return 0
}

// enter puts a place for which there is room on the books.
func (l *Ledger[S]) enter(source S, n int64, evict func()) *Place[S] {
	h := l.holders[source] // evicting its own last place may have taken it off the books
	if h == nil {
		h = &holder[S]{source: source, rank: -1}
		l.holders[source] = h
	}
	l.seq++
	p := &Place[S]{l: l, h: h, n: n, seq: l.seq, evict: evict}
	l.used += n
	h.held += n
	if evict == nil {
		p.state = settled
	} else {
		p.older = h.newest
		if p.older != nil {
			p.older.newer = p
		} else {
			h.oldest = p
		}
		h.newest = p
	}
	l.reorder(h)
	return p
}

// remove takes a place off the books.
func (l *Ledger[S]) remove(p *Place[S]) *Place[S] {
	h := p.h
	if p.state == evictable {
		p.unlink()
	}
	p.state = gone
	h.held -= p.n
	l.used -= p.n
	l.reorder(h)
	l.forget(h)
	return p
}

// restore undoes remove of what was its holder's oldest place.
func (l *Ledger[S]) restore(p *Place[S]) {
	h := p.h
	l.holders[h.source] = h
	p.state, p.older, p.newer = evictable, nil, h.oldest
	if h.oldest != nil {
		h.oldest.older = p
	} else {
		h.newest = p
	}
	h.oldest = p
	h.held += p.n
	l.used += p.n
	l.reorder(h)
}

func (p *Place[S]) unlink() {
	h := p.h
	if p.older != nil {
		p.older.newer = p.newer
	} else {
		h.oldest = p.newer
	}
	if p.newer != nil {
		p.newer.older = p.older
	} else {
		h.newest = p.older
	}
	p.older, p.newer = nil, nil
}

// forget drops a holder that has nothing.
func (l *Ledger[S]) forget(h *holder[S]) {
	if h.held == 0 && l.holders[h.source] == h {
		delete(l.holders, h.source)
	}
}

// reorder puts h where it belongs in the ranking.
func (l *Ledger[S]) reorder(h *holder[S]) {
	switch {
	case h.oldest == nil && h.rank >= 0:
		heap.Remove(&l.greedy, h.rank)
	case h.oldest != nil && h.rank < 0:
		heap.Push(&l.greedy, h)
	case h.oldest != nil:
		heap.Fix(&l.greedy, h.rank)
	}
}

// ranking is a heap of holders.
type ranking[S comparable] []*holder[S]

func (r ranking[S]) Len() int { return len(r) }
func (r ranking[S]) Less(i, j int) bool {
	if r[i].held != r[j].held {
		return r[i].held > r[j].held
	}
	return r[i].oldest.seq < r[j].oldest.seq
}
func (r ranking[S]) Swap(i, j int) {
	r[i], r[j] = r[j], r[i]
	r[i].rank, r[j].rank = i, j
}
func (r *ranking[S]) Push(x any) {
	h := x.(*holder[S])
	h.rank = len(*r)
	*r = append(*r, h)
}
func (r *ranking[S]) Pop() any {
	old := *r
	h := old[len(old)-1]
	old[len(old)-1] = nil
	*r = old[:len(old)-1]
	h.rank = -1
	return h
}

// Group is what counts as one source of traffic: an IPv4 address; of IPv6 the /64, which is what a host or a site has
// for free.
func Group(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}
