package proxy

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// Bounds of waiting for policies.
const (
	policyWait  = 3 * time.Second // from when a policy was first missed, not from when a connection came
	maxUnknown  = 4096            // policies remembered; for others nobody waits
	keptUnknown = time.Minute     // how long one that only connections have missed is remembered
)

// UnknownPolicies remembers which policies workloads list that are not loaded, and since when: a connection waits for
// such a policy only while it may be on its way. After that it is decided without it, as ztunnel does at once, or
// refused (deny). One for all pods. All methods may be called at the same time.
type UnknownPolicies struct {
	deny bool
	log  *slog.Logger
	wait time.Duration

	mu    sync.Mutex
	since map[string]*unknownPolicy

	held, without atomic.Uint64
}

type unknownPolicy struct {
	since, asked time.Time
	listed       bool   // by a workload of this node, as of the newest Follow
	workload     string // one that lists it
	said         bool
}

// NewUnknownPolicies makes an empty memory. deny refuses connections that a policy is missing for.
func NewUnknownPolicies(deny bool, log *slog.Logger) *UnknownPolicies {
	return &UnknownPolicies{deny: deny, log: log, wait: policyWait, since: map[string]*unknownPolicy{}}
}

// UnknownPolicy is an entry of Dump.
type UnknownPolicy struct {
	Policy   string    `json:"policy"`   // key
	Workload string    `json:"workload"` // one that lists it
	Since    time.Time `json:"since"`
	Decision string    `json:"decision"` // of new connections: wait, skip or deny
}

// Dump lists the policies that are missing, by key.
func (u *UnknownPolicies) Dump() []UnknownPolicy {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]UnknownPolicy, 0, len(u.since))
	for key, e := range u.since {
		d := UnknownPolicy{Policy: key, Workload: e.workload, Since: e.since.UTC().Truncate(time.Millisecond),
			Decision: "skip"}
		switch {
		case time.Since(e.since) < u.wait:
			d.Decision = "wait"
		case u.deny:
			d.Decision = "deny"
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b UnknownPolicy) int { return cmp.Compare(a.Policy, b.Policy) })
	return out
}

// UnknownPolicyStats are figures of this moment, and since the start.
type UnknownPolicyStats struct {
	Unknown int    // policies that are listed and not loaded
	Held    uint64 // connections that waited for a policy
	Without uint64 // connections that were decided without one that is missing
}

// Stats returns them.
func (u *UnknownPolicies) Stats() UnknownPolicyStats {
	u.mu.Lock()
	defer u.mu.Unlock()
	return UnknownPolicyStats{Unknown: len(u.since), Held: u.held.Load(), Without: u.without.Load()}
}

// Follow learns from a new View: which policies the pods of this node list in vain, and which have come or are not
// listed any more.
func (u *UnknownPolicies) Follow(view *state.View, pods []state.WorkloadInfo) {
	missing := map[string]string{}
	for _, i := range pods {
		w := view.WorkloadByInfo(i)
		if w == nil {
			continue
		}
		for _, key := range w.AuthorizationPolicies {
			if view.Policy(key) == nil {
				missing[key] = w.UID
			}
		}
	}
	now := time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	for key, e := range u.since {
		workload, listed := missing[key]
		switch {
		case view.Policy(key) != nil, e.listed && !listed, !listed && now.Sub(e.asked) > keptUnknown:
			delete(u.since, key)
		case listed:
			e.listed, e.workload = true, workload
		}
	}
	for key, workload := range missing {
		if e := u.missed(key, workload, now); e != nil {
			e.listed = true
		}
	}
}

// missed is the entry of a policy, made if there is none; nil if there is no room. mu is held.
func (u *UnknownPolicies) missed(key, workload string, now time.Time) *unknownPolicy {
	e := u.since[key]
	if e == nil && len(u.since) < maxUnknown {
		e = &unknownPolicy{since: now, workload: workload}
		u.since[key] = e
	}
	return e
}

// patience is how long a connection to a workload is still to wait for the policies that are missing.
func (u *UnknownPolicies) patience(missing []string, workload string) (left time.Duration) {
	now := time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, key := range missing {
		if e := u.missed(key, workload, now); e != nil {
			e.asked = now
			left = max(left, u.wait-now.Sub(e.since))
		}
	}
	return left
}

// decide is the verdict when nobody waits any longer.
func (u *UnknownPolicies) decide(v rbac.Verdict) rbac.Verdict {
	u.without.Add(1)
	u.mu.Lock()
	for _, key := range v.Missing {
		e := u.since[key]
		if e == nil || e.said {
			continue
		}
		e.said = true
		what := "connections are decided without it"
		if u.deny {
			what = "connections that no other policy refuses are refused, too"
		}
		u.log.Warn("a policy that a workload lists is not loaded: "+what, "policy", key, "workload", e.workload,
			"missing_for", time.Since(e.since).Round(time.Millisecond))
	}
	u.mu.Unlock()
	return u.missing(v)
}

// missing is v as connections are decided whose policies are missing for good.
func (u *UnknownPolicies) missing(v rbac.Verdict) rbac.Verdict {
	if u.deny {
		return v.Strict()
	}
	return v
}

// judge evaluates the newest policies, and waits for those that are listed and not loaded if they may still come. It is
// cut short when ctx ends; what it returns then is nobody's business any more, and the error says so.
func (p *Proxy) judge(ctx context.Context, local *state.Workload, q rbac.Question) (rbac.Verdict, error) {
	evaluate := func() rbac.Verdict {
		view := p.o.Knowledge.View()
		if w := view.WorkloadByInfo(p.o.Info); w != nil {
			local = w
		}
		return rbac.Evaluate(view.PoliciesFor(local), q)
	}
	v := evaluate()
	if len(v.Missing) == 0 {
		return v, nil
	}
	u := p.o.Policies
	for held := false; ; {
		changed := p.o.Knowledge.Changed() // taken before the View, so that a publication in between is seen
		if v = evaluate(); len(v.Missing) == 0 {
			return v, nil
		}
		left := u.patience(v.Missing, local.UID)
		if left <= 0 {
			return u.decide(v), nil
		}
		if !held {
			held = true
			u.held.Add(1)
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if err := ctx.Err(); err != nil {
			return v, err
		}
	}
}
