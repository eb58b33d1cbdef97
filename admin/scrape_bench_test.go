package admin

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func scrapeRegistry(b testing.TB) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(BuildCollector("1.31"), ProcessCollector(), GoCollector(),
		RuntimeCollector(RuntimeSources{Workers: 2}),
		WorkloadManagerCollector(func() WorkloadManagerStats { return WorkloadManagerStats{1, 2, 3, 4} }),
		SelfCollector(SelfSources{Loop: NewLoop(LoopOptions{})}))
	return reg
}

// BenchmarkScrape is one scrape of what every daemon has, without the network.
func BenchmarkScrape(b *testing.B) {
	x := &exposition{o: StatsOptions{Registry: scrapeRegistry(b)}, turn: make(chan struct{}, 1), wait: scrapeWait}
	served := compressed(x)
	b.Run("gather", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := x.gather(); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, encoding := range []string{"", "zstd", "gzip"} {
		b.Run("whole"+encoding, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				w := httptest.NewRecorder()
				w.Body = nil
				r := httptest.NewRequest("GET", "/metrics", http.NoBody)
				r.Header.Set("Accept-Encoding", encoding)
				served.ServeHTTP(w, r)
			}
		})
	}
	// What TestWhyNotPromhttp speaks of: the same families, by the library's handler.
	b.Run("promhttp", func(b *testing.B) {
		h := promhttp.HandlerFor(prometheus.GathererFunc(x.gather), promhttp.HandlerOpts{EnableOpenMetrics: true,
			DisableCompression: true})
		b.ReportAllocs()
		for b.Loop() {
			w := httptest.NewRecorder()
			w.Body = nil
			r := httptest.NewRequest("GET", "/metrics", http.NoBody)
			r.Header.Set("Accept", "application/openmetrics-text;version=1.0.0")
			h.ServeHTTP(w, r)
		}
	})
	for _, c := range []struct {
		name string
		c    prometheus.Collector
	}{{"process", ProcessCollector()}, {"go", GoCollector()}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := collectOrdered([]prometheus.Collector{c.c}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
