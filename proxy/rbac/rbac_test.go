package rbac

import (
	"net/netip"
	"strings"
	"testing"

	"ztun/proxy/identity"
)

func id(s string) identity.ID {
	id, err := identity.Parse(s)
	if err != nil {
		panic(err)
	}
	return id
}

// conn is 10.0.0.1 -> 10.0.0.2:80 by spiffe://td/ns/front/sa/web.
func question(change ...func(*Question)) Question {
	c := Question{
		Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddrPort("10.0.0.2:80"),
		ID: id("spiffe://td/ns/front/sa/web"), HasID: true,
	}
	for _, f := range change {
		f(&c)
	}
	return c
}

func anonymous(c *Question) { c.ID, c.HasID = identity.ID{}, false }

func from(ip string) func(*Question) {
	return func(c *Question) { c.Src = netip.MustParseAddr(ip) }
}

func to(addr string) func(*Question) {
	return func(c *Question) { c.Dst = netip.MustParseAddrPort(addr) }
}

func exact(s string) []StringMatch  { return []StringMatch{{Exact, s}} }
func prefix(s string) []StringMatch { return []StringMatch{{Prefix, s}} }
func suffix(s string) []StringMatch { return []StringMatch{{Suffix, s}} }

var presence = []StringMatch{{Kind: Presence}}

func cidr(ss ...string) (l []netip.Prefix) {
	for _, s := range ss {
		l = append(l, netip.MustParsePrefix(s))
	}
	return l
}

// Section 7.4: the empty lists of the Boolean structure.
func TestStructure(t *testing.T) {
	port := func(p uint16) Match { return Match{DestinationPorts: []uint16{p}} }
	for _, tt := range []struct {
		name  string
		rules []Rule
		want  bool
	}{
		{"no rules", nil, false},
		{"a rule without clauses", []Rule{{}}, true},
		{"a clause without matches", []Rule{{{}}}, true},
		{"a match without constraint", []Rule{{{{}}}}, false},
		{"an empty match is skipped, the other hits", []Rule{{{{}, port(80)}}}, true},
		{"an empty match is skipped, the other misses", []Rule{{{{}, port(81)}}}, false},
		{"rules are alternatives", []Rule{{{port(81)}}, {{port(80)}}}, true},
		{"clauses are all needed", []Rule{{{port(80)}, {port(81)}}}, false},
		{"matches are alternatives", []Rule{{{port(81), port(80)}}}, true},
		{"an empty clause beside one that misses", []Rule{{{}, {port(81)}}}, false},
		{"an empty match makes a clause false", []Rule{{{{}}, {port(80)}}}, false},
		{"the second rule is empty", []Rule{{{port(81)}}, {}}, true},
	} {
		for _, action := range []Action{Allow, Deny} {
			p := &Policy{Action: action, Rules: tt.rules}
			if got := p.Matches(question()); got != tt.want {
				t.Errorf("%s (%s): %v, want %v", tt.name, action, got, tt.want)
			}
		}
	}
}

