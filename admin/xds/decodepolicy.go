package xds

import (
	"errors"
	"fmt"
	"net/netip"

	"ztun/admin/pb/securitypb"
	"ztun/proxy/rbac"
)

// policy reads an istio.security.Authorization (spec controlplane 3.3) under
// the name of its resource. Entries that make no sense are left out and mark
// their list in Match.Invalid, so that the policy can only reject more; damage
// names the first of them, "" if there are none.
func (d *decoder) policy(name string, payload []byte) (p *rbac.Policy, damage string, err error) {
	var x securitypb.Authorization
	if err := unmarshal(payload, &x); err != nil {
		return nil, "", err
	}
	p = &rbac.Policy{
		Key: name, Name: d.str(x.Name), Namespace: d.str(x.Namespace),
		Scope: rbac.Scope(x.Scope), Action: rbac.Action(x.Action), DryRun: x.DryRun,
		Rules: make([]rbac.Rule, len(x.Rules)),
	}
	if _, ok := securitypb.Scope_name[int32(x.Scope)]; !ok {
		return nil, "", fmt.Errorf("unknown scope %v", x.Scope)
	}
	if _, ok := securitypb.Action_name[int32(x.Action)]; !ok {
		return nil, "", fmt.Errorf("unknown action %v", x.Action)
	}
	if p.Scope == rbac.ScopeNamespace && p.Namespace == "" {
		return nil, "", errors.New("scope NAMESPACE without a namespace applies to nothing")
	}
	for i, r := range x.Rules {
		p.Rules[i] = make(rbac.Rule, len(r.GetClauses()))
		for k, c := range r.GetClauses() {
			clause := make(rbac.Clause, len(c.GetMatches()))
			for n, m := range c.GetMatches() {
				pm := policyMatch{d: d, damage: &damage, where: fmt.Sprintf("rules[%d].clauses[%d].matches[%d]", i, k, n)}
				clause[n] = pm.read(m)
			}
			p.Rules[i][k] = clause
		}
	}
	return p, damage, nil
}

// policyMatch reads one match.
type policyMatch struct {
	d      *decoder
	m      rbac.Match
	damage *string // the first one in the policy
	where  string
}

func (r *policyMatch) read(x *securitypb.Match) rbac.Match {
	r.m.Namespaces = r.strings(rbac.FieldNamespaces, "namespaces", x.Namespaces)
	r.m.NotNamespaces = r.strings(rbac.FieldNotNamespaces, "not_namespaces", x.NotNamespaces)
	r.m.Principals = r.strings(rbac.FieldPrincipals, "principals", x.Principals)
	r.m.NotPrincipals = r.strings(rbac.FieldNotPrincipals, "not_principals", x.NotPrincipals)
	r.m.SourceIPs = r.ranges(rbac.FieldSourceIPs, "source_ips", x.SourceIps)
	r.m.NotSourceIPs = r.ranges(rbac.FieldNotSourceIPs, "not_source_ips", x.NotSourceIps)
	r.m.DestinationIPs = r.ranges(rbac.FieldDestinationIPs, "destination_ips", x.DestinationIps)
	r.m.NotDestinationIPs = r.ranges(rbac.FieldNotDestinationIPs, "not_destination_ips", x.NotDestinationIps)
	r.m.DestinationPorts = r.ports(rbac.FieldDestinationPorts, "destination_ports", x.DestinationPorts)
	r.m.NotDestinationPorts = r.ports(rbac.FieldNotDestinationPorts, "not_destination_ports", x.NotDestinationPorts)
	r.m.ServiceAccounts = r.accounts(x.ServiceAccounts)
	r.m.NotServiceAccounts = r.accounts(x.NotServiceAccounts)
	return r.m
}

// lost marks a list that lost an entry.
func (r *policyMatch) lost(f rbac.Field, name string, why error) {
	r.m.Invalid |= f
	if *r.damage == "" {
		*r.damage = fmt.Sprintf("%s.%s: %v", r.where, name, why)
	}
}

// strings reads string matches. One with an empty text is taken for a mistake
// too: as a prefix it would match everybody, and as a namespace those without
// identity.
func (r *policyMatch) strings(f rbac.Field, name string, l []*securitypb.StringMatch) (out []rbac.StringMatch) {
	for _, x := range l {
		var sm rbac.StringMatch
		switch t := x.GetMatchType().(type) {
		case *securitypb.StringMatch_Exact:
			sm = rbac.StringMatch{Kind: rbac.Exact, Value: r.d.str(t.Exact)}
		case *securitypb.StringMatch_Prefix:
			sm = rbac.StringMatch{Kind: rbac.Prefix, Value: r.d.str(t.Prefix)}
		case *securitypb.StringMatch_Suffix:
			sm = rbac.StringMatch{Kind: rbac.Suffix, Value: r.d.str(t.Suffix)}
		case *securitypb.StringMatch_Presence:
			out = append(out, rbac.StringMatch{Kind: rbac.Presence})
			continue
		default:
			r.lost(f, name, errors.New("a string match of no kind"))
			continue
		}
		if sm.Value == "" {
			r.lost(f, name, errors.New("an empty string match"))
			continue
		}
		out = append(out, sm)
	}
	return out
}

func (r *policyMatch) ranges(f rbac.Field, name string, l []*securitypb.Address) (out []netip.Prefix) {
	for _, x := range l {
		p, err := prefix(x.GetAddress(), x.GetLength())
		if err != nil {
			r.lost(f, name, err)
			continue
		}
		out = append(out, p)
	}
	return out
}

func (r *policyMatch) ports(f rbac.Field, name string, l []uint32) (out []uint16) {
	for _, n := range l {
		p, err := port(n)
		if err != nil {
			r.lost(f, name, err)
			continue
		}
		out = append(out, p)
	}
	return out
}

func (r *policyMatch) accounts(l []*securitypb.ServiceAccountMatch) (out []rbac.ServiceAccount) {
	for _, x := range l {
		out = append(out, rbac.ServiceAccount{Namespace: r.d.str(x.GetNamespace()), Name: r.d.str(x.GetServiceAccount())})
	}
	return out
}
