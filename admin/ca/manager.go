package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"ztun/proxy/identity"
)

// What a caller of Certificate can meet besides the signer's and identity's errors, and the end of its own context.
var (
	// ErrForgotten: Forget was called while the caller waited. The text is ztunnel's.
	ErrForgotten = errors.New("the identity is no longer needed")
	// ErrBusy: the queue or the table of identities is full. Nothing is remembered: the next call may succeed.
	ErrBusy = errors.New("too many certificate requests are waiting")
	// ErrStopped: Run has ended and there is no valid certificate at hand.
	ErrStopped = errors.New("certificate manager has stopped")
)

// ManagerOptions configure a Manager. Zero values of all but Signer are the defaults.
type ManagerOptions struct {
	Signer Signer
	TTL    time.Duration // validity asked for: SECRET_TTL, 24 h
	// AnyIdentity: the Signer is a Remote without Impersonate, whatever is around it: what it gives is taken.
	AnyIdentity bool

	Concurrency   int           // calls of the Signer at once: 8
	SignTimeout   time.Duration // for one call: 20 s
	QueueLimit    int           // identities waiting for their first certificate: 1024; prefetches get a quarter
	MaxIdentities int           // identities known at once: 8192

	Logger *slog.Logger   // discarded if nil
	Rand   func() float64 // jitter, uniform in [0, 1), safe for concurrent use: math/rand/v2's
}

// Manager is ztunnel's SecretManager: one certificate per identity, fetched when first wanted, shared by everyone,
// renewed before it ends, dropped when forgotten. All methods are safe for concurrent use.
type Manager struct {
	opts   ManagerOptions
	log    *slog.Logger
	failed *slog.Logger  // by whose target its lines can be left out: some say so themselves
	wake   chan struct{} // capacity 1: something became due

	mu      sync.Mutex
	started bool
	stopped bool
	entries map[identity.ID]*entry
	queue   queue
	running int
	stats   Stats
	failing int // entries whose last attempt failed
	roots   rootSet
}

// entry is all that is known of one identity. It is guarded by Manager.mu and is in exactly one of three places:
// queued (task != nil), with the signer (cancel != nil), or gone from Manager.entries.
type entry struct {
	id       identity.ID
	cert     *identity.Certificate // the newest, perhaps expired; nil before the first
	err      error                 // of the last attempt, nil if it succeeded
	failures int                   // in a row
	step     int                   // of the backoff: failures without those after which the pause was shortened
	ready    chan struct{}         // closed when callers need wait no longer: cert or err is set, or gone is true
	gone     bool
	task     *task
	cancel   context.CancelFunc
	began    time.Time       // of the last attempt
	tried    time.Time       // when it ended
	retried  chan struct{}   // not nil while callers wait for another attempt; closed when it ends
	trust    [sha256Len]byte // the roots that came with cert
}

// waiting reports whether callers wait for the entry: neither a certificate nor an error can be had.
func (e *entry) waiting() bool {
	select {
	case <-e.ready:
		return false
	default:
		return true
	}
}

// settle lets the waiting callers go.
func (e *entry) settle() {
	if e.retried != nil {
		close(e.retried)
		e.retried = nil
	}
	if e.waiting() {
		close(e.ready)
	}
}

// valid returns the certificate if it can be used at now.
func (e *entry) valid(now time.Time) *identity.Certificate {
	if e.cert != nil && !now.After(e.cert.Leaf.NotAfter) {
		return e.cert
	}
	return nil
}

// Stats are the Manager's counters and gauges.
type Stats struct {
	Identities int // known
	Waiting    int // without a certificate, without an error yet
	Running    int // calls of the signer under way
	Queued     int // due, waiting for one of the Concurrency places

	// FirstExpiry is when the certificate ends that ends first; zero: there is none. One that has ended is among them
	// until it is renewed or forgotten.
	FirstExpiry time.Time

	Signed          uint64 // certificates received
	Failed          uint64 // attempts that failed
	Discarded       uint64 // results for identities forgotten meanwhile
	Busy            uint64 // Certificate calls turned away with ErrBusy
	PrefetchDropped uint64 // Prefetch calls turned away by the same bounds
}

// NewManager makes a Manager. It fetches nothing until Run is called.
func NewManager(o ManagerOptions) *Manager {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.Concurrency, 8)
	def(&o.QueueLimit, 1024)
	def(&o.MaxIdentities, 8192)
	if o.TTL <= 0 {
		o.TTL = 24 * time.Hour
	}
	if o.SignTimeout <= 0 {
		o.SignTimeout = 20 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	if l, ok := o.Signer.(*Local); ok && l.Fake() {
		o.Logger.Warn("certificates come from the built-in fake CA, whose key is public: identities prove nothing")
	}
	return &Manager{
		opts:    o,
		log:     o.Logger,
		failed:  o.Logger.With("target", "ca::client"),
		wake:    make(chan struct{}, 1),
		entries: make(map[identity.ID]*entry),
		queue:   newQueue(),
	}
}

