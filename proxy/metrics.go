package proxy

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// series is what is counted for one set of labels. Handles are resolved once per connection; after
// that a count is one atomic addition.
type series struct {
	labels                                 labels
	isOpen                                 atomic.Bool // has ever been opened: byte counters exist from then on, also at 0
	opened, closed, failed, received, sent atomic.Uint64

	claimant string // whose claims some of the labels are; "" if nobody's
	claimed  int    // bytes that count as the claimant's
	claims   labelSet
	users    atomic.Int64 // connections that count into it now; it does not expire while there are any
	last     atomic.Int64 // when one of them last let go, in nanoseconds since Metrics.start
}

// Metrics holds the traffic metrics of all pods. It is a prometheus.Collector that writes labels in
// ztunnel's order.
//
// Series expire (Expire), where ztunnel keeps every one that it ever had: on a node whose peers come and go
// those would grow without end.
type Metrics struct {
	start  time.Time
	mu     sync.RWMutex
	series map[labels]*series
	claims map[string]int // bytes of the series made of what a peer claims, by the peer's identity

	socketsSource, socketsDestination  atomic.Int64
	socketsSourceSeen, socketsDestSeen atomic.Bool

	gone [2]Totals // of series that have expired: source's, destination's

	overflowed atomic.Uint64 // look-ups that the bound sent to the overflow series
	disclaimed atomic.Uint64 // and those whose peer had claimed too much: counted under its identity alone
	expired    atomic.Uint64 // series

	descs map[string]*prometheus.Desc
}

// NewMetrics makes an empty set.
func NewMetrics() *Metrics {
	m := &Metrics{start: time.Now(), series: map[labels]*series{}, claims: map[string]int{},
		descs: map[string]*prometheus.Desc{}}
	for _, f := range families {
		m.descs[f.name] = prometheus.NewDesc(f.name, f.help, labelNames[:], nil)
	}
	m.descs[overflowName] = prometheus.NewDesc(overflowName,
		"Label sets counted in the overflow series because the table of series was full.", nil, nil)
	m.descs[disclaimedName] = prometheus.NewDesc(disclaimedName,
		"Label sets counted without what the peer claims to be, because it has claimed too much.", nil, nil)
	m.descs[expiredName] = prometheus.NewDesc(expiredName, "Label sets that have expired: idle, and their workloads gone.",
		nil, nil)
	m.descs[sizeName] = prometheus.NewDesc(sizeName, "Label sets in the table of series.", nil, nil)
	m.descs[socketsName] = prometheus.NewDesc(socketsName, "The current number of open TCP sockets (unstable).",
		[]string{"reporter"}, nil)
	return m
}

const (
	socketsName    = "istio_tcp_sockets_open"
	overflowName   = "ztun_traffic_series_overflow_total"
	disclaimedName = "ztun_traffic_series_disclaimed_total"
	expiredName    = "ztun_traffic_series_expired_total"
	sizeName       = "ztun_traffic_series"
)

// families are the counters of spec 10.1 that carry the common labels.
var families = [...]struct {
	name, help string
	value      func(*series) (uint64, bool)
}{
	{"istio_tcp_connections_opened_total", "The total number of TCP connections opened.", func(s *series) (uint64, bool) {
		return s.opened.Load(), s.isOpen.Load()
	}},
	{"istio_tcp_connections_closed_total", "The total number of TCP connections closed.", func(s *series) (uint64, bool) {
		v := s.closed.Load()
		return v, v > 0
	}},
	{"istio_tcp_received_bytes_total", "The size of total bytes received during request in case of a TCP connection.",
		func(s *series) (uint64, bool) {
			return s.received.Load(), s.isOpen.Load()
		}},
	{"istio_tcp_sent_bytes_total", "The size of total bytes sent during response in case of a TCP connection.",
		func(s *series) (uint64, bool) {
			return s.sent.Load(), s.isOpen.Load()
		}},
	{"istio_tcp_connections_failed_total", "The total number of TCP connections that failed (unstable).",
		func(s *series) (uint64, bool) {
			v := s.failed.Load()
			return v, v > 0
		}},
}

