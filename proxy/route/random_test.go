package route_test

import (
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"ztun/proxy/identity"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// Generators over small domains, so that things refer to each other.

var (
	networks   = []string{"", "", "n2"}
	namespaces = []string{"a", "b"}
	hosts      = []string{"s1", "s2", "s3"}
	addrs      = []string{"10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1", "fd00::2"}
	ports      = []uint16{80, 80, 81}
)

func pick[T any](t *rapid.T, name string, l []T) T { return rapid.SampledFrom(l).Draw(t, name) }

// chance is true once in n times.
func chance(t *rapid.T, name string, n int) bool { return rapid.IntRange(0, n-1).Draw(t, name) == n-1 }

func genAddrs(t *rapid.T) (l []netip.Addr) {
	for range rapid.IntRange(0, 2).Draw(t, "addresses") {
		if a := netip.MustParseAddr(pick(t, "address", addrs)); !slices.Contains(l, a) {
			l = append(l, a)
		}
	}
	return l
}

func genKey(t *rapid.T) state.ServiceKey {
	return state.ServiceKey{Namespace: pick(t, "namespace", namespaces), Hostname: pick(t, "hostname", hosts)}
}

func genPorts(t *rapid.T, zero bool) state.PortMap {
	var l []state.PortPair
	for range rapid.IntRange(0, 3).Draw(t, "ports") {
		target := pick(t, "target", []uint16{8080, 8081, 15088})
		if zero && chance(t, "named", 3) {
			target = 0
		}
		l = append(l, state.PortPair{Service: pick(t, "port", ports), Target: target})
	}
	return state.SortPorts(l)
}

func genGateway(t *rapid.T) *state.GatewayAddress {
	g := &state.GatewayAddress{Port: pick(t, "gateway port", ports)}
	if rapid.Bool().Draw(t, "by host") {
		g.Host = genKey(t)
	} else {
		g.Addr = state.NetworkAddress{Network: pick(t, "network", networks),
			Addr: netip.MustParseAddr(pick(t, "address", addrs))}
	}
	return g
}

func genWorkload(t *rapid.T, i int) *state.Workload {
	w := &state.Workload{
		UID:       fmt.Sprintf("%s/w%d", pick(t, "uid", []string{"c//Pod", "c/entry"}), i),
		Namespace: pick(t, "namespace", namespaces), TrustDomain: "td", ServiceAccount: pick(t, "sa", []string{"x", "y"}),
		Network: pick(t, "network", networks), Node: pick(t, "node", []string{"", "k"}),
		ClusterID: pick(t, "cluster", []string{"", "c"}),
		Locality: state.Locality{Region: pick(t, "region", []string{"", "r"}), Zone: pick(t, "zone", []string{"", "z"}),
			Subzone: pick(t, "subzone", []string{"", "s"})},
		Addresses: genAddrs(t),
		Capacity:  pick(t, "capacity", []uint32{1, 1, 1, 0, 2}),
		Protocol:  pick(t, "protocol", []state.Protocol{state.HBONE, state.TCP}),
	}
	if chance(t, "host network", 8) {
		w.NetworkMode = state.HostNetwork
	}
	if chance(t, "unhealthy", 6) {
		w.Status = state.Unhealthy
	}
	if chance(t, "hostname", 5) {
		w.Hostname = pick(t, "hostname", hosts)
	}
	if chance(t, "waypoint", 4) {
		w.Waypoint = genGateway(t)
	}
	if w.Network != "" || chance(t, "gateway", 3) {
		w.NetworkGateway = genGateway(t)
	}
	if chance(t, "tunnel", 4) {
		w.Tunnel = state.ApplicationTunnel{Protocol: state.TunnelProxy, Port: pick(t, "tunnel port", []uint16{0, 15088})}
	}
	for range rapid.IntRange(1, 4).Draw(t, "services") {
		if k := genKey(t); !slices.ContainsFunc(w.Services, func(ws state.WorkloadService) bool { return ws.Service == k }) {
			w.Services = append(w.Services, state.WorkloadService{Service: k, Ports: genPorts(t, false)})
		}
	}
	return w
}

func genService(t *rapid.T, k state.ServiceKey) *state.Service {
	s := &state.Service{Name: k.Hostname, Namespace: k.Namespace, Hostname: k.Hostname, Ports: genPorts(t, true),
		IPFamilies: pick(t, "families", []state.IPFamilies{0, 0, 1, 2, 3}), Canonical: rapid.Bool().Draw(t, "canonical")}
	for range rapid.IntRange(0, 2).Draw(t, "vips") {
		a := state.NetworkAddress{Network: pick(t, "network", networks), Addr: netip.MustParseAddr(pick(t, "vip", addrs))}
		if !slices.Contains(s.VIPs, a) {
			s.VIPs = append(s.VIPs, a)
		}
	}
	if chance(t, "range", 5) {
		s.CIDRVIPs = []state.NetworkPrefix{{Network: pick(t, "network", networks),
			Prefix: netip.MustParsePrefix(pick(t, "cidr", []string{"10.0.0.0/24", "10.0.0.0/16", "10.0.0.1/16", "fd00::/64"}))}}
	}
	if chance(t, "private", 5) {
		s.Visibility = state.NamespaceOnly
	}
	if chance(t, "waypoint", 5) {
		s.Waypoint = genGateway(t)
	}
	if chance(t, "weighted", 6) {
		for range 2 {
			s.WeightedWaypoints = append(s.WeightedWaypoints, state.WeightedWaypoint{Destination: *genGateway(t),
				Weight: pick(t, "weight", []uint32{0, 1, 2})})
		}
	}
	if chance(t, "sans", 3) {
		s.SubjectAltNames = []string{"spiffe://td/ns/a/sa/alias"}
	}
	if chance(t, "balancer", 2) {
		s.LoadBalancer = &state.LoadBalancer{
			Mode: pick(t, "mode", []state.LBMode{state.LBStandard, state.LBStrict, state.LBFailover, state.LBFailover,
				state.LBPassthrough}),
			HealthPolicy: pick(t, "health", []state.HealthPolicy{state.OnlyHealthy, state.AllowAll}),
			Preferences: pick(t, "preferences", [][]state.Scope{nil, {state.ScopeNetwork, state.ScopeRegion, state.ScopeZone},
				{state.ScopeNode}, {state.ScopeRegion, state.ScopeNetwork}, {state.ScopeCluster, state.ScopeSubzone}}),
		}
	}
	return s
}

func genMesh(t *rapid.T) *mesh {
	m := &mesh{}
	for i := range rapid.IntRange(1, 6).Draw(t, "workloads") {
		m.workloads = append(m.workloads, genWorkload(t, i))
	}
	for _, ns := range namespaces {
		for _, h := range hosts {
			if rapid.Bool().Draw(t, "service") {
				m.services = append(m.services, genService(t, state.ServiceKey{Namespace: ns, Hostname: h}))
			}
		}
	}
	return m
}

// text describes a decision as outcomes.to does.
func text(d route.Decision) string {
	if d.Passthrough() {
		return "passthrough " + d.Actual.String()
	}
	at, authority := d.Actual.String(), d.Authority()
	if d.Hostname != "" {
		// Which family is preferred shows when both are offered.
		r, err := d.Resolved([]netip.Addr{netip.MustParseAddr("fe80::9"), netip.MustParseAddr("9.9.9.9")},
			func(uint64) uint64 {
				return 0
			})
		if err != nil {
			return err.Error()
		}
		at = fmt.Sprintf("%s:%d (IPv6 %v)", d.Hostname, d.Actual.Port(), r.Actual.Addr().Is6())
		if d.Protocol == route.HBONE && authority == "" {
			a := netip.MustParseAddrPort(r.Authority())
			if a.Addr() != r.Actual.Addr() {
				return "authority and address differ"
			}
			authority = fmt.Sprintf("resolved:%d", a.Port())
		}
	}
	name := "none"
	if d.Service != nil {
		name = d.Service.Key().String()
	}
	var inner []string
	if d.Protocol == route.DoubleHBONE {
		inner = append([]string{d.Upstream.UID}, idTexts(d.FinalSANs)...)
	}
	return fmt.Sprintf("%s %s authority=%s to=%s service=%s sans=%q inner=%q", d.Protocol, at, authority, d.Workload.UID,
		name, idTexts(d.SANs()), inner)
}

func idTexts(ids []identity.ID) (l []string) {
	for _, id := range ids {
		l = append(l, id.String())
	}
	return l
}

func TestAgainstReference(t *testing.T) {
	kinds := make(map[string]int)
	rapid.Check(t, func(rt *rapid.T) {
		m := genMesh(rt)
		v := m.view()
		for range 8 {
			src := pick(rt, "source", m.workloads)
			ip := netip.MustParseAddr(pick(rt, "source address", addrs))
			if len(src.Addresses) > 0 && rapid.Bool().Draw(rt, "own address") {
				ip = src.Addresses[0]
			}
			network := src.Network
			if chance(rt, "other network", 10) {
				network = pick(rt, "node network", networks)
			}
			var vips []string
			for _, s := range m.services {
				for _, a := range s.VIPs {
					vips = append(vips, a.Addr.String())
				}
			}
			addrs := addrs
			if len(vips) > 0 && rapid.Bool().Draw(rt, "a vip") {
				addrs = vips
			}
			dst := netip.AddrPortFrom(netip.MustParseAddr(pick(rt, "dst", addrs)), pick(rt, "port", ports))
			want := m.decide(network, src, ip, dst)
			got := outcomes{}
			enumerate(t, func(rand func(uint64) uint64) func(*big.Rat) {
				d, err := decide(t, v, route.Question{Network: network, Source: src, SrcIP: ip, Dst: dst, Rand: rand})
				what := ""
				if err != nil {
					what = err.Error()
				} else {
					what = text(d)
				}
				return func(p *big.Rat) { add(got, what, p) }
			})
			if diff := cmp.Diff(texts(want), texts(got)); diff != "" {
				rt.Fatalf("%s from %s (%s): -reference +Decide\n%s", dst, src.UID, ip, diff)
			}
			for what := range got {
				kinds[kind(what)]++
			}
		}
	})
	t.Logf("outcomes met: %v", kinds)
}

// kind is the first words of an outcome, up to what varies.
func kind(what string) string {
	for _, k := range []string{"HBONE", "DOUBLEHBONE", "TCP", "passthrough", "no healthy upstream",
		"no valid routing destination",
		"no service", "unknown network gateway", "unknown waypoint"} {
		if strings.HasPrefix(what, k) {
			return k
		}
	}
	return what
}

func texts(o outcomes) map[string]string {
	m := make(map[string]string)
	for k, p := range o {
		m[k] = p.RatString()
	}
	return m
}
