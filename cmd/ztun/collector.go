package main

import (
	"reflect"
	"strings"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
)

// dataplaneCollector exports the counters of the devices and stacks: ztun_device_*{device,pod} and
// ztun_stack_*{pod}. The pods are read when asked, so those that are gone have no series. It is
// registered when the node's side stands.
type dataplaneCollector struct{ d *daemon }

// Describe sends nothing: which pods there are is not known beforehand.
func (c *dataplaneCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *dataplaneCollector) Collect(ch chan<- prometheus.Metric) {
	emit(ch, "ztun_device_", c.d.uplink.Stats(), "pod", "")
	for _, p := range c.d.pods.all() {
		s := p.stack.Stats()
		name := refOf(p.spec).String()
		emit(ch, "ztun_device_", s.App, "pod", name)
		emit(ch, "ztun_stack_", s, "pod", name)
		ps := p.proxy.Stats()
		emit(ch, "ztun_proxy_", ps, "pod", name)
		emit(ch, "ztun_pool_", ps.Pool, "pod", name)
		emit(ch, "ztun_tunnel_", ps.Tunnels, "pod", name)
	}
	ch <- prometheus.MustNewConstMetric(
		prometheus.NewDesc("ztun_panics_total", "Panics of the data plane that were caught; each ended a connection or a pod's stack. The log has their stacks.", nil, nil),
		prometheus.CounterValue, float64(c.d.panics.Total()))
	ch <- prometheus.MustNewConstMetric(
		prometheus.NewDesc("ztun_mesh_unknown_destination_total", "Connections to port 15008 of an address that no attached pod has.", nil, nil),
		prometheus.CounterValue, float64(c.d.pods.unknown.Load()))
}

// controlCollector exports the counters of what the control side leaves to others: certificates, names of workloads,
// revocation. It is registered with the admin side.
type controlCollector struct{ d *daemon }

// Describe sends nothing: what there is depends on the configuration.
func (c *controlCollector) Describe(chan<- *prometheus.Desc) {}

var boundedFamily = prometheus.NewDesc("ztun_bounded_total", "What a bound turned away: places that were taken from the greediest source, and newcomers that got none.",
	[]string{"resource", "pod", "outcome"}, nil)

var crlFamilies = [...]*prometheus.Desc{
	prometheus.NewDesc("istio_crl_policy_rejections_total", "The total number of connections rejected due to CRL policy (unstable)", []string{"reporter"}, nil),
	prometheus.NewDesc("istio_crl_untracked_connections_total", "The total number of connections not tracked for CRL enforcement (unstable)", []string{"reporter"}, nil),
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
	emit(ch, "ztun_certificates_", c.d.certs.Stats(), "", "")
	if c.d.policies != nil {
		emit(ch, "ztun_policies_", c.d.policies.Stats(), "", "")
	}
	if c.d.resolve != nil {
		emit(ch, "ztun_hostnames_", c.d.resolve.Stats(), "", "")
	}
	if r := c.d.remoteCA; r != nil {
		s := r.Stats()
		emit(ch, "ztun_ca_", s, "", "")
		for code, n := range s.Failures {
			ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("ztun_ca_failures_total", "Certificate requests that failed, by gRPC code.", []string{"code"}, nil), prometheus.CounterValue, float64(n), code)
		}
	}
	if c.d.crl == nil {
		return
	}
	emit(ch, "ztun_crl_", c.d.crl.Stats(), "", "")
	s := c.d.revoked.Stats()
	emit(ch, "ztun_crl_", s, "", "")
	for i, counts := range [...][2]uint64{s.Rejected, s.Untracked} {
		for side, n := range counts {
			if n > 0 { // ztunnel has no series before the first
				ch <- prometheus.MustNewConstMetric(crlFamilies[i], prometheus.CounterValue, float64(n), [...]string{"source", "destination"}[side])
			}
		}
	}
}

// gauges are the fields that go up and down; all others count.
var gauges = map[string]bool{
	"InFlight": true, "DNSInFlight": true, "Conns": true, "Offload": true, "Keys": true, "Streams": true,
	"Identities": true, "Waiting": true, "Running": true, "Queued": true, "Names": true, "Tracked": true, "Unknown": true,
}

// emit exports the numeric fields of a struct of counters under their own names, with one label, or none if it is "". Reflection costs
// little here (a scrape), and a counter that netstack gains is exported without a second list.
func emit(ch chan<- prometheus.Metric, prefix string, stats any, label, value string) {
	v := reflect.ValueOf(stats)
	var names, values []string
	if label != "" {
		names, values = []string{label}, []string{value}
	}
	for i := range v.NumField() {
		f, field := v.Type().Field(i), v.Field(i)
		var x float64
		switch field.Kind() {
		case reflect.Uint64:
			x = float64(field.Uint())
		case reflect.Int:
			x = float64(field.Int())
		case reflect.Bool:
			if field.Bool() {
				x = 1
			}
		default:
			continue
		}
		name, kind := prefix+snake(f.Name), prometheus.GaugeValue
		if !gauges[f.Name] {
			name, kind = name+"_total", prometheus.CounterValue
		}
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, v.Type().String()+"."+f.Name+": see the documentation of that type.", names, nil), kind, x, values...)
	}
}

// snake turns RxNotTCP into rx_not_tcp: a capital begins a word unless it follows one.
func snake(s string) string {
	var b strings.Builder
	after := true // whether the last rune was a capital
	for _, r := range s {
		upper := unicode.IsUpper(r)
		if upper && !after {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
		after = upper
	}
	return b.String()
}
