package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// options are what the command line says.
type options struct {
	Suites    []string // in the order of suiteNames
	Reps      int
	Seconds   float64 // of one measurement
	JSON      string  // file, "" for none
	Profile   string  // directory, "" for none
	Quick     bool
	NoDaemon  bool     // only the subjects that need no daemon
	Bin       string   // directory of the built programs
	RemoveBin bool     // remove it at the end
	Root      string   // of the repository
	Rates     []int    // of the open-loop echo, per second
	Case      string   // only cases whose name holds this
	Idle      int      // idle connections
	Env       []string // K=V for the daemons
	Versus    string   // another ztun binary to measure beside, "" for none
	VersusEnv []string // K=V for the daemons of the other ztun, after Env
	V6        bool
	Wait      time.Duration // before each measurement, for a quiet machine
	Verbose   bool
	Workloads int    // of the control suite's mesh
	Services  int    // the same
	Source    string // how its daemons learn of it: file, xds
	Storm     []string
	Updates   float64  // per second; 0: the source's own pace
	Args      []string // as given, for the report
}

// suiteNames in the order in which they run and are shown.
func suiteNames() []string {
	return []string{"relay", "hbone", "mesh", "local", "conns", "echo", "mixed", "idle", "rootless", "steered", "control",
		"growth"}
}

var errHelp = errors.New("help")

const usage = `usage: scripts/bench [SUITE...] [options]
       scripts/bench compare OLD NEW     two files that --json has written: what became of each figure
       scripts/bench plot SVG METRICS FILE   bars of a run's figures, such as 'CPU-s per GB'; several are joined by |
       scripts/bench plot SVG METRICS SIZE=FILE... [--over TEXT]   how they grow over runs of several sizes

Measures ztun beside a bare veth of the same hops, interleaved, and prints medians and ratios. Needs root.
A missed target is shown and is no failure; the exit code is 1 only when something could not be measured.

suites (default: all)
  relay   pod -> TUN -> netstack -> kernel socket, 1 and 8 streams; slirp4netns and sing-box too where installed
  hbone   the mux over TLS on loopback beside bare crypto/tls (benchmarks of proxy/hbone)
  mesh    pod -> node -> node -> pod, 1 and 8 streams, both ways, CPU-s per GB of each daemon
  local   pod -> node -> pod of one node, bulk and connections; --versus-env ZTUN_LOCAL_RELAY=false: the wire beside it
  conns   new connections per second, 16 and 1 at a time, the server closes first; time of connect + 1 byte + close
  echo    1 KiB echo over kept connections at fixed rates, open loop
  mixed   the same echo at 500/s beside 8 bulk streams between the same two pods
  idle    resident memory idle and per idle connection
  rootless ` + "`ztun run`" + ` to a plain host, as an ordinary user: TCP, connections, UDP, beside pasta and slirp4netns
  steered pods that keep a CNI's eth0, by the sandwich and redirected, beside isolated ones: bulk, connections, echo
  control a mesh of 100,000 workloads: taking it in, one update, one dump, and what a storm of dumps, scrapes and updates does to
          requests and new connections, calm and stormy in turn
  growth  what a new connection costs beside 1 to 10,000 idle ones, an update and a start over 100 to 100,000 workloads

options
`

