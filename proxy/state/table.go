package state

import (
	"hash/maphash"
	"iter"
	"maps"
)

// width is how many branches a table has, and shards each branch. At 100,000 entries a shard holds about 100. An update
// touches a handful of shards in half a dozen tables, and what it costs is the copy of each, with its branch and the
// list of branches: 18 KiB in all. One list of 256 shards made that 65 KiB and two and a half times the processor
// time; 64 by 64 would make it 12, and take 60 bytes more for each workload at rest.
const width = 32

// table is a map that never changes: the value handed out with a View. The zero
// table is empty.
type table[K comparable, V any] struct {
	branches *[width]*branch[K, V]
	h        hasher[K]
	n        int
}

type branch[K comparable, V any] [width]map[K]V

// hasher picks the shard of a key. It need not agree with the maps' own hash.
type hasher[K comparable] struct {
	seed maphash.Seed
	sum  func(maphash.Seed, K) uint64
}

// place is where the key is: its branch, and its shard there.
func (h *hasher[K]) place(k K) (i, j uint64) {
	sum := h.sum(h.seed, k)
	return sum % width, sum / width % width
}

func (t *table[K, V]) get(k K) (v V, ok bool) {
	if t.branches == nil {
		return v, false
	}
	i, j := t.h.place(k)
	if b := t.branches[i]; b != nil {
		v, ok = b[j][k]
	}
	return v, ok
}

func (t *table[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if t.branches == nil {
			return
		}
		for _, b := range t.branches {
			if b == nil {
				continue
			}
			for _, m := range b {
				for k, v := range m {
					if !yield(k, v) {
						return
					}
				}
			}
		}
	}
}

// editor is a table under construction. Maps that it has not made itself since
// the last freeze belong to Views and are copied before the first write, and so
// are the lists that lead to them.
type editor[K comparable, V any] struct {
	t   table[K, V]
	own [width]uint64 // which shards are ours: a bit for each; a branch with one is ours as well
	any bool          // t.branches itself is ours
}

func newEditor[K comparable, V any](sum func(maphash.Seed, K) uint64) editor[K, V] {
	return editor[K, V]{t: table[K, V]{h: hasher[K]{maphash.MakeSeed(), sum}}}
}

func (e *editor[K, V]) get(k K) (V, bool) { return e.t.get(k) }

// writable returns the shard of k, made ours.
func (e *editor[K, V]) writable(k K) map[K]V {
	if !e.any {
		e.t.branches, e.any = owned(e.t.branches), true
	}
	i, j := e.t.h.place(k)
	b := e.t.branches[i]
	if e.own[i] == 0 {
		b = owned(b)
		e.t.branches[i] = b
	}
	if e.own[i]&(1<<j) == 0 {
		e.own[i] |= 1 << j
		if b[j] == nil {
			b[j] = make(map[K]V)
		} else {
			b[j] = maps.Clone(b[j])
		}
	}
	return b[j]
}

// owned is a copy of what p points to, or its zero value.
func owned[T any](p *T) *T {
	fresh := new(T)
	if p != nil {
		*fresh = *p
	}
	return fresh
}

func (e *editor[K, V]) set(k K, v V) {
	m := e.writable(k)
	before := len(m)
	m[k] = v
	e.t.n += len(m) - before
}

func (e *editor[K, V]) del(k K) {
	if _, ok := e.t.get(k); !ok {
		return
	}
	delete(e.writable(k), k)
	e.t.n--
}

// freeze hands the table out; the editor goes on with copies.
func (e *editor[K, V]) freeze() table[K, V] {
	if e.any {
		e.own, e.any = [width]uint64{}, false
	}
	return e.t
}

// The hash functions. maphash.Comparable would move keys that hold a netip.Addr
// to the heap.

func sumString(seed maphash.Seed, s string) uint64 { return maphash.String(seed, s) }

func sumAddr(seed maphash.Seed, k NetworkAddress) uint64 {
	b := k.Addr.As16()
	return maphash.Bytes(seed, b[:]) ^ maphash.String(seed, k.Network)
}

func sumPrefix(seed maphash.Seed, k NetworkPrefix) uint64 {
	return sumAddr(seed, NetworkAddress{k.Network, k.Prefix.Addr()}) + uint64(k.Prefix.Bits())*0x9e3779b97f4a7c15
}

func sumService(seed maphash.Seed, k ServiceKey) uint64 {
	return maphash.String(seed, k.Hostname) ^ maphash.String(seed, k.Namespace)*3
}

func sumCaller(seed maphash.Seed, k Caller) uint64 {
	return sumAddr(seed, NetworkAddress{k.Namespace, k.Host}) ^ maphash.String(seed, k.ServiceAccount)*5
}

func sumInfo(seed maphash.Seed, k WorkloadInfo) uint64 {
	return maphash.String(seed, k.Name) ^ maphash.String(seed, k.Namespace)*3 ^ maphash.String(seed, k.ServiceAccount)*5
}
