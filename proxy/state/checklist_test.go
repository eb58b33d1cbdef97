package state

import (
	"net/netip"
	"testing"
)

// TestChecklist is the controlplane checklist's 45 to 49 row by row; TestAgainstOracle holds the same rules to random
// worlds.
func TestChecklist(t *testing.T) {
	ip, pfx := netip.MustParseAddr, netip.MustParsePrefix
	b := NewBuilder("")
	workload := func(uid, addr string, p Protocol, m NetworkMode) {
		b.InsertWorkload(&Workload{UID: uid, Addresses: []netip.Addr{ip(addr)}, Protocol: p, NetworkMode: m, Capacity: 1})
	}
	workload("c//Pod/a/hbone", "10.0.0.1", HBONE, StandardNetwork)
	workload("c//Pod/a/tcp", "10.0.0.1", TCP, StandardNetwork)
	workload("c/entry/hbone", "10.0.0.1", HBONE, StandardNetwork)
	workload("c//Pod/b/tcp", "10.0.0.2", TCP, StandardNetwork)
	workload("c/entry/hbone2", "10.0.0.2", HBONE, StandardNetwork)
	workload("c/entry/hbone3", "10.0.0.3", HBONE, StandardNetwork)
	workload("c/entry/tcp3", "10.0.0.3", TCP, StandardNetwork)
	workload("c//Pod/a/host", "10.0.0.4", HBONE, HostNetwork)
	workload("c//Pod/a/shared", "10.1.0.1", TCP, StandardNetwork)
	service := func(ns, host string, change func(*Service)) {
		s := &Service{Namespace: ns, Hostname: host}
		change(s)
		b.InsertService(s)
	}
	vip := func(addr string) func(*Service) {
		return func(s *Service) { s.VIPs = []NetworkAddress{{"", ip(addr)}} }
	}
	wide := func(network, cidr string, canonical bool) func(*Service) {
		return func(s *Service) {
			s.CIDRVIPs, s.Canonical = []NetworkPrefix{{network, pfx(cidr)}}, canonical
		}
	}
	service("a", "shared", vip("10.1.0.1"))
	service("a", "same", vip("10.1.0.2"))
	service("b", "same", vip("10.1.0.2"))
	service("b", "lead", func(s *Service) { vip("10.1.0.3")(s) })
	service("a", "lead", func(s *Service) { vip("10.1.0.3")(s); s.Canonical = true })
	service("b", "own", func(s *Service) { vip("10.1.0.4")(s); s.Visibility = NamespaceOnly })
	service("b", "own2", func(s *Service) { vip("10.2.0.4")(s); s.Visibility = NamespaceOnly })
	service("a", "sixteen", wide("", "10.2.0.0/16", false))
	service("b", "twentyfour", wide("", "10.2.0.0/24", false))
	service("b", "exact", vip("10.2.0.9"))
	service("a", "mapped", wide("", "::/0", false))
	service("a", "elsewhere", wide("far", "10.9.0.0/16", false))
	service("a", "plain", wide("", "10.3.0.0/16", false))
	service("b", "canonical", wide("", "10.3.0.0/16", true))
	v := b.Build()

	for _, c := range []struct{ name, addr, want string }{
		{"45 pod and HBONE", "10.0.0.1", "c//Pod/a/hbone"},
		{"45 pod before HBONE", "10.0.0.2", "c//Pod/b/tcp"},
		{"45 HBONE before the rest", "10.0.0.3", "c/entry/hbone3"},
		{"45 host network", "10.0.0.4", "-"},
	} {
		if got := uidOf(v.WorkloadByAddr("", ip(c.addr))); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	if v.WorkloadByUID("c//Pod/a/host") == nil {
		t.Error("45: a pod on its host's network is not known by uid either")
	}
	if w, s := v.FindAddress("", ip("10.1.0.1"), "a"); uidOf(w) != "c//Pod/a/shared" || s != nil {
		t.Errorf("46: %s, %s; an address means the workload first", uidOf(w), keyOf(s))
	}
	for _, c := range []struct{ name, network, addr, ns, want string }{
		{"46 the service beside it", "", "10.1.0.1", "a", "a/shared"},
		{"47 client in a", "", "10.1.0.2", "a", "a/same"},
		{"47 client in b", "", "10.1.0.2", "b", "b/same"},
		{"47 client in c: the first", "", "10.1.0.2", "c", "a/same"},
		{"47 client in c: the canonical one", "", "10.1.0.3", "c", "a/lead"},
		{"48 not visible: none", "", "10.1.0.4", "a", "-"},
		{"48 visible to its own", "", "10.1.0.4", "b", "b/own"},
		{"48 no client", "", "10.1.0.4", "", "b/own"},
		{"48 not visible: the range", "", "10.2.0.4", "a", "a/sixteen"},
		{"49 own namespace before length", "", "10.2.0.1", "a", "a/sixteen"},
		{"49 no client: length", "", "10.2.0.1", "", "b/twentyfour"},
		{"49 exact before range", "", "10.2.0.9", "a", "b/exact"},
		{"49 IPv4 in no range of IPv6", "", "10.8.0.1", "", "-"},
		{"49 IPv6 in it", "", "fd00::1", "", "a/mapped"},
		{"49 ranges are of a network", "", "10.9.0.1", "", "-"},
		{"49 in that network", "far", "10.9.0.1", "", "a/elsewhere"},
		{"49 canonical last of all", "", "10.3.0.1", "c", "b/canonical"},
	} {
		if got := keyOf(v.ServiceByVIP(c.network, ip(c.addr), c.ns)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