// parseArgs reads the command line. Suites and options may come in any order. Errors name the argument; errHelp after
// printing the usage to out.
func parseArgs(args []string, out io.Writer) (options, error) {
	o := options{Args: slices.Clone(args)}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.IntVar(&o.Reps, "reps", 0, "repetitions (default 5; 3 with --quick)")
	fs.Float64Var(&o.Seconds, "seconds", 0, "length of one measurement (default 5; 1.2 with --quick)")
	fs.StringVar(&o.JSON, "json", "", "write everything to this `file` as JSON")
	fs.StringVar(&o.Profile, "profile", "",
		"write a CPU profile of each node and case to this `directory` and print the top ten")
	fs.BoolVar(&o.Quick, "quick", false, "short measurements: mesh takes less than a minute")
	fs.BoolVar(&o.NoDaemon, "no-daemon", false,
		"leave out what needs the daemon: bare veth, the relay tool and hbone remain")
	fs.StringVar(&o.Bin, "bin", "", "`directory` with the built programs (scripts/bench sets it)")
	fs.BoolVar(&o.RemoveBin, "remove-bin", false, "remove that directory at the end (scripts/bench sets it)")
	fs.StringVar(&o.Root, "root", ".", "the repository (scripts/bench sets it)")
	fs.StringVar(&o.Case, "case", "", "only the cases whose name holds this `text`, such as '8 streams up'")
	rates := fs.String("rates", "", "requests per second of the echo suite (default 500,4000)")
	fs.IntVar(&o.Idle, "idle-connections", 5000, "connections of the idle suite")
	keyValue := func(to *[]string) func(string) error {
		return func(s string) error {
			if k, _, ok := strings.Cut(s, "="); !ok || k == "" {
				return errors.New("want K=V")
			}
			*to = append(*to, s)
			return nil
		}
	}
	fs.Func("env", "`K=V` for the daemons, such as ZTUNNEL_WORKER_THREADS=1; may be repeated", keyValue(&o.Env))
	fs.StringVar(&o.Versus, "versus", "", "measure this other ztun `program` too, interleaved with the one of this tree")
	fs.Func("versus-env", "measure another ztun too, with this `K=V`; may be repeated", keyValue(&o.VersusEnv))
	fs.DurationVar(&o.Wait, "wait", 0, "wait up to this long before each measurement until others leave the machine alone")
	fs.BoolVar(&o.V6, "v6", false, "IPv6 instead of IPv4")
	fs.IntVar(&o.Workloads, "workloads", 100_000, "workloads of the control suite's mesh")
	fs.IntVar(&o.Services, "services", 10_000, "services of the control suite's mesh")
	fs.StringVar(&o.Source, "source", sourceNames()[0], "how the control suite's daemons learn of the mesh: "+
		strings.Join(sourceNames(), ", "))
	fs.Float64Var(&o.Updates, "updates", 0,
		"updates per second of the control suite's storm (default what the source can take: xds 100, file 0.2)")
	storm := fs.String("storm", "dumps,scrapes,updates", "what the control suite's storm is made of")
	fs.BoolVar(&o.Verbose, "v", false, "show what is being done")

	rest := args
	for len(rest) > 0 {
		if err := fs.Parse(rest); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				fmt.Fprint(out, usage)
				fs.SetOutput(out)
				fs.PrintDefaults()
				return o, errHelp
			}
			return o, err
		}
		if rest = fs.Args(); len(rest) > 0 {
			o.Suites = append(o.Suites, rest[0])
			rest = rest[1:]
		}
	}
	return o, o.finish(*rates, *storm)
}

// finish checks values and fills in defaults.
func (o *options) finish(rates, storm string) error {
	all := suiteNames()
	want := map[string]bool{}
	for _, s := range o.Suites {
		if s != "all" && !slices.Contains(all, s) {
			return fmt.Errorf("suite %q is none of: %s, all", s, strings.Join(all, ", "))
		}
		want[s] = true
	}
	if len(want) == 0 {
		want["all"] = true
	}
	o.Suites = nil
	for _, s := range all {
		if want["all"] || want[s] {
			o.Suites = append(o.Suites, s)
		}
	}
	switch {
	case o.Reps < 0 || o.Reps > 100:
		return fmt.Errorf("--reps %d: want 1 to 100", o.Reps)
	case o.Reps == 0:
		if o.Reps = 5; o.Quick {
			o.Reps = 3
		}
	}
	switch {
	case o.Seconds < 0 || o.Seconds > 300:
		return fmt.Errorf("--seconds %v: want more than 0 and at most 300", o.Seconds)
	case o.Seconds == 0 && o.Quick:
		o.Seconds = 1.2
	case o.Seconds == 0:
		o.Seconds = 5
	}
	if o.Wait < 0 || o.Wait > time.Hour {
		return fmt.Errorf("--wait %v: want at most 1h", o.Wait)
	}
	if o.NoDaemon && (o.Versus != "" || len(o.VersusEnv) > 0) {
		return errors.New("--no-daemon leaves nothing for --versus and --versus-env to compare")
	}
	if o.Versus != "" {
		abs, err := filepath.Abs(o.Versus)
		if err != nil {
			return err
		}
		o.Versus = abs // the daemons run in a directory of their own
	}
	if o.Idle < 1 || o.Idle > 25000 {
		return fmt.Errorf("--idle-connections %d: want 1 to 25000", o.Idle)
	}
	if o.Workloads < 1 || o.Workloads > 1_000_000 || o.Services < 1 || o.Services > o.Workloads {
		return fmt.Errorf("--workloads %d --services %d: want 1 to 1000000 workloads and no more services than workloads",
			o.Workloads, o.Services)
	}
	if !slices.Contains(sourceNames(), o.Source) {
		return fmt.Errorf("--source %q is none of: %s", o.Source, strings.Join(sourceNames(), ", "))
	}
	for f := range strings.SplitSeq(storm, ",") {
		if f = strings.TrimSpace(f); !slices.Contains([]string{"dumps", "scrapes", "updates"}, f) {
			return fmt.Errorf("--storm %q: want some of dumps, scrapes, updates, separated by commas", storm)
		}
		o.Storm = append(o.Storm, f)
	}
	if rates == "" {
		rates = "500,4000"
	}
	for f := range strings.SplitSeq(rates, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(f))
		if err != nil || n < 1 || n > 100000 {
			return fmt.Errorf("--rates %q: want numbers from 1 to 100000, separated by commas", rates)
		}
		o.Rates = append(o.Rates, n)
	}
	return nil
}

func (o *options) has(suite string) bool { return slices.Contains(o.Suites, suite) }
