package route

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"ztun/proxy/identity"
	"ztun/proxy/ports"
	"ztun/proxy/state"
)

// Protocol is how a connection is carried to its next hop.
type Protocol uint8

// The protocols.
const (
	TCP Protocol = iota
	HBONE
	DoubleHBONE // a tunnel to a gateway of another network, and one within it
)

// String returns ztunnel's name.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case HBONE:
		return "HBONE"
	case DoubleHBONE:
		return "DOUBLEHBONE"
	}
	return "Unknown"
}

// Question is an outbound connection.
type Question struct {
	Network string          // this node's network (NETWORK)
	Source  *state.Workload // the calling workload; required
	SrcIP   netip.Addr      // the address it calls from
	Dst     netip.AddrPort  // what it called
	// Rand returns a number below n, n > 0; as rand.Uint64N. It is asked only
	// where there is something to choose.
	Rand func(n uint64) uint64
	// Avoid, if not nil, tells the endpoints that are not to be chosen where a service
	// has several: those that could not be reached.
	Avoid func(w *state.Workload) bool
	// Missed, if not nil, is set to the first key that was looked up in vain
	// ("network/ip" or "namespace/hostname"), for a caller that can ask a control
	// plane for it and then decide again. "" if all that was needed is known.
	Missed *string
	// Trace, if not nil, is told what the decision went by.
	Trace *Trace
}

// miss notes a key that is not known. Only callers that asked for it pay for it.
func miss(missed *string, key fmt.Stringer) {
	if missed != nil && *missed == "" {
		*missed = key.String()
	}
}

// Decision is where a connection goes.
type Decision struct {
	Protocol Protocol
	// Actual is the address to dial. If Hostname is set its address is not valid
	// yet, only its port: resolve Hostname and call Resolved.
	Actual   netip.AddrPort
	Hostname string

	// FinalSANs are those for the inner tunnel of DoubleHBONE. If there are none,
	// no peer can be accepted.
	FinalSANs []identity.ID

	Workload *state.Workload // the next hop; nil for passthrough
	Service  *state.Service  // the service that was called; nil if none
	// Upstream is, with DoubleHBONE, the workload of the other network that was
	// chosen; otherwise equal to Workload.
	Upstream *state.Workload
	// Waypoint: the next hop (with DoubleHBONE: Upstream) is a waypoint.
	Waypoint bool

	// via is the service through which the next hop was chosen; nil if by itself.
	via *state.Service
	// The authority is the address that was called, the next hop's, once known, or
	// the called service's hostname, with port.
	authority authorityKind
	port      uint16
	called    netip.Addr
	prefer6   bool // family to prefer among resolved addresses
}

// authorityKind is what a CONNECT names. It and the identities are not spelt out
// before somebody asks, so that a decision costs no memory.
type authorityKind uint8

const (
	noAuthority   authorityKind = iota
	calledAddress               // that of Decision.called
	ownAddress
	calledService
)

// Authority is that of the CONNECT (of both with DoubleHBONE); "" for TCP, and
// as long as it takes a Hostname to be resolved.
func (d *Decision) Authority() string {
	switch {
	case d.authority == calledAddress:
		return netip.AddrPortFrom(d.called, d.port).String()
	case d.authority == ownAddress && d.Hostname == "":
		return netip.AddrPortFrom(d.Actual.Addr(), d.port).String()
	case d.authority == calledService:
		return net.JoinHostPort(d.Service.Hostname, strconv.Itoa(int(d.port)))
	}
	return ""
}

// SANs are the identities of which the next hop has to present one, in ztunnel's
// order: the service's, then the workload's own. Nil for passthrough.
func (d *Decision) SANs() []identity.ID {
	if d.Workload == nil {
		return nil
	}
	if d.via == nil || len(d.via.SANs) == 0 {
		return []identity.ID{d.Workload.Identity()}
	}
	ids := make([]identity.ID, 0, len(d.via.SANs)+1)
	return append(append(ids, d.via.SANs...), d.Workload.Identity())
}

// Passthrough reports whether the destination is unknown to the mesh: plain
// TCP to where the application wanted to go.
func (d *Decision) Passthrough() bool { return d.Workload == nil }

// Alternatives reports whether the next hop was one of several endpoints.
func (d *Decision) Alternatives() bool { return d.via != nil && len(d.via.Endpoints) > 1 }

