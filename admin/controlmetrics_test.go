package admin

import (
	"fmt"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// shown is the exposition of collectors, without a server.
func shown(t testing.TB, registered, ordered []prometheus.Collector) string {
	t.Helper()
	reg := prometheus.NewRegistry()
	reg.MustRegister(registered...)
	x := &exposition{o: StatsOptions{Registry: reg, Ordered: ordered}, turn: make(chan struct{}, 1), wait: scrapeWait}
	w := httptest.NewRecorder()
	x.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func wantLines(t *testing.T, body string, lines ...string) {
	t.Helper()
	have := strings.Split(body, "\n")
	for _, l := range lines {
		if !slices.Contains(have, l) {
			t.Errorf("missing: %s", l)
		}
	}
	if t.Failed() {
		t.Log(body)
	}
}

func TestXDSMetrics(t *testing.T) {
	const url = "type.googleapis.com/istio.workload.Address"
	s := XDSStats{Errors: 2, Reconnects: 1, Connected: true, Messages: map[string]uint64{url: 7}, Bytes: map[string]uint64{url: 4096}, Rejected: map[string]uint64{url: 3}}
	c := []prometheus.Collector{XDSCollector(func() XDSStats { return s })}
	body := shown(t, c, nil)
	wantLines(t, body,
		`# TYPE istio_xds_connection_terminations counter`,
		`istio_xds_connection_terminations_total{reason="Error"} 2`,
		`istio_xds_connection_terminations_total{reason="Reconnect"} 1`,
		`# TYPE istio_xds_message counter`,
		`istio_xds_message_total{url="`+url+`"} 7`,
		`# UNIT istio_xds_message_bytes bytes`,
		`istio_xds_message_bytes_total{url="`+url+`"} 4096`,
		`ztun_xds_rejected_resources_total{url="`+url+`"} 3`,
		`ztun_xds_connected 1`)
	if strings.Contains(body, "Complete") {
		t.Error("a reason that never occurred is shown")
	}
	s = XDSStats{}
	if body = shown(t, c, nil); strings.Contains(body, "istio_xds") || !strings.Contains(body, "ztun_xds_connected 0") {
		t.Errorf("of nothing: %s", body)
	}
}

// TestDNSMetrics: names, labels in the sample's order, buckets and what appears when.
func TestDNSMetrics(t *testing.T) {
	m := NewDNSMetrics()
	a := DNSLabels{"a", "udp", "a", "v1"}
	m.Request(a)
	body := shown(t, nil, []prometheus.Collector{m})
	// The line of samples/metrics-a.txt.
	wantLines(t, body, "# TYPE istio_dns_requests counter",
		`istio_dns_requests_total{request_query_type="a",request_protocol="udp",source_canonical_service="a",source_canonical_revision="v1"} 1`)
	if strings.Contains(body, "upstream") {
		t.Error("what was not forwarded is shown as such")
	}
	up := DNSLabels{QueryType: "aaaa", Protocol: "tcp"}
	for _, d := range []time.Duration{400 * time.Microsecond, time.Millisecond, 20 * time.Millisecond, 6 * time.Second} {
		m.Upstream(up, d, d > time.Second)
	}
	const l = `request_query_type="aaaa",request_protocol="tcp",source_canonical_service="unknown",source_canonical_revision="unknown"`
	wantLines(t, shown(t, nil, []prometheus.Collector{m}),
		`istio_dns_upstream_requests_total{`+l+`} 4`,
		`istio_dns_upstream_failures_total{`+l+`} 1`,
		`# TYPE istio_dns_upstream_request_duration_seconds histogram`,
		`# UNIT istio_dns_upstream_request_duration_seconds seconds`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="0.0005"} 1`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="0.001"} 2`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="0.01"} 2`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="0.1"} 3`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="1.0"} 3`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="5.0"} 3`,
		`istio_dns_upstream_request_duration_seconds_bucket{`+l+`,le="+Inf"} 4`,
		`istio_dns_upstream_request_duration_seconds_count{`+l+`} 4`)
}

// TestDNSMetricsBound: sets of labels are bounded; idle ones make room, else the rest is counted together.
func TestDNSMetricsBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewDNSMetrics()
		for i := range maxLabelSets + 10 {
			m.Request(DNSLabels{QueryType: fmt.Sprint(i)})
		}
		if len(m.sets) != maxLabelSets+1 || m.overflowed.Load() != 10 || m.sets[DNSLabels{}].requests.Load() != 10 {
			t.Errorf("%d sets, %d counted together", len(m.sets), m.overflowed.Load())
		}
		time.Sleep(labelSetIdle + time.Minute)
		m.Request(DNSLabels{QueryType: "0"}) // is there and stays
		m.Request(DNSLabels{QueryType: "new"})
		if len(m.sets) != 2 || m.sets[DNSLabels{QueryType: "0"}].requests.Load() != 2 || m.sets[DNSLabels{QueryType: "new"}] == nil {
			t.Errorf("%d sets after an idle hour", len(m.sets))
		}
		body := shown(t, nil, []prometheus.Collector{m})
		wantLines(t, body, "ztun_dns_series_overflow_total 10")
	})
}

func TestDNSMetricsConcurrently(t *testing.T) {
	m := NewDNSMetrics()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for k := range 500 {
				l := DNSLabels{QueryType: fmt.Sprint(k % 7), Protocol: "udp"}
				m.Request(l)
				m.Upstream(l, time.Millisecond, i == 0)
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			shown(t, nil, []prometheus.Collector{m})
		}
	})
	wg.Wait()
	total := uint64(0)
	for _, s := range m.sets {
		total += s.requests.Load()
	}
	if total != 2000 || len(m.sets) != 7 {
		t.Errorf("%d requests in %d sets", total, len(m.sets))
	}
}

// TestScrapesAreBounded: only so many at once; the next one waits, and not for ever.
func TestScrapesAreBounded(t *testing.T) {
	entered, release := make(chan struct{}, 10), make(chan struct{})
	slow := collect(func(chan<- prometheus.Metric) { entered <- struct{}{}; <-release })
	x := &exposition{o: StatsOptions{Ordered: []prometheus.Collector{slow}}, turn: make(chan struct{}, scrapes), wait: 20 * time.Millisecond}
	var wg sync.WaitGroup
	scrape := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		x.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		return w
	}
	for range scrapes {
		wg.Go(func() {
			if w := scrape(); w.Code != 200 {
				t.Error(w.Code)
			}
		})
		<-entered
	}
	if w := scrape(); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
	close(release)
	wg.Wait()
	if w := scrape(); w.Code != 200 {
		t.Error(w.Code)
	}
}
