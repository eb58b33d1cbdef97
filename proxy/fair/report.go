package fair

import (
	"cmp"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Every is how often a bound that is reached says so in the log.
const Every = 10 * time.Second

// maxCounts bounds the pairs of resource and pod that are told apart; what comes later counts as pod "other".
const maxCounts = 8192

// Report counts what bounds turned away, and says in the log who was bounded: one line per resource and pod in ten
// seconds. All methods may be called at the same time, and on nil.
type Report struct {
	log *slog.Logger

	mu     sync.Mutex
	counts map[countKey]*Count
}

type countKey struct{ resource, pod string }

// Count is what a bound has turned away.
type Count struct {
	Resource, Pod    string // Pod is namespace/name, "" where it is about the daemon
	Evicted, Refused uint64

	said                    time.Time
	saidEvicted, saidRefuse uint64
}

// NewReport makes the daemon's report. log is where lines go.
func NewReport(log *slog.Logger) *Report { return &Report{log: log, counts: map[countKey]*Count{}} }

// Turned says that source lost a place (evicted), or got none, of resource at pod.
func (r *Report) Turned(resource, pod, source string, evicted bool) {
	if r == nil {
		return
	}
	now := time.Now()
	r.mu.Lock()
	k := countKey{resource, pod}
	c := r.counts[k]
	if c == nil {
		if len(r.counts) >= maxCounts {
			k.pod = "other"
		}
		if c = r.counts[k]; c == nil {
			c = &Count{Resource: k.resource, Pod: k.pod}
			r.counts[k] = c
		}
	}
	if evicted {
		c.Evicted++
	} else {
		c.Refused++
	}
	if !c.said.IsZero() && now.Sub(c.said) < Every {
		r.mu.Unlock()
		return
	}
	e, f := c.Evicted-c.saidEvicted, c.Refused-c.saidRefuse
	c.said, c.saidEvicted, c.saidRefuse = now, c.Evicted, c.Refused
	r.mu.Unlock()
	// Outside the lock: a log that is slow must not hold up who counts.
	r.log.Warn("bound reached, the greediest source loses", "resource", resource, "pod", pod, "source", source, "evicted",
		e, "refused", f)
}

// Forget drops the counts of a pod that is gone.
func (r *Report) Forget(pod string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.counts {
		if k.pod == pod {
			delete(r.counts, k)
		}
	}
}

// Counts lists what was turned away since the start, sorted.
func (r *Report) Counts() []Count {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Count, 0, len(r.counts))
	for _, c := range r.counts {
		out = append(out, *c)
	}
	slices.SortFunc(out, func(a, b Count) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Pod, b.Pod))
	})
	return out
}
