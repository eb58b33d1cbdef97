package route

import (
	"net/netip"

	"ztun/proxy/state"
)

// mode says by which rules a service's port is resolved.
type mode uint8

const (
	standard mode = iota // the service has to list the port
	waypoint             // an endpoint with an application tunnel does without
)

// serviceWaypoint returns the waypoint reference of a service: one of the
// weighted ones, drawn by weight, else the primary one, else nil.
func (r *resolver) serviceWaypoint(s *state.Service) *state.GatewayAddress {
	var total uint64
	for i := range s.WeightedWaypoints {
		total += uint64(s.WeightedWaypoints[i].Weight)
	}
	if total == 0 {
		return s.Waypoint
	}
	x := r.q.Rand(total)
	for i := range s.WeightedWaypoints {
		w := uint64(s.WeightedWaypoints[i].Weight)
		if x < w {
			return &s.WeightedWaypoints[i].Destination
		}
		x -= w
	}
	return s.Waypoint // not reached as long as Rand keeps its word
}

// gateway resolves a reference to a waypoint (mode waypoint) or network gateway
// (mode standard). By address, the reference's own family decides; by hostname,
// the family that the client called.
func (r *resolver) gateway(ref *state.GatewayAddress, m mode) (upstream, error) {
	var up upstream
	var found bool
	var err error
	if ref.Host.Hostname != "" {
		target := netip.AddrPortFrom(r.q.Dst.Addr(), ref.Port)
		w, s := r.v.FindNSHost(ref.Host.Namespace, ref.Host.Hostname)
		switch {
		case s != nil:
			up, found, err = r.balance(s, target, m)
		case w != nil:
			up, err = r.workload(w, nil, target, ref.Port)
			found = true
		case r.q.Missed != nil:
			miss(r.q.Missed, ref.Host)
		}
	} else {
		up, found, err = r.upstream(ref.Addr.Network, netip.AddrPortFrom(ref.Addr.Addr.Unmap(), ref.Port), m)
	}
	if err != nil {
		return upstream{}, err
	}
	if !found {
		code := UnknownNetworkGateway
		if m == waypoint {
			code = UnknownWaypoint
		}
		return upstream{}, &Error{Code: code, Subject: ref.String()}
	}
	return up, nil
}

// upstream finds what an address stands for: a service first, then a workload.
func (r *resolver) upstream(network string, target netip.AddrPort, m mode) (up upstream, found bool, err error) {
	if s := r.v.ServiceByVIP(network, target.Addr(), r.q.Source.Namespace); s != nil {
		if s.Mode() == state.LBPassthrough {
			if r.q.Trace != nil {
				r.q.Trace.add(Step{Kind: StepPassthrough, Target: target, Service: s})
			}
			return upstream{}, false, nil // the original destination
		}
		return r.balance(s, target, m)
	}
	if w := r.v.WorkloadByAddr(network, target.Addr()); w != nil {
		up, err = r.workload(w, nil, target, target.Port())
		return up, err == nil, err
	}
	if r.q.Trace != nil {
		r.q.Trace.add(Step{Kind: StepUnknown, Target: target})
	}
	if r.q.Missed != nil {
		miss(r.q.Missed, state.NetworkAddress{Network: network, Addr: target.Addr()})
	}
	return upstream{}, false, nil
}

// fromWaypoint reports whether the caller is the waypoint that ref refers to,
// by identity and address.
func (r *resolver) fromWaypoint(ref *state.GatewayAddress) bool {
	var w *state.Workload
	var s *state.Service
	if ref.Host.Hostname != "" {
		w, s = r.v.FindNSHost(ref.Host.Namespace, ref.Host.Hostname)
	} else {
		w, s = r.v.FindAddress(ref.Addr.Network, ref.Addr.Addr.Unmap(), "")
	}
	if w != nil {
		return r.isCaller(w)
	}
	if s != nil {
		for i := range s.Endpoints {
			if w := r.v.EndpointWorkload(&s.Endpoints[i]); w != nil && r.isCaller(w) {
				return true
			}
		}
	}
	return false
}

func (r *resolver) isCaller(w *state.Workload) bool {
	return w.Identity() == r.q.Source.Identity() && w.HasAddress(r.q.SrcIP)
}
