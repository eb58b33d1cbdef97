package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"time"
)

// What makes the Manager ask the CA before a pause or half of a life is over: somebody wants a certificate that failed,
// the CA is back, the roots are others.

const (
	retryPatience = 2 * time.Second // how long a caller waits for another attempt after a failed one
	retryMost     = 5 * time.Second // the longest pause between attempts for which somebody waits
	recallSpread  = time.Second     // over which the identities that failed are tried again when the CA is back
	renewSpread   = 5 * time.Second // over which all identities are renewed for new roots
	renewPause    = time.Minute     // between two such renewals: of two CAs that answer in turn each brings others
	probePause    = time.Minute     // between two looks whether the roots are others
)

const sha256Len = sha256.Size

// rootSet is what the CA wants to be trusted at the moment.
type rootSet struct {
	sum     [sha256Len]byte
	since   time.Time // when it came
	renewed time.Time // up to when renewals for other roots are planned
	probed  time.Time
}

// demandPause is how long ago the n-th failure in a row must be for a caller to cause another attempt.
func demandPause(n int) time.Duration {
	return max(firstRetry, min(retryAfter(n, 0.5)/10, retryMost))
}

// again makes one more attempt for an entry that failed, at once, and returns what is closed when it has ended; nil if
// the last one was a moment ago.
func (m *Manager) again(e *entry, now time.Time) <-chan struct{} {
	if e.gone || m.stopped {
		return nil
	}
	if e.cancel == nil && e.retried == nil {
		if now.Sub(e.tried) < demandPause(e.step) {
			return nil
		}
		m.queue.remove(e)
		m.enqueue(e, realTime)
	}
	if e.retried == nil {
		e.retried = make(chan struct{})
	}
	return e.retried
}

// Retry says that the control plane is back: what failed is tried again now, spread over a second, and one certificate
// is renewed to see whether the roots are still the same.
func (m *Manager) Retry() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	m.recall(now)
	if now.Sub(m.roots.probed) < probePause {
		return
	}
	for _, e := range m.entries {
		if e.valid(now) != nil && e.task != nil {
			m.roots.probed = now
			m.plan(e, now)
			break
		}
	}
}

// Renew renews all certificates, spread over seconds: what they are signed with, or what they are to be trusted by, has
// changed. Those at hand serve on until then.
func (m *Manager) Renew() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	m.recall(now)
	for _, e := range m.entries {
		if e.cert != nil {
			m.plan(e, now.Add(m.spread(renewSpread)))
		}
	}
}

// recall tries again what failed, when the CA has shown that it is back.
func (m *Manager) recall(now time.Time) {
	if m.failing == 0 {
		return
	}
	for _, e := range m.entries {
		if e.err == nil {
			continue
		}
		at := now
		if soonest := e.tried.Add(firstRetry); soonest.After(at) {
			at = soonest
		}
		m.plan(e, at.Add(m.spread(recallSpread)))
	}
}

// trusted looks at the roots that came with an entry's new certificate. Are they others, all other identities get
// theirs within seconds: until a node has them it does not believe peers that have.
func (m *Manager) trusted(e *entry, now time.Time) {
	e.trust = sumOf(e.cert.Roots)
	first := m.roots.since.IsZero()
	if e.trust == m.roots.sum {
		return
	}
	if e.began.Before(m.roots.since) { // asked for before the roots of now were known
		m.plan(e, m.roots.next(now).Add(m.spread(renewSpread)))
		return
	}
	m.roots.sum, m.roots.since = e.trust, now
	m.log.Info("roots from CA", "identity", e.id.String(), "roots", describeAll(e.cert.Roots))
	if first {
		return
	}
	at, n := m.roots.next(now), 0
	m.roots.renewed = at
	for _, other := range m.entries {
		if other.cert != nil && other.trust != m.roots.sum {
			m.plan(other, at.Add(m.spread(renewSpread)))
			n++
		}
	}
	m.log.Warn("the CA has other roots than before: renewing all certificates", "identities", n, "from", at.UTC())
}

// next is when the next renewal for other roots may begin.
func (r *rootSet) next(now time.Time) time.Time {
	if at := r.renewed.Add(renewPause); !r.renewed.IsZero() && at.After(now) {
		return at
	}
	return now
}

// plan moves an entry's next attempt forward to at. One that is with the signer, or due before, stays.
func (m *Manager) plan(e *entry, at time.Time) {
	if e.task == nil || !at.Before(e.task.due) {
		return
	}
	prio := e.task.prio
	m.queue.remove(e)
	m.queue.push(e, prio, at, time.Now())
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *Manager) spread(over time.Duration) time.Duration {
	return time.Duration(m.opts.Rand() * float64(over))
}

// sumOf is a value that two lists of the same roots have in common, in whatever order.
func sumOf(roots []*x509.Certificate) (sum [sha256Len]byte) {
	raw := make([][]byte, 0, len(roots))
	for _, r := range roots {
		raw = append(raw, r.Raw)
	}
	slices.SortFunc(raw, bytes.Compare)
	h := sha256.New()
	for _, b := range slices.CompactFunc(raw, bytes.Equal) {
		h.Write(b) // DER tells its own length
	}
	h.Sum(sum[:0])
	return sum
}
