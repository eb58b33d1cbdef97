package route

import (
	"net/netip"

	"ztun/proxy/state"
)

// balance picks an endpoint of a service for target (an address of the service
// and a service port). found is false if there is none that may be used.
func (r *resolver) balance(s *state.Service, target netip.AddrPort, m mode) (up upstream, found bool, err error) {
	port := target.Port()
	targetPort, listed := s.Ports.Lookup(port)
	if m == standard && !listed {
		if r.q.Trace != nil {
			r.q.Trace.add(Step{Kind: StepNoPort, Target: target, Service: s})
		}
		return upstream{}, false, nil
	}
	b := balancer{r: r, s: s, m: m, port: port, targetPort: targetPort, listed: listed}
	e, w := b.pick()
	if r.q.Trace != nil {
		b.note(s, target, e)
	}
	if e == nil {
		return upstream{}, false, nil
	}
	p, mapped := e.Ports.Lookup(port)
	switch {
	case mapped:
	case targetPort > 0:
		p = targetPort
	case w.Tunnel.Port > 0:
		p = port
	default:
		return upstream{}, false, nil
	}
	up, err = r.workload(w, s, target, p)
	return up, err == nil, err
}

// balancer is one choice among the endpoints of a service.
type balancer struct {
	r          *resolver
	s          *state.Service
	m          mode
	port       uint16 // service port
	targetPort uint16 // of the service; 0: each endpoint maps it
	listed     bool   // the service has the port
}

// pick draws an endpoint by capacity among the candidates of the highest rank.
// It scans twice, first for the weight of that group, then for the one drawn.
func (b *balancer) pick() (*state.Endpoint, *state.Workload) {
	if b.s.Uniform() && b.targetPort > 0 && b.r.q.Avoid == nil {
		i := uint64(0)
		if n := uint64(len(b.s.Endpoints)); n > 1 {
			i = b.r.q.Rand(n)
		}
		e := &b.s.Endpoints[i]
		return e, e.Workload
	}
	best, total, last := -1, uint64(0), -1
	var ranks [64]int32 // of the first endpoints, lest they are ranked twice
	for i := range b.s.Endpoints {
		w, rank, _ := b.candidate(&b.s.Endpoints[i])
		if i < len(ranks) {
			ranks[i] = int32(rank)
		}
		if w == nil || rank < best {
			continue
		}
		if rank > best {
			best, total = rank, 0
		}
		if w.Capacity > 0 {
			total += uint64(w.Capacity)
			last = i
		}
	}
	if total == 0 {
		return nil, nil
	}
	x := uint64(0)
	if first := b.r.v.EndpointWorkload(&b.s.Endpoints[last]); uint64(first.Capacity) < total {
		x = b.r.q.Rand(total)
	} else {
		return &b.s.Endpoints[last], first // the only one
	}
	for i := range b.s.Endpoints {
		e := &b.s.Endpoints[i]
		rank := -1
		if i < len(ranks) {
			rank = int(ranks[i])
		} else {
			_, rank, _ = b.candidate(e)
		}
		if rank != best {
			continue
		}
		w := b.r.v.EndpointWorkload(e)
		if c := uint64(w.Capacity); x < c {
			return e, w
		} else {
			x -= c
		}
	}
	return nil, nil // not reached as long as Rand keeps its word
}

// candidate returns the workload of an endpoint that may be chosen, and its
// rank; nil, -1 and the reason if it may not.
func (b *balancer) candidate(e *state.Endpoint) (*state.Workload, int, Exclusion) {
	w := b.r.v.EndpointWorkload(e)
	if w == nil {
		return nil, -1, NoRecord
	}
	if b.r.q.Avoid != nil && b.r.q.Avoid(w) {
		return nil, -1, Avoided
	}
	if len(w.Addresses) == 0 && w.Hostname == "" && (w.Network == b.r.q.Source.Network || w.NetworkGateway == nil) {
		return nil, -1, NoAddress
	}
	switch {
	case b.m == standard && b.targetPort == 0:
		if _, mapped := e.Ports.Lookup(b.port); !mapped {
			return nil, -1, PortUnmapped
		}
	case b.m == waypoint && !b.listed:
		if w.Tunnel.Protocol == state.TunnelAbsent {
			return nil, -1, NoTunnel
		}
	}
	lb := b.s.LoadBalancer
	if lb == nil || lb.Mode == state.LBStandard {
		return w, 0, NotExcluded
	}
	matched, rank := localityRank(lb.Preferences, b.r.q.Source, w)
	if lb.Mode == state.LBStrict && matched != len(lb.Preferences) {
		return nil, -1, WrongPlace
	}
	return w, rank, NotExcluded
}

// localityRank counts how many preferences a workload satisfies, from the most
// important to the first mismatch. If the first preference is the network, its
// mismatch does not end the count, and its match counts as much as all others
// together, so that every endpoint of our network outranks every remote one
// and the remote ones are still ranked by locality.
func localityRank(prefs []state.Scope, src, w *state.Workload) (matched, rank int) {
	extra := 0
	for i, scope := range prefs {
		same := sameScope(scope, src, w)
		networkFirst := i == 0 && scope == state.ScopeNetwork
		switch {
		case same && networkFirst:
			extra = len(prefs) - 1
			matched++
		case same:
			matched++
		case !networkFirst:
			return matched, matched + extra
		}
	}
	return matched, matched + extra
}

func sameScope(s state.Scope, a, b *state.Workload) bool {
	switch s {
	case state.ScopeRegion:
		return a.Locality.Region == b.Locality.Region
	case state.ScopeZone:
		return a.Locality.Zone == b.Locality.Zone
	case state.ScopeSubzone:
		return a.Locality.Subzone == b.Locality.Subzone
	case state.ScopeNode:
		return a.Node == b.Node
	case state.ScopeCluster:
		return a.ClusterID == b.ClusterID
	case state.ScopeNetwork:
		return a.Network == b.Network
	}
	return false
}
