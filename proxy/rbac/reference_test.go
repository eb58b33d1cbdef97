package rbac

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"ztun/proxy/identity"
)

// The reference says section 7 again, slowly: it counts hits per list instead of
// combining conditions, and knows nothing of lost entries.

func refString(sm StringMatch, s string) bool {
	switch fmt.Sprint(sm.Kind) {
	case "Exact":
		return strings.Compare(s, sm.Value) == 0
	case "Prefix":
		return len(s) >= len(sm.Value) && s[:len(sm.Value)] == sm.Value
	case "Suffix":
		return len(s) >= len(sm.Value) && s[len(s)-len(sm.Value):] == sm.Value
	}
	return len(s) > 0
}

func refMatch(m Match, c Question) bool {
	type pair struct{ positives, hits, negatives, negHits int }
	var pairs []pair
	count := func(n, nn int, hit func(i int) bool, notHit func(i int) bool) {
		p := pair{positives: n, negatives: nn}
		for i := range n {
			if hit(i) {
				p.hits++
			}
		}
		for i := range nn {
			if notHit(i) {
				p.negHits++
			}
		}
		pairs = append(pairs, p)
	}
	principal := ""
	if c.HasID {
		principal = strings.Replace(c.ID.String(), "spiffe://", "", 1)
	}
	in := func(p netip.Prefix, a netip.Addr) bool {
		q, err := a.Prefix(p.Bits())
		return err == nil && q == p.Masked()
	}
	sa := func(a ServiceAccount) bool {
		return c.HasID && a == ServiceAccount{c.ID.Namespace, c.ID.ServiceAccount}
	}
	count(len(m.Namespaces), len(m.NotNamespaces),
		func(i int) bool { return refString(m.Namespaces[i], c.ID.Namespace) },
		func(i int) bool { return refString(m.NotNamespaces[i], c.ID.Namespace) })
	count(len(m.Principals), len(m.NotPrincipals),
		func(i int) bool { return c.HasID && refString(m.Principals[i], principal) },
		func(i int) bool { return c.HasID && refString(m.NotPrincipals[i], principal) })
	count(len(m.SourceIPs), len(m.NotSourceIPs),
		func(i int) bool { return in(m.SourceIPs[i], c.Src) },
		func(i int) bool { return in(m.NotSourceIPs[i], c.Src) })
	count(len(m.DestinationIPs), len(m.NotDestinationIPs),
		func(i int) bool { return in(m.DestinationIPs[i], c.Dst.Addr()) },
		func(i int) bool { return in(m.NotDestinationIPs[i], c.Dst.Addr()) })
	count(len(m.DestinationPorts), len(m.NotDestinationPorts),
		func(i int) bool { return m.DestinationPorts[i] == c.Dst.Port() },
		func(i int) bool { return m.NotDestinationPorts[i] == c.Dst.Port() })
	count(len(m.ServiceAccounts), len(m.NotServiceAccounts),
		func(i int) bool { return sa(m.ServiceAccounts[i]) },
		func(i int) bool { return sa(m.NotServiceAccounts[i]) })
	declared := 0
	for _, p := range pairs {
		declared += p.positives + p.negatives
		if p.positives > 0 && p.hits == 0 || p.negHits > 0 {
			return false
		}
	}
	return declared > 0
}

func refPolicy(p *Policy, c Question) bool {
	for _, rule := range p.Rules {
		satisfied := 0
		for _, clause := range rule {
			ok := len(clause) == 0
			for _, m := range clause {
				ok = ok || refMatch(m, c)
			}
			if ok {
				satisfied++
			}
		}
		if satisfied == len(rule) {
			return true
		}
	}
	return false
}

func refAllowed(ps []*Policy, c Question) bool {
	enforcedAllows, hits := 0, 0
	for _, p := range ps {
		if p.DryRun {
			continue
		}
		if p.Action == Deny && refPolicy(p, c) {
			return false
		}
		if p.Action == Allow {
			enforcedAllows++
			if refPolicy(p, c) {
				hits++
			}
		}
	}
	return enforcedAllows == 0 || hits > 0
}

// Generators over small domains, so that hits are frequent.

