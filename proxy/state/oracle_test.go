package state

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"ztun/proxy/rbac"
)

// oracle is the state as plain lists, in the order of insertion, and answers
// every question by scanning them.
type oracle struct {
	node      string
	workloads []*Workload
	services  []*Service
	policies  []*rbac.Policy
}

func (o *oracle) insertWorkload(w *Workload) {
	o.removeWorkload(w.UID)
	o.workloads = append(o.workloads, w)
}

func (o *oracle) removeWorkload(uid string) {
	o.workloads = slices.DeleteFunc(slices.Clone(o.workloads), func(w *Workload) bool { return w.UID == uid })
}

// insertService keeps the place of a service that is replaced.
func (o *oracle) insertService(s *Service) {
	o.services = slices.Clone(o.services)
	for i, old := range o.services {
		if old.Key() == s.Key() {
			o.services[i] = s
			return
		}
	}
	o.services = append(o.services, s)
}

func (o *oracle) removeService(k ServiceKey) {
	o.services = slices.DeleteFunc(slices.Clone(o.services), func(s *Service) bool { return s.Key() == k })
}

func (o *oracle) insertPolicy(p *rbac.Policy) {
	o.removePolicy(p.Key)
	o.policies = append(o.policies, p)
}

func (o *oracle) removePolicy(key string) {
	o.policies = slices.DeleteFunc(slices.Clone(o.policies), func(p *rbac.Policy) bool { return p.Key == key })
}

// best returns the uid of the best claimant: of equals the last inserted.
func best(ws []*Workload) string {
	var b *Workload
	for _, w := range ws {
		score := func(w *Workload) int { return 2*strings.Count(w.UID, "//Pod/") + int(w.Protocol) }
		if b == nil || score(w) >= score(b) {
			b = w
		}
	}
	return uidOf(b)
}

func uidOf(w *Workload) string {
	if w == nil {
		return "-"
	}
	return w.UID
}

func (o *oracle) filter(keep func(*Workload) bool) (l []*Workload) {
	for _, w := range o.workloads {
		if keep(w) {
			l = append(l, w)
		}
	}
	return l
}

// endpoints describes the endpoints of a service, or those staged for it.
func (o *oracle) endpoints(k ServiceKey) string {
	var s *Service
	for _, x := range o.services {
		if x.Key() == k {
			s = x
		}
	}
	m := make(map[string]string)
	healthy := s != nil && (s.LoadBalancer == nil || s.LoadBalancer.HealthPolicy == OnlyHealthy)
	put := func(uid string, ports PortMap, st Status) {
		delete(m, uid)
		if st == Healthy || !healthy {
			m[uid] = fmt.Sprint(ports, st)
		}
	}
	if s != nil {
		for _, e := range s.Endpoints {
			put(e.UID, e.Ports, e.Status)
		}
	}
	for _, w := range o.workloads {
		for _, ws := range w.Services {
			if ws.Service == k {
				put(w.UID, ws.Ports, w.Status)
				break
			}
		}
	}
	return fmt.Sprint(m) // sorted by key
}

func describeEndpoints(l []Endpoint) string {
	m := make(map[string]string)
	for _, e := range l {
		m[e.UID] = fmt.Sprint(e.Ports, e.Status)
	}
	if !slices.IsSortedFunc(l, func(a, b Endpoint) int { return strings.Compare(a.UID, b.UID) }) || len(m) != len(l) {
		return "not sorted or not unique"
	}
	return fmt.Sprint(m)
}

func (o *oracle) choose(l []*Service, ns, preferred string) string {
	var visible []*Service
	for _, s := range l {
		if ns == "" || s.Visibility == Public || s.Namespace == ns {
			visible = append(visible, s)
		}
	}
	score := func(i int) []int {
		s := visible[i]
		b := func(x bool, n int) int {
			if x {
				return n
			}
			return 0
		}
		own := ns != "" && s.Namespace == ns
		switch {
		case own:
			return []int{4, b(s.Canonical, 1), i} // canonical, then the later
		case s.Canonical:
			return []int{3, i} // the later
		case preferred != "" && s.Namespace == preferred:
			return []int{2, -i} // the first
		}
		return []int{1, -i}
	}
	at := -1
	for i := range visible {
		if at < 0 || slices.Compare(score(i), score(at)) > 0 {
			at = i
		}
	}
	if at < 0 {
		return "-"
	}
	return visible[at].Key().String()
}

