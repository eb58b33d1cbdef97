package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"ztun/test/bench/gobench"
	"ztun/test/bench/report"
	"ztun/test/lab"
)

// The subjects of the hbone suite, and how proxy/hbone's benchmarks call them.
const (
	bareTLS  = "bare TLS"      // BenchmarkMuxBare: crypto/tls alone
	muxOwn   = "mux"           // BenchmarkMux/tls=own: as the daemon runs it
	muxPlain = "mux, tls.Conn" // BenchmarkMux/tls=crypto: the mux over an ordinary *tls.Conn
)

// hboneWorld is a namespace with a loopback: even these bytes stay in a world of our own.
type hboneWorld struct {
	lab *lab.World
	ns  *lab.NS
	bin string // proxy/hbone's compiled test
	dir string // where it runs, for its testdata
}

func (h *hboneWorld) Close() error {
	if h == nil || h.lab == nil {
		return nil
	}
	return h.lab.Close()
}

// hboneCases run the benchmarks of proxy/hbone one by one, each beside bare crypto/tls.
func (b *bench) hboneCases(ctx context.Context) ([]kase, error) {
	h := &hboneWorld{bin: b.tool("hbone.test"), dir: filepath.Join(b.o.Root, "proxy", "hbone")}
	build := exec.CommandContext(ctx, "go", "test", "-c", "-buildvcs=false", "-o", h.bin, "./proxy/hbone")
	build.Dir = b.o.Root
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go test -c ./proxy/hbone: %w\n%s", err, out)
	}
	var err error
	if h.lab, err = lab.New(lab.Options{Prefix: "zth", Logf: b.logf}); err != nil {
		return nil, err
	}
	b.hbone = h
	if h.ns, err = h.lab.AddNS("hbone"); err != nil {
		return nil, err
	}
	if err := h.lab.IP(ctx, h.ns, "link set lo up"); err != nil {
		return nil, err
	}
	var ks []kase
	for _, streams := range []int{1, 64} {
		for _, dir := range dirs() {
			k := kase{
				suite: "hbone", name: streamsText(streams) + " " + dir, lasts: 2 * b.length(),
				rows: []report.Row{
					{Metric: "throughput", Unit: "Gb/s", Subject: muxOwn, Target: &report.Target{OfRatio: true, Value: 0.8}},
					{Metric: "CPU-s/GB"},
				},
			}
			for _, s := range []struct{ name, pattern string }{
				{bareTLS, "^BenchmarkMuxBare$"},
				{muxOwn, fmt.Sprintf("^BenchmarkMux$/^tls=own$/^%s$/^%d$", dir, streams)},
				{muxPlain, fmt.Sprintf("^BenchmarkMux$/^tls=crypto$/^%s$/^%d$", dir, streams)},
			} {
				k.subjects = append(k.subjects, subject{s.name, func(ctx context.Context, _ int) (outcome, error) {
					return b.gobench(ctx, h, s.pattern)
				}})
			}
			ks = append(ks, k)
		}
	}
	for _, bulk := range []int{0, 8} {
		ks = append(ks, kase{
			suite: "hbone", name: fmt.Sprintf("1 KiB echo beside %d streams", bulk), lasts: 2 * b.length(),
			rows: []report.Row{{Metric: "p50", Unit: "ms"}, {Metric: "p99", Unit: "ms"},
				{Metric: "bulk meanwhile", Unit: "Gb/s"}},
			subjects: []subject{{muxOwn, func(ctx context.Context, _ int) (outcome, error) {
				return b.gobench(ctx, h, fmt.Sprintf("^BenchmarkMuxLatency$/^bulk=%d$", bulk))
			}}},
		})
	}
	return ks, nil
}

// gobench runs one benchmark and returns what it reports.
func (b *bench) gobench(ctx context.Context, h *hboneWorld, pattern string) (outcome, error) {
	out, err := h.lab.RunCmd(ctx, h.ns, lab.Cmd{
		// The testing package runs a benchmark several times, ever longer, until it has lasted benchtime: together about
		// twice that.
		Args: []string{h.bin, "-test.run", "^$", "-test.bench", pattern, "-test.benchtime", (b.length() * 7 / 10).String(),
			"-test.timeout", "5m"},
		Dir: h.dir, Env: append(lab.BaseEnv(), "TMPDIR="+os.TempDir()),
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", pattern, err)
	}
	rs, err := gobench.Parse(strings.NewReader(out))
	if err != nil {
		return nil, err
	}
	if len(rs) != 1 {
		return nil, fmt.Errorf("%s: %d results instead of one: has the benchmark another name now?", pattern, len(rs))
	}
	return benchOutcome(rs[0])
}

// benchOutcome translates a result's units into the table's.
func benchOutcome(r gobench.Result) (outcome, error) {
	o := outcome{}
	if v, ok := r.Throughput(); ok {
		o["throughput"] = v * 8 / 1e9
	}
	for unit, v := range r.Values {
		switch unit {
		case "MB/s", "Gb/s", "B/op", "allocs/op":
		case "CPUs/GB":
			o["CPU-s/GB"] = v
		case "p50-us", "p99-us":
			o[strings.TrimSuffix(unit, "-us")] = v / 1000
		case "bulk-MB/s":
			o["bulk meanwhile"] = v * 8 / 1000
		case "ns/op":
			if v > 0 && len(r.Values) == 1 {
				o[unit] = v
			}
		default:
			o[unit] = v
		}
	}
	if len(o) == 0 {
		return nil, errors.New("the benchmark reports nothing that we know")
	}
	return o, nil
}
