package admin

import (
	"cmp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// XDSStats is what XDSCollector shows of the client of the control plane.
type XDSStats struct {
	ConnectionErrors, Errors, Reconnects, Completes uint64 // how streams ended (spec controlplane 2.5)

	Messages map[string]uint64 // responses received, by type URL
	Bytes    map[string]uint64 // of resources' payload, by type URL
	Rejected map[string]uint64 // resources refused with a NACK, by type URL (ours)

	Connected bool // a stream stands (ours)
}

// XDSCollector has the istio_xds_* family, and ztun_xds_* beside it. get is called once per scrape. For
// StatsOptions.Registry.
func XDSCollector(get func() XDSStats) prometheus.Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	ends := desc("istio_xds_connection_terminations_total", "The total number of completed connections to the control plane, by reason (unstable)", "reason")
	messages := desc("istio_xds_message_total", "The total number of messages received from the control plane (unstable)", "url")
	bytes := desc("istio_xds_message_bytes_total", "The total number of bytes of resources received from the control plane (unstable)", "url")
	rejected := desc("ztun_xds_rejected_resources_total", "Resources of the control plane that were refused", "url")
	connected := desc("ztun_xds_connected", "Whether there is a stream to the control plane")
	return collect(func(ch chan<- prometheus.Metric) {
		s := get()
		count := func(d *prometheus.Desc, n uint64, label string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), label)
		}
		for _, e := range []struct {
			reason string
			n      uint64
		}{{"ConnectionError", s.ConnectionErrors}, {"Error", s.Errors}, {"Reconnect", s.Reconnects}, {"Complete", s.Completes}} {
			if e.n > 0 { // as ztunnel: a reason appears when it first occurs
				count(ends, e.n, e.reason)
			}
		}
		for d, m := range map[*prometheus.Desc]map[string]uint64{messages: s.Messages, bytes: s.Bytes, rejected: s.Rejected} {
			for url, n := range m {
				count(d, n, url)
			}
		}
		up := 0.0
		if s.Connected {
			up = 1
		}
		ch <- prometheus.MustNewConstMetric(connected, prometheus.GaugeValue, up)
	})
}

// DNSLabels are the labels of the istio_dns_* family, in their order. Empty ones are shown as "unknown".
type DNSLabels struct {
	QueryType         string // lower case: "a", "aaaa"
	Protocol          string // "udp", "tcp"
	CanonicalService  string // of the client
	CanonicalRevision string
}

// DNSMetrics counts what the DNS proxy does. It is safe for concurrent use, and a collector for
// StatsOptions.Ordered (its labels are not in alphabetical order).
//
// At most maxLabelSets sets of labels are kept apart. When there are as many, sets that have been idle for
// labelSetIdle make room; without any, what is new is counted together under the zero labels.
type DNSMetrics struct {
	mu         sync.RWMutex
	sets       map[DNSLabels]*dnsSeries
	swept      time.Time // when idle ones were last looked for
	overflowed atomic.Uint64

	requests, upstream, failures, duration, overflow *prometheus.Desc
}

const (
	maxLabelSets = 4096
	labelSetIdle = time.Hour
)

type dnsSeries struct {
	last                         atomic.Int64 // use, in nanoseconds of Unix time
	requests, upstream, failures atomic.Uint64
	counts                       [len(dnsBounds) + 1]atomic.Uint64
	sum                          atomic.Int64 // ns
}

// dnsBounds are ztunnel's buckets of the duration of forwarded queries, in seconds.
var dnsBounds = [...]float64{0.0005, 0.001, 0.01, 0.1, 1, 5}

// NewDNSMetrics makes an empty set.
func NewDNSMetrics() *DNSMetrics {
	d := func(name, help string) *prometheus.Desc { return prometheus.NewDesc(name, help, nil, nil) }
	return &DNSMetrics{
		sets:     map[DNSLabels]*dnsSeries{},
		requests: d("istio_dns_requests_total", "The total number of DNS requests (unstable)"),
		upstream: d("istio_dns_upstream_requests_total", "The total number of DNS requests that were forwarded (unstable)"),
		failures: d("istio_dns_upstream_failures_total", "The total number of DNS requests whose forwarding failed (unstable)"),
		duration: d("istio_dns_upstream_request_duration_seconds", "How long forwarded DNS requests took (unstable)"),
		overflow: d("ztun_dns_series_overflow_total", "DNS events counted together because the table of series was full"),
	}
}

