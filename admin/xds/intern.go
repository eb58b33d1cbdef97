package xds

import (
	"ztun/proxy/state"
)

// cacheMax is how many values each half of a cache holds. The strings of a mesh
// that repeat (namespaces, nodes, hostnames, workload names) fit well.
const cacheMax = 1 << 16

// cache remembers values for sharing. It is bounded: when the young half is
// full it becomes the old one, and what nobody asked for since is forgotten.
// Forgetting costs memory only: the next value with that key is a copy.
type cache[K comparable, V any] struct{ young, old map[K]V }

func (c *cache[K, V]) get(k K) (v V, ok bool) {
	if v, ok = c.young[k]; ok {
		return v, true
	}
	if v, ok = c.old[k]; ok {
		c.put(k, v)
	}
	return v, ok
}

func (c *cache[K, V]) put(k K, v V) {
	if c.young == nil || len(c.young) >= cacheMax {
		c.old, c.young = c.young, make(map[K]V)
	}
	c.young[k] = v
}

// maxInterned bounds the length of strings worth sharing, in bytes.
const maxInterned = 512

// str returns s, or the copy of it that others have already.
func (d *decoder) str(s string) string {
	if s == "" || len(s) > maxInterned {
		return s
	}
	if v, ok := d.strings.get(s); ok {
		return v
	}
	d.strings.put(s, s)
	return s
}

// shared returns the copy of a gateway reference that others have already: all
// workloads of a namespace refer to the same waypoint.
func (d *decoder) shared(g state.GatewayAddress) *state.GatewayAddress {
	if p, ok := d.gateways.get(g); ok {
		return p
	}
	p := &g
	d.gateways.put(g, p)
	return p
}
