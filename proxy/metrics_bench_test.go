package proxy

import (
	"fmt"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func benchLabels(n int) []labels {
	ls := make([]labels, n)
	for i := range ls {
		ls[i] = labels{lReporter: reporterSource, lSourceWorkload: "a-deploy", lDestinationWorkload: fmt.Sprint("w", i),
			lSourceNamespace: "default", lResponseFlags: "-"}
	}
	return ls
}

// BenchmarkMetrics is what a connection pays: opening and closing it, and each write.
func BenchmarkMetrics(b *testing.B) {
	m := NewMetrics()
	ls := benchLabels(100)
	b.Run("open-close", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			i++
			m.close(m.open(ls[i%len(ls)], "", 0), FlagNone)
		}
	})
	b.Run("failed", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			i++
			m.close(m.open(ls[i%len(ls)], "", 0), FlagConnect)
		}
	})
	b.Run("bytes", func(b *testing.B) {
		b.ReportAllocs()
		c := &books{series: m.open(ls[0], "", 0)}
		for b.Loop() {
			c.addSent(1400)
		}
	})
	b.Run("scrape", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			ch := make(chan prometheus.Metric, 256)
			go func() { m.Collect(ch); close(ch) }()
			for range ch {
			}
		}
	})
}
