package admin

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/gzhttp"
	"github.com/klauspost/compress/gzip"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"ztun/admin/guard"
	"ztun/proxy/fair"
	"ztun/proxy/rescue"
)

// StatsOptions configure the metrics server (15020).
type StatsOptions struct {
	At   netip.AddrPort // in the place of every address and Port, if valid
	Port uint16
	IPv6 bool // bind [::] rather than 0.0.0.0
	// Registry holds the ordinary collectors. Its metrics come out with labels in alphabetical order:
	// that is what Registry.Gather makes of any order.
	Registry prometheus.Gatherer
	// Ordered are collectors that do not go through a registry and whose labels come out in the order
	// in which their metrics' Write puts them (ztunnel's). They answer for their own consistency: no
	// duplicates, one type per family. Their Describe is not called.
	Ordered []prometheus.Collector
	Report  *fair.Report // of the bound on connections; may be nil
	Logger  *slog.Logger
}

// NewStats binds the metrics server to the wildcard address. It answers /metrics and /stats/prometheus.
func NewStats(o StatsOptions) (*Server, error) {
	ls, err := listenAt("stats", o.At, o.Port, o.IPv6)
	if err != nil {
		return nil, err
	}
	h := &exposition{o: o, turn: make(chan struct{}, scrapes), wait: scrapeWait}
	if h.o.Logger == nil {
		h.o.Logger = slog.New(slog.DiscardHandler)
	}
	served := compressed(h)
	routes := exact(map[string]http.Handler{"/metrics": served, "/stats/prometheus": served})
	return newServer("stats", ls, routes, o.Logger, guard.ConnsOptions{Report: o.Report}), nil
}

// compressed wraps h with the encodings that Prometheus and whoever else scrapes ask for, zstd and gzip, at their
// fastest: a scrape must not be felt.
func compressed(h http.Handler) http.Handler {
	wrap, err := gzhttp.NewWrapper(gzhttp.CompressionLevel(gzip.BestSpeed))
	if err != nil {
		panic(err) // the options are valid
	}
	return wrap(h)
}

// exposition writes what spec controlplane 7.1 says: OpenMetrics text always, whatever the content type.
type exposition struct {
	o    StatsOptions
	turn chan struct{} // a token for each scrape under way
	wait time.Duration
}

// Bounds of scrapes: each holds all samples in memory, so that only so many run at once. Others wait.
const (
	scrapes    = 2
	scrapeWait = 10 * time.Second // the usual patience of a Prometheus
)

const (
	contentPlain       = "text/plain; charset=utf-8"
	contentOpenMetrics = "application/openmetrics-text;charset=utf-8;version=1.0.0"
)

func (x *exposition) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	patience := time.NewTimer(x.wait)
	defer patience.Stop()
	select {
	case x.turn <- struct{}{}:
		defer func() { <-x.turn }()
	case <-patience.C:
		w.Header().Set("Retry-After", "5")
		plain(w, http.StatusServiceUnavailable, "too many scrapes are under way\n")
		return
	case <-r.Context().Done():
		return
	}
	fs, err := x.gather()
	if err != nil {
		x.o.Logger.Warn("some metrics could not be collected", "error", err)
		if len(fs) == 0 {
			plain(w, http.StatusInternalServerError, err.Error()+"\n")
			return
		}
	}
	w.Header().Set("Content-Type", contentType(r.Header.Values("Accept")))
	buf := bufio.NewWriterSize(&paced{w: &plainNumbers{w: w}}, 16<<10)
	for _, f := range fs {
		if _, err := expfmt.MetricFamilyToOpenMetrics(buf, f); err != nil {
			panic(http.ErrAbortHandler) // the reader is gone
		}
	}
	expfmt.FinalizeOpenMetrics(buf)
	if buf.Flush() != nil {
		panic(http.ErrAbortHandler)
	}
}

// paced pauses between pieces.
type paced struct {
	w     io.Writer
	pause breather
}

func (p *paced) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	p.pause.breathe()
	return n, err
}

// contentType is OpenMetrics' own if any element of Accept names it, in any case and with any parameters.
// (ztunnel does not trim the elements and so misses all but the first after ", "; that is not copied.)
func contentType(accept []string) string {
	for _, line := range accept {
		for e := range strings.SplitSeq(line, ",") {
			e, _, _ = strings.Cut(e, ";")
			if strings.EqualFold(strings.TrimSpace(e), "application/openmetrics-text") {
				return contentOpenMetrics
			}
		}
	}
	return contentPlain
}

