package route_test

import (
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strings"

	"ztun/proxy/state"
)

// The reference says dataplane.md 2.2-2.6 and controlplane.md 4 again, slowly
// and obviously: it scans lists where the View has indexes, and computes every
// outcome with its probability where Decide draws one.

// mesh is a world as lists.
type mesh struct {
	workloads []*state.Workload
	services  []*state.Service // Endpoints are ignored
}

func (m *mesh) view() *state.View {
	b := state.NewBuilder("")
	for _, s := range m.services {
		b.InsertService(s)
	}
	for _, w := range m.workloads {
		b.InsertWorkload(w)
	}
	return b.Build()
}

func (m *mesh) workloadAt(network string, ip netip.Addr) (best *state.Workload) {
	score := func(w *state.Workload) int {
		return 2*strings.Count(w.UID, "//Pod/") + int(w.Protocol)
	}
	for _, w := range m.workloads {
		if w.Network == network && slices.Contains(w.Addresses, ip) && w.NetworkMode == state.StandardNetwork {
			if best == nil || score(w) >= score(best) {
				best = w
			}
		}
	}
	return best
}

func (m *mesh) serviceAt(network string, ip netip.Addr, ns string) *state.Service {
	var exact []*state.Service
	var best *state.Service
	var bestRank []int
	for _, s := range m.services {
		if ns != "" && s.Visibility == state.NamespaceOnly && s.Namespace != ns {
			continue
		}
		if slices.Contains(s.VIPs, state.NetworkAddress{Network: network, Addr: ip}) {
			exact = append(exact, s)
		}
		for _, c := range s.CIDRVIPs {
			if c.Network != network || !c.Prefix.Contains(ip) {
				continue
			}
			rank := []int{0, c.Prefix.Bits(), 0}
			if s.Namespace == ns {
				rank[0] = 1
			}
			if s.Canonical {
				rank[2] = 1
			}
			if best == nil || slices.Compare(rank, bestRank) > 0 {
				best, bestRank = s, rank
			}
		}
	}
	if len(exact) == 0 {
		return best
	}
	var own []*state.Service
	for _, s := range exact {
		if s.Namespace == ns {
			own = append(own, s)
		}
	}
	if len(own) > 0 {
		for _, s := range slices.Backward(own) {
			if s.Canonical {
				return s
			}
		}
		return own[len(own)-1]
	}
	for _, s := range slices.Backward(exact) {
		if s.Canonical {
			return s
		}
	}
	return exact[0]
}

func (m *mesh) named(k state.ServiceKey) (*state.Workload, *state.Service) {
	for _, s := range m.services {
		if s.Key() == k {
			return nil, s
		}
	}
	var found *state.Workload
	for _, w := range m.workloads {
		if w.Namespace == k.Namespace && w.Hostname == k.Hostname && (found == nil || better(w, found)) {
			found = w
		}
	}
	return found, nil
}

// better: several workloads with one hostname; not specified, so as addresses.
func better(a, b *state.Workload) bool {
	score := func(w *state.Workload) int { return 2*strings.Count(w.UID, "//Pod/") + int(w.Protocol) }
	return score(a) >= score(b)
}

// candidate is a workload that may be chosen, with the probability that it is.
type candidate struct {
	p        *big.Rat
	workload *state.Workload
	service  *state.Service
	port     uint16
	ip       netip.Addr
	target   netip.Addr
	err      string
}

func one() *big.Rat { return big.NewRat(1, 1) }

func (m *mesh) fromService(src *state.Workload, s *state.Service, target netip.AddrPort,
	waypointMode bool) []candidate {
	var svcTarget uint16
	listed := false
	for _, p := range s.Ports {
		if p.Service == target.Port() {
			svcTarget, listed = p.Target, true
		}
	}
	if !waypointMode && !listed {
		return nil
	}
	type ranked struct {
		w          *state.Workload
		ports      state.PortMap
		rank, full int
	}
	var all []ranked
	for _, w := range m.workloads {
		i := slices.IndexFunc(w.Services, func(ws state.WorkloadService) bool { return ws.Service == s.Key() })
		if i < 0 {
			continue
		}
		if w.Status == state.Unhealthy && (s.LoadBalancer == nil || s.LoadBalancer.HealthPolicy == state.OnlyHealthy) {
			continue
		}
		reachable := len(w.Addresses) > 0 || w.Hostname != "" || w.Network != src.Network && w.NetworkGateway != nil
		_, mapped := w.Services[i].Ports.Lookup(target.Port())
		if !reachable || !waypointMode && svcTarget == 0 && !mapped ||
			waypointMode && !listed && w.Tunnel.Protocol == state.TunnelAbsent {
			continue
		}
		r := ranked{w: w, ports: w.Services[i].Ports}
		if lb := s.LoadBalancer; lb != nil && lb.Mode != state.LBStandard {
			netFirst := len(lb.Preferences) > 0 && lb.Preferences[0] == state.ScopeNetwork
			for i, scope := range lb.Preferences {
				a, b := scopeValue(scope, src), scopeValue(scope, w)
				if a == b {
					r.full++
				} else if !(i == 0 && netFirst) {
					break
				}
			}
			r.rank = r.full
			if netFirst && src.Network == w.Network {
				r.rank += len(lb.Preferences) - 1
			}
			if lb.Mode == state.LBStrict && r.full != len(lb.Preferences) {
				continue
			}
		}
		all = append(all, r)
	}
	top := -1
	for _, r := range all {
		top = max(top, r.rank)
	}
	total := int64(0)
	for _, r := range all {
		if r.rank == top {
			total += int64(r.w.Capacity)
		}
	}
	var out []candidate
	for _, r := range all {
		if r.rank != top || r.w.Capacity == 0 {
			continue
		}
		p := big.NewRat(int64(r.w.Capacity), total)
		port, mapped := r.ports.Lookup(target.Port())
		switch {
		case mapped:
		case svcTarget > 0:
			port = svcTarget
		case r.w.Tunnel.Port > 0:
			port = target.Port()
		default:
			out = append(out, candidate{p: p}) // no upstream after all
			continue
		}
		out = append(out, m.address(p, r.w, s, target, port))
	}
	return out
}

