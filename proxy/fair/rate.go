package fair

import (
	"sync"
	"time"
)

// Rate is a budget per second for each source, in a bounded table: a token bucket per source that has spent lately.
// Sources that find no room in the table share one bucket, so that inventing sources buys nothing. All methods may be
// called at the same time.
type Rate[S comparable] struct {
	perSecond float64
	burst     float64
	most      int

	mu     sync.Mutex
	by     map[S]bucket
	rest   bucket    // of the sources beyond the table
	swept  time.Time // when full buckets were last dropped
	denied uint64
}

type bucket struct {
	tokens float64
	at     time.Time
}

// NewRate gives every source burst at once and perSecond after that; at most maxSources are told apart.
func NewRate[S comparable](perSecond float64, burst, maxSources int) *Rate[S] {
	return &Rate[S]{perSecond: perSecond, burst: float64(burst), most: maxSources, by: map[S]bucket{}}
}

// Allow takes one from the budget of source, if it has one.
func (r *Rate[S]) Allow(source S) bool { return r.AllowAt(source, time.Now()) }

// AllowAt is Allow for callers that know what time it is.
func (r *Rate[S]) AllowAt(source S, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, known := r.by[source]
	if !known {
		if len(r.by) >= r.most {
			r.sweep(now)
		}
		if len(r.by) >= r.most {
			return r.spend(&r.rest, now)
		}
	}
	ok := r.spend(&b, now)
	r.by[source] = b
	return ok
}

// Denied is how often Allow said no.
func (r *Rate[S]) Denied() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.denied
}

func (r *Rate[S]) spend(b *bucket, now time.Time) bool {
	r.fill(b, now)
	if b.tokens < 1 {
		r.denied++
		return false
	}
	b.tokens--
	return true
}

func (r *Rate[S]) fill(b *bucket, now time.Time) {
	if b.at.IsZero() {
		b.tokens = r.burst
	} else if d := now.Sub(b.at).Seconds(); d > 0 {
		b.tokens = min(r.burst, b.tokens+d*r.perSecond)
	}
	b.at = now
}

// sweep drops the buckets that are full again: they say no more than none at all. It looks at the table once in the
// time that an empty bucket takes to fill, before which there is little to find.
func (r *Rate[S]) sweep(now time.Time) {
	if !r.swept.IsZero() && now.Sub(r.swept).Seconds() < r.burst/r.perSecond {
		return
	}
	r.swept = now
	for s, b := range r.by {
		if r.fill(&b, now); b.tokens >= r.burst {
			delete(r.by, s)
		}
	}
}
