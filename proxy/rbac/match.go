package rbac

import (
	"net/netip"
	"strings"
)

const spiffePrefix = "spiffe://"

// Matches reports whether the policy's rules match q. Entries that were lost
// are decided against the connection: they count as no hit for an ALLOW policy
// and as a hit for a DENY policy.
func (p *Policy) Matches(q Question) bool {
	m := newMatcher(q)
	return m.policy(p)
}

// matcher holds what is computed once per connection.
type matcher struct {
	q         Question
	src, dst  netip.Addr
	namespace string // of the peer, "" without identity
	principal string // the peer's identity without "spiffe://", once asked for
	// possibly is how an entry that was lost is decided: true answers "could it
	// match?", false answers "does it match for certain?".
	possibly bool
}

func newMatcher(q Question) matcher {
	m := matcher{q: q, src: q.Src.Unmap(), dst: q.Dst.Addr().Unmap()}
	if q.HasID {
		m.namespace = q.ID.Namespace
	}
	return m
}

func (m *matcher) policy(p *Policy) bool { return m.first(p) >= 0 }

// first is the index of the first rule that matches, -1 if none does.
func (m *matcher) first(p *Policy) int {
	m.possibly = p.Action == Deny
	for i := range p.Rules {
		if m.rule(p.Rules[i]) {
			return i
		}
	}
	return -1
}

func (m *matcher) rule(r Rule) bool {
	for i := range r {
		if !m.clause(r[i]) {
			return false
		}
	}
	return true
}

func (m *matcher) clause(c Clause) bool {
	if len(c) == 0 {
		return true
	}
	for i := range c {
		if m.match(&c[i]) {
			return true
		}
	}
	return false
}

func (m *matcher) match(x *Match) bool {
	if x.empty() {
		return false
	}
	return m.positive(x, FieldDestinationIPs, len(x.DestinationIPs), anyPrefix(x.DestinationIPs, m.dst)) &&
		m.negative(x, FieldNotDestinationIPs, anyPrefix(x.NotDestinationIPs, m.dst)) &&
		m.source(x) &&
		m.positive(x, FieldDestinationPorts, len(x.DestinationPorts), anyPort(x.DestinationPorts, m.q.Dst.Port())) &&
		m.negative(x, FieldNotDestinationPorts, anyPort(x.NotDestinationPorts, m.q.Dst.Port())) &&
		m.positive(x, FieldServiceAccounts, len(x.ServiceAccounts), m.anyAccount(x.ServiceAccounts)) &&
		m.negative(x, FieldNotServiceAccounts, m.anyAccount(x.NotServiceAccounts)) &&
		m.positive(x, FieldPrincipals, len(x.Principals), m.anyPrincipal(x.Principals)) &&
		m.negative(x, FieldNotPrincipals, m.anyPrincipal(x.NotPrincipals)) &&
		m.positive(x, FieldNamespaces, len(x.Namespaces), anyString(x.Namespaces, m.namespace)) &&
		m.negative(x, FieldNotNamespaces, anyString(x.NotNamespaces, m.namespace))
}

// positive decides a positive list of n entries of which one is hit or not.
func (m *matcher) positive(x *Match, f Field, n int, hit bool) bool {
	if x.Invalid&f != 0 {
		return hit || m.possibly
	}
	return n == 0 || hit
}

// negative decides a negative list. A lost entry might have been the one that
// excludes the connection, so a certain match is impossible with one.
func (m *matcher) negative(x *Match, f Field, hit bool) bool {
	if hit {
		return false
	}
	return x.Invalid&f == 0 || m.possibly
}

// source decides the lists of source addresses.
func (m *matcher) source(x *Match) bool {
	if m.q.SrcUnknown {
		return m.possibly || len(x.SourceIPs) == 0 && len(x.NotSourceIPs) == 0 &&
			x.Invalid&(FieldSourceIPs|FieldNotSourceIPs) == 0
	}
	return m.positive(x, FieldSourceIPs, len(x.SourceIPs), anyPrefix(x.SourceIPs, m.src)) &&
		m.negative(x, FieldNotSourceIPs, anyPrefix(x.NotSourceIPs, m.src))
}

// empty reports whether x constrains nothing.
func (x *Match) empty() bool {
	return x.Invalid == 0 &&
		len(x.Namespaces) == 0 && len(x.NotNamespaces) == 0 &&
		len(x.Principals) == 0 && len(x.NotPrincipals) == 0 &&
		len(x.SourceIPs) == 0 && len(x.NotSourceIPs) == 0 &&
		len(x.DestinationIPs) == 0 && len(x.NotDestinationIPs) == 0 &&
		len(x.DestinationPorts) == 0 && len(x.NotDestinationPorts) == 0 &&
		len(x.ServiceAccounts) == 0 && len(x.NotServiceAccounts) == 0
}

// Matches reports whether s satisfies the match.
func (sm StringMatch) Matches(s string) bool {
	switch sm.Kind {
	case Exact:
		return s == sm.Value
	case Prefix:
		return strings.HasPrefix(s, sm.Value)
	case Suffix:
		return strings.HasSuffix(s, sm.Value)
	case Presence:
		return s != ""
	}
	return false
}

func anyString(ms []StringMatch, s string) bool {
	for _, sm := range ms {
		if sm.Matches(s) {
			return true
		}
	}
	return false
}

// anyPrincipal: without an identity nothing is hit, whatever the pattern.
func (m *matcher) anyPrincipal(ms []StringMatch) bool {
	if !m.q.HasID || len(ms) == 0 {
		return false
	}
	if m.principal == "" { // an identity's text is never empty
		m.principal = strings.TrimPrefix(m.q.ID.String(), spiffePrefix)
	}
	return anyString(ms, m.principal)
}

func (m *matcher) anyAccount(as []ServiceAccount) bool {
	if !m.q.HasID {
		return false
	}
	for _, a := range as {
		if a.Namespace == m.q.ID.Namespace && a.Name == m.q.ID.ServiceAccount {
			return true
		}
	}
	return false
}

// anyPrefix: the families never match each other, and bits behind the prefix
// length do not count.
func anyPrefix(ps []netip.Prefix, a netip.Addr) bool {
	for _, p := range ps {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func anyPort(ps []uint16, port uint16) bool {
	for _, p := range ps {
		if p == port {
			return true
		}
	}
	return false
}