// get finds or makes the series of l, for one user more until release. claimant is whose claims some of the labels
// are, and claims which; no claimant, no claims.
func (m *Metrics) get(l labels, claimant string, claims labelSet) *series {
	if s := m.find(l); s != nil {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var s *series
	if claimant != "" && m.series[l] == nil {
		size := 0
		for i := range l {
			if claims.has(i) {
				l[i] = strings.Clone(l[i]) // of a header that may be much longer
				size += len(l[i])
			}
		}
		if size += seriesCost; m.claims[claimant]+size > maxClaims {
			m.disclaimed.Add(1)
			for i := range l {
				if claims.has(i) {
					l[i] = ""
				}
			}
			claimant = ""
		} else if len(m.series) < maxSeries {
			m.claims[claimant] += size
			s = m.insert(l)
			s.claimant, s.claimed, s.claims = claimant, size, claims
		}
	}
	if s == nil {
		s = m.insert(l)
	}
	s.users.Add(1)
	return s
}

// find is get for a series that exists.
func (m *Metrics) find(l labels) *series {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.series[l]
	if s != nil {
		s.users.Add(1) // under the lock: what expires has no users
	}
	return s
}

// maxClaims bounds the bytes of the series that are made of what one peer says of itself; seriesCost is what a series
// costs beside its texts.
const (
	maxClaims  = 64 << 10
	seriesCost = 1 << 10
)

// insert is called with the lock held.
func (m *Metrics) insert(l labels) *series {
	if s := m.series[l]; s != nil {
		return s
	}
	if len(m.series) >= maxSeries && l[lSourceWorkload] != overflow {
		m.overflowed.Add(1)
		return m.insert(labels{lReporter: l[lReporter], lSourceWorkload: overflow, lDestinationWorkload: overflow,
			lRequestProtocol: l[lRequestProtocol], lResponseFlags: l[lResponseFlags], lSecurityPolicy: l[lSecurityPolicy]})
	}
	s := &series{labels: l}
	m.series[l] = s
	return s
}

func (m *Metrics) release(s *series) {
	s.last.Store(int64(time.Since(m.start)))
	s.users.Add(-1)
}

// maxSeries bounds the label sets that are kept apart; further ones are counted together, in one series
// per reporter, flag and security policy whose workloads are called "overflow".
const (
	maxSeries = 20000
	overflow  = "overflow"
)

// open counts a connection that begins and returns its byte counters. See get for the claims.
func (m *Metrics) open(l labels, claimant string, claims labelSet) *series {
	s := m.get(l, claimant, claims)
	s.isOpen.Store(true)
	s.opened.Add(1)
	return s
}

// close counts the end of a connection that open returned s for. failed is whether it ended in an
// error of its own; a connection cut by a forced drain is not one (spec 10.2).
func (m *Metrics) close(s *series, f Flag) {
	if f != FlagNone {
		l := s.labels
		l[lResponseFlags] = f.String()
		f := m.get(l, s.claimant, s.claims)
		f.failed.Add(1)
		f.closed.Add(1)
		m.release(f)
	} else {
		s.closed.Add(1)
	}
	m.release(s)
}

// How long a series is idle before it may expire, and how often that is looked at.
const (
	seriesIdle  = 15 * time.Minute
	expireEvery = 5 * time.Minute
)

// NamedWorkload is a workload as the labels of metrics name it: not a pod, but what it belongs to.
type NamedWorkload struct{ Namespace, Workload string }

// Run lets series expire until ctx ends.
func (m *Metrics) Run(ctx context.Context, present func(map[NamedWorkload]bool)) {
	t := time.NewTicker(expireEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			m.Expire(present)
		}
	}
}

// Expire removes the series that no open connection counts into, that have been idle for 15 minutes, and of
// which the source's or the destination's workload is gone, and returns how many those were. present is
// asked about all candidates' workloads at once: it sets true for those that still exist. It is not called
// when there is none; nil says that none exists.
//
// The series of a workload that still exists stays however long it is idle: were it to begin again at 1, a
// rate over it would miss its rare connections. Only when the table is three quarters full does being idle
// suffice.
func (m *Metrics) Expire(present func(map[NamedWorkload]bool)) int {
	idleSince := int64(time.Since(m.start) - seriesIdle)
	idle := func(s *series) bool { return s.last.Load() <= idleSince && s.users.Load() == 0 }
	known := map[NamedWorkload]bool{}
	m.mu.RLock()
	full := len(m.series) > maxSeries*3/4
	for _, s := range m.series {
		if idle(s) {
			for _, w := range s.workloads() {
				if w != (NamedWorkload{}) {
					known[w] = false
				}
			}
		}
	}
	m.mu.RUnlock()
	if present != nil && len(known) > 0 && !full {
		present(known)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := len(m.series)
	for l, s := range m.series {
		if !idle(s) {
			continue
		}
		ws := s.workloads()
		gone := ws == [2]NamedWorkload{} // nothing keeps it
		for _, w := range ws {
			exists, asked := known[w]
			gone = gone || asked && !exists // not asked: idle only since a moment ago
		}
		if gone || full {
			delete(m.series, l)
			m.gone[side(s)].add(s)
			if s.claimant != "" {
				if m.claims[s.claimant] -= s.claimed; m.claims[s.claimant] <= 0 {
					delete(m.claims, s.claimant)
				}
			}
		}
	}
	n -= len(m.series)
	m.expired.Add(uint64(n))
	return n
}

// Totals are sums over all series of one reporter, those that have expired included. Bytes are those of both ways.
type Totals struct{ Opened, Failed, Bytes uint64 }

func (t *Totals) add(s *series) {
	t.Opened += s.opened.Load()
	t.Failed += s.failed.Load()
	t.Bytes += s.received.Load() + s.sent.Load()
}

// Totals returns what the pods opened (source), and what they were opened (destination), since the start.
func (m *Metrics) Totals() (source, destination Totals) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	sums := m.gone
	for _, s := range m.series {
		sums[side(s)].add(s)
	}
	return sums[0], sums[1]
}