// CheckOutbound refuses connections to our own ports on loopback.
func CheckOutbound(dst netip.AddrPort, illegal []uint16) error {
	if dst.Addr().Unmap().IsLoopback() && contains(illegal, dst.Port()) {
		return &Error{Code: SelfCall, Subject: dst.String()}
	}
	return nil
}

// IllegalPorts returns the ports that a connection may not be sent to:
// those of the proxy itself, and SOCKS5's if it is on.
func IllegalPorts(socks bool) []uint16 {
	p := []uint16{ports.Outbound, ports.InboundPlaintext, ports.HBONE}
	if socks {
		p = append(p, ports.SOCKS)
	}
	return p
}

func contains(ports []uint16, port uint16) bool {
	for _, p := range ports {
		if p == port {
			return true
		}
	}
	return false
}

// Decide routes an outbound connection. Errors are *Error: NoHealthyUpstream,
// UnknownWaypoint, UnknownNetworkGateway, NoValidDestination or NoService, each
// of which means that the connection must fail: there is no way around a
// waypoint and no fallback to plaintext.
//
// Order, as ztunnel: the called service's waypoint; else one endpoint of the
// called service or the called workload; if that is in another network, its
// gateway; if it was called as workload, its waypoint; else itself. Whatever is
// not known passes through.
func Decide(v *state.View, q Question) (Decision, error) {
	r := resolver{v: v, q: q}
	r.q.Dst = unmap(q.Dst)
	r.q.SrcIP = q.SrcIP.Unmap()
	dst := r.q.Dst

	w, called := v.FindAddress(q.Network, dst.Addr(), q.Source.Namespace)
	if q.Trace != nil {
		q.Trace.add(Step{Kind: StepCalled, Target: dst, Workload: w, Service: called})
	}
	if w == nil && called == nil && q.Missed != nil {
		miss(q.Missed, state.NetworkAddress{Network: q.Network, Addr: dst.Addr()})
	}
	if called != nil {
		if ref := r.serviceWaypoint(called); ref != nil {
			if q.Trace != nil {
				q.Trace.add(Step{Kind: StepServiceWaypoint, Target: dst, Service: called, Gateway: ref})
			}
			wp, err := r.gateway(ref, waypoint)
			if err != nil {
				return Decision{}, err
			}
			if wp.workload.Network != q.Source.Network {
				return r.throughGateway(wp, called, true)
			}
			return r.toWaypoint(wp, called)
		}
	}

	up, found, err := r.upstream(q.Source.Network, dst, standard)
	if err != nil {
		return Decision{}, err
	}
	if !found {
		if called == nil {
			// A service that shares its address with a workload: FindAddress saw the
			// workload, upstream the service.
			called = v.ServiceByVIP(q.Source.Network, dst.Addr(), q.Source.Namespace)
		}
		if called != nil && called.Mode() != state.LBPassthrough {
			return Decision{}, &Error{Code: NoHealthyUpstream, Subject: dst.String()}
		}
		return Decision{Protocol: TCP, Actual: dst}, nil
	}
	if up.workload.Network != q.Source.Network {
		if up.service == nil {
			return Decision{}, &Error{Code: NoService, Subject: dst.String()}
		}
		return r.throughGateway(up, up.service, false)
	}
	if called == nil && up.workload.Waypoint != nil {
		from := r.fromWaypoint(up.workload.Waypoint)
		if q.Trace != nil {
			kind := StepWorkloadWaypoint
			if from {
				kind = StepFromWaypoint
			}
			q.Trace.add(Step{Kind: kind, Target: dst, Workload: up.workload, Gateway: up.workload.Waypoint})
		}
		if from {
			return r.direct(up)
		}
		wp, err := r.gateway(up.workload.Waypoint, waypoint)
		if err != nil {
			return Decision{}, err
		}
		return r.toWaypoint(wp, up.service)
	}
	return r.direct(up)
}

// upstream is a chosen workload.
type upstream struct {
	workload *state.Workload
	service  *state.Service // through which it was chosen; nil if by itself
	addr     netip.Addr     // not valid: hostname or gateway
	port     uint16
	prefer6  bool // family of what was asked for
}

// resolver carries a question through its sub-questions.
type resolver struct {
	v *state.View
	q Question
}