// gather collects everything, in ztunnel's order of families: process, tokio, istio, workload_manager,
// and then what is our own. Families without samples are left out.
func (x *exposition) gather() ([]*dto.MetricFamily, error) {
	var fs []*dto.MetricFamily
	var err error
	if x.o.Registry != nil {
		fs, err = x.o.Registry.Gather() // sorted by name; partial results beside an error
	}
	more, err2 := collectOrdered(x.o.Ordered)
	fs, err = append(fs, more...), errors.Join(err, err2)
	fs = slices.DeleteFunc(fs, func(f *dto.MetricFamily) bool {
		// OpenMetrics leaves _total out of a counter's family name, so that client_golang's two families
		// go_memstats_alloc_bytes and go_memstats_alloc_bytes_total become one twice, which scrapers refuse.
		// The gauge goes: it is go_memstats_heap_alloc_bytes by another name.
		return len(f.Metric) == 0 || f.GetName() == "go_memstats_alloc_bytes"
	})
	for _, f := range fs {
		finish(f)
	}
	slices.SortStableFunc(fs, func(a, b *dto.MetricFamily) int {
		return cmp.Compare(rank(a.GetName()), rank(b.GetName()))
	})
	return fs, err
}

func rank(name string) int {
	for i, p := range [...]string{"process_", "tokio_", "istio_build", "istio_", "workload_manager_", "go_"} {
		if strings.HasPrefix(name, p) {
			return i
		}
	}
	return 9
}

// units of the families that ztunnel gives a # UNIT line; its other families have none. Ours say theirs in the name.
// (client_golang takes a unit in Opts as well.)
var units = map[string]string{
	"istio_xds_message_bytes_total":               "bytes",
	"istio_dns_upstream_request_duration_seconds": "seconds",
}

// finish gives the HELP text its dot and the family its unit.
func finish(f *dto.MetricFamily) {
	switch h := f.GetHelp(); {
	case h == "":
		f.Help = nil
	case !strings.HasSuffix(h, "."):
		h += "."
		f.Help = &h
	}
	if u := unit(f.GetName()); u != "" {
		f.Unit = &u
	}
}

func unit(name string) string {
	if strings.HasPrefix(name, "ztun_") {
		for _, u := range [...]string{"seconds", "bytes"} {
			if strings.HasSuffix(strings.TrimSuffix(name, "_total"), "_"+u) {
				return u
			}
		}
	}
	return units[name]
}

// collectOrdered makes families of what the collectors send, in order of first appearance. A collector
// that panics costs the rest of its own metrics and is reported in the error.
func collectOrdered(cs []prometheus.Collector) (fs []*dto.MetricFamily, err error) {
	if len(cs) == 0 {
		return nil, nil
	}
	ch := make(chan prometheus.Metric, 256)
	go func() { // ends before the range below does
		defer close(ch)
		for _, c := range cs {
			if p := rescue.Contain("a collector", func() { c.Collect(ch) }); p != nil {
				err = errors.Join(err, p) // read after ch is closed
			}
		}
	}()
	byDesc := map[*prometheus.Desc]*dto.MetricFamily{}
	byName := map[string]*dto.MetricFamily{}
	for m := range ch {
		d := m.Desc()
		f := byDesc[d]
		if f == nil {
			name, help, unit, err := describe(d)
			if err != nil {
				continue // an invalid Desc, which a registry would refuse
			}
			if f = byName[name]; f == nil {
				f = &dto.MetricFamily{Name: &name, Help: &help}
				if unit != "" {
					f.Unit = &unit
				}
				fs = append(fs, f)
				byName[name] = f
			}
			byDesc[d] = f
		}
		p := &dto.Metric{}
		if m.Write(p) != nil {
			continue
		}
		t, ok := typeOf(p)
		if !ok || f.Type != nil && *f.Type != t {
			continue // one stray sample must not spoil the whole exposition
		}
		f.Type = &t
		p.Label = validLabels(p.Label)
		f.Metric = append(f.Metric, p)
	}
	return fs, err
}

func typeOf(m *dto.Metric) (dto.MetricType, bool) {
	switch {
	case m.Counter != nil:
		return dto.MetricType_COUNTER, true
	case m.Gauge != nil:
		return dto.MetricType_GAUGE, true
	case m.Histogram != nil:
		return dto.MetricType_HISTOGRAM, true
	case m.Summary != nil:
		return dto.MetricType_SUMMARY, true
	case m.Untyped != nil:
		return dto.MetricType_UNTYPED, true
	}
	return 0, false
}

// validLabels replaces values that are not UTF-8: scrapers refuse the whole text for one of them. The
// slice may be shared with the collector, so it is copied before a change.
func validLabels(ls []*dto.LabelPair) []*dto.LabelPair {
	copied := false
	for i, l := range ls {
		if utf8.ValidString(l.GetValue()) {
			continue
		}
		if !copied {
			ls, copied = slices.Clone(ls), true
		}
		v := strings.ToValidUTF8(l.GetValue(), "\uFFFD")
		ls[i] = &dto.LabelPair{Name: l.Name, Value: &v}
	}
	return ls
}

// describe reads a Desc back: client_golang has no accessors, only String. A test holds it to the format.
func describe(d *prometheus.Desc) (name, help, unit string, err error) {
	if d.Err() != nil {
		return "", "", "", d.Err()
	}
	if _, err = fmt.Sscanf(d.String(), "Desc{fqName: %q, help: %q, unit: %q,", &name, &help, &unit); err != nil {
		return "", "", "", fmt.Errorf("unexpected format of a metric's description: %s", d)
	}
	return name, help, unit, nil
}
