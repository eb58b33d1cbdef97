package admin

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// ordered is a collector as package proxy has it: labels in an order of its own.
type ordered struct {
	desc   *prometheus.Desc
	labels [][]*dto.LabelPair
	values []float64
}

func (o *ordered) Describe(chan<- *prometheus.Desc) {}
func (o *ordered) Collect(ch chan<- prometheus.Metric) {
	for i := range o.labels {
		ch <- orderedSample{o, i}
	}
}

type orderedSample struct {
	o *ordered
	i int
}

func (s orderedSample) Desc() *prometheus.Desc { return s.o.desc }
func (s orderedSample) Write(m *dto.Metric) error {
	m.Label = s.o.labels[s.i]
	m.Counter = &dto.Counter{Value: &s.o.values[s.i]}
	return nil
}

var labelRE = regexp.MustCompile(`([a-z_]+)="([^"]*)"`)

// fromSample reads lines of a real ztunnel's metrics into a collector.
func fromSample(t *testing.T, lines []string) *ordered {
	o := &ordered{desc: prometheus.NewDesc("istio_tcp_connections_opened_total",
		"The total number of TCP connections opened", nil, nil)}
	for _, l := range lines {
		var ps []*dto.LabelPair
		for _, m := range labelRE.FindAllStringSubmatch(l, -1) {
			ps = append(ps, &dto.LabelPair{Name: &m[1], Value: &m[2]})
		}
		o.labels = append(o.labels, ps)
		o.values = append(o.values, float64(l[len(l)-1]-'0'))
	}
	return o
}

// TestLabelOrder: labels leave in ztunnel's order, which is not the alphabetical one, byte for byte.
func TestLabelOrder(t *testing.T) {
	lines := sampleLines(t)
	o := fromSample(t, lines[1:])
	if names := labelRE.FindAllStringSubmatch(lines[1], -1); len(names) != 26 && len(names) != 27 ||
		slices.IsSortedFunc(names, func(a, b []string) int {
			return strings.Compare(a[1], b[1])
		}) {
		t.Fatalf("the sample proves nothing: %d labels", len(names))
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(BuildCollector(""))
	srv, err := NewStats(StatsOptions{Registry: reg, Ordered: []prometheus.Collector{o}})
	s := serving(t, srv, err)
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		_, body := do(t, "GET", urlOf(s, path))
		want := "# HELP istio_build Istio component build info.\n# TYPE istio_build " +
			"gauge\nistio_build{component=\"ztunnel\",tag=\"unknown\"} 1\n" +
			"# HELP istio_tcp_connections_opened The total number of TCP connections opened.\n" + strings.Join(lines, "\n") +
			"\n# EOF\n"
		if d := cmp.Diff(want, body); d != "" {
			t.Errorf("%s:\n%s", path, d)
		}
	}
	// The reason for StatsOptions.Ordered: the registry would have sorted them. Should this ever fail, the
	// detour is no longer needed.
	reg = prometheus.NewRegistry()
	reg.MustRegister(o)
	fs, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if fs[0].Metric[0].Label[0].GetName() == "reporter" {
		t.Error("the registry keeps the order of labels now")
	}
}

// TestContentType: checklist 78.
func TestContentType(t *testing.T) {
	srv, err := NewStats(StatsOptions{})
	s := serving(t, srv, err)
	for _, tc := range []struct{ accept, want string }{
		{"", "text/plain; charset=utf-8"},
		{"*/*", "text/plain; charset=utf-8"},
		{"application/openmetrics-text;version=1.0.0", "application/openmetrics-text;charset=utf-8;version=1.0.0"},
		{"application/OpenMetrics-Text", "application/openmetrics-text;charset=utf-8;version=1.0.0"},
		{"text/plain;q=0.5, application/openmetrics-text; version=0.0.1",
			"application/openmetrics-text;charset=utf-8;version=1.0.0"},
		{"application/openmetrics-textual", "text/plain; charset=utf-8"},
	} {
		for _, m := range []string{"GET", "POST"} {
			var h []string
			if tc.accept != "" {
				h = []string{"Accept", tc.accept}
			}
			resp, body := do(t, m, urlOf(s, "/metrics"), h...)
			if got := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || got != tc.want || body != "# EOF\n" ||
				resp.Header.Get("Content-Encoding") != "" {
				t.Errorf("Accept %q: %s %q %q", tc.accept, resp.Status, got, body)
			}
		}
	}
}

