package admin

import (
	"github.com/prometheus/client_golang/prometheus"
)

// XDSStats is what XDSCollector shows of the client of the control plane.
type XDSStats struct {
	ConnectionErrors, Errors, Reconnects, Completes uint64 // how streams ended (spec controlplane 2.5)

	Messages map[string]uint64 // responses received, by type URL
	Bytes    map[string]uint64 // of resources' payload, by type URL
	Refused  map[string]uint64 // resources refused with a NACK, ever, by type URL (ours)
	Rejected map[string]int    // of these, what is refused now, as far as it is listed (ours)

	Connected bool // a stream stands (ours)

	// On-demand look-ups (ours): under way; made way for another pod's or found no room; never answered; answered by what
	// the control plane said a moment ago.
	LookupsWaiting                                  int
	LookupsFull, LookupsUnanswered, LookupsRecalled uint64
}

// XDSCollector has the istio_xds_* family, and ztun_xds_* beside it. get is called once per scrape; false: there is
// no control plane, and so no sample: an alert on ztun_xds_connected must tell a node without one from one that has
// lost it. For StatsOptions.Registry.
func XDSCollector(get func() (XDSStats, bool)) prometheus.Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	ends := desc("istio_xds_connection_terminations_total",
		"The total number of completed connections to the control plane, by reason (unstable)", "reason")
	messages := desc("istio_xds_message_total", "The total number of messages received from the control plane (unstable)",
		"url")
	bytes := desc("istio_xds_message_bytes_total",
		"The total number of bytes of resources received from the control plane (unstable)", "url")
	refused := desc("ztun_xds_rejected_resources_total", "Resources of the control plane that were refused", "url")
	rejected := desc("ztun_xds_rejected_now",
		"Resources of the control plane whose newest version is refused, at most 100 of a type", "url")
	lookups := desc("ztun_xds_lookups_total",
		"On-demand look-ups that were not put to the control plane or not answered by it; recalled: it said a moment ago "+
			"that there is no such thing", "outcome")
	waiting := desc("ztun_xds_lookups_waiting", "On-demand look-ups that wait for an answer")
	connected := desc("ztun_xds_connected", "Whether there is a stream to the control plane")
	return collect(func(ch chan<- prometheus.Metric) {
		s, ok := get()
		if !ok {
			return
		}
		count := func(d *prometheus.Desc, n uint64, label string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), label)
		}
		for _, e := range []struct {
			reason string
			n      uint64
		}{{"ConnectionError", s.ConnectionErrors}, {"Error", s.Errors}, {"Reconnect", s.Reconnects},
			{"Complete", s.Completes}} {
			if e.n > 0 { // as ztunnel: a reason appears when it first occurs
				count(ends, e.n, e.reason)
			}
		}
		for d, m := range map[*prometheus.Desc]map[string]uint64{messages: s.Messages, bytes: s.Bytes, refused: s.Refused} {
			for url, n := range m {
				count(d, n, url)
			}
		}
		for url, n := range s.Rejected {
			ch <- prometheus.MustNewConstMetric(rejected, prometheus.GaugeValue, float64(n), url)
		}
		count(lookups, s.LookupsFull, "full")
		count(lookups, s.LookupsUnanswered, "unanswered")
		count(lookups, s.LookupsRecalled, "recalled")
		ch <- prometheus.MustNewConstMetric(waiting, prometheus.GaugeValue, float64(s.LookupsWaiting))
		up := 0.0
		if s.Connected {
			up = 1
		}
		ch <- prometheus.MustNewConstMetric(connected, prometheus.GaugeValue, up)
	})
}
