package admin

import (
	"os"
	"regexp"
	"runtime"
	"runtime/metrics"
	"slices"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sys/unix"
)

// value is a metric without labels whose value is asked for at each scrape.
type value struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	get  func() (v float64, ok bool) // not ok: no sample this time
}

func newValue(kind prometheus.ValueType, name, help string, get func() (float64, bool)) value {
	return value{prometheus.NewDesc(name, help, nil, nil), kind, get}
}

// values is a collector of several of them.
type values []value

func (vs values) Describe(ch chan<- *prometheus.Desc) {
	for _, v := range vs {
		ch <- v.desc
	}
}

func (vs values) Collect(ch chan<- prometheus.Metric) {
	for _, v := range vs {
		if x, ok := v.get(); ok {
			ch <- prometheus.MustNewConstMetric(v.desc, v.kind, x)
		}
	}
}

// ProcessCollector has ztunnel's process_open_fds and process_max_fds, and the memory and processor time
// of the process under the names that Prometheus' clients use.
func ProcessCollector() prometheus.Collector {
	return values{
		newValue(prometheus.GaugeValue, "process_open_fds", "Number of open file descriptors", openFDs),
		newValue(prometheus.GaugeValue, "process_max_fds", "Maximum number of open file descriptors", func() (float64, bool) {
			var l unix.Rlimit
			if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
				return 0, false
			}
			return float64(l.Cur), true
		}),
		newValue(prometheus.GaugeValue, "process_resident_memory_bytes", "Resident memory size in bytes", residentBytes),
		newValue(prometheus.CounterValue, "process_cpu_seconds_total", "Total user and system CPU time spent in seconds",
			func() (float64, bool) {
				var u unix.Rusage
				if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
					return 0, false
				}
				return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9, true
			}),
	}
}

// openFDs counts /dev/fd without the descriptor that reads it.
func openFDs() (float64, bool) {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0, false
	}
	defer d.Close()
	n := 0
	buf := make([]byte, 16<<10)
	for {
		k, err := syscall.ReadDirent(int(d.Fd()), buf)
		if err != nil {
			return 0, false
		}
		if k == 0 {
			return float64(n - 1), true
		}
		_, c, _ := syscall.ParseDirent(buf[:k], -1, nil) // drops . and ..
		n += c
	}
}

func residentBytes() (float64, bool) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, false
	}
	var pages float64
	field := 0
	for _, c := range b {
		if c == ' ' {
			field++
		} else if field == 1 && c >= '0' && c <= '9' {
			pages = pages*10 + float64(c-'0')
		}
	}
	return pages * float64(os.Getpagesize()), field > 1
}

// BuildCollector is istio_build{component="ztunnel",tag} 1; tag is ISTIO_META_ISTIO_VERSION, "unknown" if
// empty. To be given to StatsOptions.Registry (its two labels are in alphabetical order anyway).
func BuildCollector(tag string) prometheus.Collector {
	if tag == "" {
		tag = "unknown"
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "istio_build",
		Help:        "Istio component build info",
		ConstLabels: prometheus.Labels{"component": "ztunnel", "tag": tag},
	})
	g.Set(1)
	return g
}

// VersionCollector is ztun_build_info 1 with what was built from what.
func VersionCollector(version, revision string) prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "ztun_build_info",
		Help:        "What this program was built from",
		ConstLabels: prometheus.Labels{"version": version, "revision": revision, "go": runtime.Version()},
	})
	g.Set(1)
	return g
}

// WorkloadManagerStats are ztunnel's counts of pods: gauges of the moment and counts since the start.
type WorkloadManagerStats struct {
	Active, Pending  int
	Started, Stopped uint64
}

// WorkloadManagerCollector has the workload_manager_* family (without istio_ in front, as ztunnel). get
// is called at each scrape, four times.
func WorkloadManagerCollector(get func() WorkloadManagerStats) prometheus.Collector {
	pick := func(f func(WorkloadManagerStats) float64) func() (float64, bool) {
		return func() (float64, bool) { return f(get()), true }
	}
	return values{
		newValue(prometheus.GaugeValue, "workload_manager_active_proxy_count",
			"The total number current workloads with active proxies (unstable)",
			pick(func(s WorkloadManagerStats) float64 { return float64(s.Active) })),
		newValue(prometheus.GaugeValue, "workload_manager_pending_proxy_count",
			"The total number current workloads with pending proxies (unstable)",
			pick(func(s WorkloadManagerStats) float64 { return float64(s.Pending) })),
		newValue(prometheus.CounterValue, "workload_manager_proxies_started_total",
			"The total number of proxies that were started (unstable)",
			pick(func(s WorkloadManagerStats) float64 { return float64(s.Started) })),
		newValue(prometheus.CounterValue, "workload_manager_proxies_stopped_total",
			"The total number of proxies that were stopped (unstable)",
			pick(func(s WorkloadManagerStats) float64 { return float64(s.Stopped) })),
	}
}

// GoCollector has the Go runtime's own figures (go_*), scheduling latency and the pauses of the garbage
// collector among them: what ztunnel tells of Tokio.
func GoCollector() prometheus.Collector {
	return collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(
		collectors.GoRuntimeMetricsRule{
			Matcher: regexp.MustCompile(
				`^/sched/|^/cpu/classes/(gc/total|idle|user|total):cpu-seconds|^/sync/mutex/wait/total:seconds`)},
	))
}

