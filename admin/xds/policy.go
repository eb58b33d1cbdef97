package xds

import (
	"net/netip"

	"go.yaml.in/yaml/v3"

	"ztun/proxy/rbac"
)

func readPolicy(v *value) *rbac.Policy {
	p := &rbac.Policy{}
	v.object(&policyObject, func(key string, x *value) {
		switch key {
		case "name":
			p.Name = x.str()
		case "namespace":
			p.Namespace = x.str()
		case "scope":
			p.Scope = enum(x, rbac.ScopeGlobal, rbac.ScopeNamespace, rbac.ScopeWorkloadSelector)
		case "action":
			p.Action = enum(x, rbac.Allow, rbac.Deny)
		case "dryRun":
			p.DryRun = x.boolean()
		case "rules":
			x.list(func(x *value) {
				rule := rbac.Rule{}
				x.list(func(x *value) {
					clause := rbac.Clause{}
					x.list(func(x *value) { clause = append(clause, readMatch(x)) })
					rule = append(rule, clause)
				})
				p.Rules = append(p.Rules, rule)
			})
		}
	})
	p.Key = p.Namespace + "/" + p.Name
	return p
}

func readMatch(v *value) (m rbac.Match) {
	if v.null() {
		v.fail("want a map, found nothing ({} is a match without conditions, which never holds)")
		return m
	}
	v.object(&matchObject, func(key string, x *value) {
		switch key {
		case "namespaces":
			m.Namespaces = readStrings(x)
		case "notNamespaces":
			m.NotNamespaces = readStrings(x)
		case "principals":
			m.Principals = readStrings(x)
		case "notPrincipals":
			m.NotPrincipals = readStrings(x)
		case "serviceAccounts":
			m.ServiceAccounts = readAccounts(x)
		case "notServiceAccounts":
			m.NotServiceAccounts = readAccounts(x)
		case "sourceIps":
			m.SourceIPs = readPrefixes(x)
		case "notSourceIps":
			m.NotSourceIPs = readPrefixes(x)
		case "destinationIps":
			m.DestinationIPs = readPrefixes(x)
		case "notDestinationIps":
			m.NotDestinationIPs = readPrefixes(x)
		case "destinationPorts":
			m.DestinationPorts = readPortList(x)
		case "notDestinationPorts":
			m.NotDestinationPorts = readPortList(x)
		}
	})
	return m
}

func readPrefixes(v *value) (l []netip.Prefix) {
	v.list(func(x *value) { l = append(l, x.prefix()) })
	return l
}

func readPortList(v *value) (l []uint16) {
	v.list(func(x *value) {
		if x.null() {
			x.fail("want a port number, found nothing")
		}
		l = append(l, x.port())
	})
	return l
}

func readAccounts(v *value) (l []rbac.ServiceAccount) {
	v.list(func(x *value) {
		var a rbac.ServiceAccount
		x.object(&accountObject, func(key string, x *value) {
			switch key {
			case "namespace":
				a.Namespace = x.str()
			case "serviceAccount":
				a.Name = x.str()
			}
		})
		l = append(l, a)
	})
	return l
}

func readStrings(v *value) (l []rbac.StringMatch) {
	v.list(func(x *value) { l = append(l, readString(x)) })
	return l
}

// readString reads "!Exact x" or "{Exact: x}"; the value of Presence is an
// empty list or nothing.
func readString(v *value) rbac.StringMatch {
	kinds := [...]rbac.StringKind{rbac.Exact, rbac.Prefix, rbac.Suffix, rbac.Presence}
	for _, k := range kinds {
		if v.n.Tag != "!"+k.String() {
			continue
		}
		switch {
		case k == rbac.Presence:
			if len(v.n.Content) > 0 || v.n.Kind == yaml.ScalarNode && v.n.Value != "" {
				v.fail("Presence takes no value: !Presence []")
			}
		case v.n.Kind != yaml.ScalarNode:
			v.fail("want a string after %s", v.n.Tag)
		default:
			return rbac.StringMatch{Kind: k, Value: v.r.intern(v.n.Value)}
		}
		return rbac.StringMatch{Kind: k}
	}
	if v.n.Kind != yaml.MappingNode || len(v.n.Content) != 2 {
		v.fail("want !Exact x, !Prefix x, !Suffix x or !Presence [], found %s", v.describe())
		return rbac.StringMatch{}
	}
	var sm rbac.StringMatch
	v.object(&stringObject, func(key string, x *value) {
		for _, k := range kinds {
			if key != k.String() {
				continue
			}
			sm.Kind = k
			switch {
			case k != rbac.Presence:
				if x.null() {
					x.fail("needs a value")
				}
				sm.Value = x.str()
			case !x.null() && (x.n.Kind != yaml.SequenceNode || len(x.n.Content) > 0):
				x.fail("Presence takes no value: {Presence: []}")
			}
		}
	})
	return sm
}