// side is 0 for a series of the source's, 1 for one of the destination's.
func side(s *series) int {
	if s.labels[lReporter] == reporterSource {
		return 0
	}
	return 1
}

// workloads are those of the source and the destination.
func (s *series) workloads() (ws [2]NamedWorkload) {
	l := &s.labels
	ws = [2]NamedWorkload{{l[lSourceNamespace], l[lSourceWorkload]}, {l[lDestinationNamespace], l[lDestinationWorkload]}}
	for i := range ws {
		if w := ws[i].Workload; w == "" || w == overflow {
			ws[i] = NamedWorkload{} // nobody in particular
		}
	}
	return ws
}

// socket counts a socket of reporter being opened (+1) or closed (-1).
func (m *Metrics) socket(reporter string, n int64) {
	if reporter == reporterSource {
		m.socketsSource.Add(n)
		m.socketsSourceSeen.Store(true)
		return
	}
	m.socketsDestination.Add(n)
	m.socketsDestSeen.Store(true)
}

// Describe sends nothing: the collector is unchecked, since its label order is not client_golang's.
func (m *Metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.RLock()
	all := make([]*series, 0, len(m.series))
	for _, s := range m.series {
		all = append(all, s)
	}
	m.mu.RUnlock()
	for _, s := range all {
		pairs := s.pairs()
		for _, f := range families {
			if v, ok := f.value(s); ok {
				ch <- sample{desc: m.descs[f.name], pairs: pairs, counter: true, value: float64(v)}
			}
		}
	}
	ch <- sample{desc: m.descs[overflowName], counter: true, value: float64(m.overflowed.Load())}
	ch <- sample{desc: m.descs[disclaimedName], counter: true, value: float64(m.disclaimed.Load())}
	ch <- sample{desc: m.descs[expiredName], counter: true, value: float64(m.expired.Load())}
	ch <- sample{desc: m.descs[sizeName], value: float64(len(all))}
	gauge := func(reporter string, v int64) {
		ch <- sample{desc: m.descs[socketsName], pairs: []*dto.LabelPair{pair("reporter", reporter)}, value: float64(v)}
	}
	if m.socketsSourceSeen.Load() {
		gauge(reporterSource, m.socketsSource.Load())
	}
	if m.socketsDestSeen.Load() {
		gauge(reporterDestination, m.socketsDestination.Load())
	}
}

// pairs renders the labels in ztunnel's order. The texts are shared, not copied: a scrape of thousands of
// series would be megabytes of garbage otherwise.
func (s *series) pairs() []*dto.LabelPair {
	out, values := make([]*dto.LabelPair, nLabels), make([]dto.LabelPair, nLabels)
	unknown := "unknown"
	for i := range out {
		p := &values[i]
		p.Name, p.Value = &labelNames[i], &s.labels[i]
		if *p.Value == "" {
			p.Value = &unknown
		}
		out[i] = p
	}
	return out
}

func pair(name, value string) *dto.LabelPair {
	return &dto.LabelPair{Name: proto.String(name), Value: proto.String(value)}
}

// sample is one metric as it is written out.
type sample struct {
	desc    *prometheus.Desc
	pairs   []*dto.LabelPair
	counter bool
	value   float64
}

func (s sample) Desc() *prometheus.Desc { return s.desc }

func (s sample) Write(m *dto.Metric) error {
	m.Label = s.pairs
	if s.counter {
		m.Counter = &dto.Counter{Value: proto.Float64(s.value)}
	} else {
		m.Gauge = &dto.Gauge{Value: proto.Float64(s.value)}
	}
	return nil
}
