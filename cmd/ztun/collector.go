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
	}
	ch <- prometheus.MustNewConstMetric(
		prometheus.NewDesc("ztun_mesh_unknown_destination_total", "Connections to port 15008 of an address that no attached pod has.", nil, nil),
		prometheus.CounterValue, float64(c.d.pods.unknown.Load()))
}

// gauges are the fields that go up and down; all others count.
var gauges = map[string]bool{"InFlight": true, "Conns": true, "Offload": true, "Keys": true, "Streams": true}

// emit exports the numeric fields of a struct of counters under their own names. Reflection costs
// little here (a scrape), and a counter that netstack gains is exported without a second list.
func emit(ch chan<- prometheus.Metric, prefix string, stats any, label, value string) {
	v := reflect.ValueOf(stats)
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
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, "Userspace data path: "+f.Name+" (see package netstack).", []string{label}, nil), kind, x, value)
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
