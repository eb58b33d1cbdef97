package netstack

import (
	"net/netip"
	"sync"
	"time"

	"ztun/proxy/fair"
)

const (
	// promptly is how soon a destination's verdict has to be there for it to count as one that answers.
	promptly = time.Second
	// partySpan is how long a party that has answered counts as known; partyLimit bounds how many are remembered (twice
	// that at most, some 40 bytes each).
	partySpan  = time.Minute
	partyLimit = 1024
)

// places are the places of one direction for flows that await their verdict or the end of their handshake. The party
// that a flow is charged to is who may leave it unanswered: the destination of what the pod opens, the client
// (fair.Group) of what is opened to the pod.
//
// Half of the places are for parties that have answered lately, half for all others, and either half is shared
// fairly: when it is full the party with the most places loses its oldest. One half would not do: of a thousand dead
// destinations each has but one place, and a busy live one would be the greediest of all.
//
// A SYN that comes again after it was turned down takes a free place only: each attempt costs a goroutine, a dial and
// a line in the log, and with one per retransmission a crawler's dead destinations kept a processor busy (p99 of the
// others 6 to 16 times calm).
type places struct {
	known, strange *fair.Ledger[netip.AddrPort]
	turned         func(party netip.AddrPort, evicted bool)

	mu       sync.Mutex
	answered lately[netip.AddrPort]
}

// newPlaces makes limit places, of which one party has at most perParty.
func newPlaces(limit, perParty int, turned func(party netip.AddrPort, evicted bool)) *places {
	half := func(n int) *fair.Ledger[netip.AddrPort] {
		return fair.NewLedger(fair.LedgerOptions[netip.AddrPort]{Limit: int64(n), PerSource: int64(perParty), Turned: turned})
	}
	p := &places{
		known: half(limit / 2), strange: half(limit - limit/2), turned: turned,
		answered: lately[netip.AddrPort]{span: partySpan, limit: partyLimit},
	}
	return p
}

// take gives party a place, nil when there is none for it. again: its SYN was turned down before. evict is told that
// the place is lost to somebody else.
func (p *places) take(party netip.AddrPort, again bool, evict func()) *fair.Place[netip.AddrPort] {
	p.mu.Lock()
	known := p.answered.has(party, time.Now())
	p.mu.Unlock()
	if known {
		return p.known.Take(party, 1, evict)
	}
	if again {
		place := p.strange.TakeFree(party, 1, evict)
		if place == nil {
			p.turned(party, false)
		}
		return place
	}
	return p.strange.Take(party, 1, evict)
}

// answers notes that party has answered.
func (p *places) answers(party netip.AddrPort) {
	p.mu.Lock()
	p.answered.note(party, time.Now())
	p.mu.Unlock()
}

// silent notes that party has not answered.
func (p *places) silent(party netip.AddrPort) {
	p.mu.Lock()
	p.answered.forget(party)
	p.mu.Unlock()
}
