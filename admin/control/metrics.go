package control

import (
	"io"
	"log"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// The names by which dashboards and alerts know the control plane: an interface, to be changed like one. A test
// compares them with docs/metrics.md.

// gauge is a metric of the whole, and where a Status has it. A time that is zero has no sample.
type gauge struct {
	name, help string
	get        func(*Status) float64
}

var gauges = []gauge{
	{"snapshot_version", "Versions of the mesh published since the start; 0: nothing yet.", func(s *Status) float64 {
		return float64(s.Snapshot.Version)
	}},
	{"snapshot_published_timestamp_seconds", "When the newest version was published, in Unix time.",
		func(s *Status) float64 {
			return unixTime(s.Snapshot.PublishedAt)
		}},
	{"snapshot_workloads", "Workloads that are published.", func(s *Status) float64 {
		return float64(s.Snapshot.Workloads)
	}},
	{"snapshot_services", "Services that are published.", func(s *Status) float64 { return float64(s.Snapshot.Services) }},
	{"snapshot_policies", "Policies that are published.", func(s *Status) float64 { return float64(s.Snapshot.Policies) }},
	{"directory_errors", "Errors in the mesh's directory: while there are any, what is published is older.",
		func(s *Status) float64 {
			return float64(s.Snapshot.ErrorCount)
		}},
	{"directory_warnings", "Warnings about the mesh's directory.", func(s *Status) float64 {
		return float64(s.Snapshot.WarningCount)
	}},
	{"directory_load_seconds", "How long the last load of the directory took.", func(s *Status) float64 {
		return s.Snapshot.LoadSeconds
	}},
	{"certificate_expiry_timestamp_seconds", "When the server's own certificate ends, in Unix time.",
		func(s *Status) float64 {
			return unixTime(s.Certificate.NotAfter)
		}},
	{"revoked_certificates", "Certificates of nodes that have left and that have not expired.", func(s *Status) float64 {
		return float64(s.Revoked.Certificates)
	}},
	{"nodes_not_joined", "Nodes that workloads name and that have no credentials, at most 100.", func(s *Status) float64 {
		return float64(len(s.NotJoined))
	}},
	{"credential_problems", "Files of nodes' credentials that cannot be used.", func(s *Status) float64 {
		return float64(len(s.Problems))
	}},
}

// totals are the counters of Status.Counters.
var totals = map[string]struct{ name, help string }{
	"connections":        {"connections_total", "Connections of nodes that were taken."},
	"connectionsRefused": {"connections_refused_total", "Connections that found no place."},
	"unauthenticated":    {"unauthenticated_total", "Calls without credentials that count."},
	"denied":             {"denied_total", "Calls by somebody who may not make them."},
	"streams":            {"streams_total", "Streams of nodes that began."},
	"streamsRefused":     {"streams_refused_total", "Streams that found no place."},
	"requests":           {"requests_total", "Requests on streams, acknowledgements among them."},
	"messages":           {"pushes_total", "Messages pushed to nodes."},
	"resources":          {"pushed_resources_total", "Resources in messages pushed to nodes."},
	"acks":               {"acks_total", "Messages that nodes have acknowledged."},
	"nacks":              {"nacks_total", "Messages that nodes have rejected."},
	"stale":              {"stale_replies_total", "Replies to another message than the last."},
	"signed":             {"certificates_signed_total", "Certificates issued to workloads and nodes."},
	"signRefused": {"certificates_refused_total",
		"Requests for certificates that were refused: for an identity that is not the node's, or malformed."},
	"signLimited": {"certificates_limited_total", "Requests for certificates beyond a node's rate."},
}

// collector exports a Status at each scrape. Nodes are told apart by name: there are as many as have joined.
type collector struct {
	status  func() Status
	bounded func(yield func(resource, outcome string, n uint64))

	gauges                                                []*prometheus.Desc
	totals                                                map[string]*prometheus.Desc
	connected, pods, expires, acked, lag, behind, rejects *prometheus.Desc
	turned                                                *prometheus.Desc
}

func newCollector(s *Server) *collector {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		if strings.HasSuffix(name, "_seconds") {
			return prometheus.V2.NewDesc("ztun_control_"+name, help, prometheus.UnconstrainedLabels(labels), nil,
				prometheus.WithUnit("seconds"))
		}
		return prometheus.NewDesc("ztun_control_"+name, help, labels, nil)
	}
	c := &collector{
		status: s.Status, totals: map[string]*prometheus.Desc{},
		bounded: func(yield func(resource, outcome string, n uint64)) {
			for _, n := range s.report.Counts() {
				yield(n.Resource, "evicted", n.Evicted)
				yield(n.Resource, "refused", n.Refused)
			}
		},
		connected: d("node_connected", "Whether a node that has joined has a stream.", "node"),
		pods:      d("node_pods", "Workloads that are published for a node.", "node"),
		expires: d("node_certificate_expiry_timestamp_seconds", "When a node's client certificate ends, in Unix time.",
			"node"),
		acked: d("node_acknowledged_version", "The newest version that a node has been sent entirely and has replied to.",
			"node", "type"),
		lag:     d("node_lag_versions", "Versions that a node is behind.", "node", "type"),
		behind:  d("node_lag_seconds", "For how long a node has been behind.", "node", "type"),
		rejects: d("node_rejecting", "1: the node's last reply was a rejection.", "node", "type"),
		turned: d("bounded_total",
			"What a bound turned away: places that were taken from the greediest source, and newcomers that got none.",
			"resource", "outcome"),
	}
	for _, g := range gauges {
		c.gauges = append(c.gauges, d(g.name, g.help))
	}
	for key, t := range totals {
		c.totals[key] = d(t.name, t.help)
	}
	return c
}

