package state

import (
	"hash/maphash"
	"iter"
	"maps"
)

// shards is how many maps a table consists of. At 100,000 entries a shard holds
// about 400, which take some 10 us to copy; an update touches a handful.
const shards = 256

// table is a map that never changes: the value handed out with a View. The zero
// table is empty.
type table[K comparable, V any] struct {
	shard *[shards]map[K]V
	h     hasher[K]
	n     int
}

// hasher picks the shard of a key. It need not agree with the maps' own hash.
type hasher[K comparable] struct {
	seed maphash.Seed
	sum  func(maphash.Seed, K) uint64
}

func (t *table[K, V]) get(k K) (v V, ok bool) {
	if t.shard == nil {
		return v, false
	}
	v, ok = t.shard[t.h.sum(t.h.seed, k)%shards][k]
	return v, ok
}

func (t *table[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if t.shard == nil {
			return
		}
		for _, m := range t.shard {
			for k, v := range m {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// editor is a table under construction. Maps that it has not made itself since
// the last freeze belong to Views and are copied before the first write.
type editor[K comparable, V any] struct {
	t   table[K, V]
	own [shards]bool
	any bool // t.shard itself is ours
}

func newEditor[K comparable, V any](sum func(maphash.Seed, K) uint64) editor[K, V] {
	return editor[K, V]{t: table[K, V]{h: hasher[K]{maphash.MakeSeed(), sum}}}
}

func (e *editor[K, V]) get(k K) (V, bool) { return e.t.get(k) }

// writable returns the shard of k, made ours.
func (e *editor[K, V]) writable(k K) map[K]V {
	if !e.any {
		fresh := new([shards]map[K]V)
		if e.t.shard != nil {
			*fresh = *e.t.shard
		}
		e.t.shard, e.any = fresh, true
	}
	i := e.t.h.sum(e.t.h.seed, k) % shards
	if !e.own[i] {
		if e.t.shard[i] == nil {
			e.t.shard[i] = make(map[K]V)
		} else {
			e.t.shard[i] = maps.Clone(e.t.shard[i])
		}
		e.own[i] = true
	}
	return e.t.shard[i]
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
		e.own, e.any = [shards]bool{}, false
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

func sumInfo(seed maphash.Seed, k WorkloadInfo) uint64 {
	return maphash.String(seed, k.Name) ^ maphash.String(seed, k.Namespace)*3 ^ maphash.String(seed, k.ServiceAccount)*5
}
