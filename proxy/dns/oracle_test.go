package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"ztun/proxy/state"
)

// slow answers as Answer should, by spec 5.3 read aloud: names are lists of
// labels, every service is looked at for every name.
type slow struct {
	services  []*state.Service // in the order of insertion
	workloads map[string]*state.Workload
	client    *state.Workload
	o         Options
}

type labelled struct{ labels, stripped []string }

func (s *slow) expansions(n []string) [][]string {
	domain := strings.Split(s.o.ClusterDomain, ".")
	svc := append([]string{"svc"}, domain...)
	nsSvc := append([]string{s.client.Namespace}, svc...)
	plus := func(tail []string) []string { return slices.Concat(n, tail) }
	endsSvc := n[len(n)-1] == "svc"
	switch len(n) {
	case 1:
		return [][]string{plus(nsSvc)}
	case 2:
		return [][]string{plus(svc), plus(nsSvc)}
	case 3:
		if endsSvc {
			return [][]string{plus(domain), plus(svc)}
		}
		return [][]string{plus(svc)}
	case 4:
		if endsSvc {
			return [][]string{plus(domain)}
		}
	}
	return nil
}

func (s *slow) names(n []string) (out []labelled) {
	all := []labelled{{labels: n}}
	for _, e := range s.expansions(n) {
		all = append(all, labelled{labels: e})
	}
	search := s.o.SearchDomains
	if search == nil {
		d := s.o.ClusterDomain
		search = []string{s.client.Namespace + ".svc." + d, "svc." + d, d}
	}
	for _, d := range search {
		tail := strings.Split(d, ".")
		if k := len(n) - len(tail); k > 0 && slices.Equal(n[k:], tail) {
			all = append(all, labelled{n[:k], n[:k]})
			for _, e := range s.expansions(n[:k]) {
				all = append(all, labelled{e, n[:k]})
			}
		}
	}
	for _, a := range all {
		if !slices.ContainsFunc(out, func(b labelled) bool { return slices.Equal(a.labels, b.labels) }) {
			out = append(out, a)
		}
	}
	return out
}

func (s *slow) match(host []string) *state.Service {
	var best *state.Service
	bestScore := []int{-1}
	for i, sv := range s.services {
		mine := sv.Namespace == s.client.Namespace
		if !slices.Equal(strings.Split(strings.ToLower(sv.Hostname), "."), host) ||
			sv.Visibility == state.NamespaceOnly && !mine {
			continue
		}
		if len(sv.VIPs) == 0 && !strings.HasSuffix(strings.ToLower(sv.Hostname), ".svc."+s.o.ClusterDomain) {
			continue
		}
		var score []int
		switch {
		case mine:
			score = []int{4, i}
		case sv.Canonical:
			score = []int{3, i}
		case s.o.PreferredNamespace != "" && sv.Namespace == s.o.PreferredNamespace:
			score = []int{2, i}
		default:
			score = []int{1, -i}
		}
		if slices.Compare(score, bestScore) > 0 {
			best, bestScore = sv, score
		}
	}
	return best
}

func (s *slow) answer(name string, v6 bool) string {
	n := strings.Split(strings.ToLower(name), ".")
	for _, a := range s.names(n) {
		for k := range a.labels {
			host := a.labels
			if k > 0 {
				host = append([]string{"*"}, a.labels[k:]...)
			}
			if sv := s.match(host); sv != nil {
				return s.records(n, a, sv, v6)
			}
		}
	}
	return "forward"
}

func (s *slow) records(n []string, a labelled, sv *state.Service, v6 bool) string {
	asked := strings.Join(n, ".") + "."
	var l []netip.Addr
	for _, v := range sv.VIPs {
		if v.Network == s.client.Network {
			l = append(l, v.Addr)
		}
	}
	if len(sv.VIPs) == 0 {
		for _, w := range s.workloads {
			if !slices.ContainsFunc(w.Services, func(ws state.WorkloadService) bool { return ws.Service == sv.Key() }) {
				continue
			}
			if i := slices.IndexFunc(w.Addresses, func(ip netip.Addr) bool { return ip.Is6() == v6 }); i >= 0 {
				l = append(l, w.Addresses[i])
			}
		}
	}
	l = slices.DeleteFunc(l, func(ip netip.Addr) bool {
		return ip.Is6() != v6 || !sv.IPFamilies.Accepts(ip) || v6 && !s.o.IPv6
	})
	if len(l) == 0 {
		return asked + " nothing"
	}
	slices.SortFunc(l, netip.Addr.Compare)
	if a.stripped != nil && !strings.HasPrefix(sv.Hostname, "*.") {
		return fmt.Sprint(asked, " is ", strings.Join(a.stripped, "."), ". ", l)
	}
	return fmt.Sprint(asked, " ", l)
}