var (
	genName = rapid.SampledFrom([]string{"", "a", "b", "ab"})
	genAddr = rapid.Map(rapid.SampledFrom([]string{"10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1", "fd00::2"}),
		netip.MustParseAddr)
	genPrefix = rapid.Map(rapid.SampledFrom([]string{"10.0.0.1/32", "10.0.0.9/24", "0.0.0.0/0", "fd00::/127", "::/0"}),
		netip.MustParsePrefix)
	genPort    = rapid.SampledFrom([]uint16{1, 2, 3})
	genAccount = rapid.Custom(func(t *rapid.T) ServiceAccount {
		return ServiceAccount{genName.Draw(t, "ns"), genName.Draw(t, "sa")}
	})
	genString = rapid.Custom(func(t *rapid.T) StringMatch {
		return StringMatch{
			Kind: rapid.SampledFrom([]StringKind{Exact, Prefix, Suffix, Presence}).Draw(t, "kind"),
			Value: rapid.SampledFrom([]string{"", "a", "b", "ab", "td/ns/a/sa/b", "td/ns/", "/sa/a", "spiffe://"}).Draw(t,
				"value"),
		}
	})
	genQuestion = rapid.Custom(func(t *rapid.T) Question {
		c := Question{Src: genAddr.Draw(t, "src"), Dst: netip.AddrPortFrom(genAddr.Draw(t, "dst"), genPort.Draw(t, "port"))}
		if c.HasID = rapid.Bool().Draw(t, "identity"); c.HasID {
			c.ID = identity.ID{TrustDomain: "td", Namespace: genName.Draw(t, "ns"), ServiceAccount: genName.Draw(t, "sa")}
		}
		return c
	})
	genMatch = rapid.Custom(func(t *rapid.T) (m Match) {
		// Few lists at a time: with all of them nothing would ever match.
		for range rapid.IntRange(0, 3).Draw(t, "lists") {
			switch rapid.IntRange(0, 11).Draw(t, "list") {
			case 0:
				m.Namespaces = list(t, genString)
			case 1:
				m.NotNamespaces = list(t, genString)
			case 2:
				m.Principals = list(t, genString)
			case 3:
				m.NotPrincipals = list(t, genString)
			case 4:
				m.SourceIPs = list(t, genPrefix)
			case 5:
				m.NotSourceIPs = list(t, genPrefix)
			case 6:
				m.DestinationIPs = list(t, genPrefix)
			case 7:
				m.NotDestinationIPs = list(t, genPrefix)
			case 8:
				m.DestinationPorts = list(t, genPort)
			case 9:
				m.NotDestinationPorts = list(t, genPort)
			case 10:
				m.ServiceAccounts = list(t, genAccount)
			case 11:
				m.NotServiceAccounts = list(t, genAccount)
			}
		}
		return m
	})
	genPolicy = rapid.Custom(func(t *rapid.T) *Policy {
		p := &Policy{
			Key:    rapid.SampledFrom([]string{"n/a", "n/b", "n/c"}).Draw(t, "key"),
			Action: rapid.SampledFrom([]Action{Allow, Deny}).Draw(t, "action"),
			DryRun: rapid.IntRange(0, 5).Draw(t, "dry") == 0,
		}
		for range rapid.IntRange(0, 2).Draw(t, "rules") {
			var rule Rule
			for range rapid.IntRange(0, 2).Draw(t, "clauses") {
				rule = append(rule, rapid.SliceOfN(genMatch, 0, 2).Draw(t, "clause"))
			}
			p.Rules = append(p.Rules, rule)
		}
		return p
	})
)

func list[T any](t *rapid.T, g *rapid.Generator[T]) []T {
	return rapid.SliceOfN(g, 0, 2).Draw(t, "entries")
}

func TestAgainstReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ps := rapid.SliceOfN(genPolicy, 0, 4).Draw(t, "policies")
		c := genQuestion.Draw(t, "conn")
		v := Evaluate(ps, c)
		explained(t, ps, c)
		if want := refAllowed(ps, c); v.Allowed != want {
			t.Fatalf("%+v, want %v", v, want)
		}
		for _, p := range ps {
			if got, want := p.Matches(c), refPolicy(p, c); got != want {
				t.Fatalf("%+v: matches %v, want %v", p, got, want)
			}
		}
	})
}

// Whatever entries of whatever lists are lost, nothing is allowed that the whole
// policies would not have allowed.
func TestDamageNeverWidens(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ps := rapid.SliceOfN(genPolicy, 0, 4).Draw(t, "policies")
		c := genQuestion.Draw(t, "conn")
		damaged := make([]*Policy, len(ps))
		for i, p := range ps {
			d := *p
			d.Rules = nil
			for _, rule := range p.Rules {
				var r Rule
				for _, clause := range rule {
					var cl Clause
					for _, m := range clause {
						cl = append(cl, damage(t, m))
					}
					r = append(r, cl)
				}
				d.Rules = append(d.Rules, r)
			}
			damaged[i] = &d
		}
		if Evaluate(damaged, c).Allowed && !Evaluate(ps, c).Allowed {
			t.Fatal("the damaged policies allow what the whole ones reject")
		}
	})
}

func damage(t *rapid.T, m Match) Match {
	m.Namespaces = lose(t, m.Namespaces, &m, FieldNamespaces)
	m.NotNamespaces = lose(t, m.NotNamespaces, &m, FieldNotNamespaces)
	m.Principals = lose(t, m.Principals, &m, FieldPrincipals)
	m.NotPrincipals = lose(t, m.NotPrincipals, &m, FieldNotPrincipals)
	m.SourceIPs = lose(t, m.SourceIPs, &m, FieldSourceIPs)
	m.NotSourceIPs = lose(t, m.NotSourceIPs, &m, FieldNotSourceIPs)
	m.DestinationIPs = lose(t, m.DestinationIPs, &m, FieldDestinationIPs)
	m.NotDestinationIPs = lose(t, m.NotDestinationIPs, &m, FieldNotDestinationIPs)
	m.DestinationPorts = lose(t, m.DestinationPorts, &m, FieldDestinationPorts)
	m.NotDestinationPorts = lose(t, m.NotDestinationPorts, &m, FieldNotDestinationPorts)
	m.ServiceAccounts = lose(t, m.ServiceAccounts, &m, FieldServiceAccounts)
	m.NotServiceAccounts = lose(t, m.NotServiceAccounts, &m, FieldNotServiceAccounts)
	return m
}

func lose[T any](t *rapid.T, l []T, m *Match, f Field) (kept []T) {
	for _, e := range l {
		if rapid.IntRange(0, 3).Draw(t, "lose") == 0 {
			m.Invalid |= f
		} else {
			kept = append(kept, e)
		}
	}
	return kept
}
