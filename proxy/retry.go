package proxy

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztun/proxy/route"
	"ztun/proxy/state"
)

// Bounds of trying another endpoint of a service. The application's SYN is held meanwhile, and nothing of it has been
// sent.
const (
	maxTries  = 3                // endpoints that one connection tries
	tryTime   = 2 * time.Second  // for each but the last; a client may give up after 4 s
	ailingFor = 10 * time.Second // an endpoint that has failed is avoided where there are others
	maxAiling = 1024             // endpoints remembered
)

// ailing are the endpoints that could not be reached of late: only the first connection is to pay for a pod that is
// gone.
type ailing struct {
	some  atomic.Bool // false: the table is empty, which is the rule
	mu    sync.Mutex
	until map[string]time.Time // by uid
}

func (a *ailing) add(w *state.Workload) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for uid, until := range a.until {
		if now.After(until) {
			delete(a.until, uid)
		}
	}
	if a.until == nil {
		a.until = map[string]time.Time{}
	}
	if len(a.until) < maxAiling {
		a.until[w.UID] = now.Add(ailingFor)
	}
	a.some.Store(true)
}

// has reports whether w has failed of late.
func (a *ailing) has(w *state.Workload) bool {
	if !a.some.Load() {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	until, ok := a.until[w.UID]
	if ok && time.Now().After(until) {
		delete(a.until, w.UID)
		a.some.Store(len(a.until) > 0)
		return false
	}
	return ok
}

// choose makes a decision that avoids the endpoints that were tried, and those that ail as long as there are others.
func (p *Proxy) choose(view *state.View, q route.Question, tried []*state.Workload) (route.Decision, error) {
	wasTried := func(w *state.Workload) bool {
		for _, t := range tried {
			if t.UID == w.UID {
				return true
			}
		}
		return false
	}
	q.Trace.Reset() // of what is not known any better meanwhile
	if p.ailing.some.Load() {
		q.Avoid = func(w *state.Workload) bool { return wasTried(w) || p.ailing.has(w) }
		// What cannot be said without them is said with them: also which key was missed.
		if d, err := route.Decide(view, q); err == nil && (q.Missed == nil || *q.Missed == "") {
			return d, nil
		}
		if q.Missed != nil {
			*q.Missed = ""
		}
		q.Trace.Reset()
	}
	q.Avoid = nil
	if len(tried) > 0 {
		q.Avoid = wasTried
	}
	return route.Decide(view, q)
}

// attempts is one outbound connection's way to an endpoint that answers.
type attempts struct {
	c        *connection
	local    *state.Workload
	src, dst netip.AddrPort
	tried    []*state.Workload
	last     bool // there is nobody else: it may take as long as it takes
}

// context is that of the next try.
func (a *attempts) context(ctx context.Context, d *route.Decision) (context.Context, context.CancelFunc) {
	if len(a.tried) == maxTries-1 || !d.Alternatives() {
		a.last = true
	}
	if a.last {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, tryTime)
}

// another finds the next endpoint after one that failed; false if there is none, or if nobody else would know better.
func (a *attempts) another(ctx context.Context, d route.Decision, failed *Error) (route.Decision, bool) {
	p := a.c.p
	if d.Workload == nil || a.c.inner != nil || errors.Is(ctx.Err(), context.Canceled) || !failed.elsewhere(d.Waypoint) {
		return d, false
	}
	cut := !a.last && errors.Is(failed, context.DeadlineExceeded) // by tryTime, perhaps
	if d.Alternatives() {
		p.ailing.add(d.Workload)
	}
	if a.last {
		return d, false
	}
	a.tried = append(a.tried, d.Workload)
	next, _, err := p.decide(ctx, a.src, a.dst, a.tried, nil)
	if err == nil && next.Workload != nil && next.Workload.UID != d.Workload.UID {
		p.retried.Add(1)
		p.o.Log.Debug("trying another endpoint", "dst", a.dst, "failed", d.Actual, "next", next.Actual, "error", failed)
		return next, true
	}
	// Nobody else after all: the one that was cut short gets the time that it would have had.
	a.last = true
	return d, cut
}

// elsewhere reports whether another endpoint of the service may do what this one did not: it could not be reached,
// proved to be somebody else, or could not reach its application. What a peer refuses (401 and the like), and what a
// waypoint could not do, is an answer.
func (e *Error) elsewhere(waypoint bool) bool {
	switch e.kind {
	case kindIO, kindNetworkPolicy, kindTLS, kindH2:
		return true
	case kindStatus:
		return !waypoint && e.statusIs(503)
	}
	return false
}