// Describe sends nothing: which nodes there are is not known beforehand.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	st := c.status()
	for i, g := range gauges {
		if v := g.get(&st); v != 0 || !timestamp(g.name) {
			gauge(c.gauges[i], v)
		}
	}
	for key, d := range c.totals {
		count(d, st.Counters[key])
	}
	c.bounded(func(resource, outcome string, n uint64) {
		if n > 0 {
			count(c.turned, n, resource, outcome)
		}
	})
	for _, n := range byNode(st.Nodes) {
		gauge(c.connected, truth(n.Connected), n.Node)
		gauge(c.pods, float64(n.Pods), n.Node)
		if end := unixTime(n.CertificateNotAfter); end != 0 {
			gauge(c.expires, end, n.Node)
		}
		for _, t := range n.Types {
			if t.url != typeAddress && t.url != typeAuthorization {
				continue // of the node's invention
			}
			gauge(c.acked, float64(t.Synced), n.Node, t.Type)
			gauge(c.lag, float64(t.Lag), n.Node, t.Type)
			gauge(c.behind, t.LagSeconds, n.Node, t.Type)
			gauge(c.rejects, truth(t.Rejecting), n.Node, t.Type)
		}
	}
}

// byNode is the newest stream of each node: it may have another while that is being replaced. The list is sorted by
// node and time.
func byNode(all []NodeStatus) []NodeStatus {
	out := all[:0:0]
	for _, n := range all {
		if len(out) > 0 && out[len(out)-1].Node == n.Node {
			out = out[:len(out)-1]
		}
		out = append(out, n)
	}
	return out
}

func timestamp(name string) bool { return strings.HasSuffix(name, "_timestamp_seconds") }

// unixTime is a time as metrics have it, 0 for none.
func unixTime(t time.Time) float64 {
	if t.IsZero() || t.Unix() <= 0 {
		return 0
	}
	return float64(t.Unix())
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// metrics is the handler of /metrics. Two scrapes at a time; the others are told to come again.
func (s *Server) metrics() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(newCollector(s), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 2, EnableOpenMetrics: true,
		ErrorLog: log.New(io.Discard, "", 0), ErrorHandling: promhttp.ContinueOnError})
}
