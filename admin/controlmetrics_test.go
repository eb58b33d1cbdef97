package admin

import (
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
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
	s := XDSStats{Errors: 2, Reconnects: 1, Connected: true, Messages: map[string]uint64{url: 7},
		Bytes:   map[string]uint64{url: 4096},
		Refused: map[string]uint64{url: 3}, Rejected: map[string]int{url: 2}, LookupsWaiting: 4, LookupsFull: 5,
		LookupsUnanswered: 6, LookupsRecalled: 7}
	used := true
	c := []prometheus.Collector{XDSCollector(func() (XDSStats, bool) { return s, used })}
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
		`# TYPE ztun_xds_rejected_resources counter`,
		`ztun_xds_rejected_now{url="`+url+`"} 2`,
		`ztun_xds_lookups_total{outcome="full"} 5`,
		`ztun_xds_lookups_total{outcome="unanswered"} 6`,
		`ztun_xds_lookups_total{outcome="recalled"} 7`,
		`ztun_xds_lookups_waiting 4`,
		`ztun_xds_connected 1`)
	if strings.Contains(body, "Complete") {
		t.Error("a reason that never occurred is shown")
	}
	s = XDSStats{}
	if body = shown(t, c, nil); strings.Contains(body, "istio_xds") || !strings.Contains(body, "ztun_xds_connected 0") {
		t.Errorf("of nothing: %s", body)
	}
	// A node whose workloads come from a file has lost no connection.
	used = false
	if body = shown(t, c, nil); strings.Contains(body, "xds") {
		t.Errorf("without a control plane: %s", body)
	}
}

// TestScrapesAreBounded: only so many at once; the next one waits, and not for ever.
func TestScrapesAreBounded(t *testing.T) {
	entered, release := make(chan struct{}, 10), make(chan struct{})
	slow := collect(func(chan<- prometheus.Metric) { entered <- struct{}{}; <-release })
	x := &exposition{o: StatsOptions{Ordered: []prometheus.Collector{slow}}, turn: make(chan struct{}, scrapes),
		wait: 20 * time.Millisecond}
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
