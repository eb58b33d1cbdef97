package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"ztun/test/bench/proc"
	"ztun/test/bench/report"
	"ztun/test/lab"
)

func main() {
	code, o := run(os.Args[1:], os.Stdout, os.Stderr)
	// The name is scripts/bench's: a mistaken --bin costs nobody a directory of theirs.
	if o.RemoveBin && strings.HasPrefix(filepath.Base(o.Bin), "ztun-bench.") {
		_ = os.RemoveAll(o.Bin)
	}
	os.Exit(code)
}

// bench is one run of the program.
type bench struct {
	o     options
	out   io.Writer // the report
	err   io.Writer // progress
	start time.Time
	r     *runner
	// one for each variant of ztun, of the suites that share them: mesh, local, conns, echo, mixed, growth and a part of
	// relay
	worlds []*world
	// one for each way of capturing a pod
	steered []*world
	relay   *relayWorld
	hbone   *hboneWorld
	ctl     *controlWorld
	user    *rootlessWorld
}

// run returns what the command line said and the exit code: 0 for a run in which everything could be measured,
// however slow; 1 when something failed; 2 for a bad command line.
func run(args []string, stdout, stderr io.Writer) (code int, o options) {
	if len(args) > 0 && args[0] == "compare" {
		return compare(args[1:], stdout, stderr), o
	}
	if len(args) > 0 && args[0] == "plot" {
		return plot(args[1:], stderr), o
	}
	o, err := parseArgs(args, stdout)
	if errors.Is(err, errHelp) {
		return 0, o
	}
	if err != nil {
		fmt.Fprintf(stderr, "bench: %v (scripts/bench --help tells more)\n", err)
		return 2, o
	}
	if err := lab.CanRun(); err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1, o
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	b := &bench{o: o, out: stdout, err: stderr, start: time.Now()}
	b.r = &runner{proc: proc.Host(), progress: b.progress, patience: o.Wait, rep: &report.Report{
		Started: b.start, Commands: []string{command(args)}, Base: map[string]string{}, Titles: map[string]string{},
	}}
	b.r.rep.Machine = machine(ctx, o.Root)
	err = b.all(ctx)
	if cerr := b.close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("cleaning up: %w", cerr))
	}
	b.r.rep.Took = time.Since(b.start)
	if err != nil {
		b.r.rep.Errors = append(b.r.rep.Errors, err.Error())
	}
	if perr := b.print(); perr != nil {
		fmt.Fprintf(stderr, "bench: %v\n", perr)
		return 1, o
	}
	if len(b.r.rep.Errors) > 0 {
		return 1, o
	}
	return 0, o
}

// compare shows what became of the figures of one run in another, both as --json wrote them.
func compare(files []string, stdout, stderr io.Writer) (code int) {
	if len(files) != 2 {
		fmt.Fprintln(stderr, "bench: compare takes two files that --json has written: scripts/bench compare OLD NEW")
		return 2
	}
	var runs [2]*report.Run
	for i, name := range files {
		var err error
		if runs[i], err = report.Load(name); err != nil {
			fmt.Fprintf(stderr, "bench: %v\n", err)
			return 1
		}
	}
	if err := report.Compare(stdout, runs[0], runs[1]); err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	return 0
}

