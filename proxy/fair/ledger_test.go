package fair

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// model is the ledger in the most obvious way.
type model struct {
	limit, per int64
	places     []*modelPlace // in the order of taking
}

type modelPlace struct {
	source string
	n      int64
	fixed  bool
	id     int
}

func (m *model) held(source string) (n int64) {
	for _, p := range m.places {
		if p.source == source {
			n += p.n
		}
	}
	return n
}

func (m *model) used() (n int64) {
	for _, p := range m.places {
		n += p.n
	}
	return n
}

// oldest is the first evictable place of source, or of anybody ("").
func (m *model) oldest(source string) int {
	for i, p := range m.places {
		if !p.fixed && (source == "" || p.source == source) {
			return i
		}
	}
	return -1
}

// greediest is who has most among those with something to lose; of equals, who has the oldest such place.
func (m *model) greediest() (source string, held int64) {
	for _, p := range m.places {
		if h := m.held(p.source); !p.fixed && h > held {
			source, held = p.source, h
		}
	}
	return source, held
}

func (m *model) take(p *modelPlace) (evicted []int, ok bool) {
	before := append([]*modelPlace(nil), m.places...)
	drop := func(i int) {
		evicted = append(evicted, m.places[i].id)
		m.places = append(m.places[:i:i], m.places[i+1:]...)
	}
	for m.held(p.source)+p.n > m.per || m.used()+p.n > m.limit {
		from := p.source
		if m.held(p.source)+p.n <= m.per {
			if s, held := m.greediest(); held >= m.held(p.source)+p.n {
				from = s
			}
		}
		i := m.oldest(from)
		if i < 0 {
			m.places = before
			return nil, false
		}
		drop(i)
	}
	m.places = append(m.places, p)
	return evicted, true
}

func TestLedgerLikeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{limit: rapid.Int64Range(1, 12).Draw(t, "limit")}
		m.per = rapid.Int64Range(1, m.limit).Draw(t, "perSource")
		var evicted []int
		turned := map[bool]int{}
		l := NewLedger(LedgerOptions[string]{Limit: m.limit, PerSource: m.per, Turned: func(_ string, e bool) {
			turned[e]++
		}})
		places := map[int]*Place[string]{}
		want := map[bool]int{}
		for id := range rapid.IntRange(1, 60).Draw(t, "steps") {
			source := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "source")
			switch rapid.SampledFrom([]string{"take", "take", "take", "free", "release", "settle"}).Draw(t, "step") {
			case "take":
				evicted = nil
				p := &modelPlace{source: source, n: rapid.Int64Range(1, 3).Draw(t, "n"),
					fixed: rapid.IntRange(0, 4).Draw(t, "fixed") == 0, id: id}
				wantEvicted, ok := m.take(p)
				evict := func() { evicted = append(evicted, id) }
				if p.fixed {
					evict = nil
				}
				got := l.Take(source, p.n, evict)
				if (got != nil) != ok || fmt.Sprint(evicted) != fmt.Sprint(wantEvicted) {
					t.Fatalf("take %d units for %s: got a place %v, evicted %v; want %v, %v", p.n, source, got != nil, evicted, ok,
						wantEvicted)
				}
				want[true] += len(wantEvicted)
				if !ok {
					want[false]++
				} else {
					places[id] = got
				}
			case "free":
				p := &modelPlace{source: source, n: rapid.Int64Range(1, 3).Draw(t, "n"), id: id}
				ok := m.used()+p.n <= m.limit && m.held(source)+p.n <= m.per
				evicted = nil
				got := l.TakeFree(source, p.n, func() { evicted = append(evicted, id) })
				if (got != nil) != ok || evicted != nil {
					t.Fatalf("%d units for %s, if free: got a place %v, want %v; evicted %v", p.n, source, got != nil, ok, evicted)
				}
				if ok {
					m.places, places[id] = append(m.places, p), got
				}
			case "release":
				if i := len(m.places); i > 0 {
					p := m.places[rapid.IntRange(0, i-1).Draw(t, "which")]
					places[p.id].Release()
					places[p.id].Release()
					for j, o := range m.places {
						if o == p {
							m.places = append(m.places[:j:j], m.places[j+1:]...)
							break
						}
					}
				}
			case "settle":
				if i := len(m.places); i > 0 {
					p := m.places[rapid.IntRange(0, i-1).Draw(t, "which")]
					if !places[p.id].Settle() {
						t.Fatal("a place that is held cannot be settled")
					}
					p.fixed = true
				}
			}
			if l.Used() != m.used() || l.Used() > m.limit || l.Held(source) != m.held(source) || l.Held(source) > m.per {
				t.Fatalf("used %d, held by %s %d; want %d, %d", l.Used(), source, l.Held(source), m.used(), m.held(source))
			}
		}
		if turned[true] != want[true] || turned[false] != want[false] {
			t.Fatalf("told of %v, want %v", turned, want)
		}
		for _, p := range places {
			p.Release()
		}
		if l.Used() != 0 || len(l.holders) != 0 || len(l.greedy) != 0 {
			t.Fatalf("left: %d units, %d holders, %d ranked", l.Used(), len(l.holders), len(l.greedy))
		}
	})
}

