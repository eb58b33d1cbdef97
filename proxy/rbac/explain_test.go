package rbac

import (
	"reflect"
	"testing"
)

// explained holds Explain against Evaluate: the same verdict, and hits from which that verdict follows.
func explained(t interface {
	Helper()
	Errorf(string, ...any)
}, ps []*Policy, c Question) {
	t.Helper()
	want := Evaluate(ps, c)
	got, hits := Explain(ps, c)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("explained is %+v, evaluated %+v", got, want)
	}
	follows, allows := Verdict{Allowed: true, Reason: ReasonNoAllowPolicy}, 0
	for _, h := range hits {
		if h.Rule >= 0 && !h.Policy.Matches(c) || h.Rule < 0 && h.Policy.Matches(c) || h.Rule >= len(h.Policy.Rules) {
			t.Errorf("%s: rule %d of %d, matches: %v", h.Policy.Key, h.Rule, len(h.Policy.Rules), h.Policy.Matches(c))
		}
		if h.Policy.DryRun || h.Policy.IsMissing() {
			continue
		}
		if h.Policy.Action == Allow {
			allows++
		}
	}
	if allows > 0 {
		follows = Verdict{Reason: ReasonNotAllowed}
	}
	for _, action := range []Action{Allow, Deny} {
		decided := false
		for _, h := range hits {
			if decided || h.Rule < 0 || h.Policy.Action != action || h.Policy.DryRun || h.Policy.IsMissing() {
				continue
			}
			decided = true
			follows = Verdict{Allowed: action == Allow, Policy: h.Policy.Key, Reason: map[Action]Reason{Allow: ReasonAllowed,
				Deny: ReasonDenied}[action]}
		}
	}
	if follows.Allowed != want.Allowed || follows.Policy != want.Policy || follows.Reason != want.Reason {
		t.Errorf("from the hits follows %+v, the verdict is %+v", follows, want)
	}
}

func TestRuleText(t *testing.T) {
	for _, c := range []struct {
		r    Rule
		want string
	}{
		{Rule{}, "everything"},
		{Rule{{}}, "everything"},
		{Rule{{{}}}, "nothing"},
		{Rule{{{DestinationPorts: []uint16{80, 443}}}}, "destinationPorts [80 443]"},
		{
			Rule{{{Namespaces: exact("a"), NotPrincipals: prefix("td/")}, {SourceIPs: cidr("10.0.0.0/8")}},
				{{ServiceAccounts: []ServiceAccount{{"ns", "sa"}}}}},
			`(namespaces ["a"], notPrincipals ["td/"...] or sourceIps [10.0.0.0/8]) and serviceAccounts [ns/sa]`,
		},
		{Rule{{{Principals: []StringMatch{{Kind: Presence}}}, {Invalid: FieldSourceIPs}}},
			"principals [any] or sourceIps [an entry that was not understood]"},
	} {
		if got := c.r.String(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
