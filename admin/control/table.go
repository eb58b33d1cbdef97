package control

import (
	"cmp"
	"slices"
	"strconv"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// resource is one named thing as nodes get it. Immutable. Of what a node reports that it has, only name and version
// are known.
type resource struct {
	name, version string
	payload       []byte // the encoded message

	// What it is made from: exactly one.
	workload *state.Workload
	service  *state.Service
	policy   *rbac.Policy
}

// newResource encodes m. The version is istiod's: unpadded lower-case hex of the payload's xxhash.
func newResource(name string, m proto.Message) (*resource, error) {
	payload, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err // text that is not UTF-8
	}
	return &resource{name: name, version: strconv.FormatUint(xxhash.Sum64(payload), 16), payload: payload}, nil
}

// wireOverhead is what lengths, tags, type URL and version of a resource take in a message, rounded up. Bytes.
const wireOverhead = 96

// size is an upper estimate of what the resource takes in a message, in bytes.
func (r *resource) size() int {
	n := len(r.payload) + len(r.name) + wireOverhead
	switch {
	case r.workload != nil:
		n += len(r.workload.Addresses) * (len(r.workload.Network) + 44)
	case r.service != nil:
		for _, a := range r.service.VIPs {
			n += len(a.Network) + 44
		}
	}
	return n
}

// aliases are the further names of a resource: "network/ip" of every address.
func (r *resource) aliases() []string {
	var out []string
	if r.workload != nil && r.workload.NetworkMode != state.HostNetwork {
		for _, a := range r.workload.Addresses {
			out = append(out, state.NetworkAddress{Network: r.workload.Network, Addr: a}.String())
		}
	}
	if r.service != nil {
		for _, a := range r.service.VIPs {
			out = append(out, a.String())
		}
	}
	return out
}

// shardCount is how many parts a table has: with 100,000 resources a part has some 200, the grain of sharing.
const shardCount = 512

// shard is one part of a table, sorted by name. Immutable.
type shard []*resource

// table is a set of resources by name. Immutable; tables that follow each other share the shards in which they agree,
// so that pointer equality says "nothing changed here". A nil shard is empty.
type table struct {
	shards [shardCount]*shard
	count  int
}

func shardOf(name string) int { return int(xxhash.Sum64String(name) % shardCount) }

// makeTable makes a table of resources with distinct names, sharing with prev (which may be nil) what is equal.
func makeTable(list []*resource, prev *table) *table {
	if prev == nil {
		prev = &table{}
	}
	var parts [shardCount]shard
	for _, r := range list {
		i := shardOf(r.name)
		parts[i] = append(parts[i], r)
	}
	t := &table{count: len(list)}
	for i, part := range parts {
		slices.SortFunc(part, func(a, b *resource) int { return cmp.Compare(a.name, b.name) })
		switch old := prev.shards[i]; {
		case sameShard(old, part):
			t.shards[i] = old
		case len(part) > 0:
			t.shards[i] = &part
		}
	}
	return t
}

func sameShard(old *shard, part shard) bool {
	if old == nil {
		return len(part) == 0
	}
	return slices.EqualFunc(*old, part, func(a, b *resource) bool { return a.name == b.name && a.version == b.version })
}

func (t *table) get(name string) *resource { return t.shards[shardOf(name)].get(name) }

// plus returns t with further or newer resources.
func (t *table) plus(list []*resource) *table {
	next := *t
	for _, r := range list {
		i := shardOf(r.name)
		s := next.shards[i].with(r)
		if s != next.shards[i] {
			next.count += len(*s) - next.shards[i].len()
			next.shards[i] = s
		}
	}
	return &next
}

func (s *shard) len() int {
	if s == nil {
		return 0
	}
	return len(*s)
}

func (s *shard) find(name string) (int, bool) {
	if s == nil {
		return 0, false
	}
	return slices.BinarySearchFunc(*s, name, func(r *resource, name string) int { return cmp.Compare(r.name, name) })
}

func (s *shard) get(name string) *resource {
	if at, ok := s.find(name); ok {
		return (*s)[at]
	}
	return nil
}

// with returns s with the resources added or replaced; s itself if it has them all.
func (s *shard) with(list ...*resource) *shard {
	var next shard
	for _, r := range list {
		cur := s
		if next != nil {
			cur = &next
		}
		at, ok := cur.find(r.name)
		if ok && (*cur)[at] == r {
			continue
		}
		if next == nil {
			if s != nil {
				next = slices.Clone(*s)
			} else {
				next = shard{}
			}
		}
		if ok {
			next[at] = r
		} else {
			next = slices.Insert(next, at, r)
		}
	}
	if next == nil {
		return s
	}
	return &next
}

// diff says what leads from s to want: resources that are new or differ in version, and names that are gone.
func (s *shard) diff(want *shard) (changed []*resource, gone []string) {
	var have, next shard
	if s != nil {
		have = *s
	}
	if want != nil {
		next = *want
	}
	for len(have) > 0 || len(next) > 0 {
		switch {
		case len(next) == 0 || len(have) > 0 && have[0].name < next[0].name:
			gone = append(gone, have[0].name)
			have = have[1:]
		case len(have) == 0 || next[0].name < have[0].name:
			changed = append(changed, next[0])
			next = next[1:]
		default:
			if have[0].version != next[0].version {
				changed = append(changed, next[0])
			}
			have, next = have[1:], next[1:]
		}
	}
	return changed, gone
}