// Request counts a request that was decided: answered here, forwarded, or refused.
func (m *DNSMetrics) Request(l DNSLabels) { m.get(l).requests.Add(1) }

// Upstream counts one that was forwarded, how long that took, and whether it failed.
func (m *DNSMetrics) Upstream(l DNSLabels, took time.Duration, failed bool) {
	s := m.get(l)
	s.upstream.Add(1)
	if failed {
		s.failures.Add(1)
	}
	i := 0
	for i < len(dnsBounds) && took.Seconds() > dnsBounds[i] {
		i++
	}
	s.counts[i].Add(1)
	s.sum.Add(int64(took))
}

func (m *DNSMetrics) get(l DNSLabels) *dnsSeries {
	now := time.Now()
	m.mu.RLock()
	s := m.sets[l]
	m.mu.RUnlock()
	if s == nil {
		m.mu.Lock()
		s = m.insert(l, now)
		m.mu.Unlock()
	}
	s.last.Store(now.UnixNano())
	return s
}

// insert is called with the lock held.
func (m *DNSMetrics) insert(l DNSLabels, now time.Time) *dnsSeries {
	if s := m.sets[l]; s != nil {
		return s
	}
	if len(m.sets) >= maxLabelSets && now.Sub(m.swept) > time.Second { // not for every name of a flood
		m.swept = now
		for k, s := range m.sets {
			if now.UnixNano()-s.last.Load() > int64(labelSetIdle) {
				delete(m.sets, k)
			}
		}
	}
	if len(m.sets) >= maxLabelSets && l != (DNSLabels{}) {
		m.overflowed.Add(1)
		return m.insert(DNSLabels{}, now)
	}
	s := &dnsSeries{}
	m.sets[l] = s
	return s
}

// Describe sends nothing: the collector is unchecked.
func (m *DNSMetrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *DNSMetrics) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, n uint64, pairs []*dto.LabelPair) {
		ch <- orderedMetric{d, &dto.Metric{Label: pairs, Counter: &dto.Counter{Value: proto.Float64(float64(n))}}}
	}
	type entry struct {
		l DNSLabels
		s *dnsSeries
	}
	m.mu.RLock()
	all := make([]entry, 0, len(m.sets))
	for l, s := range m.sets {
		all = append(all, entry{l, s})
	}
	m.mu.RUnlock()
	for _, e := range all {
		l, s := e.l, e.s
		p := pairs("request_query_type", l.QueryType, "request_protocol", l.Protocol,
			"source_canonical_service", l.CanonicalService, "source_canonical_revision", l.CanonicalRevision)
		if n := s.requests.Load(); n > 0 {
			counter(m.requests, n, p)
		}
		if n := s.upstream.Load(); n > 0 {
			counter(m.upstream, n, p)
			ch <- orderedMetric{m.duration, &dto.Metric{Label: p, Histogram: s.histogram()}}
		}
		if n := s.failures.Load(); n > 0 {
			counter(m.failures, n, p)
		}
	}
	if n := m.overflowed.Load(); n > 0 {
		counter(m.overflow, n, nil)
	}
}

func (s *dnsSeries) histogram() *dto.Histogram {
	h := &dto.Histogram{SampleSum: proto.Float64(time.Duration(s.sum.Load()).Seconds())}
	var total uint64
	for i, b := range dnsBounds {
		total += s.counts[i].Load()
		h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: proto.Float64(b), CumulativeCount: proto.Uint64(total)})
	}
	h.SampleCount = proto.Uint64(total + s.counts[len(dnsBounds)].Load())
	return h
}

// orderedMetric is a metric with its labels as they are.
type orderedMetric struct {
	desc *prometheus.Desc
	m    *dto.Metric
}

func (o orderedMetric) Desc() *prometheus.Desc { return o.desc }

func (o orderedMetric) Write(m *dto.Metric) error {
	m.Label, m.Counter, m.Histogram = o.m.Label, o.m.Counter, o.m.Histogram
	return nil
}

// pairs makes labels of names and values.
func pairs(namesAndValues ...string) []*dto.LabelPair {
	var out []*dto.LabelPair
	for i := 0; i < len(namesAndValues); i += 2 {
		out = append(out, &dto.LabelPair{Name: &namesAndValues[i], Value: proto.String(cmp.Or(namesAndValues[i+1], "unknown"))})
	}
	return out
}