func TestGreediestLoses(t *testing.T) {
	lost := map[string]int{}
	l := NewLedger(LedgerOptions[string]{Limit: 256})
	for range 256 {
		l.Take("attacker", 1, func() { lost["attacker"]++ })
	}
	for range 10 {
		if l.Take("honest", 1, func() { lost["honest"]++ }) == nil {
			t.Fatal("an honest newcomer got no place")
		}
	}
	for range 1000 {
		l.Take("attacker", 1, func() { lost["attacker"]++ })
	}
	if lost["honest"] != 0 || lost["attacker"] != 1010 {
		t.Errorf("lost: %v", lost)
	}
}

func TestEvictedAndSettled(t *testing.T) {
	l := NewLedger(LedgerOptions[string]{Limit: 1})
	evicted := false
	p := l.Take("a", 1, func() { evicted = true })
	q := l.Take("b", 1, func() {})
	if q == nil || !evicted {
		t.Fatalf("the older place of an equal was not evicted")
	}
	if p.Settle() {
		t.Error("a place that was evicted was settled")
	}
	p.Release()
	if l.Used() != 1 {
		t.Errorf("used %d after releasing what was evicted, want 1", l.Used())
	}
	for range 2 {
		if !q.Settle() {
			t.Error("a place could not be settled")
		}
	}
	if l.Take("c", 1, func() {}) != nil {
		t.Error("a settled place made room")
	}
	var none *Place[string]
	none.Release()
	if none.Settle() {
		t.Error("no place was settled")
	}
}

// The callbacks run without the ledger's lock: they may use it.
func TestCallbacksMayUseLedger(t *testing.T) {
	var l *Ledger[int]
	l = NewLedger(LedgerOptions[int]{Limit: 4, Turned: func(int, bool) { l.Used() }})
	var wg sync.WaitGroup
	for s := range 8 {
		wg.Go(func() {
			for range 1000 {
				l.Take(s, 1, func() { l.Held(s) }).Release()
			}
		})
	}
	wg.Wait()
	if l.Used() != 0 {
		t.Errorf("used %d", l.Used())
	}
}

func TestGroup(t *testing.T) {
	for in, want := range map[string]string{
		"10.1.2.3": "10.1.2.3", "::ffff:10.1.2.3": "10.1.2.3", "2001:db8:1:2:3::4": "2001:db8:1:2::",
		"fe80::1%eth0": "fe80::",
	} {
		if got := Group(netip.MustParseAddr(in)); got.String() != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	if got := Group(netip.Addr{}); got.IsValid() {
		t.Errorf("no address: %v", got)
	}
}

func BenchmarkTakeRelease(b *testing.B) {
	l := NewLedger(LedgerOptions[netip.Addr]{Limit: 1024})
	a := netip.MustParseAddr("10.0.0.1")
	evict := func() {}
	b.ReportAllocs()
	for b.Loop() {
		l.Take(a, 1, evict).Release()
	}
}