// Section 7.5: what each field is compared with.
func TestFields(t *testing.T) {
	accounts := func(ns, sa string) []ServiceAccount { return []ServiceAccount{{ns, sa}} }
	for _, tt := range []struct {
		name string
		m    Match
		c    Question
		want bool
	}{
		{"destination ip", Match{DestinationIPs: cidr("10.0.0.0/24")}, question(), true},
		{"destination ip, single", Match{DestinationIPs: cidr("10.0.0.2/32")}, question(), true},
		{"destination ip, other", Match{DestinationIPs: cidr("10.0.1.0/24")}, question(), false},
		{"destination ip, second of two", Match{DestinationIPs: cidr("10.0.1.0/24", "10.0.0.2/32")}, question(), true},
		{"destination ip, host bits set", Match{DestinationIPs: cidr("10.0.0.77/24")}, question(), true},
		{"destination ip, everything", Match{DestinationIPs: cidr("0.0.0.0/0")}, question(), true},
		{"destination ip, other family", Match{DestinationIPs: cidr("::/0")}, question(), false},
		{"destination ip, IPv6", Match{DestinationIPs: cidr("fd00::/64")}, question(to("[fd00::2]:80")), true},
		{"destination ip, IPv4 in IPv6 clothes", Match{DestinationIPs: cidr("10.0.0.0/24")},
			question(to("[::ffff:10.0.0.2]:80")), true},
		{"not destination ip, hit", Match{NotDestinationIPs: cidr("10.0.0.0/24")}, question(), false},
		{"not destination ip, other family", Match{NotDestinationIPs: cidr("::/0")}, question(), true},
		{"source ip", Match{SourceIPs: cidr("10.0.0.0/31")}, question(), true},
		{"source ip, other", Match{SourceIPs: cidr("10.0.0.2/32")}, question(), false},
		{"source ip, IPv4 in IPv6 clothes", Match{SourceIPs: cidr("10.0.0.1/32")}, question(from("::ffff:10.0.0.1")), true},
		{"not source ip", Match{NotSourceIPs: cidr("10.0.0.0/31")}, question(), false},
		{"source ip in range but not this one", Match{SourceIPs: cidr("10.0.0.0/8"), NotSourceIPs: cidr("10.0.0.1/32")},
			question(), false},
		{"port", Match{DestinationPorts: []uint16{1, 80}}, question(), true},
		{"port, other", Match{DestinationPorts: []uint16{1, 8080}}, question(), false},
		{"not port", Match{NotDestinationPorts: []uint16{80}}, question(), false},
		{"not port, other", Match{NotDestinationPorts: []uint16{1}}, question(), true},
		{"port and source are both needed", Match{DestinationPorts: []uint16{80}, SourceIPs: cidr("10.9.0.0/16")},
			question(), false},

		{"principal, exact, without scheme", Match{Principals: exact("td/ns/front/sa/web")}, question(), true},
		{"principal, exact, with scheme", Match{Principals: exact("spiffe://td/ns/front/sa/web")}, question(), false},
		{"principal, letter case", Match{Principals: exact("td/ns/Front/sa/web")}, question(), false},
		{"principal, prefix", Match{Principals: prefix("td/ns/front/")}, question(), true},
		{"principal, prefix with scheme", Match{Principals: prefix("spiffe://")}, question(), false},
		{"principal, suffix", Match{Principals: suffix("/sa/web")}, question(), true},
		{"principal, presence", Match{Principals: presence}, question(), true},
		{"principal, presence, anonymous", Match{Principals: presence}, question(anonymous), false},
		{"principal, empty prefix, anonymous", Match{Principals: prefix("")}, question(anonymous), false},
		{"principal, empty exact, anonymous", Match{Principals: exact("")}, question(anonymous), false},
		{"not principal, presence, anonymous", Match{NotPrincipals: presence}, question(anonymous), true},
		{"not principal, presence", Match{NotPrincipals: presence}, question(), false},
		{"not principal, other", Match{NotPrincipals: exact("td/ns/x/sa/y")}, question(), true},

		{"namespace", Match{Namespaces: exact("front")}, question(), true},
		{"namespace, part", Match{Namespaces: exact("fron")}, question(), false},
		{"namespace, prefix", Match{Namespaces: prefix("fr")}, question(), true},
		{"namespace, suffix", Match{Namespaces: suffix("nt")}, question(), true},
		{"namespace, presence", Match{Namespaces: presence}, question(), true},
		{"namespace, presence, anonymous", Match{Namespaces: presence}, question(anonymous), false},
		{"namespace, exact empty, anonymous", Match{Namespaces: exact("")}, question(anonymous), true},
		{"namespace, prefix empty, anonymous", Match{Namespaces: prefix("")}, question(anonymous), true},
		{"not namespace, anonymous", Match{NotNamespaces: exact("x")}, question(anonymous), true},
		{"not namespace, hit", Match{NotNamespaces: exact("front")}, question(), false},

		{"service account", Match{ServiceAccounts: accounts("front", "web")}, question(), true},
		{"service account, other trust domain", Match{ServiceAccounts: accounts("front", "web")},
			question(func(c *Question) { c.ID.TrustDomain = "elsewhere" }), true},
		{"service account, other namespace", Match{ServiceAccounts: accounts("back", "web")}, question(), false},
		{"service account, other name", Match{ServiceAccounts: accounts("front", "job")}, question(), false},
		{"service account, anonymous", Match{ServiceAccounts: accounts("", "")}, question(anonymous), false},
		{"not service account", Match{NotServiceAccounts: accounts("front", "web")}, question(), false},
		{"not service account, anonymous", Match{NotServiceAccounts: accounts("front", "web")}, question(anonymous), true},

		{"a string match without kind", Match{Namespaces: []StringMatch{{Value: "front"}}}, question(), false},
	} {
		p := &Policy{Rules: []Rule{{{tt.m}}}}
		if got := p.Matches(tt.c); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// Section 7.3.
func TestEvaluate(t *testing.T) {
	always, never := []Rule{{}}, []Rule(nil)
	pol := func(key string, a Action, rules []Rule, dry bool) *Policy {
		return &Policy{Key: key, Action: a, Rules: rules, DryRun: dry}
	}
	const enforced, dry = false, true
	for _, tt := range []struct {
		name   string
		ps     []*Policy
		want   bool
		reason Reason
		policy string
		text   string
		dryRun int

		missing string // keys
		strict  string // the text if missing policies deny; "": text
	}{
		{name: "no policy", want: true, reason: ReasonNoAllowPolicy},
		{name: "nil policies", ps: []*Policy{nil}, want: true, reason: ReasonNoAllowPolicy},
		{name: "deny that misses", ps: []*Policy{pol("n/d", Deny, never, enforced)}, want: true, reason: ReasonNoAllowPolicy},
		{name: "deny", ps: []*Policy{pol("n/d", Deny, always, enforced)}, reason: ReasonDenied, policy: "n/d",
			text: "connection closed due to policy rejection: explicitly denied by: n/d"},
		{name: "deny wins over allow", ps: []*Policy{pol("n/a", Allow, always, enforced), pol("n/d", Deny, always, enforced)},
			reason: ReasonDenied, policy: "n/d", text: "connection closed due to policy rejection: explicitly denied by: n/d"},
		{name: "the first deny is named", ps: []*Policy{pol("n/d1", Deny, always, enforced),
			pol("n/d2", Deny, always, enforced)},
			reason: ReasonDenied, policy: "n/d1", text: "connection closed due to policy rejection: explicitly denied by: n/d1"},
		{name: "allow", ps: []*Policy{pol("n/a", Allow, always, enforced)}, want: true, reason: ReasonAllowed, policy: "n/a"},
		{name: "allow that misses", ps: []*Policy{pol("n/a", Allow, never, enforced)}, reason: ReasonNotAllowed,
			text: "connection closed due to policy rejection: allow policies exist, but none allowed"},
		{name: "one allow of two", ps: []*Policy{pol("n/a", Allow, never, enforced), pol("n/b", Allow, always, enforced)},
			want: true, reason: ReasonAllowed, policy: "n/b"},
		{name: "dry-run deny", ps: []*Policy{pol("n/d", Deny, always, dry)}, want: true, reason: ReasonNoAllowPolicy,
			dryRun: 1},
		{name: "dry-run allow only, misses", ps: []*Policy{pol("n/a", Allow, never, dry)}, want: true,
			reason: ReasonNoAllowPolicy},
		{name: "dry-run allow does not allow", ps: []*Policy{pol("n/a", Allow, always, dry),
			pol("n/b", Allow, never, enforced)},
			reason: ReasonNotAllowed, dryRun: 1,
			text: "connection closed due to policy rejection: allow policies exist, but none allowed"},
		{name: "missing", ps: []*Policy{Missing("n/m"), Missing("n/o")}, want: true, reason: ReasonNoAllowPolicy,
			missing: "n/m n/o",
			strict:  "connection closed due to policy rejection: explicitly denied by: n/m (policy not loaded)"},
		{name: "missing beside an allow", ps: []*Policy{Missing("n/m"), pol("n/a", Allow, always, enforced)},
			want: true, reason: ReasonAllowed, policy: "n/a", missing: "n/m",
			strict: "connection closed due to policy rejection: explicitly denied by: n/m (policy not loaded)"},
		{name: "missing beside an allow that misses", ps: []*Policy{Missing("n/m"), pol("n/a", Allow, never, enforced)},
			reason: ReasonNotAllowed, missing: "n/m",
			text: "connection closed due to policy rejection: allow policies exist, but none allowed"},
		{name: "missing beside a deny", ps: []*Policy{Missing("n/m"), pol("n/d", Deny, always, enforced)},
			reason: ReasonDenied, policy: "n/d",
			text: "connection closed due to policy rejection: explicitly denied by: n/d"},
	} {
		v := Evaluate(tt.ps, question())
		explained(t, tt.ps, question())
		if v.Allowed != tt.want || v.Reason != tt.reason || v.Policy != tt.policy || len(v.DryRun) != tt.dryRun {
			t.Errorf("%s: %+v", tt.name, v)
		}
		if err := v.Err(); (err == nil) != tt.want || err != nil && err.Error() != tt.text {
			t.Errorf("%s: error %v", tt.name, err)
		}
		if got := strings.Join(v.Missing, " "); got != tt.missing {
			t.Errorf("%s: missing %q, want %q", tt.name, got, tt.missing)
		}
		strict := tt.strict
		if strict == "" {
			strict = tt.text
		}
		if err := v.Strict().Err(); (err == nil) != (strict == "") || err != nil && err.Error() != strict {
			t.Errorf("%s: strict: error %v, want %q", tt.name, err, strict)
		}
	}
}

func TestDryRunHint(t *testing.T) {
	miss := &Policy{Key: "n/a", Action: Allow, DryRun: true}
	hit := &Policy{Key: "n/b", Action: Allow, DryRun: true, Rules: []Rule{{}}}
	enforced := &Policy{Key: "n/c", Action: Allow, Rules: []Rule{{}}}
	for _, tt := range []struct {
		ps   []*Policy
		want bool
	}{
		{[]*Policy{miss}, true},
		{[]*Policy{miss, hit}, false},
		{[]*Policy{miss, enforced}, false},
		{nil, false},
	} {
		explained(t, tt.ps, question())
		if v := Evaluate(tt.ps, question()); v.OnlyDryRunAllow != tt.want {
			t.Errorf("%d policies: %+v", len(tt.ps), v)
		}
	}
}

// What istiod makes of PeerAuthentication (section 7.6).
func TestStrict(t *testing.T) {
	strict := &Policy{Key: "istio-system/istio_converted_static_strict", Action: Deny, Scope: ScopeWorkloadSelector,
		Rules: []Rule{{{{NotPrincipals: presence}}}}}
	portPermissive := &Policy{Key: "front/istio_converted_pa", Action: Deny, Scope: ScopeWorkloadSelector,
		Rules: []Rule{{{{NotPrincipals: presence}}, {{NotDestinationPorts: []uint16{8080}}}}}}
	for _, tt := range []struct {
		p    *Policy
		c    Question
		want bool
	}{
		{strict, question(), true},
		{strict, question(anonymous), false},
		{portPermissive, question(), true},
		{portPermissive, question(anonymous), false},
		{portPermissive, question(anonymous, to("10.0.0.2:8080")), true},
	} {
		explained(t, []*Policy{tt.p}, tt.c)
		if v := Evaluate([]*Policy{tt.p}, tt.c); v.Allowed != tt.want {
			t.Errorf("%s, identity %v, port %d: %+v", tt.p.Key, tt.c.HasID, tt.c.Dst.Port(), v)
		}
	}
}

// A list that lost an entry decides against the connection.
func TestInvalid(t *testing.T) {
	for _, tt := range []struct {
		name        string
		m           Match
		allow, deny bool // whether an ALLOW and a DENY policy match
	}{
		{"the only source ip is lost", Match{Invalid: FieldSourceIPs}, false, true},
		{"one source ip of two is lost, the other hits", Match{SourceIPs: cidr("10.0.0.1/32"), Invalid: FieldSourceIPs},
			true, true},
		{"one source ip of two is lost, the other misses", Match{SourceIPs: cidr("10.9.0.1/32"), Invalid: FieldSourceIPs},
			false, true},
		{"an excluded source ip is lost", Match{Invalid: FieldNotSourceIPs}, false, true},
		{"an excluded source ip is lost, another hits", Match{NotSourceIPs: cidr("10.0.0.1/32"), Invalid: FieldNotSourceIPs},
			false, false},
		{"a principal is lost, the port misses", Match{DestinationPorts: []uint16{1}, Invalid: FieldPrincipals},
			false, false},
		{"a namespace is lost, the port hits", Match{DestinationPorts: []uint16{80}, Invalid: FieldNamespaces}, false, true},
	} {
		for action, want := range map[Action]bool{Allow: tt.allow, Deny: tt.deny} {
			p := &Policy{Action: action, Rules: []Rule{{{tt.m}}}}
			if got := p.Matches(question()); got != want {
				t.Errorf("%s: %s matches: %v, want %v", tt.name, action, got, want)
			}
		}
	}
}

func TestEvaluateAllocatesLittle(t *testing.T) {
	ps := []*Policy{
		{Key: "n/strict", Action: Deny, Rules: []Rule{{{{NotPrincipals: presence}}}}},
		{Key: "n/a", Action: Allow, Rules: []Rule{{{{DestinationPorts: []uint16{80}, SourceIPs: cidr("10.0.0.0/8")}}}}},
	}
	c := question()
	// The one allocation is the identity's text, made once for all policies.
	if n := testing.AllocsPerRun(100, func() { Evaluate(ps, c) }); n > 2 {
		t.Errorf("%v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { Evaluate(ps[1:], c) }); n > 0 {
		t.Errorf("%v allocations without principals", n)
	}
}

func BenchmarkEvaluate(b *testing.B) {
	ps := []*Policy{
		{Key: "n/strict", Action: Deny, Rules: []Rule{{{{NotPrincipals: presence}}}}},
		{Key: "n/a", Action: Allow,
			Rules: []Rule{{{{Principals: exact("td/ns/front/sa/web"), DestinationPorts: []uint16{80}}}}}},
	}
	c := question()
	b.ReportAllocs()
	for b.Loop() {
		Evaluate(ps, c)
	}
}

// A source address that is not the peer's own decides nothing: an ALLOW policy needs to match for certain, a DENY
// policy rejects what possibly matches, and lists of other things go on as before.
func TestUnknownSource(t *testing.T) {
	unknown := func(c *Question) { c.SrcUnknown = true }
	port := Match{DestinationPorts: []uint16{80}}
	for _, tt := range []struct {
		name        string
		m           Match
		allow, deny bool
	}{
		{"a list that it is in", Match{SourceIPs: cidr("10.0.0.1/32")}, false, true},
		{"a list that it is not in", Match{SourceIPs: cidr("10.9.0.0/16")}, false, true},
		{"everything", Match{SourceIPs: cidr("0.0.0.0/0")}, false, true},
		{"a negative list that it is in", Match{NotSourceIPs: cidr("10.0.0.1/32")}, false, true},
		{"a negative list that it is not in", Match{NotSourceIPs: cidr("10.9.0.0/16")}, false, true},
		{"a lost entry", Match{Invalid: FieldSourceIPs}, false, true},
		{"a lost negative entry", Match{Invalid: FieldNotSourceIPs}, false, true},
		{"another list, which hits", port, true, true},
		{"another list, which misses", Match{DestinationPorts: []uint16{81}, SourceIPs: cidr("10.0.0.1/32")}, false, false},
		{"no constraint", Match{}, false, false},
	} {
		for action, want := range map[Action]bool{Allow: tt.allow, Deny: tt.deny} {
			p := &Policy{Action: action, Rules: []Rule{{{tt.m}}}}
			if got := p.Matches(question(unknown)); got != want {
				t.Errorf("%s, %s: %v, want %v", tt.name, action, got, want)
			}
		}
	}
}
