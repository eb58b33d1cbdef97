package dns

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"ztun/proxy/state"
)

// buckets are the upper bounds, in seconds, of the duration of forwarded queries.
var buckets = [...]float64{0.0005, 0.001, 0.01, 0.1, 1, 5}

// maxSeries bounds the label sets that are kept apart (types with a name, times
// two protocols, times the node's services); further ones are counted together.
const maxSeries = 10000

// dropReason says why a message got no answer, or SERVFAIL without being asked on.
type dropReason int

const (
	dropMalformed   dropReason = iota // shorter than a header, or itself an answer
	dropQueries                       // Config.MaxQueries reached
	dropConnections                   // Config.MaxConns reached
	dropForwards                      // Config.MaxForwards reached
	dropRate                          // Config.Rate exceeded
	nDropReasons
)

func (r dropReason) String() string {
	return [...]string{"malformed", "queries", "connections", "forwards", "rate"}[r]
}

// Metrics holds the DNS metrics of all pods (spec controlplane 7.2). It is a
// prometheus.Collector that writes labels in ztunnel's order: to be registered
// where such collectors go (admin.StatsOptions.Ordered), and only when the DNS
// proxy is on.
type Metrics struct {
	mu     sync.RWMutex
	series map[labels]*series

	dropped    [nDropReasons]atomic.Uint64
	overflowed atomic.Uint64

	requests, upstream, failures, duration, drops, overflow *prometheus.Desc
}

// labels in the order of labelNames.
type labels [4]string

var labelNames = [...]string{"request_query_type", "request_protocol", "source_canonical_service",
	"source_canonical_revision"}

type series struct {
	labels                       labels
	requests, upstream, failures atomic.Uint64

	mu     sync.Mutex // of the histogram
	counts [len(buckets)]uint64
	total  uint64
	sum    float64
}

// NewMetrics makes an empty set.
func NewMetrics() *Metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &Metrics{
		series:   map[labels]*series{},
		requests: desc("istio_dns_requests_total", "Total number of DNS requests (unstable)", labelNames[:]...),
		upstream: desc("istio_dns_upstream_requests_total", "Total number of DNS requests forwarded to upstream (unstable)",
			labelNames[:]...),
		failures: desc("istio_dns_upstream_failures_total",
			"Total number of DNS requests that failed to forward upstream (unstable)", labelNames[:]...),
		duration: desc("istio_dns_upstream_request_duration_seconds",
			"Total time in seconds Istio takes to get DNS response from upstream (unstable)", labelNames[:]...),
		drops: desc("ztun_dns_dropped_total", "DNS messages or connections that were not served, by the reason.",
			"reason"),
		overflow: desc("ztun_dns_series_overflow_total",
			"DNS requests counted in the overflow series because the table of series was full."),
	}
}

// of finds or makes the series of a query.
func (m *Metrics) of(q *dns.Msg, protocol string, client *state.Workload) *series {
	l := labels{strings.ToLower(typeName(q)), protocol, "unknown", "unknown"}
	if client != nil {
		if client.CanonicalName != "" {
			l[2] = client.CanonicalName
		}
		if client.CanonicalRevision != "" {
			l[3] = client.CanonicalRevision
		}
	}
	m.mu.RLock()
	s := m.series[l]
	m.mu.RUnlock()
	if s != nil {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.series[l] == nil && len(m.series) >= maxSeries {
		m.overflowed.Add(1)
		l = labels{"overflow", protocol, "overflow", "overflow"}
	}
	if s = m.series[l]; s == nil {
		s = &series{labels: l}
		m.series[l] = s
	}
	return s
}

func (s *series) observe(d time.Duration) {
	v := d.Seconds()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total++
	s.sum += v
	for i, b := range buckets {
		if v <= b {
			s.counts[i]++ // of this bucket alone; Write adds them up
			break
		}
	}
}

// Describe sends nothing: the collector is unchecked, since its label order is
// not client_golang's.
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
		counter := func(d *prometheus.Desc, n uint64) {
			if n > 0 {
				ch <- sample{d, pairs, &dto.Metric{Counter: &dto.Counter{Value: proto.Float64(float64(n))}}}
			}
		}
		counter(m.requests, s.requests.Load())
		counter(m.upstream, s.upstream.Load())
		counter(m.failures, s.failures.Load())
		if h := s.histogram(); h != nil {
			ch <- sample{m.duration, pairs, &dto.Metric{Histogram: h}}
		}
	}
	for r := range nDropReasons {
		ch <- sample{m.drops, []*dto.LabelPair{pair("reason", r.String())},
			&dto.Metric{Counter: &dto.Counter{Value: proto.Float64(float64(m.dropped[r].Load()))}}}
	}
	ch <- sample{m.overflow, nil, &dto.Metric{Counter: &dto.Counter{Value: proto.Float64(float64(m.overflowed.Load()))}}}
}

// histogram is the durations so far; nil if there are none.
func (s *series) histogram() *dto.Histogram {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total == 0 {
		return nil
	}
	h := &dto.Histogram{SampleCount: proto.Uint64(s.total), SampleSum: proto.Float64(s.sum)}
	n := uint64(0)
	for i, b := range buckets {
		n += s.counts[i]
		h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: proto.Float64(b), CumulativeCount: proto.Uint64(n)})
	}
	return h // the writer adds +Inf
}

func (s *series) pairs() []*dto.LabelPair {
	out := make([]*dto.LabelPair, len(labelNames))
	for i := range out {
		out[i] = pair(labelNames[i], s.labels[i])
	}
	return out
}

func pair(name, value string) *dto.LabelPair {
	return &dto.LabelPair{Name: proto.String(name), Value: proto.String(value)}
}

// sample is one metric as it is written out.
type sample struct {
	desc  *prometheus.Desc
	pairs []*dto.LabelPair
	value *dto.Metric
}

func (s sample) Desc() *prometheus.Desc { return s.desc }

func (s sample) Write(m *dto.Metric) error {
	m.Label, m.Counter, m.Histogram = s.pairs, s.value.Counter, s.value.Histogram
	return nil
}