// LogStats is the part of the log's counters that is exported; zlog.Stats converts to it field by field.
type LogStats struct {
	Queued                                      int
	Lines, Batches, Waits, Dropped, WriteErrors uint64
}

// SelfSources is what SelfCollector looks at; nil ones are left out.
type SelfSources struct {
	Loop    *Loop
	Log     func() LogStats
	Servers []*Server
}

// SelfCollector has ztun's own figures of this package: ztun_admin_loop_*, ztun_log_*, ztun_http_*,
// ztun_config_dumps_total.
func SelfCollector(o SelfSources) prometheus.Collector { return newSelf(o) }

type self struct {
	o                                                SelfSources
	events, queued, full, waits, panics, views, busy *prometheus.Desc
	waited, longest                                  *prometheus.Desc
	logQueued, logLines, logWrites, logWaits         *prometheus.Desc
	logDropped, logErrors, latency                   *prometheus.Desc
	refused, foreign, open, took, dumps              *prometheus.Desc
}

func newSelf(o SelfSources) *self {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("ztun_"+name, help, labels, nil)
	}
	return &self{
		o:          o,
		events:     d("admin_loop_events_total", "Events handled by the admin loop.", "kind"),
		queued:     d("admin_loop_queue_length", "Events that wait for the admin loop."),
		full:       d("admin_loop_events_refused_total", "Events turned away because the admin loop's queue was full."),
		waits:      d("admin_loop_waits_total", "Times that a sender had to wait for room in the admin loop's queue."),
		panics:     d("admin_loop_panics_total", "Panics that the admin loop contained."),
		views:      d("admin_views_published_total", "Views of the mesh handed to the workers."),
		busy:       d("admin_loop_busy_seconds_total", "Time that the admin loop spent in handlers."),
		waited:     d("admin_loop_wait_seconds", "How long events waited for the admin loop."),
		longest:    d("admin_loop_longest_seconds", "The longest time that one event kept the admin loop."),
		logQueued:  d("log_queue_length", "Log lines that wait to be written."),
		logLines:   d("log_lines_total", "Log lines accepted."),
		logWrites:  d("log_writes_total", "Write calls of the log."),
		logWaits:   d("log_waits_total", "Times that a caller had to wait because the log's queue was full."),
		logDropped: d("log_lines_dropped_total", "Log lines that came after the log was closed."),
		logErrors:  d("log_write_errors_total", "Write calls of the log that failed."),
		refused:    d("http_connections_refused_total", "Connections to an HTTP server that its bounds closed.", "server"),
		foreign: d("http_requests_foreign_total",
			"Requests to the admin server that were refused as a web page's, or for want of the token."),
		open:  d("http_connections_open", "Open connections to an HTTP server.", "server"),
		took:  d("http_request_duration_seconds", "How long requests took, to the end of the answer.", "server"),
		dumps: d("config_dumps_total", "Requests for a configuration dump by result.", "result"),
		latency: d("sched_runnable_p99_seconds",
			"99th percentile of the time that goroutines waited for a processor, since the start."),
	}
}

// Describe sends nothing: the collector is unchecked.
func (s *self) Describe(chan<- *prometheus.Desc) {}

func (s *self) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	if s.o.Loop != nil {
		st := s.o.Loop.Stats()
		for k, n := range st.Events {
			count(s.events, float64(n), k)
		}
		gauge(s.queued, float64(st.Queued))
		count(s.full, float64(st.Full))
		count(s.waits, float64(st.Waits))
		count(s.panics, float64(st.Panics))
		count(s.views, float64(st.Views))
		count(s.busy, st.Busy.Seconds())
		gauge(s.longest, st.Longest.Seconds())
		ch <- st.Waited.metric(s.waited)
	}
	if s.o.Log != nil {
		st := s.o.Log()
		gauge(s.logQueued, float64(st.Queued))
		count(s.logLines, float64(st.Lines))
		count(s.logWrites, float64(st.Batches))
		count(s.logWaits, float64(st.Waits))
		count(s.logDropped, float64(st.Dropped))
		count(s.logErrors, float64(st.WriteErrors))
	}
	for _, srv := range s.o.Servers {
		count(s.refused, float64(srv.Refused()), srv.name)
		gauge(s.open, float64(srv.Open()), srv.name)
		ch <- srv.took.snapshot().metric(s.took, srv.name)
		if srv.local != nil {
			count(s.foreign, float64(srv.local.Refused()))
		}
		if d := srv.dumps; d != nil {
			count(s.dumps, float64(d.done.Load()), "done")
			count(s.dumps, float64(d.failed.Load()), "failed")
			count(s.dumps, float64(d.refused.Load()), "refused")
		}
	}
	if p99, ok := runnableP99(); ok {
		gauge(s.latency, p99)
	}
}

// runnableP99 reads the scheduler's latency histogram.
func runnableP99() (float64, bool) {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	metrics.Read(sample)
	if sample[0].Value.Kind() != metrics.KindFloat64Histogram {
		return 0, false
	}
	h := sample[0].Value.Float64Histogram()
	var total uint64
	for _, c := range h.Counts {
		total += c
	}
	if total == 0 {
		return 0, false
	}
	var sum uint64
	i := slices.IndexFunc(h.Counts, func(c uint64) bool {
		sum += c
		return float64(sum) >= 0.99*float64(total)
	})
	return max(0, h.Buckets[i]), true // the bucket's lower edge; the first one is -Inf
}