// Run fetches and renews until ctx ends, then waits for its goroutines and returns nil. Callers still waiting get
// ErrStopped; certificates at hand are served on, while they are valid, to connections that drain. Call it once: a
// second call is an error.
func (m *Manager) Run(ctx context.Context) error {
	m.mu.Lock()
	if m.started {
		m.mu.Unlock()
		return errors.New("certificate manager: Run called twice")
	}
	m.started = true
	m.mu.Unlock()

	var signers sync.WaitGroup
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		// Renewals are due by the wall clock, which may be corrected or have slept while the timer runs: look at
		// least once a minute.
		timer.Reset(m.startDue(ctx, &signers, time.Minute))
		select {
		case <-ctx.Done():
		case <-m.wake:
		case <-timer.C:
		}
	}
	signers.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = true
	for _, e := range m.entries {
		e.settle()
	}
	return nil
}

// startDue starts a goroutine for every entry that is due while there are places, and returns how long to sleep.
func (m *Manager) startDue(ctx context.Context, signers *sync.WaitGroup, limit time.Duration) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for m.running < m.opts.Concurrency {
		e := m.queue.pop(now)
		if e == nil {
			return m.queue.wait(now, limit)
		}
		m.running++
		ctx, cancel := context.WithTimeout(ctx, m.opts.SignTimeout)
		e.cancel, e.began = cancel, now
		signers.Go(func() {
			defer cancel()
			cert, err := m.fetch(ctx, e.id)
			m.finish(ctx, e, cert, err)
		})
	}
	return limit // a place that becomes free wakes us
}

// fetch makes one attempt for one identity.
func (m *Manager) fetch(ctx context.Context, id identity.ID) (*identity.Certificate, error) {
	key, csr, err := NewRequest(id)
	if err != nil {
		return nil, err
	}
	chain, roots, err := m.opts.Signer.Sign(ctx, id, csr, m.opts.TTL)
	if err != nil {
		return nil, err
	}
	want := id
	if m.opts.AnyIdentity {
		want = identity.ID{} // the CA decides whose certificate it is (spec/controlplane.md 2.7)
	}
	cert, err := identity.New(want, key, chain, roots)
	if err != nil {
		return nil, err
	}
	if now := time.Now(); now.After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("certificate from CA for %s had expired at %s when it arrived: is the clock right?", id,
			cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	} else if now.Before(cert.Leaf.NotBefore) {
		m.log.Warn("certificate from CA is not valid yet: is the clock right?", "identity", id.String(), "notBefore",
			cert.Leaf.NotBefore.UTC())
	}
	return cert, nil
}

// finish books the outcome of an attempt and plans the next one.
func (m *Manager) finish(ctx context.Context, e *entry, cert *identity.Certificate, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.running--
	e.cancel = nil
	select {
	case m.wake <- struct{}{}:
	default:
	}
	now := time.Now()
	e.tried = now
	failed := e.err != nil
	switch {
	case e.gone:
		m.stats.Discarded++
		return
	case err == nil:
		m.stats.Signed++
		if failed {
			m.failing--
		}
		e.cert, e.err, e.failures, e.step = cert, nil, 0, 0
		due := renewAt(now, cert.Leaf.NotBefore, cert.Leaf.NotAfter, m.opts.Rand())
		m.queue.push(e, background, due, now)
		m.log.Debug("certificate received", "identity", e.id.String(), "notAfter", cert.Leaf.NotAfter.UTC(), "renewal",
			due.UTC())
		m.recall(now)
		m.trusted(e, now)
	case errors.Is(ctx.Err(), context.Canceled): // not forgotten, so Run is ending: nobody failed
		m.queue.push(e, background, now, now)
		return
	default:
		m.stats.Failed++
		if !failed {
			m.failing++
		}
		e.err = err
		e.failures++
		e.step++
		delay := retryAfter(e.step, m.opts.Rand())
		prio := warmup
		if old := e.valid(now); old != nil {
			prio = background
			if short := retryValid(delay, old.Leaf.NotAfter.Sub(now)); short < delay {
				delay = short
				e.step--
			}
		}
		m.queue.push(e, prio, now.Add(delay), now)
		m.failed.Warn("certificate request failed", "identity", e.id.String(), "error", err.Error(), "failures", e.failures,
			"retry", delay.Round(time.Millisecond), "oldStillValid", prio == background)
	}
	e.settle()
}