func (o *oracle) byVIP(network string, ip netip.Addr, ns string) string {
	var exact []*Service
	for _, s := range o.services {
		if slices.Contains(s.VIPs, NetworkAddress{network, ip}) {
			exact = append(exact, s)
		}
	}
	if k := o.choose(exact, ns, ""); k != "-" {
		return k
	}
	found, foundRank := "-", []int{-1}
	for _, s := range o.services {
		if ns != "" && s.Visibility == NamespaceOnly && s.Namespace != ns {
			continue
		}
		for _, c := range s.CIDRVIPs {
			if c.Network != network || !c.Prefix.Contains(ip) {
				continue
			}
			rank := []int{0, c.Prefix.Bits(), 0}
			if ns != "" && s.Namespace == ns {
				rank[0] = 1
			}
			if s.Canonical {
				rank[2] = 1
			}
			if slices.Compare(rank, foundRank) > 0 {
				found, foundRank = s.Key().String(), rank
			}
		}
	}
	return found
}

func (o *oracle) policiesFor(w *Workload) (l []string) {
	for _, p := range o.policies {
		if p.Scope == rbac.ScopeNamespace && p.Namespace == w.Namespace && p.Namespace != "" || p.Scope == rbac.ScopeGlobal {
			l = append(l, p.Key)
		}
	}
	l = append(l, w.AuthorizationPolicies...)
	slices.Sort(l)
	return l
}

func keyOf(s *Service) string {
	if s == nil {
		return "-"
	}
	return s.Key().String()
}

var (
	tNets  = []string{"", "n2"}
	tNS    = []string{"a", "b", "c"}
	tHosts = []string{"h1", "h2", "H2", "*.h2", ".h2", "*.a.b.c"}
	tAddrs = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"),
		netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("fd00::1")}
	tCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.0.7/24"),
		netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd00::/64")}
	tUIDs = []string{"c//Pod/a/1", "c//Pod/a/2", "c/entry/3", "c/entry/4", "c//Pod/b/5"}
	tKeys = []string{"a/p", "a/q", "b/p"}
)

