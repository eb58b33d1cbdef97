package admin

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// TestWhyNotPromhttp is the reason for a handler of our own around the library's encoder: answers of a real ztunnel's
// (docs/samples) that promhttp gives otherwise. A row that promhttp comes to give is a row of our own code less.
func TestWhyNotPromhttp(t *testing.T) {
	lines := sampleLines(t)
	x := &exposition{o: StatsOptions{Ordered: []prometheus.Collector{fromSample(t, lines[1:])}}}
	reg := prometheus.NewRegistry()
	reg.MustRegister(fromSample(t, lines[1:]))
	ordered := prometheus.GathererFunc(x.gather) // the order of labels is ours, the rest promhttp's
	const openMetrics = "application/openmetrics-text;version=1.0.0"
	for _, tc := range []struct {
		what     string
		from     prometheus.Gatherer
		accept   string
		theirs   string // a line of ztunnel's answer, or its Content-Type
		promhttp string // what promhttp says instead
	}{
		{"numbers are whole", ordered, openMetrics, lines[1], lines[1] + ".0"},
		{"labels are in ztunnel's order", reg, openMetrics, lines[1], ""},
		{"OpenMetrics whatever was asked for", ordered, "*/*", "# TYPE istio_tcp_connections_opened counter",
			"# TYPE istio_tcp_connections_opened_total counter"},
		{"the end is marked, whatever was asked for", ordered, "*/*", "# EOF", ""},
		{"the plain type", ordered, "*/*", contentPlain, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"},
		{"the type of OpenMetrics", ordered, openMetrics, contentOpenMetrics,
			"application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"},
	} {
		h := promhttp.HandlerFor(tc.from, promhttp.HandlerOpts{EnableOpenMetrics: true})
		answer := func(h http.Handler) []string {
			w := httptest.NewRecorder()
			r := httptest.NewRequest("GET", "/metrics", http.NoBody)
			r.Header.Set("Accept", tc.accept)
			h.ServeHTTP(w, r)
			return append(strings.Split(w.Body.String(), "\n"), w.Header().Get("Content-Type"))
		}
		x.turn = make(chan struct{}, 1)
		x.wait = scrapeWait
		if got := answer(x); !slices.Contains(got, tc.theirs) {
			t.Errorf("%s: we do not say %q either: %q", tc.what, tc.theirs, got)
		}
		got := answer(h)
		if slices.Contains(got, tc.theirs) {
			t.Errorf("%s: promhttp says %q now", tc.what, tc.theirs)
		}
		if tc.promhttp != "" && !slices.Contains(got, tc.promhttp) {
			t.Errorf("%s: promhttp does not say %q: %q", tc.what, tc.promhttp, got)
		}
	}
}

// sampleLines are the lines of istio_tcp_connections_opened of a real ztunnel's scrape, TYPE first.
func sampleLines(t *testing.T) []string {
	t.Helper()
	data, err := os.ReadFile("../docs/samples/metrics-a.txt")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for l := range bytes.Lines(data) {
		if strings.Contains(string(l), "istio_tcp_connections_opened") {
			lines = append(lines, strings.TrimSuffix(string(l), "\n"))
		}
	}
	return lines
}
