package xds

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"ztun/admin/pb/securitypb"
	"ztun/proxy/identity"
	"ztun/proxy/rbac"
)

func exact(s string) *securitypb.StringMatch {
	return &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Exact{Exact: s}}
}

func policyPB(m ...*securitypb.Match) *securitypb.Authorization {
	return &securitypb.Authorization{Name: "p", Namespace: "ns", Scope: securitypb.Scope_NAMESPACE,
		Rules: []*securitypb.Rule{{Clauses: []*securitypb.Clause{{Matches: m}}}}}
}

func fullPolicyPB() *securitypb.Authorization {
	ip := func(s string, n uint32) *securitypb.Address {
		return &securitypb.Address{Address: netip.MustParseAddr(s).AsSlice(), Length: n}
	}
	prefix := &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Prefix{Prefix: "pre"}}
	suffix := &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Suffix{Suffix: "suf"}}
	presence := &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Presence{Presence: &emptypb.Empty{}}}
	x := policyPB(&securitypb.Match{
		Namespaces: []*securitypb.StringMatch{exact("a"), prefix}, NotNamespaces: []*securitypb.StringMatch{suffix},
		Principals: []*securitypb.StringMatch{presence}, NotPrincipals: []*securitypb.StringMatch{exact("td/ns/a/sa/b")},
		SourceIps: []*securitypb.Address{ip("10.0.0.0", 8)}, NotSourceIps: []*securitypb.Address{ip("2001:db8::", 32)},
		DestinationIps:    []*securitypb.Address{ip("::ffff:10.0.0.1", 128)},
		NotDestinationIps: []*securitypb.Address{ip("0.0.0.0", 0)},
		DestinationPorts:  []uint32{80, 443}, NotDestinationPorts: []uint32{22},
		ServiceAccounts:    []*securitypb.ServiceAccountMatch{{Namespace: "a", ServiceAccount: "b"}},
		NotServiceAccounts: []*securitypb.ServiceAccountMatch{{Namespace: "c", ServiceAccount: "d"}},
	}, &securitypb.Match{})
	x.Rules = append(x.Rules, &securitypb.Rule{})
	x.Scope, x.Action, x.DryRun = securitypb.Scope_WORKLOAD_SELECTOR, securitypb.Action_DENY, true
	return x
}

func fullPolicy(t testing.TB) []byte { return marshal(t, fullPolicyPB()) }

// Every field of a policy.
func TestDecodePolicy(t *testing.T) {
	want := &rbac.Policy{
		Key: "ns/key", Name: "p", Namespace: "ns", Scope: rbac.ScopeWorkloadSelector, Action: rbac.Deny, DryRun: true,
		Rules: []rbac.Rule{{{{
			Namespaces:        []rbac.StringMatch{{Kind: rbac.Exact, Value: "a"}, {Kind: rbac.Prefix, Value: "pre"}},
			NotNamespaces:     []rbac.StringMatch{{Kind: rbac.Suffix, Value: "suf"}},
			Principals:        []rbac.StringMatch{{Kind: rbac.Presence}},
			NotPrincipals:     []rbac.StringMatch{{Kind: rbac.Exact, Value: "td/ns/a/sa/b"}},
			SourceIPs:         []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
			NotSourceIPs:      []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")},
			DestinationIPs:    []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")},
			NotDestinationIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
			DestinationPorts:  []uint16{80, 443}, NotDestinationPorts: []uint16{22},
			ServiceAccounts:    []rbac.ServiceAccount{{Namespace: "a", Name: "b"}},
			NotServiceAccounts: []rbac.ServiceAccount{{Namespace: "c", Name: "d"}},
		}, {}}}, {}},
	}
	var d decoder
	got, damage, err := d.policy("ns/key", fullPolicy(t))
	if err != nil || damage != "" {
		t.Fatal(damage, err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(rbac.Policy{}), cmp.Comparer(func(a, b netip.Prefix) bool {
		return a == b
	})); diff != "" {
		t.Fatal(diff)
	}
}

// checklist 41: Clause.matches is field 2. Written by hand, byte by byte.
func TestClauseFieldNumber(t *testing.T) {
	bytesField := func(n protowire.Number, b []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), b)
	}
	match := protowire.AppendVarint(protowire.AppendTag(nil, 9, protowire.VarintType), 80) // destination_ports
	for field, want := range map[protowire.Number]int{1: 0, 2: 1} {
		payload := append(bytesField(1, []byte("p")), bytesField(5, bytesField(1, bytesField(field, match)))...)
		var d decoder
		p, _, err := d.policy("k", payload)
		if err != nil || len(p.Rules) != 1 || len(p.Rules[0]) != 1 || len(p.Rules[0][0]) != want {
			t.Errorf("field %d: %+v %v", field, p, err)
		}
	}
}

func TestDecodePolicyRefused(t *testing.T) {
	for want, change := range map[string]func(*securitypb.Authorization){
		"unknown scope 3":         func(x *securitypb.Authorization) { x.Scope = 3 },
		"unknown action 2":        func(x *securitypb.Authorization) { x.Action = 2 },
		"without a namespace":     func(x *securitypb.Authorization) { x.Namespace = "" },
		"cannot decode: ":         nil,
		"cannot decode: proto: c": nil,
	} {
		x := policyPB()
		payload := []byte{0x0a, 0xff}
		if change != nil {
			change(x)
			payload = marshal(t, x)
		}
		var d decoder
		p, _, err := d.policy("k", payload)
		if p != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v %v, want %q", p, err, want)
		}
	}
}