// answers asks everything that can be asked and describes the answers: want is
// the oracle's, got the View's.
func answers(o *oracle, v *View) (want, got []string) {
	ask := func(q string, w, g any) {
		want, got = append(want, fmt.Sprint(q, ": ", w)), append(got, fmt.Sprint(q, ": ", g))
	}
	for _, uid := range tUIDs {
		ws := o.filter(func(w *Workload) bool { return w.UID == uid })
		ask("uid "+uid, best(ws), uidOf(v.WorkloadByUID(uid)))
		for _, w := range ws {
			var keys []string
			for _, p := range v.PoliciesFor(w) {
				keys = append(keys, p.Key)
				if p.IsMissing() != (v.Policy(p.Key) == nil) {
					keys = append(keys, "wrongly missing or not")
				}
			}
			slices.Sort(keys)
			ask("policies of "+uid, o.policiesFor(w), keys)
		}
	}
	for _, n := range tNets {
		for _, ip := range tAddrs {
			ask(fmt.Sprint("address ", n, ip), best(o.filter(func(w *Workload) bool {
				return w.Network == n && w.NetworkMode == StandardNetwork && slices.Contains(w.Addresses, ip)
			})), uidOf(v.WorkloadByAddr(n, ip)))
			for _, ns := range append(tNS, "") {
				ask(fmt.Sprint("vip ", n, ip, ns), o.byVIP(n, ip, ns), keyOf(v.ServiceByVIP(n, ip, ns)))
			}
		}
	}
	for _, ns := range tNS {
		for _, h := range tHosts {
			k := ServiceKey{ns, h}
			ask("workload host "+k.String(), best(o.filter(func(w *Workload) bool {
				return w.Namespace == ns && w.Hostname == h
			})), uidOf(v.WorkloadByNSHost(ns, h)))
			known := slices.ContainsFunc(o.services, func(s *Service) bool { return s.Key() == k })
			s := v.ServiceByNSHost(ns, h)
			ask("service "+k.String(), known, s != nil)
			eps := []Endpoint(nil)
			if s != nil {
				eps = s.Endpoints
			} else {
				for _, st := range v.Staged() {
					if st.Service == k {
						eps = st.Endpoints
					}
				}
			}
			ask("endpoints of "+k.String(), o.endpoints(k), describeEndpoints(eps))
		}
		for _, host := range tAddrs {
			c := Caller{host, ns, "sa"}
			ask(fmt.Sprint("caller ", c), best(o.filter(func(w *Workload) bool {
				return w.Namespace == ns && slices.ContainsFunc(w.MeshAddresses,
					func(a netip.AddrPort) bool { return a.Addr() == host })
			})), uidOf(v.WorkloadByCaller(c)))
		}
		info := WorkloadInfo{"w", ns, "sa"}
		ask("info "+info.String(), best(o.filter(func(w *Workload) bool {
			return w.Info() == info && (o.node == "" || w.Node == o.node)
		})),
			uidOf(v.WorkloadByInfo(info)))
	}
	wild := map[int]bool{}
	for _, s := range o.services {
		if strings.HasPrefix(s.Hostname, "*.") {
			wild[strings.Count(s.Hostname, ".")] = true
		}
	}
	var labels []uint8
	for n := range wild {
		labels = append(labels, uint8(n))
	}
	slices.Sort(labels)
	slices.Reverse(labels)
	ask("wildcard labels", labels, v.WildcardLabels())
	for _, h := range tHosts {
		var l []*Service
		for _, s := range o.services {
			if strings.EqualFold(s.Hostname, h) {
				l = append(l, s)
			}
		}
		names := func(l []*Service) (out []string) {
			for _, s := range l {
				out = append(out, keyOf(s))
			}
			return out
		}
		ask("hosts "+h, names(l), names(v.ServicesByHost(h)))
		if suffix, ok := strings.CutPrefix(h, "*"); ok {
			ask("wildcard "+h, names(l), names(v.ServicesByWildcard(suffix)))
		}
		for _, ns := range append(tNS, "") {
			ask("host "+h+ns, o.choose(l, ns, ""), keyOf(v.ServiceByHost(h, ns)))
			ask("host "+h+ns+" preferring b", o.choose(l, ns, "b"), keyOf(v.ServiceByHostPreferring(h, ns, "b")))
		}
	}
	w, s, p := v.Counts()
	ask("counts", []int{len(o.workloads), len(o.services), len(o.policies)}, []int{w, s, p})
	ask("lists", []int{len(o.workloads), len(o.services), len(o.policies)}, []int{len(v.Workloads()), len(v.Services()),
		len(v.Policies())})
	return want, got
}

func genWorkload(t *rapid.T) *Workload {
	pick := func(name string, l ...string) string { return rapid.SampledFrom(l).Draw(t, name) }
	w := &Workload{
		UID: rapid.SampledFrom(tUIDs).Draw(t, "uid"), Name: pick("name", "w", "x"), Namespace: pick("ns", tNS...),
		ServiceAccount: "sa",
		Network:        pick("network", tNets...), Node: pick("node", "k1", "k2"), Hostname: pick("hostname", "", "h1", "h2"),
		Protocol: rapid.SampledFrom([]Protocol{TCP, HBONE}).Draw(t, "protocol"),
		Status:   rapid.SampledFrom([]Status{Healthy, Healthy, Unhealthy}).Draw(t, "status"),
		// Repetitions are the builder's to bear.
		Addresses:             rapid.SliceOfN(rapid.SampledFrom(tAddrs), 0, 3).Draw(t, "addresses"),
		AuthorizationPolicies: rapid.SliceOfN(rapid.SampledFrom(tKeys), 0, 1).Draw(t, "policies"),
		NetworkMode: rapid.SampledFrom([]NetworkMode{StandardNetwork, StandardNetwork, HostNetwork}).Draw(t,
			"mode"),
	}
	for _, a := range rapid.SliceOfN(rapid.SampledFrom(tAddrs), 0, 2).Draw(t, "mesh addresses") {
		w.MeshAddresses = append(w.MeshAddresses, netip.AddrPortFrom(a, uint16(15008+len(w.MeshAddresses))))
	}
	for range rapid.IntRange(0, 3).Draw(t, "services") {
		w.Services = append(w.Services, WorkloadService{ServiceKey{pick("ns", tNS...), pick("host", tHosts...)}, genPorts(t)})
	}
	return w
}