// TestCompression: checklist 77.
func TestCompression(t *testing.T) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(BuildCollector("1.31"), GoCollector())
	srv, err := NewStats(StatsOptions{Registry: reg})
	s := serving(t, srv, err)
	for _, tc := range []struct{ accept, want string }{
		{"gzip", "gzip"}, {"gzip, deflate, br, zstd", "zstd"}, {"gzip, deflate, br", "gzip"}, {"zstd", "zstd"},
		{"zstd;q=0.5, gzip", "gzip"},
		{"gzip;q=0", ""}, {"zstd;q=0, gzip", "gzip"}, {"GZIP;Q=1", "gzip"}, {"gzip;q=x", ""}, {"identity", ""}, {"", ""},
		// What real ztunnel has and ztun has not, and what neither has.
		{"br", ""}, {"deflate", ""}, {"br, deflate;q=0.9", ""}, {"compress", ""}, {"*", ""},
		// Again, with compressors that have been used before.
		{"zstd", "zstd"}, {"gzip", "gzip"},
	} {
		resp, body := do(t, "GET", urlOf(s, "/metrics"), "Accept-Encoding", tc.accept)
		if got := resp.Header.Get("Content-Encoding"); got != tc.want {
			t.Errorf("%q: encoding %q, want %q", tc.accept, got, tc.want)
			continue
		}
		var r io.Reader = strings.NewReader(body)
		switch tc.want {
		case "gzip":
			r, err = gzip.NewReader(r)
		case "zstd":
			var z *zstd.Decoder
			if z, err = zstd.NewReader(r); err == nil {
				defer z.Close()
				r = z
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if resp.Header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("%q: Vary %q", tc.accept, resp.Header.Values("Vary"))
		}
		b, err := io.ReadAll(r)
		if err != nil || !bytes.HasSuffix(b, []byte("# EOF\n")) || !bytes.Contains(b, []byte(`tag="1.31"`)) {
			t.Errorf("%q: %v", tc.accept, err)
		}
	}
}

func TestExposition(t *testing.T) {
	loop := running(t, LoopOptions{})
	if err := loop.Do(background(t), func() {}); err != nil {
		t.Fatal(err)
	}
	admin := testAdmin(t, nil)
	empty := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "istio_never_total", Help: "Never"}, []string{"x"})
	bytesTotal := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "istio_xds_message_bytes_total",
		Help: "Total number of bytes received (unstable)"}, []string{"url"})
	bytesTotal.WithLabelValues("u").Add(7)
	reg := prometheus.NewRegistry()
	reg.MustRegister(empty, bytesTotal, BuildCollector("t"), VersionCollector("1", "abc"), ProcessCollector(),
		GoCollector(),
		RuntimeCollector(RuntimeSources{Workers: 3, AdminTasks: func() int { return 1 }, Servers: []*Server{admin}}),
		WorkloadManagerCollector(func() WorkloadManagerStats { return WorkloadManagerStats{1, 2, 3, 4} }),
		SelfCollector(SelfSources{Loop: loop, Log: func() LogStats { return LogStats{Lines: 9} }, Servers: []*Server{admin}}))
	bad := &ordered{desc: prometheus.NewDesc("istio_x_total", "X.", nil, nil), values: []float64{1}}
	name, value := "l", "a\xff\"\n"
	bad.labels = [][]*dto.LabelPair{{{Name: &name, Value: &value}}}
	srv, err :=
		NewStats(
			StatsOptions{Registry: reg,
				Ordered: []prometheus.Collector{bad, values{newValue(prometheus.GaugeValue, "", "Bad name", func() (float64, bool) {
					return 1, true
				})}}})
	s := serving(t, srv, err)
	_, body := do(t, "GET", urlOf(s, "/metrics"))
	for _, want := range []string{
		"# TYPE istio_xds_message_bytes counter\n# UNIT istio_xds_message_bytes " +
			"bytes\nistio_xds_message_bytes_total{url=\"u\"} 7\n",
		"\nistio_x_total{l=\"a\uFFFD\\\"\\n\"} 1\n",
		"\nworkload_manager_active_proxy_count 1\n", "\nworkload_manager_pending_proxy_count 2\n",
		"# TYPE workload_manager_proxies_started counter\nworkload_manager_proxies_started_total 3\n",
		"\nworkload_manager_proxies_stopped_total 4\n",
		"\nztun_admin_loop_events_total{kind=\"closure\"} 1\n", "\nztun_log_lines_total 9\n",
		"\nztun_http_connections_refused_total{server=\"admin\"} 0\n",
		"\ntokio_num_workers 3\n", "\nztun_goroutines{role=\"admin\"} ", "\nztun_goroutines{role=\"worker\"} ",
		"\ntokio_num_alive_tasks ", "\ntokio_global_queue_depth ",
		"\nztun_admin_loop_wait_seconds_count 1\n", "\n# UNIT ztun_admin_loop_wait_seconds seconds\n",
		"\n# UNIT ztun_admin_loop_busy_seconds seconds\n", "\nztun_http_connections_open{server=\"admin\"} 0\n",
		"\nztun_http_request_duration_seconds_count{server=\"admin\"} 0\n",
		"\nztun_config_dumps_total{result=\"done\"} 0\n", "revision=\"abc\",version=\"1\"} 1\n",
		"\ngo_goroutines ", "\ngo_sched_latencies_seconds_bucket", "\nztun_sched_runnable_p99_seconds ",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("missing: %q", want)
		}
	}
	for _, re := range []string{`(?m)^process_open_fds [1-9]`, `(?m)^process_max_fds [1-9]`,
		`(?m)^process_resident_memory_bytes [1-9]`, `(?m)^process_cpu_seconds_total [0-9]`} {
		if !regexp.MustCompile(re).MatchString(body) {
			t.Errorf("missing: %s", re)
		}
	}
	if strings.Contains(body, "istio_never") || strings.Contains(body, "Bad name") ||
		!strings.HasSuffix(body, "\n# EOF\n") {
		t.Error("a family without samples or an invalid one is shown, or the end is missing")
	}
	for _, line := range regexp.MustCompile(`(?m)^# HELP .*$`).FindAllString(body, -1) {
		if !strings.HasSuffix(line, ".") || strings.HasSuffix(line, "..") {
			t.Errorf("HELP without one dot: %s", line)
		}
	}
	at := -1
	for _, p := range []string{"# TYPE process_open_fds", "# TYPE tokio_num", "# TYPE istio_build", "# TYPE istio_xds",
		"# TYPE workload_manager_active", "# TYPE go_goroutines", "# TYPE ztun_"} {
		n := strings.Index(body, p)
		if n < at {
			t.Errorf("%s is out of order", p)
		}
		at = n
	}
}

