package proxy

import (
	"sync"
	"sync/atomic"

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
}

// Metrics holds the traffic metrics of all pods. It is a prometheus.Collector that writes labels in
// ztunnel's order.
type Metrics struct {
	mu     sync.RWMutex
	series map[labels]*series

	socketsSource, socketsDestination  atomic.Int64
	socketsSourceSeen, socketsDestSeen atomic.Bool

	overflowed atomic.Uint64 // look-ups that the bound sent to the overflow series

	descs map[string]*prometheus.Desc
}

// NewMetrics makes an empty set.
func NewMetrics() *Metrics {
	m := &Metrics{series: map[labels]*series{}, descs: map[string]*prometheus.Desc{}}
	for _, f := range families {
		m.descs[f.name] = prometheus.NewDesc(f.name, f.help, labelNames[:], nil)
	}
	m.descs[overflowName] = prometheus.NewDesc(overflowName, "Label sets counted in the overflow series because the table of series was full.", nil, nil)
	m.descs[socketsName] = prometheus.NewDesc(socketsName, "The current number of open TCP sockets (unstable).", []string{"reporter"}, nil)
	return m
}

const (
	socketsName  = "istio_tcp_sockets_open"
	overflowName = "ztun_traffic_series_overflow_total"
)

// families are the counters of spec 10.1 that carry the common labels.
var families = [...]struct {
	name, help string
	value      func(*series) (uint64, bool)
}{
	{"istio_tcp_connections_opened_total", "The total number of TCP connections opened.", func(s *series) (uint64, bool) { return s.opened.Load(), s.isOpen.Load() }},
	{"istio_tcp_connections_closed_total", "The total number of TCP connections closed.", func(s *series) (uint64, bool) { v := s.closed.Load(); return v, v > 0 }},
	{"istio_tcp_received_bytes_total", "The size of total bytes received during request in case of a TCP connection.", func(s *series) (uint64, bool) { return s.received.Load(), s.isOpen.Load() }},
	{"istio_tcp_sent_bytes_total", "The size of total bytes sent during response in case of a TCP connection.", func(s *series) (uint64, bool) { return s.sent.Load(), s.isOpen.Load() }},
	{"istio_tcp_connections_failed_total", "The total number of TCP connections that failed (unstable).", func(s *series) (uint64, bool) { v := s.failed.Load(); return v, v > 0 }},
}

// get finds or makes the series of l.
func (m *Metrics) get(l labels) *series {
	m.mu.RLock()
	s := m.series[l]
	m.mu.RUnlock()
	if s != nil {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s = m.series[l]; s != nil {
		return s
	}
	if len(m.series) >= maxSeries && l[lSourceWorkload] != overflow {
		m.overflowed.Add(1)
		o := labels{lReporter: l[lReporter], lSourceWorkload: overflow, lDestinationWorkload: overflow,
			lRequestProtocol: l[lRequestProtocol], lResponseFlags: l[lResponseFlags], lSecurityPolicy: l[lSecurityPolicy]}
		if s = m.series[o]; s != nil {
			return s
		}
		l = o
	}
	s = &series{labels: l}
	m.series[l] = s
	return s
}

// maxSeries bounds the label sets that are kept apart; further ones are counted together, in one series
// per reporter, flag and security policy whose workloads are called "overflow".
const (
	maxSeries = 20000
	overflow  = "overflow"
)

// open counts a connection that begins and returns its byte counters.
func (m *Metrics) open(l labels) *series {
	s := m.get(l)
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
		s = m.get(l)
		s.failed.Add(1)
	}
	s.closed.Add(1)
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

// pairs renders the labels in ztunnel's order.
func (s *series) pairs() []*dto.LabelPair {
	out := make([]*dto.LabelPair, nLabels)
	for i := range out {
		v := s.labels[i]
		if v == "" {
			v = "unknown"
		}
		out[i] = pair(labelNames[i], v)
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
