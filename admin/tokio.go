package admin

import (
	"runtime/metrics"

	"github.com/prometheus/client_golang/prometheus"
)

// RuntimeSources is what RuntimeCollector looks at.
type RuntimeSources struct {
	Workers    int        // worker threads: the most processors that traffic gets
	AdminTasks func() int // goroutines of the admin runtime besides those of Servers; nil: none
	Servers    []*Server
}

// RuntimeCollector answers, for Go's scheduler, what ztunnel tells of its data-plane runtime under Tokio's
// names, and how the goroutines are divided between the two roles:
//
//   - tokio_num_workers is Workers (go_sched_gomaxprocs_threads is how many processors are in use now);
//   - tokio_global_queue_depth is the number of goroutines that are ready and wait for a processor, of all
//     queues and both roles: Go counts them together;
//   - tokio_num_alive_tasks is the number of goroutines that are not the admin runtime's.
//
// Tokio's per-worker counters (tokio_worker_*) are left out: Go has no fixed workers, and neither busy time
// nor parks are counted per processor. go_cpu_classes_* and go_sched_latencies_seconds are the honest
// neighbours.
func RuntimeCollector(o RuntimeSources) prometheus.Collector {
	roles := func() (admin, worker float64) {
		total, _ := readUint("/sched/goroutines:goroutines")
		if o.AdminTasks != nil {
			admin = float64(o.AdminTasks())
		}
		for _, s := range o.Servers {
			admin += float64(s.Open() + len(s.listeners) + 1)
		}
		return admin, max(0, total-admin)
	}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	workers := desc("tokio_num_workers", "Worker threads of the data plane")
	queue := desc("tokio_global_queue_depth", "Goroutines that are ready to run and wait for a processor")
	alive := desc("tokio_num_alive_tasks", "Goroutines of the data plane")
	byRole := desc("ztun_goroutines", "Goroutines by role: admin is everything that is not traffic", "role")
	return collect(func(ch chan<- prometheus.Metric) {
		gauge := func(d *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
		}
		gauge(workers, float64(o.Workers))
		if n, ok := readUint("/sched/goroutines/runnable:goroutines"); ok {
			gauge(queue, n)
		}
		a, w := roles()
		gauge(alive, w)
		gauge(byRole, a, "admin")
		gauge(byRole, w, "worker")
	})
}

// collect is a collector that describes nothing beforehand.
type collect func(chan<- prometheus.Metric)

// Describe sends nothing.
func (collect) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collect) Collect(ch chan<- prometheus.Metric) { c(ch) }

// readUint reads one of the runtime's own metrics; not ok if this Go has none of that name.
func readUint(name string) (float64, bool) {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0, false
	}
	return float64(s[0].Value.Uint64()), true
}
