package route

import (
	"net/netip"

	"ztun/proxy/state"
)

// InboundQuestion is a CONNECT that arrived on 15008.
type InboundQuestion struct {
	Local     *state.Workload // the workload that the tunnel reached; required
	LocalAddr netip.Addr      // its address at which the tunnel arrived
	// AnyOwn: the tunnel arrived elsewhere (Local.MeshAddresses), on behalf of all of Local's addresses. The authority
	// says which one is meant; LocalAddr is, where it names none.
	AnyOwn    bool
	Network   string // this node's network (NETWORK)
	Authority string // the request's :authority
	// ForwardedHost is host= of the forwarded header, "" if absent: it helps to
	// tell which service was called.
	ForwardedHost string
	Illegal       []uint16 // see IllegalPorts
	Missed        *string  // as Question.Missed
}

// InboundDecision is where a CONNECT goes.
type InboundDecision struct {
	// App is the next hop: always at LocalAddr, at the application's port or its
	// tunnel port. This is what policy is evaluated on.
	App       netip.AddrPort
	Authority Authority // as parsed
	// Service is the best guess at the service that was called; nil if none.
	Service *state.Service
	// Tunnel is the local workload's application tunnel. With TunnelProxy, a PROXY
	// protocol header with destination ProxyDst is sent first, and App may be
	// dialled on loopback instead.
	Tunnel   state.TunnelProtocol
	ProxyDst netip.AddrPort
}

// Inbound validates a CONNECT's authority and finds its next hop. Errors are
// *Error whose Status answers the peer: 400 for BadAuthority and IPMismatch, 503
// for NoHostname, NoPort, SelfCall and NoIPForService.
func Inbound(v *state.View, q InboundQuestion) (InboundDecision, error) {
	auth, err := ParseAuthority(q.Authority)
	if err != nil {
		return InboundDecision{}, err
	}
	local := q.LocalAddr.Unmap()
	if q.AnyOwn && q.Local.HasAddress(auth.Addr) {
		local = auth.Addr
	}
	if err := validate(v, q, local, auth); err != nil {
		return InboundDecision{}, err
	}

	port := auth.Port
	var named *state.Service
	if !auth.Addr.IsValid() {
		named = v.ServiceByHost(auth.Host, q.Local.Namespace)
		if named == nil {
			if q.Missed != nil {
				miss(q.Missed, state.ServiceKey{Namespace: q.Local.Namespace, Hostname: auth.Host})
			}
			return InboundDecision{}, &Error{Code: NoHostname, Subject: auth.Host}
		}
		if port = portAt(named, q.Local, auth.Port); port == 0 {
			return InboundDecision{}, &Error{Code: NoPort, Subject: auth.String()}
		}
	}
	if contains(q.Illegal, port) {
		return InboundDecision{}, &Error{Code: SelfCall, Subject: netip.AddrPortFrom(local, port).String()}
	}

	d := InboundDecision{Authority: auth, Tunnel: q.Local.Tunnel.Protocol}
	if d.Tunnel != state.TunnelAbsent && q.Local.Tunnel.Port != 0 {
		port = q.Local.Tunnel.Port
	}
	d.App = netip.AddrPortFrom(local, port)
	if d.Tunnel == state.TunnelProxy {
		d.ProxyDst = auth.AddrPort()
		if named != nil {
			vip, ok := bestVIP(named, q.Network)
			if !ok {
				return InboundDecision{}, &Error{Code: NoIPForService, Subject: auth.Host}
			}
			d.ProxyDst = netip.AddrPortFrom(vip, auth.Port)
		}
	}
	d.Service = guess(v, named, q.Local, q.ForwardedHost, port)
	return d, nil
}

// validate says whether an authority is ours to serve.
func validate(v *state.View, q InboundQuestion, local netip.Addr, auth Authority) error {
	if !auth.Addr.IsValid() || auth.Addr == local || q.Local.Tunnel.Protocol != state.TunnelAbsent {
		return nil
	}
	w, s := v.FindAddress(q.Network, auth.Addr, "")
	switch {
	case w != nil:
		if leadsTo(v, w.Waypoint, q, local) {
			return nil
		}
	case s != nil:
		if leadsTo(v, s.Waypoint, q, local) {
			return nil
		}
		for i := range s.WeightedWaypoints {
			if leadsTo(v, &s.WeightedWaypoints[i].Destination, q, local) {
				return nil
			}
		}
	case q.Missed != nil:
		miss(q.Missed, state.NetworkAddress{Network: q.Network, Addr: auth.Addr})
	}
	return &Error{Code: IPMismatch, Subject: local.String(), Other: auth.Addr.String()}
}

