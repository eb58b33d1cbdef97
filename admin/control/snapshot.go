package control

import (
	"net/netip"
	"strings"
	"sync"
	"time"

	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// The types that are served.
const (
	typeAddress       = "type.googleapis.com/istio.workload.Address"
	typeAuthorization = "type.googleapis.com/istio.security.Authorization"
)

// snapshot is what the directory said at one moment. Immutable, but for the indexes that are made when first needed.
type snapshot struct {
	version   uint64 // counts the snapshots of this process, from 1
	published time.Time

	addresses, policies *table
	workloads, services int
	nodes               map[string]*nodeIndex
	once                sync.Once
	byAddr              map[state.NetworkAddress][]*resource // exact; not of workloads on their host's network
	ranges              []addressRange
	backers             map[string][]*resource // service name -> workloads that list it
}

// nodeIndex is what runs on one node.
type nodeIndex struct {
	workloads  []*resource
	identities map[identity.ID]struct{}
}

// addressRange is a CIDR VIP.
type addressRange struct {
	network string
	prefix  netip.Prefix
	service *resource
}

// number is the version; 0 of none.
func (s *snapshot) number() uint64 {
	if s == nil {
		return 0
	}
	return s.version
}

// table returns the resources of a type; empty for a type that is not served.
func (s *snapshot) table(typeURL string) *table {
	switch typeURL {
	case typeAddress:
		return s.addresses
	case typeAuthorization:
		return s.policies
	}
	return &table{}
}

// runs reports whether a workload of that identity belongs to the node.
func (s *snapshot) runs(node string, id identity.ID) bool {
	n := s.nodes[node]
	if n == nil {
		return false
	}
	_, ok := n.identities[id]
	return ok
}

// resolve returns what a subscribed name means: the resource of that name, or, as "network/ip", the workloads and
// services that have this address.
func (s *snapshot) resolve(typeURL, name string) []*resource {
	if r := s.table(typeURL).get(name); r != nil {
		return []*resource{r}
	}
	if typeURL != typeAddress {
		return nil
	}
	at := strings.LastIndexByte(name, '/')
	if at < 0 {
		return nil
	}
	ip, err := netip.ParseAddr(name[at+1:])
	if err != nil || ip.Zone() != "" {
		return nil
	}
	network, ip := name[:at], ip.Unmap()
	s.index()
	out := s.byAddr[state.NetworkAddress{Network: network, Addr: ip}]
	for _, r := range s.ranges {
		if r.network == network && r.prefix.Contains(ip) {
			out = append(out[:len(out):len(out)], r.service)
		}
	}
	return out
}

// withBackers adds to resources the workloads of the services among them.
func (s *snapshot) withBackers(list []*resource) []*resource {
	for _, r := range list[:len(list):len(list)] {
		if r.service != nil {
			s.index()
			list = append(list[:len(list):len(list)], s.backers[r.name]...)
		}
	}
	return list
}

// wanted returns what a member that subscribed on demand has to have: its own workloads, and what the names mean.
func (s *snapshot) wanted(typeURL string, own []*resource, names map[string]struct{}, prev *table) *table {
	found := make(map[string]*resource)
	if typeURL == typeAddress {
		for _, r := range own {
			found[r.name] = r
		}
	}
	for name := range names {
		for _, r := range s.withBackers(s.resolve(typeURL, name)) {
			found[r.name] = r
		}
	}
	list := make([]*resource, 0, len(found))
	for _, r := range found {
		list = append(list, r)
	}
	return makeTable(list, prev)
}

// index makes the indexes that only subscriptions by name need.
func (s *snapshot) index() {
	s.once.Do(func() {
		s.byAddr = make(map[state.NetworkAddress][]*resource)
		s.backers = make(map[string][]*resource)
		for _, shard := range s.addresses.shards {
			if shard == nil {
				continue
			}
			for _, r := range *shard {
				s.indexOne(r)
			}
		}
	})
}

func (s *snapshot) indexOne(r *resource) {
	if w := r.workload; w != nil {
		if w.NetworkMode != state.HostNetwork {
			for _, a := range w.Addresses {
				k := state.NetworkAddress{Network: w.Network, Addr: a}
				s.byAddr[k] = append(s.byAddr[k], r)
			}
		}
		for _, e := range w.Services {
			k := e.Service.String()
			s.backers[k] = append(s.backers[k], r)
		}
		return
	}
	for _, a := range r.service.VIPs {
		s.byAddr[a] = append(s.byAddr[a], r)
	}
	for _, p := range r.service.CIDRVIPs {
		s.ranges = append(s.ranges, addressRange{p.Network, p.Prefix, r})
	}
}