func scopeValue(s state.Scope, w *state.Workload) string {
	return map[state.Scope]string{
		state.ScopeRegion: w.Locality.Region, state.ScopeZone: w.Locality.Zone, state.ScopeSubzone: w.Locality.Subzone,
		state.ScopeNode: w.Node, state.ScopeCluster: w.ClusterID, state.ScopeNetwork: w.Network,
	}[s]
}

func (m *mesh) address(p *big.Rat, w *state.Workload, s *state.Service, target netip.AddrPort, port uint16) candidate {
	c := candidate{p: p, workload: w, service: s, port: port, target: target.Addr()}
	if slices.Contains(w.Addresses, target.Addr()) {
		c.ip = target.Addr()
		return c
	}
	var usable []netip.Addr
	for _, a := range w.Addresses {
		if s == nil || s.IPFamilies == state.FamiliesAutomatic || s.IPFamilies == state.FamiliesDual ||
			a.Is4() == (s.IPFamilies == state.FamiliesIPv4) {
			usable = append(usable, a)
		}
	}
	for _, a := range usable {
		if a.Is4() == target.Addr().Is4() {
			c.ip = a
			return c
		}
	}
	if len(usable) > 0 {
		c.ip = usable[0]
	} else if w.Hostname == "" && w.NetworkGateway == nil {
		c.err = "no valid routing destination for workload: " + w.UID
	}
	return c
}

func (m *mesh) fromAddress(src *state.Workload, network string, target netip.AddrPort, waypointMode bool) []candidate {
	if s := m.serviceAt(network, target.Addr(), src.Namespace); s != nil {
		if s.Mode() == state.LBPassthrough {
			return nil
		}
		return m.fromService(src, s, target, waypointMode)
	}
	if w := m.workloadAt(network, target.Addr()); w != nil {
		return []candidate{m.address(one(), w, nil, target, target.Port())}
	}
	return nil
}

func (m *mesh) gateway(src *state.Workload, ref *state.GatewayAddress, dst netip.AddrPort,
	waypointMode bool) []candidate {
	var out []candidate
	if ref.Host.Hostname != "" {
		w, s := m.named(ref.Host)
		target := netip.AddrPortFrom(dst.Addr(), ref.Port)
		if s != nil {
			out = m.fromService(src, s, target, waypointMode)
		} else if w != nil {
			out = []candidate{m.address(one(), w, nil, target, ref.Port)}
		}
	} else {
		out = m.fromAddress(src, ref.Addr.Network, netip.AddrPortFrom(ref.Addr.Addr, ref.Port), waypointMode)
	}
	missing := "unknown network gateway: " + ref.String()
	if waypointMode {
		missing = "unknown waypoint: " + ref.String()
	}
	if len(out) == 0 {
		return []candidate{{p: one(), err: missing}}
	}
	for i := range out {
		if out[i].workload == nil && out[i].err == "" {
			out[i].err = missing
		}
	}
	return out
}

// outcomes maps every possible decision, as text, to its probability.
type outcomes map[string]*big.Rat

