package rbac

// Reason says which step of the evaluation decided.
type Reason uint8

// The reasons.
const (
	ReasonNoAllowPolicy Reason = iota // allowed: no enforced ALLOW policy applies
	ReasonAllowed                     // allowed: Verdict.Policy matches
	ReasonNotAllowed                  // rejected: ALLOW policies apply, none matches
	ReasonDenied                      // rejected: Verdict.Policy denies
)

// String returns ztunnel's wording for the rejections and ours for the rest.
func (r Reason) String() string {
	switch r {
	case ReasonNoAllowPolicy:
		return "no allow policies, allow"
	case ReasonAllowed:
		return "allowed by policy"
	case ReasonNotAllowed:
		return "allow policies exist, but none allowed"
	case ReasonDenied:
		return "explicitly denied by"
	}
	return "unknown"
}

// Verdict is the outcome of an evaluation.
type Verdict struct {
	Allowed bool
	Reason  Reason
	Policy  string // key "namespace/name" of the deciding policy; "" if none decided

	// Missing are the keys of policies that the workload lists and that are not
	// loaded (yet): what they say was left out. Nil when a policy that is loaded
	// denies, since no other could change that.
	Missing []string

	// DryRun are the dry-run policies that match, in the order of evaluation, for
	// the log. Nil unless there are any.
	DryRun []DryRun
	// OnlyDryRunAllow: the only ALLOW policies are dry-run ones and none of them
	// matches: enforcing them would reject this connection.
	OnlyDryRunAllow bool
}

// DryRun is a policy that would have acted.
type DryRun struct {
	Policy string // key
	Action Action
}

// Evaluate judges q by the policies that apply to its destination. Nil policies
// are skipped, and so are missing ones, which the verdict names. It allocates only
// for these and for dry-run policies that match.
func Evaluate(ps []*Policy, q Question) Verdict {
	var v Verdict
	allows, dryAllows := 0, 0
	m := newMatcher(q)
	for _, p := range ps {
		switch {
		case p == nil:
		case p.missing:
			v.Missing = append(v.Missing, p.Key)
		case p.Action == Allow && p.DryRun:
			dryAllows++
		case p.Action == Allow:
			allows++
		case p.DryRun && m.policy(p):
			v.DryRun = append(v.DryRun, DryRun{Policy: p.Key, Action: Deny})
		}
	}
	for _, p := range ps {
		if p != nil && p.Action == Deny && !p.DryRun && !p.missing && m.policy(p) {
			v.Reason, v.Policy, v.Missing = ReasonDenied, p.Key, nil
			return v
		}
	}
	if dryAllows > 0 {
		hit := false
		for _, p := range ps {
			if p != nil && p.Action == Allow && p.DryRun && m.policy(p) {
				v.DryRun = append(v.DryRun, DryRun{Policy: p.Key, Action: Allow})
				hit = true
			}
		}
		v.OnlyDryRunAllow = allows == 0 && !hit
	}
	v.Allowed, v.Reason = allows == 0, ReasonNoAllowPolicy
	if allows > 0 {
		v.Reason = ReasonNotAllowed
		for _, p := range ps {
			if p != nil && p.Action == Allow && !p.DryRun && m.policy(p) {
				v.Allowed, v.Reason, v.Policy = true, ReasonAllowed, p.Key
				break
			}
		}
	}
	return v
}

// Strict is the verdict if policies that are missing deny.
func (v Verdict) Strict() Verdict {
	if v.Allowed && len(v.Missing) > 0 {
		v.Allowed, v.Reason, v.Policy = false, ReasonDenied, v.Missing[0]
	}
	return v
}

// Err returns nil for an allowing verdict and a *Rejection otherwise.
func (v Verdict) Err() error {
	if v.Allowed {
		return nil
	}
	return &Rejection{Reason: v.Reason, Policy: v.Policy, Missing: v.Reason == ReasonDenied && len(v.Missing) > 0}
}

// Rejection is the error of a connection that policy rejects.
type Rejection struct {
	Reason  Reason // ReasonNotAllowed or ReasonDenied
	Policy  string // with ReasonDenied
	Missing bool   // Policy is listed by the workload and not loaded
}

// Error returns ztunnel's text.
func (r *Rejection) Error() string {
	s := "connection closed due to policy rejection: " + r.Reason.String()
	if r.Reason == ReasonDenied {
		s += ": " + r.Policy
	}
	if r.Missing {
		s += " (policy not loaded)"
	}
	return s
}
