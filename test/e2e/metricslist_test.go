package e2e

import (
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ztun/test/lab"
	"ztun/test/load"
)

var updateMetrics = flag.Bool("update-metrics", false, "write docs/metrics.md anew from what the daemons export")

const metricsPage = "../../docs/metrics.md"

const metricsHead = `# Metrics

What ` + "`/metrics`" + ` on port 15020 has. Names are an interface: those with ` + "`istio_`" + ` (and ` + "`workload_manager_`, `tokio_`" + `) are ztunnel's, with its labels;
those with ` + "`ztun_`" + ` are our own; ` + "`ztun_control_`" + ` is what ` + "`ztun control`" + ` has, on port 15014. Besides there are ` + "`go_*` and `process_*`" + ` of the Prometheus client. A counter's samples end in ` + "`_total`" + `. This page is compared with two running daemons by ` + "`go test ./test/e2e -run MetricsList`" + `,
which also writes it (` + "`-update-metrics`" + `). Some metrics appear with their first event only.

| metric | type | unit | labels | what it says |
|---|---|---|---|---|
`

// eventual are metrics that a run of this test need not bring about: they appear with their first event. Their rows
// are kept by hand.
var eventual = map[string]bool{
	"istio_crl_policy_rejections": true, "istio_crl_untracked_connections": true, "istio_tcp_connections_failed": true,
	"istio_xds_connection_terminations": true,
	"istio_dns_requests":                true, "istio_dns_upstream_requests": true, "istio_dns_upstream_failures": true,
	"istio_dns_upstream_request_duration_seconds": true,
	"istio_on_demand_dns":                         true, "ztun_bounded": true, "ztun_control_bounded": true,
	"ztun_ca_failures":      true,
	"ztun_xds_rejected_now": true, "ztun_xds_rejected_resources": true,
}

// TestMetricsList compares the list of metrics of nodes that have a control plane, revocation lists, names and
// traffic with the documented one: a metric that is renamed, or gone, breaks somebody's dashboard.
func TestMetricsList(t *testing.T) {
	c := newControlled(t, false, map[string]string{"CRL_PATH": t.TempDir() + "/none.pem"})
	for _, to := range []string{lab.HostPort(c.c.IPs[0], 9000), lab.HostPort(c.h2.IPs[0], 9000)} {
		r := load.DialOnce(c.ctx, load.Target{Addr: to, Dial: c.a.NS.Dial})
		if !r.OK {
			t.Fatalf("%s: %+v", to, r)
		}
	}
	exported := map[string]string{}
	for _, n := range c.Nodes() {
		_, text, err := n.Daemon.Get(c.ctx, 15020, "/metrics")
		must(t, err)
		for name, row := range metricRows(t, text) {
			if len(row) > len(exported[name]) {
				exported[name] = row
			}
		}
	}
	// What there is under a node agent alone.
	r := newRedirected(t)
	under := r.begin(r.N1)
	r.snapshot(r.N1, r.a)
	_, ofAgent, err := under.Get(r.ctx, 15020, "/metrics")
	must(t, err)
	for name, row := range metricRows(t, ofAgent) {
		if strings.HasPrefix(name, "ztun_agent_") {
			exported[name] = row
		}
	}
	// The control plane's own, on the same page: no name is in both.
	req, err := http.NewRequest(http.MethodGet, "http://127.0.0.1:15014/metrics", nil)
	must(t, err)
	req.Header.Set("Accept", "application/openmetrics-text")
	resp, err := c.N1.NS.HTTP(20 * time.Second).Do(req)
	must(t, err)
	text, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	must(t, err)
	for name, row := range metricRows(t, string(text)) {
		if !strings.HasPrefix(name, "ztun_control_") {
			t.Errorf("%s is none of the control plane's", name)
		}
		exported[name] = row
	}
	page, err := os.ReadFile(metricsPage)
	if !*updateMetrics {
		must(t, err)
	}
	documented := map[string]string{}
	for line := range strings.Lines(string(page)) {
		if name, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "`"); ok && strings.HasPrefix(line, "| `") {
			documented[name] = line
		}
	}
	for name, row := range documented {
		if eventual[name] {
			exported[name] = row
		}
	}
	if *updateMetrics {
		var b strings.Builder
		b.WriteString(metricsHead)
		for _, name := range slices.Sorted(maps.Keys(exported)) {
			b.WriteString(exported[name])
		}
		must(t, os.WriteFile(metricsPage, []byte(b.String()), 0o644))
		return
	}
	if diff := cmp.Diff(documented, exported); diff != "" {
		t.Errorf("docs/metrics.md is not what daemons export (-documented +exported):\n%s", diff)
	}
}

// metricRows are the rows of the page for a scrape, by name.
func metricRows(t *testing.T, text string) map[string]string {
	t.Helper()
	metrics, err := lab.ParseMetrics(text)
	must(t, err)
	labels := map[string][]string{}
	for _, s := range metrics.Series {
		name := s.Name
		for _, suffix := range []string{"", "_bucket", "_total"} {
			if cut, ok := strings.CutSuffix(name, suffix); ok && metrics.Types[cut] != "" {
				name = cut
				break
			}
		}
		for _, l := range s.Labels {
			if l.Name != "le" && l.Name != "quantile" && !slices.Contains(labels[name], l.Name) {
				labels[name] = append(labels[name], l.Name)
			}
		}
	}
	units := map[string]string{}
	for line := range strings.Lines(text) {
		if name, unit, ok := strings.Cut(strings.TrimPrefix(line, "# UNIT "), " "); ok && strings.HasPrefix(line, "# UNIT ") {
			units[name] = strings.TrimSpace(unit)
		}
	}
	rows := map[string]string{}
	for line := range strings.Lines(text) {
		name, help, ok := strings.Cut(strings.TrimPrefix(line, "# HELP "), " ")
		if runtime := strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_"); ok &&
			strings.HasPrefix(line, "# HELP ") && !runtime {
			rows[name] = fmt.Sprintf("| `%s` | %s | %s | %s | %s |\n", name, metrics.Types[name], units[name],
				strings.Join(labels[name], ", "), strings.TrimSpace(help))
		}
	}
	return rows
}