// spec controlplane 12.26: entries that make no sense never widen a policy. An
// ALLOW policy with only such an entry admits nobody, a DENY policy rejects
// everybody, in the positive list and in the negative one.
func TestDamagedPolicyNeverWidens(t *testing.T) {
	none := []*securitypb.StringMatch{{}}
	empty := []*securitypb.StringMatch{exact("")}
	emptyPrefix := []*securitypb.StringMatch{{MatchType: &securitypb.StringMatch_Prefix{}}}
	emptySuffix := []*securitypb.StringMatch{{MatchType: &securitypb.StringMatch_Suffix{}}}
	badIP := []*securitypb.Address{{Address: []byte{1, 2, 3}, Length: 8}}
	badLen := []*securitypb.Address{{Address: []byte{1, 2, 3, 4}, Length: 33}}
	mapped := []*securitypb.Address{{Address: netip.MustParseAddr("::ffff:1.2.3.4").AsSlice(), Length: 95}}
	matches := map[string]*securitypb.Match{}
	for kind, l := range map[string][]*securitypb.StringMatch{"of no kind": none, "empty string": empty,
		"an empty string match": emptyPrefix, "empty string match": emptySuffix} {
		matches["namespaces: "+kind] = &securitypb.Match{Namespaces: l}
		matches["not_namespaces: "+kind] = &securitypb.Match{NotNamespaces: l}
		matches["principals: "+kind] = &securitypb.Match{Principals: l}
		matches["not_principals: "+kind] = &securitypb.Match{NotPrincipals: l}
	}
	for kind, l := range map[string][]*securitypb.Address{"3 bytes": badIP, "length 33": badLen, "length 95": mapped} {
		matches["source_ips: "+kind] = &securitypb.Match{SourceIps: l}
		matches["not_source_ips: "+kind] = &securitypb.Match{NotSourceIps: l}
		matches["destination_ips: "+kind] = &securitypb.Match{DestinationIps: l}
		matches["not_destination_ips: "+kind] = &securitypb.Match{NotDestinationIps: l}
	}
	matches["destination_ports: port 65616"] = &securitypb.Match{DestinationPorts: []uint32{65536 + 80}}
	matches["not_destination_ports: port 65616"] = &securitypb.Match{NotDestinationPorts: []uint32{65536 + 80}}

	conns := []rbac.Question{
		{Src: netip.MustParseAddr("1.2.3.4"), Dst: netip.MustParseAddrPort("1.2.3.4:80")},
		{Src: netip.MustParseAddr("1.2.3.4"), Dst: netip.MustParseAddrPort("1.2.3.4:80"), HasID: true,
			ID: identity.ID{TrustDomain: "td", Namespace: "ns", ServiceAccount: "sa"}},
		{Src: netip.MustParseAddr("2001:db8::1"), Dst: netip.MustParseAddrPort("[2001:db8::2]:443"), HasID: true},
	}
	for name, m := range matches {
		for _, action := range []securitypb.Action{securitypb.Action_ALLOW, securitypb.Action_DENY} {
			x := policyPB(m)
			x.Action = action
			var d decoder
			p, damage, err := d.policy("k", marshal(t, x))
			field, why, _ := strings.Cut(name, ": ")
			if err != nil || !strings.HasPrefix(damage, "rules[0].clauses[0].matches[0]."+field+": ") ||
				!strings.Contains(damage, why) {
				t.Fatalf("%s: damage %q, %v", name, damage, err)
			}
			for _, c := range conns {
				if got, want := p.Matches(c), action == securitypb.Action_DENY; got != want {
					t.Errorf("%s, %v, %+v: matches %v", name, action, c, got)
				}
			}
		}
	}
	// Good entries beside a bad one still count.
	var d decoder
	p, _, err := d.policy("k",
		marshal(t,
			policyPB(&securitypb.Match{SourceIps: []*securitypb.Address{badIP[0], {Address: []byte{1, 2, 3, 0}, Length: 24}}})))
	if err != nil || !p.Matches(conns[0]) || p.Matches(conns[2]) {
		t.Error(p, err)
	}
}

// A policy decodes whole or not at all, and one that lost something says so.
func FuzzPolicy(f *testing.F) {
	f.Add(fullPolicy(f))
	f.Add(
		marshal(f,
			policyPB(&securitypb.Match{Namespaces: []*securitypb.StringMatch{{}}, SourceIps: []*securitypb.Address{{}}})))
	f.Fuzz(func(t *testing.T, payload []byte) {
		var d decoder
		p, damage, err := d.policy("k", payload)
		if (p == nil) == (err == nil) {
			t.Fatal(p, err)
		}
		if err != nil {
			return
		}
		var x securitypb.Authorization
		if err := proto.Unmarshal(payload, &x); err != nil {
			t.Fatal(err)
		}
		invalid := false
		for i, r := range p.Rules {
			for k, c := range r {
				for n := range c {
					m, y := &c[n], x.Rules[i].Clauses[k].Matches[n]
					invalid = invalid || m.Invalid != 0
					// A list that was given is never one that was not.
					if len(y.SourceIps) > 0 && len(m.SourceIPs) == 0 && m.Invalid&rbac.FieldSourceIPs == 0 ||
						len(y.Principals) > 0 && len(m.Principals) == 0 && m.Invalid&rbac.FieldPrincipals == 0 ||
						len(y.NotNamespaces) > 0 && len(m.NotNamespaces) == 0 && m.Invalid&rbac.FieldNotNamespaces == 0 ||
						len(y.DestinationPorts) > 0 && len(m.DestinationPorts) == 0 && m.Invalid&rbac.FieldDestinationPorts == 0 {
						t.Fatalf("%v became %+v", y, m)
					}
				}
			}
		}
		if invalid != (damage != "") {
			t.Fatal(invalid, damage)
		}
		p.Matches(rbac.Question{Src: netip.MustParseAddr("1.2.3.4"), Dst: netip.MustParseAddrPort("1.2.3.4:80")})
	})
}