func genPorts(t *rapid.T) PortMap {
	return SortPorts([]PortPair{{80, rapid.SampledFrom([]uint16{1, 2}).Draw(t, "target")}})
}

func genService(t *rapid.T) *Service {
	s := &Service{
		Namespace: rapid.SampledFrom(tNS).Draw(t, "ns"), Hostname: rapid.SampledFrom(tHosts).Draw(t, "host"),
		Canonical:  rapid.Bool().Draw(t, "canonical"),
		Visibility: rapid.SampledFrom([]Visibility{Public, Public, NamespaceOnly}).Draw(t, "visibility"),
	}
	for range rapid.IntRange(0, 2).Draw(t, "vips") {
		s.VIPs = append(s.VIPs, NetworkAddress{rapid.SampledFrom(tNets).Draw(t, "network"),
			rapid.SampledFrom(tAddrs).Draw(t, "vip")})
	}
	for range rapid.IntRange(0, 2).Draw(t, "ranges") {
		s.CIDRVIPs = append(s.CIDRVIPs, NetworkPrefix{rapid.SampledFrom(tNets).Draw(t, "network"),
			rapid.SampledFrom(tCIDRs).Draw(t, "cidr")})
	}
	if rapid.Bool().Draw(t, "balancer") {
		s.LoadBalancer = &LoadBalancer{HealthPolicy: rapid.SampledFrom([]HealthPolicy{OnlyHealthy, AllowAll}).Draw(t,
			"health")}
	}
	if rapid.IntRange(0, 3).Draw(t, "given") == 0 {
		s.Endpoints = []Endpoint{{UID: rapid.SampledFrom(tUIDs).Draw(t, "uid"), Ports: genPorts(t),
			Status: rapid.SampledFrom([]Status{Healthy, Unhealthy}).Draw(t, "status")}}
	}
	return s
}

func genPolicy(t *rapid.T) *rbac.Policy {
	key := rapid.SampledFrom(tKeys).Draw(t, "key")
	return &rbac.Policy{Key: key, Namespace: key[:1],
		Scope: rapid.SampledFrom([]rbac.Scope{rbac.ScopeGlobal, rbac.ScopeNamespace, rbac.ScopeWorkloadSelector}).Draw(t,
			"scope")}
}

// Random histories: the View answers as the oracle does, and Views that went
// out earlier go on answering what they answered then.
func TestAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		node := rapid.SampledFrom([]string{"", "k1"}).Draw(t, "node")
		b, o := NewBuilder(node), &oracle{node: node}
		type past struct {
			o    oracle
			v    *View
			want []string
		}
		var history []past
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			for range rapid.IntRange(1, 5).Draw(t, "changes") {
				switch rapid.IntRange(0, 7).Draw(t, "change") {
				case 0, 1, 2:
					w := genWorkload(t)
					b.InsertWorkload(w)
					o.insertWorkload(w)
				case 3, 4:
					s := genService(t)
					b.InsertService(s)
					o.insertService(s)
				case 5:
					uid := rapid.SampledFrom(tUIDs).Draw(t, "uid")
					b.RemoveWorkload(uid)
					o.removeWorkload(uid)
				case 6:
					k := ServiceKey{rapid.SampledFrom(tNS).Draw(t, "ns"), rapid.SampledFrom(tHosts).Draw(t, "host")}
					b.RemoveService(k)
					o.removeService(k)
				case 7:
					p := genPolicy(t)
					if rapid.Bool().Draw(t, "remove") {
						b.RemovePolicy(p.Key)
						o.removePolicy(p.Key)
					} else {
						b.InsertPolicy(p)
						o.insertPolicy(p)
					}
				}
			}
			v := b.Build()
			want, got := answers(o, v)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("-oracle +View:\n%s", diff)
			}
			history = append(history, past{*o, v, want})
		}
		for i, p := range history {
			if p.v.Version() != uint64(i+1) {
				t.Fatalf("version %d at step %d", p.v.Version(), i)
			}
			if _, got := answers(&p.o, p.v); !slices.Equal(got, p.want) {
				t.Fatalf("the View of step %d has changed:\n%s", i, cmp.Diff(p.want, got))
			}
		}
	})
}