func (m *mesh) decide(network string, src *state.Workload, srcIP netip.Addr, dst netip.AddrPort) outcomes {
	out := outcomes{}
	var called *state.Service
	if m.workloadAt(network, dst.Addr()) == nil {
		called = m.serviceAt(network, dst.Addr(), src.Namespace)
	}
	if called != nil {
		type choice struct {
			p   *big.Rat
			ref *state.GatewayAddress
		}
		var choices []choice
		total := int64(0)
		for _, w := range called.WeightedWaypoints {
			total += int64(w.Weight)
		}
		for i, w := range called.WeightedWaypoints {
			if w.Weight > 0 {
				choices = append(choices, choice{big.NewRat(int64(w.Weight), total), &called.WeightedWaypoints[i].Destination})
			}
		}
		if len(choices) == 0 && called.Waypoint != nil {
			choices = []choice{{one(), called.Waypoint}}
		}
		for _, c := range choices {
			for _, wp := range m.gateway(src, c.ref, dst, true) {
				p := new(big.Rat).Mul(c.p, wp.p)
				switch {
				case wp.err != "":
					add(out, wp.err, p)
				case wp.workload.Network != src.Network:
					m.remote(out, p, src, wp, called, dst)
				default:
					out.to(p, "HBONE", wp, wp.port, dst.String(), called, nil)
				}
			}
		}
		if len(choices) > 0 {
			return out
		}
	}
	ups := m.fromAddress(src, src.Network, dst, false)
	if len(ups) == 0 {
		ups = []candidate{{p: one()}}
	}
	for _, up := range ups {
		switch {
		case up.err != "":
			add(out, up.err, up.p)
		case up.workload == nil:
			s := called
			if s == nil {
				s = m.serviceAt(src.Network, dst.Addr(), src.Namespace)
			}
			if s != nil && s.Mode() != state.LBPassthrough {
				add(out, "no healthy upstream: "+dst.String(), up.p)
			} else {
				add(out, "passthrough "+dst.String(), up.p)
			}
		case up.workload.Network != src.Network && up.service == nil:
			add(out, "no service for target address: "+dst.String(), up.p)
		case up.workload.Network != src.Network:
			m.remote(out, up.p, src, up, up.service, dst)
		case called == nil && up.workload.Waypoint != nil && !m.isWaypoint(up.workload.Waypoint, src, srcIP):
			for _, wp := range m.gateway(src, up.workload.Waypoint, dst, true) {
				p := new(big.Rat).Mul(up.p, wp.p)
				if wp.err != "" {
					add(out, wp.err, p)
				} else {
					out.to(p, "HBONE", wp, wp.port, dst.String(), up.service, nil)
				}
			}
		case up.workload.Protocol == state.HBONE:
			out.to(up.p, "HBONE", up, 15008, "own", up.service, nil)
		default:
			out.to(up.p, "TCP", up, up.port, "", up.service, nil)
		}
	}
	return out
}

func (m *mesh) isWaypoint(ref *state.GatewayAddress, src *state.Workload, ip netip.Addr) bool {
	var w *state.Workload
	var s *state.Service
	if ref.Host.Hostname != "" {
		w, s = m.named(ref.Host)
	} else if w = m.workloadAt(ref.Addr.Network, ref.Addr.Addr); w == nil {
		s = m.serviceAt(ref.Addr.Network, ref.Addr.Addr, "")
	}
	var who []*state.Workload
	if w != nil {
		who = append(who, w)
	}
	if s != nil {
		for _, w := range m.workloads {
			_, ok := w.PortsFor(s.Key())
			sick := w.Status == state.Unhealthy && (s.LoadBalancer == nil || s.LoadBalancer.HealthPolicy != state.AllowAll)
			if ok && !sick {
				who = append(who, w)
			}
		}
	}
	return slices.ContainsFunc(who, func(w *state.Workload) bool {
		return w.Identity() == src.Identity() && slices.Contains(w.Addresses, ip)
	})
}

func (m *mesh) remote(out outcomes, p *big.Rat, src *state.Workload, up candidate, called *state.Service,
	dst netip.AddrPort) {
	if up.workload.NetworkGateway == nil {
		add(out, "no valid routing destination for workload: "+up.workload.UID, p)
		return
	}
	for _, gw := range m.gateway(src, up.workload.NetworkGateway, dst, false) {
		q := new(big.Rat).Mul(p, gw.p)
		if gw.err != "" {
			add(out, gw.err, q)
			continue
		}
		var inner []string
		if up.service != nil {
			inner = up.service.SubjectAltNames
		}
		out.to(q, "DOUBLEHBONE", gw, gw.port, fmt.Sprintf("%s:%d", called.Hostname, dst.Port()), called,
			append([]string{up.workload.UID}, inner...))
	}
}

// to adds an outcome; authority "own" is the address and port of the workload.
func (o outcomes) to(p *big.Rat, proto string, c candidate, port uint16, authority string, s *state.Service,
	inner []string) {
	if !c.ip.IsValid() && c.workload.Hostname == "" {
		add(o, "no valid routing destination for workload: "+c.workload.UID, p)
		return
	}
	at := netip.AddrPortFrom(c.ip, port).String()
	if !c.ip.IsValid() {
		at = fmt.Sprintf("%s:%d (IPv6 %v)", c.workload.Hostname, port, c.target.Is6())
	}
	if authority == "own" {
		authority = netip.AddrPortFrom(c.ip, c.port).String()
		if !c.ip.IsValid() {
			authority = fmt.Sprintf("resolved:%d", c.port)
		}
	}
	var sans []string
	if c.service != nil {
		sans = append(sans, c.service.SubjectAltNames...)
	}
	sans = append(sans, c.workload.Identity().String())
	name := "none"
	if s != nil {
		name = s.Key().String()
	}
	add(o, fmt.Sprintf("%s %s authority=%s to=%s service=%s sans=%q inner=%q", proto, at, authority, c.workload.UID, name,
		sans, inner), p)
}