func describe(d Decision) string {
	switch {
	case d.Forward:
		return "forward"
	case d.Rcode != 0:
		return rcodeName(d.Rcode)
	case len(d.Addrs) == 0:
		return d.Owner + " nothing"
	}
	slices.SortFunc(d.Addrs, netip.Addr.Compare)
	if d.Alias != "" {
		return fmt.Sprint(d.Alias, " is ", d.Owner, " ", d.Addrs)
	}
	return fmt.Sprint(d.Owner, " ", d.Addrs)
}

// Random worlds and questions: Answer agrees with the slow reading of the spec.
func TestAgainstSlow(t *testing.T) {
	hosts := []string{"cart.blue.svc.cluster.local", "pay.green.svc.cluster.local", "*.green.svc.cluster.local",
		"hl.blue.svc.cluster.local", "Web.Blue.svc.cluster.local",
		"api.acme.test", "*.acme.test", "*.test", "cart", "cart.blue", "*.blue", "*.local",
		"pay.green.blue.svc.cluster.local", "cart.svc", "x.y.blue.svc.cluster.local"}
	words := []string{"cart", "pay", "hl", "web", "api", "x", "y", "*", "blue", "green", "svc", "cluster", "local",
		"acme", "test"}
	tails := []string{"", "", "", ".blue", ".green", ".svc", ".blue.svc", ".green.svc.cluster.local",
		".blue.svc.cluster.local", ".svc.cluster.local", ".cluster.local", ".acme.test", ".green.blue.svc.cluster.local"}
	namespaces := []string{"blue", "green", "red"}
	rapid.Check(t, func(t *rapid.T) {
		pick := func(what string, l []string) string { return rapid.SampledFrom(l).Draw(t, what) }
		s := &slow{workloads: map[string]*state.Workload{}, client: pod("client", pick("client", namespaces),
			pick("network", []string{"", "n1"}), "10.1.0.9")}
		s.o = Options{ClusterDomain: "cluster.local", PreferredNamespace: pick("preferred", []string{"", "green"}),
			IPv6: rapid.Bool().Draw(t, "IPv6")}
		if rapid.IntRange(0, 3).Draw(t, "dedicated") == 0 {
			s.o.SearchDomains =
				rapid.SliceOfN(rapid.SampledFrom([]string{"acme.test", "test", "blue.svc.cluster.local", "local"}), 0, 3).Draw(t,
					"search")
			if s.o.SearchDomains == nil {
				s.o.SearchDomains = []string{}
			}
		}
		b := state.NewBuilder("")
		b.InsertWorkload(s.client)
		for range rapid.IntRange(0, 8).Draw(t, "services") {
			sv := service(pick("host", hosts), pick("ns", namespaces), "")
			sv.VIPs =
				vips(
					strings.Join(
						rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"n1/10.96.0.1", "n1/10.96.0.2", "n1/fd00::1", "/10.96.0.3",
							"/fd00::3"}), 0, 3, rapid.ID[string]).Draw(t, "vips"), " "))
			sv.Canonical = rapid.Bool().Draw(t, "canonical")
			sv.Visibility = rapid.SampledFrom([]state.Visibility{state.Public, state.NamespaceOnly}).Draw(t, "visibility")
			sv.IPFamilies = rapid.SampledFrom([]state.IPFamilies{0, 0, 1, 2, 3}).Draw(t, "families")
			b.InsertService(sv)
			if i := slices.IndexFunc(s.services, func(x *state.Service) bool { return x.Key() == sv.Key() }); i >= 0 {
				s.services[i] = sv // which keeps its place
			} else {
				s.services = append(s.services, sv)
			}
		}
		for i := range rapid.IntRange(0, 4).Draw(t, "pods") {
			w := pod(fmt.Sprint("p", i), pick("ns", namespaces), "",
				pick("addresses", []string{"", "10.1.0.1", "10.1.0.2 10.1.0.3", "fd00:1::1", "10.1.0.4 fd00:1::2"}),
				pick("of", hosts))
			b.InsertWorkload(w)
			s.workloads[w.UID] = w
		}
		view := b.Build()
		for range rapid.IntRange(1, 5).Draw(t, "questions") {
			name := strings.Join(rapid.SliceOfN(rapid.SampledFrom(words), 1, 3).Draw(t, "name"), ".") + pick("tail", tails)
			typ := pick("type", []string{"A", "AAAA"})
			d := Answer(view, s.client, &s.o, ask(typ+" "+name))
			if got, want := describe(d), s.answer(name, typ == "AAAA"); got != want {
				t.Fatalf("%s %s\n got %s\nwant %s", typ, name, got, want)
			}
		}
	})
}