// leadsTo reports whether a waypoint reference means the local workload: a
// service that it backs, or a workload with its address.
func leadsTo(v *state.View, ref *state.GatewayAddress, q InboundQuestion, local netip.Addr) bool {
	if ref == nil {
		return false
	}
	var w *state.Workload
	var s *state.Service
	if ref.Host.Hostname != "" {
		w, s = v.FindNSHost(ref.Host.Namespace, ref.Host.Hostname)
	} else {
		w, s = v.FindAddress(ref.Addr.Network, ref.Addr.Addr.Unmap(), "")
	}
	if s != nil {
		return s.Endpoint(q.Local.UID) != nil
	}
	if w == nil && q.Missed != nil {
		miss(q.Missed, ref)
	}
	return w != nil && w.HasAddress(local)
}

// portAt returns the port at which a workload serves a service's port; 0 if
// that cannot be told.
func portAt(s *state.Service, w *state.Workload, port uint16) uint16 {
	if e := s.Endpoint(w.UID); e != nil {
		if p, ok := e.Ports.Lookup(port); ok {
			return p
		}
	}
	p, _ := s.Ports.Lookup(port)
	return p
}

// bestVIP returns the address of a service to name in a PROXY header: one of our
// network rather than another's, IPv4 rather than IPv6.
func bestVIP(s *state.Service, network string) (best netip.Addr, ok bool) {
	bestRank := -1
	for _, a := range s.VIPs {
		rank := 0
		if a.Network == network {
			rank += 2
		}
		if a.Addr.Is4() {
			rank++
		}
		if rank > bestRank {
			best, bestRank = a.Addr, rank
		}
	}
	return best, bestRank >= 0
}

// guess tells which service a connection to port (the next hop's) of a workload
// was meant for: the one that the client names, if it is a candidate, else the
// first candidate that sends some port of its own there. Candidates are named,
// if the authority named a service, else the workload's services.
func guess(v *state.View, named *state.Service, w *state.Workload, host string, port uint16) *state.Service {
	if named != nil {
		if named.Hostname == host || reaches(named, w, port) {
			return named
		}
		return nil
	}
	if host != "" {
		for s := range v.ServicesOf(w) {
			if s.Hostname == host {
				return s
			}
		}
	}
	for s := range v.ServicesOf(w) {
		if reaches(s, w, port) {
			return s
		}
	}
	return nil
}

// reaches reports whether some port of the service ends at the workload's port.
func reaches(s *state.Service, w *state.Workload, port uint16) bool {
	for _, p := range s.Ports {
		if p.Target == port {
			return true
		}
	}
	if e := s.Endpoint(w.UID); e != nil {
		for _, p := range e.Ports {
			if p.Target == port {
				return true
			}
		}
	}
	return false
}

// PassthroughQuestion is a plaintext connection that arrived from the network.
type PassthroughQuestion struct {
	Local   *state.Workload // the workload that was reached; required
	Dst     netip.AddrPort  // the destination as captured
	Illegal []uint16        // see IllegalPorts
}

// PassthroughDecision is where a plaintext connection goes.
type PassthroughDecision struct {
	App     netip.AddrPort // the destination as captured
	Service *state.Service // the best guess at the service that was called; nil if none
}

// Passthrough judges a plaintext connection from the network. The only error is
// SelfCall.
func Passthrough(v *state.View, q PassthroughQuestion) (PassthroughDecision, error) {
	dst := unmap(q.Dst)
	if contains(q.Illegal, dst.Port()) {
		return PassthroughDecision{}, &Error{Code: SelfCall, Subject: dst.String()}
	}
	return PassthroughDecision{App: dst, Service: guess(v, nil, q.Local, "", dst.Port())}, nil
}
