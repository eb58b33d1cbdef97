package proxy

import (
	"net/netip"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// Explanation is what would happen to a connection now, and why, step by step.
type Explanation struct {
	Direction string               `json:"direction"` // outbound, inbound or passthrough
	Pod       string               `json:"pod"`       // namespace/name
	Called    netip.AddrPort       `json:"called"`    // inbound: the application's address
	Steps     []ExplanationStep    `json:"steps"`
	Decision  *ExplanationDecision `json:"decision,omitempty"` // of an outbound one that has a way
	Refused   bool                 `json:"refused"`
	Error     string               `json:"error,omitempty"` // as the access line would have it
	Outcome   string               `json:"outcome"`         // what the one who connects would see
	Probe     *ExplanationProbe    `json:"probe,omitempty"`
}

// ExplanationStep is one of them. The steps of an outbound connection are source, called, waypoint, gateway, endpoints,
// route, certificate, tunnel (memory, where none is needed) and policies (or request, which the peer would turn down),
// those of an inbound one pod,
// request and policies; what plays no part is left out.
type ExplanationStep struct {
	Step       string                 `json:"step"`
	OK         bool                   `json:"ok"` // false: here it ends
	Text       string                 `json:"text"`
	Candidates []ExplanationCandidate `json:"candidates,omitempty"` // of endpoints
	Policies   []ExplanationPolicy    `json:"policies,omitempty"`   // of policies
}

// ExplanationCandidate is an endpoint of a service.
type ExplanationCandidate struct {
	UID      string     `json:"uid"`
	Address  netip.Addr `json:"address,omitzero"`
	Health   string     `json:"health"`
	Locality string     `json:"locality,omitempty"` // region/zone/subzone
	Node     string     `json:"node,omitempty"`
	Rank     int        `json:"rank"` // how many preferences of place it meets; the best are drawn from, by weight
	Weight   uint32     `json:"weight"`
	Excluded string     `json:"excluded,omitempty"` // why it cannot be chosen
	Chosen   bool       `json:"chosen,omitempty"`
}

// ExplanationPolicy is what one policy says.
type ExplanationPolicy struct {
	Policy  string `json:"policy"`
	Action  string `json:"action"`
	Scope   string `json:"scope"`
	DryRun  bool   `json:"dryRun,omitempty"`
	Missing bool   `json:"missing,omitempty"` // listed by the workload and not loaded
	Matches bool   `json:"matches"`
	Rule    int    `json:"rule,omitempty"`     // number of the rule that matches, from 1
	Text    string `json:"ruleText,omitempty"` // what it says
	Decides bool   `json:"decides,omitempty"`
}

// ExplanationDecision is where an outbound connection goes.
type ExplanationDecision struct {
	Protocol   string         `json:"protocol"`
	NextHop    netip.AddrPort `json:"nextHop"`
	Authority  string         `json:"authority,omitempty"`
	Identities []string       `json:"identities,omitempty"` // of which the next hop has to present one
	Inner      []string       `json:"innerIdentities,omitempty"`
	Workload   string         `json:"workload,omitempty"` // uid
	Service    string         `json:"service,omitempty"`
	Waypoint   bool           `json:"waypoint,omitempty"`
	// Alternatives: other endpoints are tried when this one cannot be reached.
	Alternatives bool `json:"alternatives,omitempty"`
}

// ExplanationProbe is what a real attempt came to: a CONNECT, or a SYN where there is no tunnel, and nothing else.
type ExplanationProbe struct {
	OK bool `json:"ok"`
	// at which it failed: certificate, connect, handshake, tunnel, answer or application
	Step    string  `json:"step,omitempty"`
	Error   string  `json:"error,omitempty"`
	Millis  float64 `json:"millis"`
	Outcome string  `json:"outcome"` // what the one who connects would see
}

func (x *Explanation) add(step string, ok bool, text string) *ExplanationStep {
	x.Steps = append(x.Steps, ExplanationStep{Step: step, OK: ok, Text: text})
	return &x.Steps[len(x.Steps)-1]
}

// refuse ends an explanation at a step.
func (x *Explanation) refuse(step string, err error) {
	x.add(step, false, err.Error())
	x.Refused, x.Error, x.Outcome = true, err.Error(), outcomeText(err)
}

// stageOf is the step of an attempt at which it failed.
func stageOf(e *Error) string {
	switch e.kind {
	case kindIdentity:
		return "certificate"
	case kindIO, kindNetworkPolicy:
		return "connect"
	case kindTLS, kindRevoked:
		return "handshake"
	case kindStatus:
		return "answer"
	case kindApp:
		return "application"
	}
	return "tunnel"
}

// policies says what each policy does to a connection, and how that adds up.
func (x *Explanation) policies(v rbac.Verdict, hits []rbac.Hit, where string) {
	text := v.Reason.String()
	if v.Policy != "" {
		text += " " + v.Policy
	}
	if v.OnlyDryRunAllow {
		text += "; the policies that only try out (dry run) would reject it"
	}
	s := x.add("policies", v.Allowed, text+where)
	for _, h := range hits {
		p := ExplanationPolicy{
			Policy: h.Policy.Key, Action: h.Policy.Action.String(), Scope: h.Policy.Scope.String(), DryRun: h.Policy.DryRun,
			Missing: h.Policy.IsMissing(),
			Matches: h.Rule >= 0, Decides: v.Policy == h.Policy.Key && (v.Reason == rbac.ReasonDenied ||
				v.Reason == rbac.ReasonAllowed),
		}
		if h.Rule >= 0 {
			p.Rule, p.Text = h.Rule+1, h.Policy.Rules[h.Rule].String()
		}
		s.Policies = append(s.Policies, p)
	}
}

func candidateOf(uid string, w *state.Workload) ExplanationCandidate {
	c := ExplanationCandidate{UID: uid, Health: "unknown"}
	if w == nil {
		return c
	}
	c.Health, c.Node, c.Weight = w.Status.String(), w.Node, w.Capacity
	if len(w.Addresses) > 0 {
		c.Address = w.Addresses[0]
	}
	if l := w.Locality; l != (state.Locality{}) {
		c.Locality = l.Region + "/" + l.Zone + "/" + l.Subzone
	}
	return c
}
