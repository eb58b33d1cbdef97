package main

import (
	"github.com/prometheus/client_golang/prometheus"
)

// dataplaneCollector exports the counters of the devices and stacks: ztun_device_*{device,pod} and
// ztun_stack_*{pod}. The pods are read when asked, so those that are gone have no series. It is
// registered when the node's side stands.
type dataplaneCollector struct {
	d      *daemon
	tables *metricTables
}

// Describe sends nothing: which pods there are is not known beforehand.
func (c *dataplaneCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *dataplaneCollector) Collect(ch chan<- prometheus.Metric) {
	node := c.d.kind.Stats()
	if node.Link != nil {
		c.tables.device.emit(ch, *node.Link, "")
	}
	for _, p := range c.d.pods.all() {
		name := p.label
		if s := p.att.Stats(); s != nil {
			c.tables.device.emit(ch, s.App, name)
			c.tables.stack.emit(ch, *s, name)
		}
		emitBudget(ch, name, p.memory)
		ps := p.proxy.Stats()
		c.tables.proxy.emit(ch, ps, name)
		c.tables.pool.emit(ch, ps.Pool, name)
		c.tables.tunnel.emit(ch, ps.Tunnels, name)
	}
	emitBudget(ch, "", c.d.memory.all)
	ch <- prometheus.MustNewConstMetric(
		prometheus.NewDesc("ztun_panics_total",
			"Panics of the data plane that were caught; each ended a connection or a pod's stack. The log has their stacks.",
			nil, nil),
		prometheus.CounterValue, float64(c.d.panics.Total()))
	ch <- prometheus.MustNewConstMetric(
		prometheus.NewDesc("ztun_mesh_unknown_destination_total",
			"Connections to port 15008 of an address that no attached pod has.", nil, nil),
		prometheus.CounterValue, float64(node.MeshUnknown))
}

// controlCollector exports the counters of what the control side leaves to others: certificates, names of workloads,
// revocation. It is registered with the admin side.
type controlCollector struct {
	d      *daemon
	tables *metricTables
}

// Describe sends nothing: what there is depends on the configuration.
func (c *controlCollector) Describe(chan<- *prometheus.Desc) {}

var boundedFamily = prometheus.NewDesc("ztun_bounded_total",
	"What a bound turned away: places that were taken from the greediest source, and newcomers that got none.",
	[]string{"resource", "pod", "outcome"}, nil)

var firstExpiry = prometheus.NewDesc("ztun_certificates_first_expiry_timestamp_seconds",
	"When the certificate ends that ends first, in Unix time.", nil, nil)

var crlFamilies = [...]*prometheus.Desc{
	prometheus.NewDesc("istio_crl_policy_rejections_total",
		"The total number of connections rejected due to CRL policy (unstable)", []string{"reporter"}, nil),
	prometheus.NewDesc("istio_crl_untracked_connections_total",
		"The total number of connections not tracked for CRL enforcement (unstable)", []string{"reporter"}, nil),
}

// Collect implements prometheus.Collector.
func (c *controlCollector) Collect(ch chan<- prometheus.Metric) {
	for _, n := range c.d.report.Counts() {
		for outcome, v := range map[string]uint64{"evicted": n.Evicted, "refused": n.Refused} {
			if v > 0 {
				ch <- prometheus.MustNewConstMetric(boundedFamily, prometheus.CounterValue, float64(v), n.Resource, n.Pod, outcome)
			}
		}
	}
	certs := c.d.certs.Stats()
	c.tables.certificates.emit(ch, certs)
	if end := certs.FirstExpiry; !end.IsZero() { // no sample: the alert takes it for a time
		ch <- prometheus.MustNewConstMetric(firstExpiry, prometheus.GaugeValue, float64(end.Unix()))
	}
	if c.d.policies != nil {
		c.tables.policies.emit(ch, c.d.policies.Stats())
	}
	if c.d.resolve != nil {
		c.tables.hostnames.emit(ch, c.d.resolve.Stats())
	}
	if r := c.d.remoteCA; r != nil {
		s := r.Stats()
		c.tables.authority.emit(ch, s)
		for code, n := range s.Failures {
			ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("ztun_ca_failures_total",
				"Certificate requests that failed, by gRPC code.", []string{"code"}, nil), prometheus.CounterValue,
				float64(n), code)
		}
	}
	if c.d.agent != nil {
		c.tables.agent.emit(ch, c.d.agent.client.Stats())
	}
	if c.d.crl == nil {
		return
	}
	c.tables.crl.emit(ch, c.d.crl.Stats())
	s := c.d.revoked.Stats()
	c.tables.revocation.emit(ch, s)
	for i, counts := range [...][2]uint64{s.Rejected, s.Untracked} {
		for side, n := range counts {
			if n > 0 { // ztunnel has no series before the first
				ch <- prometheus.MustNewConstMetric(crlFamilies[i], prometheus.CounterValue, float64(n),
					[...]string{"source", "destination"}[side])
			}
		}
	}
}
