package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/proxy/fair"
)

// weighEvery is how often it is looked what the pods' connections hold.
const weighEvery = 500 * time.Millisecond

// memory is how much may lie in the daemon for the pods' connections, and who holds it.
type memory struct {
	limit int64 // of the process, bytes; 0: none is known
	all   *fair.Budget
	pod   int64
}

// newMemory shares limit (ZTUN_MEMORY_LIMIT; 0: the cgroup's, else a quarter of the machine's memory is shared out).
// Half of it is for bytes under way: the collector lets garbage grow beside them. pod is ZTUN_POD_MEMORY, 0: half of
// that.
func newMemory(root string, limit, pod int64) *memory {
	m := &memory{limit: limit, pod: pod}
	if m.limit == 0 {
		m.limit = cgroupMemory(root)
	}
	shared := m.limit / 2
	if m.limit == 0 {
		shared = machineMemory(root) / 4
	}
	if m.pod == 0 {
		m.pod = shared / 2
	}
	m.all = fair.NewBudget(nil, shared)
	return m
}

// forPod is a pod's part.
func (m *memory) forPod() *fair.Budget {
	if m == nil {
		return nil
	}
	return fair.NewBudget(m.all, m.pod)
}

// tellRuntime lets the collector work harder before the limit kills the process, unless GOMEMLIMIT says otherwise.
func (m *memory) tellRuntime() {
	if m.limit > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(m.limit / 10 * 9)
	}
}

// weigh looks at what the pods hold until ctx ends.
func (d *daemon) weigh(ctx context.Context) error {
	tick := time.NewTicker(weighEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, p := range d.pods.all() {
			p.att.Weigh()
			if p.memory.Tight() {
				d.report.Turned("memory", p.label, p.label, false)
			}
		}
	}
}

var memoryFamilies = [...]*prometheus.Desc{
	prometheus.NewDesc("ztun_memory_held_bytes",
		"What lies in the daemon for a pod's connections; an empty pod is all of them.", []string{"pod"}, nil),
	prometheus.NewDesc("ztun_memory_budget_bytes",
		"How much may: from three quarters of it on buffers and windows are small.", []string{"pod"}, nil),
}

func emitBudget(ch chan<- prometheus.Metric, pod string, b *fair.Budget) {
	ch <- prometheus.MustNewConstMetric(memoryFamilies[0], prometheus.GaugeValue, float64(b.Used()), pod)
	ch <- prometheus.MustNewConstMetric(memoryFamilies[1], prometheus.GaugeValue, float64(b.Limit()), pod)
}

// cgroupMemory is the least memory limit of the process's cgroup and those above it, in bytes; 0: there is none. It
// knows version 2, and version 1's memory controller. root is "/" but in tests.
func cgroupMemory(root string) (least int64) {
	f, err := os.Open(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return 0
	}
	defer f.Close()
	look := func(mount, path, file string) {
		for dir := filepath.Clean("/" + path); ; dir = filepath.Dir(dir) {
			if b, err := os.ReadFile(filepath.Join(root, mount, dir, file)); err == nil {
				// "max", and version 1's unlimited, which is next to the largest number, are no limits.
				n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
				if err == nil && n > 0 && n < 1<<60 && (least == 0 || n < least) {
					least = n
				}
			}
			if dir == "/" {
				return
			}
		}
	}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// "0::/path", or "7:memory:/path"
		part := strings.SplitN(sc.Text(), ":", 3)
		if len(part) != 3 {
			continue
		}
		if part[0] == "0" && part[1] == "" {
			look("sys/fs/cgroup", part[2], "memory.max")
		}
		for _, c := range strings.Split(part[1], ",") {
			if c == "memory" {
				look("sys/fs/cgroup/memory", part[2], "memory.limit_in_bytes")
			}
		}
	}
	return least
}

// machineMemory is the machine's memory in bytes; 1 GiB if that cannot be found out.
func machineMemory(root string) int64 {
	b, err := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	if err == nil {
		for line := range strings.Lines(string(b)) {
			var kib int64
			if n, _ := fmt.Sscanf(line, "MemTotal: %d kB", &kib); n == 1 && kib > 0 {
				return kib << 10
			}
		}
	}
	return 1 << 30
}

// byteUnits are those of Kubernetes' quantities and of GOMEMLIMIT.
var byteUnits = []struct {
	suffix string
	bytes  float64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"k", 1e3},
	{"M", 1e6}, {"G", 1e9}}

// size is a number of bytes, of least at the least.
func size(p *int64, least int64) func(string) error {
	return func(v string) error {
		number, unit := v, 1.0
		for _, u := range byteUnits {
			if s, ok := strings.CutSuffix(v, u.suffix); ok {
				number, unit = s, u.bytes
				break
			}
		}
		f, err := strconv.ParseFloat(number, 64)
		if err != nil || !(f*unit >= float64(least)) || f*unit > math.MaxInt64/2 {
			return errors.New("must be a number of bytes of at least " + strconv.FormatInt(least>>20, 10) +
				"Mi, such as 512Mi, 1.5Gi or 268435456")
		}
		*p = int64(f * unit)
		return nil
	}
}
