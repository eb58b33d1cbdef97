package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"ztun/proxy/state"
)

// exposed is the collector's families as text, without a registry (which would
// sort the labels).
func exposed(t *testing.T, m *Metrics) string {
	t.Helper()
	ch := make(chan prometheus.Metric)
	go func() {
		m.Collect(ch)
		close(ch)
	}()
	var b strings.Builder
	for x := range ch {
		var d dto.Metric
		if err := x.Write(&d); err != nil {
			t.Fatal(err)
		}
		var name, help string
		fmt.Sscanf(x.Desc().String(), "Desc{fqName: %q, help: %q", &name, &help)
		kind := dto.MetricType_COUNTER
		if d.Histogram != nil {
			kind = dto.MetricType_HISTOGRAM
		}
		f := &dto.MetricFamily{Name: &name, Help: &help, Type: &kind, Metric: []*dto.Metric{&d}}
		if _, err := expfmt.MetricFamilyToOpenMetrics(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// Names, labels in ztunnel's order, buckets (spec 7.2).
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		s := start(t, Config{Metrics: m, Upstream: &upstream{answer: func(p string, d netip.AddrPort, raw []byte) [][]byte {
			time.Sleep(20 * time.Millisecond)
			return echo(p, d, raw)
		}}})
		udp(t, s, ask("A cart"), kubeDNS)
		udp(t, s, ask("AAAA cart"), kubeDNS)
		udp(t, s, ask("MX elsewhere.test"), kubeDNS)
		odd := ask("A elsewhere.test")
		odd.Question[0].Qtype = 65300
		udp(t, s, odd, kubeDNS)
		update := new(dns.Msg).SetUpdate("acme.test.")
		udp(t, s, update, kubeDNS)
		text := exposed(t, m)
		labels := func(typ string) string {
			return `{request_query_type="` + typ +
				`",request_protocol="udp",source_canonical_service="client",source_canonical_revision="v1"}`
		}
		for _, want := range []string{
			"istio_dns_requests_total" + labels("a") + " 1.0\n",
			"istio_dns_requests_total" + labels("aaaa") + " 1.0\n",
			"istio_dns_requests_total" + labels("mx") + " 1.0\n",
			"istio_dns_requests_total" + labels("unknown") + " 1.0\n",
			"istio_dns_requests_total" + labels("soa") + " 1.0\n",
			"istio_dns_upstream_requests_total" + labels("mx") + " 1.0\n",
			"# HELP istio_dns_upstream_requests Total number of DNS requests forwarded to upstream (unstable)\n",
			"# TYPE istio_dns_upstream_request_duration_seconds histogram\n",
			strings.TrimSuffix("istio_dns_upstream_request_duration_seconds_bucket"+labels("mx"), "}") +
				`,le="0.0005"} 0` + "\n",
			strings.TrimSuffix("istio_dns_upstream_request_duration_seconds_bucket"+labels("mx"), "}") + `,le="0.01"} 0` + "\n",
			strings.TrimSuffix("istio_dns_upstream_request_duration_seconds_bucket"+labels("mx"), "}") + `,le="0.1"} 1` + "\n",
			strings.TrimSuffix("istio_dns_upstream_request_duration_seconds_bucket"+labels("mx"), "}") + `,le="5.0"} 1` + "\n",
			strings.TrimSuffix("istio_dns_upstream_request_duration_seconds_bucket"+labels("mx"), "}") + `,le="+Inf"} 1` + "\n",
			"istio_dns_upstream_request_duration_seconds_sum" + labels("mx") + " 0.02\n",
			`ztun_dns_dropped_total{reason="forwards"} 0.0` + "\n",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("missing: %s", want)
			}
		}
		for _, unwanted := range []string{"istio_dns_upstream_requests_total" + labels("a"),
			"istio_dns_upstream_failures_total"} {
			if strings.Contains(text, unwanted) {
				t.Errorf("unwanted: %s", unwanted)
			}
		}
		if t.Failed() {
			t.Log(text)
		}
	})
}

// A duration beyond the last bucket is counted all the same.
func TestHistogramTail(t *testing.T) {
	var s series
	s.observe(6 * time.Second)
	s.observe(5 * time.Second)
	if h := s.histogram(); h.GetSampleCount() != 2 || h.Bucket[5].GetCumulativeCount() != 1 ||
		h.Bucket[4].GetCumulativeCount() != 0 || h.GetSampleSum() != 11 {
		t.Errorf("%v", h)
	}
}

func TestSeriesBound(t *testing.T) {
	m := NewMetrics()
	q := ask("A cart")
	for i := range maxSeries + 5 {
		m.of(q, "udp", &state.Workload{CanonicalName: fmt.Sprint("w", i)})
	}
	over := m.of(q, "udp", &state.Workload{CanonicalName: "one more"})
	if len(m.series) != maxSeries+1 || m.overflowed.Load() != 6 || over.labels[2] != "overflow" {
		t.Errorf("%d series, %d overflowed, %v", len(m.series), m.overflowed.Load(), over.labels)
	}
	if s := m.of(q, "udp", &state.Workload{CanonicalName: "w3"}); s.labels[2] != "w3" || s.labels[3] != "unknown" {
		t.Errorf("%v", s.labels)
	}
}

// A registry takes the collector as well (it sorts labels).
func TestMetricsRegister(t *testing.T) {
	m := NewMetrics()
	m.of(ask("A cart"), "udp", nil).requests.Add(1)
	r := prometheus.NewRegistry()
	r.MustRegister(m)
	got, err := r.Gather()
	if err != nil || len(got) != 3 {
		t.Errorf("%d families, %v", len(got), err)
	}
}
