package admin

import (
	"github.com/prometheus/client_golang/prometheus"
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