func TestOpenFDs(t *testing.T) {
	before, ok := openFDs()
	if !ok || before < 3 {
		t.Fatalf("%v open files", before)
	}
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	if now, _ := openFDs(); now != before+1 || int(now) != len(es)-1 {
		t.Errorf("%v open files, then %v; %d entries", before, now, len(es))
	}
}

func TestDescribe(t *testing.T) {
	name, help, unit, err := describe(prometheus.NewDesc("a_total", "With \"quotes\",\nand: {more}", []string{"x"},
		prometheus.Labels{"y": "z"}))
	if err != nil || name != "a_total" || help != "With \"quotes\",\nand: {more}" || unit != "" {
		t.Errorf("%q %q %q %v", name, help, unit, err)
	}
}

// brokenGatherer fails altogether.
type brokenGatherer struct{}

func (brokenGatherer) Gather() ([]*dto.MetricFamily, error) { return nil, io.ErrUnexpectedEOF }

func TestGatherError(t *testing.T) {
	srv, err := NewStats(StatsOptions{Registry: brokenGatherer{}})
	s := serving(t, srv, err)
	if resp, body := do(t, "GET", urlOf(s, "/metrics")); resp.StatusCode != 500 || body != "unexpected EOF\n" {
		t.Errorf("%s %q", resp.Status, body)
	}
}

func TestPlainNumbers(t *testing.T) {
	const in = "# HELP a 1.0\na 1.0\na{x=\"y 2.0\"} 1.048576e+08\nb 0.5\nc +Inf\nd NaN\ne -0\nf -3.0\ng " +
		"1e+300\nh{le=\"1.0\"} 0.0\ni\n# EOF\n"
	const want = "# HELP a 1.0\na 1\na{x=\"y 2.0\"} 104857600\nb 0.5\nc +Inf\nd NaN\ne -0\nf -3\ng " +
		"1e+300\nh{le=\"1.0\"} 0\ni\n# EOF\n"
	for step := 1; step <= len(in); step++ { // however the text is cut into writes
		var got bytes.Buffer
		p := &plainNumbers{w: &got}
		for i := 0; i < len(in); i += step {
			if n, err := p.Write([]byte(in[i:min(i+step, len(in))])); err != nil || n != min(step, len(in)-i) {
				t.Fatal(n, err)
			}
		}
		if got.String() != want {
			t.Fatalf("step %d: got\n%s\nwant\n%s", step, got.String(), want)
		}
	}
}
