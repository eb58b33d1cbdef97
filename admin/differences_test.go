package admin

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestDifferences lists where the three servers answer otherwise than ztunnel (spec controlplane 6, 7 and its
// samples), why, and that they do. What is not in this table is meant to be the same, and is held to the samples by
// TestSampleExchanges, TestDumpSample and TestMetricFamilies. Differences of the values of /config_dump stand in
// package xds (Static) and at cmd/ztun's sections.
func TestDifferences(t *testing.T) {
	admin := testAdmin(t, func(o *AdminOptions) { o.Dump = func() map[string]Section { return nil } })
	reg := prometheus.NewRegistry()
	reg.MustRegister(BuildCollector(""), GoCollector()) // enough to be worth compressing
	stats, err := NewStats(StatsOptions{Registry: reg})
	stats = serving(t, stats, err)
	r := NewReady(nil)
	r.Register("proxy")
	ready, err := NewReadiness(ReadinessOptions{Ready: r})
	ready = serving(t, ready, err)
	for _, d := range []struct {
		what, ztunnel, why string
		s                  *Server
		method, target     string
		header             []string
		code               int
		body, contentType  string // beginnings of ours
	}{
		{"mod:level in /logging", "400, though its own help text advertises it",
			"istioctl sends it (spec 12.32, checklist 73)",
			admin, "POST", "/logging?level=mod:debug", nil, 200,
			"current log level is hickory_server::server=off,mod=debug,info\n", "text/plain"},
		{"usage text of /logging", "its own wording",
			"targets here are the names in the log's third column, not Rust modules",
			admin, "GET", "/logging", nil, 405, "Invalid HTTP method\n\nusage: POST /logging", "text/plain"},
		{"an unknown parameter of /logging", "200 with the levels of before",
			"nothing was changed, and who asked must know it",
			admin, "POST", "/logging?levle=debug", nil, 400, "unknown parameter \"levle\"; did you mean \"level\"?\n\nusage:",
			"text/plain"},
		{"level twice in /logging", "200, one of them", "as before",
			admin, "POST", "/logging?level=debug&level=info", nil, 400, "parameter level is given 2 times", "text/plain"},
		{"body of 404", "empty", "says what there is",
			admin, "GET", "/config-dump", nil, 404,
			"no path \"/config-dump\" here; did you mean \"/config_dump\"?\npaths: / /config_dump ", "text/plain"},
		{"body of 405", "empty", "says what is wanted; Allow as RFC 9110 15.5.6 has it",
			ready, "POST", "/healthz/ready", nil, 405, "/healthz/ready wants GET", "text/plain"},
		{"elements of Accept", "not trimmed: only the first one counts after \", \"", "Prometheus sends blanks (spec 12.33)",
			stats, "GET", "/metrics", []string{"Accept", "text/plain, application/openmetrics-text"}, 200, "# HELP istio_build",
			"application/openmetrics-text"},
		{"br and deflate", "compressed", "no scraper asks for them alone, and what is not compressed everybody reads",
			stats, "GET", "/metrics", []string{"Accept-Encoding", "br, deflate"}, 200, "# HELP istio_build", "text/plain"},
		{"/debug/pprof/heap before activation", "500, heap profiling is off at the start",
			"Go's allocator samples from the start, one in 512 KiB as ztunnel's",
			admin, "GET", "/debug/pprof/heap", nil, 200, "\x1f\x8b", "application/octet-stream"},
		{"switching heap profiling off", "heap profiling active: false",
			"it cannot be switched off, and costs nothing that could be measured",
			admin, "GET", "/debug/pprof/heap/profiling?activate=false", nil, 200, "heap profiling active: true\n", "text/plain"},
		{"Go's other profiles", "404", "goroutines, mutexes, blocking: what Go can tell beyond ztunnel",
			admin, "GET", "/debug/pprof/goroutine?debug=1", nil, 200, "goroutine profile: total", "text/plain"},
		{"a foreign Origin", "answered like any request",
			"a web page in a browser on the node must not shut the process down",
			admin, "POST", "/quitquitquit", []string{"Origin", "http://evil.example"}, 403, "a web page of another origin asks",
			"text/plain"},
		{"/", "a table of links, two of which lead to a 405",
			"people want to see the node; title and table are the same, and what wants POST is a button",
			admin, "GET", "/", nil, 200, "<!DOCTYPE html>\n<html lang=\"en\">", "text/html"},
		{"/healthz/ready?verbose", "as without", "says since when a task is pending, and its last error",
			ready, "GET", "/healthz/ready?verbose", nil, 500, "not ready, pending: proxy\nproxy: pending for ", "text/plain"},
	} {
		resp, body := do(t, d.method, urlOf(d.s, d.target), d.header...)
		if resp.StatusCode != d.code || !strings.HasPrefix(body, d.body) ||
			!strings.HasPrefix(resp.Header.Get("Content-Type"), d.contentType) {
			t.Errorf("%s (ztunnel: %s; reason: %s): %s %q %.80q", d.what, d.ztunnel, d.why, resp.Status,
				resp.Header.Get("Content-Type"), body)
		}
	}
}

// absent are the families of ztunnel's that are not made in this package, and why.
var absent = map[string]string{
	"tokio_worker_total_busy_duration_seconds": "Go counts busy time for all processors together (go_cpu_classes_*), " +
		"and only at garbage collections",
	"tokio_worker_park_count":        "Go does not count parks of processors",
	"tokio_worker_park_unpark_count": "the same",
	"istio_tcp_connections_opened":   "package proxy's, held to the sample there and in test/e2e",
	"istio_tcp_connections_closed":   "the same",
	"istio_tcp_received_bytes":       "the same",
	"istio_tcp_sent_bytes":           "the same",
	"istio_tcp_connections_failed":   "the same",
	"istio_tcp_sockets_open":         "the same",
	"istio_dns_requests":             "package proxy/dns's, held to the sample there and in test/e2e",
}

// TestMetricFamilies holds the families of this package to a real ztunnel's: each is there with the same type and in
// the same order of groups, or listed as absent with a reason. Checklist 77 and 79.
func TestMetricFamilies(t *testing.T) {
	body := shown(t, []prometheus.Collector{
		ProcessCollector(), BuildCollector(""), VersionCollector("1", "2"), GoCollector(),
		RuntimeCollector(RuntimeSources{Workers: 2}),
		XDSCollector(func() (XDSStats, bool) { return XDSStats{Messages: map[string]uint64{"u": 1}}, true }),
		WorkloadManagerCollector(func() WorkloadManagerStats {
			return WorkloadManagerStats{}
		}), SelfCollector(SelfSources{Loop: NewLoop(LoopOptions{})}),
	}, nil)
	sample, err := os.ReadFile("../docs/samples/metrics-a.txt")
	if err != nil {
		t.Fatal(err)
	}
	types := func(text string) (names []string, typ map[string]string) {
		typ = map[string]string{}
		for l := range strings.Lines(text) {
			if f := strings.Fields(l); len(f) == 4 && f[1] == "TYPE" {
				names = append(names, f[2])
				typ[f[2]] = f[3]
			}
		}
		return names, typ
	}
	ours, ourTypes := types(body)
	if len(ours) != len(ourTypes) {
		t.Errorf("a family is there twice: %v", ours)
	}
	theirs, theirTypes := types(string(sample))
	if len(theirs) < 15 {
		t.Fatalf("the sample has only %d families", len(theirs))
	}
	for _, n := range theirs {
		why, missing := absent[n]
		switch {
		case missing && ourTypes[n] != "":
			t.Errorf("%s is listed as absent (%s), but there", n, why)
		case !missing && ourTypes[n] != theirTypes[n]:
			t.Errorf("%s is %q, ztunnel's is %q", n, ourTypes[n], theirTypes[n])
		}
	}
	if !slices.IsSortedFunc(ours, func(a, b string) int { return rank(a) - rank(b) }) {
		t.Errorf("groups out of order: %v", ours)
	}
	// What ztunnel does not have stands under names that say so.
	spec := []string{"istio_xds_message", "istio_xds_message_bytes", "istio_xds_connection_terminations",
		"workload_manager_active_proxy_count",
		"workload_manager_pending_proxy_count", "workload_manager_proxies_started", "workload_manager_proxies_stopped"}
	for _, n := range ours {
		if theirTypes[n] == "" && !slices.Contains(spec, n) && !strings.HasPrefix(n, "go_") &&
			!strings.HasPrefix(n, "ztun_") &&
			n != "process_resident_memory_bytes" && n != "process_cpu_seconds" {
			t.Errorf("%s is neither ztunnel's nor marked as ours", n)
		}
	}
	wantLines(t, body, `istio_build{component="ztunnel",tag="unknown"} 1`, "workload_manager_active_proxy_count 0")
	if !strings.HasSuffix(body, "\n# EOF\n") || strings.Contains(body, "istio_workload_manager") {
		t.Error("the end, or the prefix of the pods' family")
	}
}