// all measures the suites. What the suites have in common lives until close.
func (b *bench) all(ctx context.Context) error {
	var ks []kase
	shared := b.o.has("relay") && !b.o.NoDaemon || b.o.has("mesh") || b.o.has("conns") || b.o.has("echo") ||
		b.o.has("mixed") || b.o.has("local") || b.o.has("growth")
	if shared {
		if err := b.sharedWorlds(ctx); err != nil {
			return err
		}
	}
	type suite struct {
		name, title, base string
		cases             func() ([]kase, error)
	}
	plain := func(f func() []kase) func() ([]kase, error) { return func() ([]kase, error) { return f(), nil } }
	for _, s := range []suite{
		{"relay", "pod -> TUN -> netstack -> kernel socket, MTU 1500 unless said; bare veth: one veth between client and " +
			"server", bareVeth, func() ([]kase, error) {
			return b.relayCases(ctx)
		}},
		{"hbone", "the HTTP/2 mux over TLS 1.3 on loopback, one process at both ends", bareTLS, func() ([]kase, error) {
			return b.hboneCases(ctx)
		}},
		{"mesh", "pod -> node -> node -> pod; bare veth: host -> node -> node -> host, the same veth between the same nodes",
			bareVeth, plain(b.meshCases)},
		{"local", "pod -> node -> pod of the same node, relayed in the daemon's memory; --versus-env ZTUN_LOCAL_RELAY=false has " +
			"the wire beside it; bare veth: host -> node -> host", bareVeth, plain(b.localCases)},
		{"conns", "new connections over a warm tunnel: connect, one byte from the server, which closes first", bareVeth,
			plain(b.connsCases)},
		{"echo", "1 KiB echo over kept connections, open loop: a request's latency counts from when it was due", bareVeth,
			plain(b.echoCases)},
		{"mixed", "the same echo beside 8 bulk streams between the same two pods", bareVeth, plain(b.mixedCases)},
		{"idle", "resident memory of the daemons, fresh ones in each repetition", bareVeth, plain(b.idleCases)},
		{"rootless", "a user's command in a namespace of its own, MTU 1500, to a plain host two hops away; ratios to slirp4netns",
			slirpName, func() ([]kase, error) { return b.rootlessCases(ctx) }},
		{"steered", "pod -> node -> node -> pod by each way of capturing a pod; bare veth: host -> node -> node -> host",
			bareVeth, func() ([]kase, error) { return b.steeredCases(ctx) }},
		{"control",
			fmt.Sprintf("%d workloads, %d services from %s; requests and connections from pod to pod, storms at node n1",
				b.o.Workloads, b.o.Services, b.o.Source), calm, plain(b.controlCases)},
		{"growth", "16 new connections at a time beside idle ones of the same pods; one update, and a start, over the size of " +
			"the mesh", bareVeth, plain(b.growthCases)},
	} {
		if !b.o.has(s.name) {
			continue
		}
		b.r.rep.Titles[s.name], b.r.rep.Base[s.name] = s.title, s.base
		cases, err := s.cases()
		if ctx.Err() != nil {
			return fmt.Errorf("stopped: %w", context.Cause(ctx))
		}
		if err != nil {
			b.r.rep.Errors = append(b.r.rep.Errors, fmt.Sprintf("%s: %v", s.name, err)) // the other suites go on
			continue
		}
		for _, k := range cases {
			if strings.Contains(k.name, b.o.Case) {
				ks = append(ks, k)
			}
		}
	}
	if len(ks) == 0 {
		return errors.New("nothing to measure")
	}
	b.progress("%d cases, %d repetitions, about %v", len(ks), b.o.Reps, expected(ks, b.o.Reps).Round(time.Second))
	if err := b.r.run(ctx, ks, b.o.Reps); err != nil {
		return fmt.Errorf("stopped: %w", err)
	}
	if b.o.Profile != "" {
		return b.profiles(ctx, ks)
	}
	return nil
}

func (b *bench) close() error {
	errs := []error{b.relay.Close(), b.hbone.Close(), b.ctl.Close(), b.user.Close()}
	for _, w := range append(b.worlds, b.steered...) {
		errs = append(errs, w.Close())
	}
	return errors.Join(errs...)
}

// print writes the table to standard output and everything to the JSON file.
func (b *bench) print() error {
	fmt.Fprintln(b.err)
	err := b.r.rep.Text(b.out)
	if b.o.JSON == "" {
		return err
	}
	j, jerr := json.MarshalIndent(b.r.rep, "", "  ")
	if jerr == nil {
		jerr = os.WriteFile(b.o.JSON, append(j, '\n'), 0o644)
	}
	return errors.Join(err, jerr)
}

// progress goes to standard error with the time since the start.
func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(b.err, "%6.1fs  %s\n", time.Since(b.start).Seconds(), fmt.Sprintf(format, args...))
}

// logf is progress for details.
func (b *bench) logf(format string, args ...any) {
	if b.o.Verbose {
		b.progress(format, args...)
	}
}

// tool is the path of a built program.
func (b *bench) tool(name string) string { return filepath.Join(b.o.Bin, name) }

// seconds of one measurement.
func (b *bench) length() time.Duration { return time.Duration(b.o.Seconds * float64(time.Second)) }