// Certificate returns id's certificate, fetching it with the highest priority if there is none; concurrent callers
// share the fetch. After a failed fetch it waits up to 2 s for another attempt, unless the last one was a moment ago,
// and returns its error; but while an older certificate is valid it returns that one. Other errors: ErrForgotten,
// ErrBusy, ErrStopped, ctx's.
func (m *Manager) Certificate(ctx context.Context, id identity.ID) (*identity.Certificate, error) {
	return m.get(ctx, id, realTime)
}

func (m *Manager) get(ctx context.Context, id identity.ID, prio priority) (*identity.Certificate, error) {
	m.mu.Lock()
	e, err := m.want(id, prio)
	if err != nil {
		m.stats.Busy++
		m.mu.Unlock()
		return nil, err
	}
	var patience <-chan time.Time
	for {
		cert, ready, err := m.outcome(e)
		if ready == nil && cert == nil && e.err != nil && prio == realTime && patience == nil {
			ready = m.again(e, time.Now())
			timer := time.NewTimer(retryPatience)
			defer timer.Stop()
			patience = timer.C
		}
		m.mu.Unlock()
		if ready == nil {
			return cert, err
		}
		select {
		case <-ready:
		case <-patience:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the certificate of %s: %w", id, context.Cause(ctx))
		}
		m.mu.Lock()
		m.revive(e, prio)
	}
}

// outcome says what a caller gets now, or what it has to wait for.
func (m *Manager) outcome(e *entry) (*identity.Certificate, <-chan struct{}, error) {
	cert := e.valid(time.Now())
	switch {
	case e.gone:
		return nil, nil, ErrForgotten
	case cert != nil:
		return cert, nil, nil
	case e.err != nil:
		return nil, nil, e.err
	case m.stopped:
		return nil, nil, ErrStopped
	}
	return nil, e.ready, nil
}

// Prefetch asks for id's certificate ahead of need, without waiting. It does nothing if the identity is known; if the
// bounds are reached it is dropped and counted (Certificate will fetch it).
func (m *Manager) Prefetch(id identity.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, err := m.want(id, warmup); err != nil {
		m.stats.PrefetchDropped++
		m.log.Info("certificate prefetch dropped", "identity", id.String(), "error", err.Error())
	}
}

// want returns id's entry and sees to it that a fetch is under way if nothing can be served from it. Error: ErrBusy.
func (m *Manager) want(id identity.ID, prio priority) (*entry, error) {
	e := m.entries[id]
	if e == nil {
		limit := m.opts.QueueLimit
		if prio != realTime {
			limit = max(limit/4, 1)
		}
		if len(m.entries) >= m.opts.MaxIdentities || m.queue.ready.Len() >= limit {
			return nil, ErrBusy
		}
		e = &entry{id: id, ready: make(chan struct{})}
		m.entries[id] = e
		m.enqueue(e, prio)
		return e, nil
	}
	m.revive(e, prio)
	return e, nil
}

// revive makes a caller's wait for a known entry end: more urgent if others wait already, anew if its certificate ended
// before its renewal (the machine slept, or the clock jumped).
func (m *Manager) revive(e *entry, prio priority) {
	switch {
	case e.gone || m.stopped:
	case e.waiting():
		m.queue.bump(e, prio)
	case e.err == nil && e.valid(time.Now()) == nil:
		e.ready = make(chan struct{})
		if e.cancel == nil { // otherwise the fetch under way will do
			m.queue.remove(e)
			m.enqueue(e, prio)
		}
	}
}

func (m *Manager) enqueue(e *entry, prio priority) {
	now := time.Now()
	m.queue.push(e, prio, now, now)
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Forget drops an identity: its certificate, its renewals and the fetch under way. Callers that wait get ErrForgotten.
// Connections made with the certificate live on.
func (m *Manager) Forget(id identity.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		return
	}
	delete(m.entries, id)
	e.gone = true
	if e.err != nil {
		m.failing--
	}
	m.queue.remove(e)
	if e.cancel != nil {
		e.cancel()
	}
	e.settle()
}

// Stats returns the counters and gauges. It looks at every identity: for scrapes, not for connections.
func (m *Manager) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.stats
	s.Identities, s.Running, s.Queued = len(m.entries), m.running, m.queue.ready.Len()
	for _, e := range m.entries {
		if e.waiting() {
			s.Waiting++
		}
		if e.cert != nil && (s.FirstExpiry.IsZero() || e.cert.Leaf.NotAfter.Before(s.FirstExpiry)) {
			s.FirstExpiry = e.cert.Leaf.NotAfter
		}
	}
	return s
}