// direct sends a connection straight to the chosen workload.
func (r *resolver) direct(up upstream) (Decision, error) {
	d := Decision{Protocol: TCP, Workload: up.workload, Upstream: up.workload, Service: up.service}
	port := up.port
	if up.workload.Protocol == state.HBONE {
		d.Protocol, d.authority, d.port, port = HBONE, ownAddress, up.port, ports.HBONE
		if at, ok := meshAddress(up); ok {
			d.authority, d.called, up.addr, port = calledAddress, up.addr, at.Addr(), at.Port()
		}
	}
	return d.at(up, port)
}

// meshAddress is where a workload that says so takes its HBONE connections: of the family that was called if it has
// one. A workload without an address has no name in a CONNECT, and none there either.
func meshAddress(up upstream) (at netip.AddrPort, ok bool) {
	if !up.addr.IsValid() {
		return at, false
	}
	for _, a := range up.workload.MeshAddresses {
		if !ok || a.Addr().Is6() == up.prefer6 {
			at, ok = a, true
		}
	}
	return at, ok
}

// toWaypoint sends a connection to a waypoint of our network, which is told the
// original destination.
func (r *resolver) toWaypoint(wp upstream, called *state.Service) (Decision, error) {
	d := Decision{
		Protocol: HBONE, authority: calledAddress, called: r.q.Dst.Addr(), port: r.q.Dst.Port(),
		Workload: wp.workload, Upstream: wp.workload, Service: called, Waypoint: true,
	}
	return d.at(wp, wp.port)
}

// throughGateway sends a connection to a workload of another network through
// that workload's gateway. Only services can be called across networks: the
// authority of both tunnels is the service's name.
func (r *resolver) throughGateway(up upstream, called *state.Service, isWaypoint bool) (Decision, error) {
	ref := up.workload.NetworkGateway
	if ref == nil {
		return Decision{}, &Error{Code: NoValidDestination, Subject: up.workload.UID}
	}
	if r.q.Trace != nil {
		r.q.Trace.add(Step{Kind: StepNetworkGateway, Target: r.q.Dst, Workload: up.workload, Gateway: ref})
	}
	gw, err := r.gateway(ref, standard)
	if err != nil {
		return Decision{}, err
	}
	d := Decision{
		Protocol: DoubleHBONE, authority: calledService, port: r.q.Dst.Port(),
		Workload: gw.workload, Upstream: up.workload, Service: called, Waypoint: isWaypoint,
	}
	if up.service != nil {
		d.FinalSANs = up.service.SANs
	}
	return d.at(gw, gw.port)
}

// at completes a decision with the address of its next hop.
func (d Decision) at(next upstream, port uint16) (Decision, error) {
	d.Actual = netip.AddrPortFrom(next.addr, port)
	d.via, d.prefer6 = next.service, next.prefer6
	if !next.addr.IsValid() {
		if next.workload.Hostname == "" {
			return Decision{}, &Error{Code: NoValidDestination, Subject: next.workload.UID}
		}
		d.Hostname = next.workload.Hostname
	}
	return d, nil
}

// Resolved completes a decision that has a Hostname with the answer of DNS: a
// random address of the family that was called, else a random other. The error
// is EmptyResolvedAddresses if there is none; failed lookups are
// NoResolvedAddresses, which is the caller's to say (ResolveFailed).
func (d Decision) Resolved(addrs []netip.Addr, rand func(n uint64) uint64) (Decision, error) {
	if d.Hostname == "" {
		return d, nil
	}
	var same, other []netip.Addr
	for _, a := range addrs {
		switch a = a.Unmap(); {
		case !a.IsValid():
		case a.Is6() == d.prefer6:
			same = append(same, a)
		default:
			other = append(other, a)
		}
	}
	if len(same) == 0 {
		same = other
	}
	if len(same) == 0 {
		return Decision{}, &Error{Code: EmptyResolvedAddresses, Subject: d.Workload.UID}
	}
	d.Actual = netip.AddrPortFrom(same[rand(uint64(len(same)))], d.Actual.Port())
	d.Hostname = ""
	return d, nil
}

// ResolveFailed returns the error of a decision whose Hostname could not be
// looked up.
func (d *Decision) ResolveFailed() error {
	return &Error{Code: NoResolvedAddresses, Subject: d.Workload.UID}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
