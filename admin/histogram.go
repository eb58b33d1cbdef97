package admin

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// histogram counts durations without locks or allocations.
type histogram struct {
	counts [len(bounds) + 1]atomic.Uint64
	sum    atomic.Int64 // ns
}

// bounds are the upper edges of the buckets in seconds; what is beyond the last one has a bucket of its own.
// From what a good machine does (100 us) to what a probe calls a failure (1 s), and a whole dump.
var bounds = [...]float64{0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5}

func (h *histogram) add(d time.Duration) {
	i, s := 0, d.Seconds()
	for i < len(bounds) && s > bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(d))
}

func (h *histogram) snapshot() Histogram {
	s := Histogram{Bounds: bounds[:], Counts: make([]uint64, len(h.counts)), Sum: time.Duration(h.sum.Load()).Seconds()}
	for i := range h.counts {
		s.Counts[i] = h.counts[i].Load()
	}
	return s
}

// Histogram is a distribution at one moment.
type Histogram struct {
	Bounds []float64 // upper edges, ascending, without +Inf
	Counts []uint64  // of each bucket by itself, one more than Bounds
	Sum    float64   // of all values
}

// metric is the histogram under desc, with its label values.
func (h Histogram) metric(desc *prometheus.Desc, labels ...string) prometheus.Metric {
	var total uint64
	buckets := make(map[float64]uint64, len(h.Bounds))
	for i, n := range h.Counts {
		total += n
		if i < len(h.Bounds) {
			buckets[h.Bounds[i]] = total
		}
	}
	return prometheus.MustNewConstHistogram(desc, total, h.Sum, buckets, labels...)
}
