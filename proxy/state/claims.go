package state

import (
	"container/list"
	"hash/maphash"
	"strings"
)

// claims is an index in which several workloads may claim one key. The View sees the best; the others are remembered
// here. Every operation takes the same time however many claim a key: a hundred thousand WorkloadEntries may share a
// name.
type claims[K comparable] struct {
	best editor[K, *Workload]
	all  map[K]*claimants // only keys with several
}

// claimants are the workloads of one key.
type claimants struct {
	ranks [4]list.List // of *Workload, by rank, in order of insertion
	at    map[*Workload]*list.Element
}

func newClaims[K comparable](sum func(maphash.Seed, K) uint64) claims[K] {
	return claims[K]{best: newEditor[K, *Workload](sum), all: make(map[K]*claimants)}
}

// rank orders the claimants of an address: pods before others, then HBONE.
func rank(w *Workload) int {
	r := 0
	// The literal matters: istiod writes "cluster//Pod/namespace/name".
	if strings.Contains(w.UID, "//Pod/") {
		r += 2
	}
	if w.Protocol == HBONE {
		r++
	}
	return r
}

func (c *claims[K]) add(k K, w *Workload) {
	cur, ok := c.best.get(k)
	if !ok {
		c.best.set(k, w)
		return
	}
	l, ok := c.all[k]
	if !ok {
		l = &claimants{at: make(map[*Workload]*list.Element, 2)}
		l.put(cur)
		c.all[k] = l
	}
	l.put(w)
	c.best.set(k, l.best())
}

func (c *claims[K]) remove(k K, w *Workload) {
	l, ok := c.all[k]
	if !ok {
		if cur, _ := c.best.get(k); cur == w {
			c.best.del(k)
		}
		return
	}
	l.drop(w)
	c.best.set(k, l.best())
	if len(l.at) == 1 {
		delete(c.all, k)
	}
}

func (l *claimants) put(w *Workload) { l.at[w] = l.ranks[rank(w)].PushBack(w) }

func (l *claimants) drop(w *Workload) {
	if e, ok := l.at[w]; ok {
		l.ranks[rank(w)].Remove(e)
		delete(l.at, w)
	}
}

// best is the last of the highest rank.
func (l *claimants) best() *Workload {
	for r := len(l.ranks) - 1; r >= 0; r-- {
		if e := l.ranks[r].Back(); e != nil {
			return e.Value.(*Workload)
		}
	}
	return nil
}
