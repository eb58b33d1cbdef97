// Command perturb runs the tests of packages under schedules that a quiet machine never shows, to find the tests that
// assume an order of goroutines which nothing gives them.
//
//	go run ./test/perturb -runs 20 ./proxy/hbone ./netstack
//	go run ./test/perturb -race -run 'TestStaleTunnel$' -seed 7 -runs 1 ./proxy/hbone
//
// Tests are built with a standard library whose locks, condition variables, channels, go statements and socket calls
// hold the goroutine up now and then (overlay.go; the installed source stays as it is, by go build -overlay). Which
// goroutines or places are slow in a run comes from the run's seed (ZTUN_PERTURB, a number from 1; its rest by four
// says which of the two), so that the same seed tends to show a failure again; a run's number of processors is 1, 2 or
// 4, by the seed as well. Held up means that all others get their turn: what fails assumes an order, or has a limit in
// real seconds that is tight. With -busy, that many loops use the processors up beside the tests.
//
// Figures (2026-11-29): hbone.TestStaleTunnel before commit 407b982, which had failed once in all of CI's runs, fails
// under 10 of the first 240 seeds, which takes 80 s; so run a suspect test alone, a hundred times, a package twenty.
//
// What failed is printed with its seed; ZTUN_PERTURB_KEEP names a directory for its whole output. Exit status 1:
// something did.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	o := options{out: os.Stdout}
	flag.IntVar(&o.runs, "runs", 20, "how `many` of each package")
	flag.Uint64Var(&o.seed, "seed", 1, "of the first run; each next one has the next")
	flag.StringVar(&o.run, "run", "", "tests to run, as go test -run has it")
	flag.StringVar(&o.skip, "skip", "", "tests to leave out, as go test -skip has it")
	flag.BoolVar(&o.short, "short", false, "as go test -short")
	flag.BoolVar(&o.race, "race", false, "under the race detector")
	flag.IntVar(&o.busy, "busy", 0, "how many `loops` beside the tests")
	flag.DurationVar(&o.timeout, "timeout", 10*time.Minute, "for one run")
	flag.Parse()
	o.packages = flag.Args()
	if len(o.packages) == 0 || o.runs < 1 || o.seed < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	failed, err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "perturb:", err)
		os.Exit(2)
	}
	if failed > 0 {
		os.Exit(1)
	}
}

type options struct {
	packages    []string
	runs        int
	seed        uint64
	run, skip   string
	short, race bool
	busy        int
	timeout     time.Duration
	out         io.Writer
}

// run tests all packages and returns how many runs failed.
func run(ctx context.Context, o options) (failed int, err error) {
	dir, err := os.MkdirTemp("", "ztun-perturb-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	goroot, err := output(ctx, "go", "env", "GOROOT")
	if err != nil {
		return 0, err
	}
	overlay, err := writeOverlay(strings.TrimSpace(goroot), dir)
	if err != nil {
		return 0, err
	}
	const format = "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{.Dir}}{{end}}"
	listed, err := output(ctx, "go", append([]string{"list", "-f", format}, o.packages...)...)
	if err != nil {
		return 0, err
	}
	defer keepBusy(o.busy)()
	for line := range strings.Lines(listed) {
		pkg, where, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		binary := filepath.Join(dir, "tests")
		args := []string{"test", "-c", "-overlay", overlay, "-o", binary}
		if o.race {
			args = append(args, "-race")
		}
		if _, err := output(ctx, "go", append(args, pkg)...); err != nil {
			return failed, err
		}
		bad := 0
		started := time.Now()
		for i := range o.runs {
			if ctx.Err() != nil {
				return failed, ctx.Err()
			}
			if !o.once(ctx, pkg, where, binary, o.seed+uint64(i)) {
				bad++
			}
		}
		failed += bad
		fmt.Fprintf(o.out, "%s: %d of %d runs failed, %.0f s\n", pkg, bad, o.runs, time.Since(started).Seconds())
	}
	return failed, nil
}

// verdict is what of a test's output says what went wrong.
var verdict = regexp.MustCompile(
	`(?m)^\s*--- FAIL: .*|^panic: .*|^fatal error: .*|^WARNING: DATA RACE|^\s+\S+_test\.go:\d+: .*`)

// once reports whether a run passed, and prints what it said if not.
func (o options) once(ctx context.Context, pkg, where, binary string, seed uint64) bool {
	args := []string{"-test.count=1", "-test.timeout=" + o.timeout.String()}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	if o.skip != "" {
		args = append(args, "-test.skip="+o.skip)
	}
	if o.short {
		args = append(args, "-test.short")
	}
	processors := []int{1, 2, 4}[seed%3]
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = where
	cmd.Env = append(os.Environ(), "ZTUN_PERTURB="+strconv.FormatUint(seed, 10), "GOMAXPROCS="+strconv.Itoa(processors))
	out, err := cmd.CombinedOutput()
	if err == nil {
		return true
	}
	fmt.Fprintf(o.out, "%s: seed %d, %d processors: %v\n", pkg, seed, processors, err)
	lines := verdict.FindAllString(string(out), -1)
	if len(lines) == 0 {
		lines = strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	for _, l := range lines[:min(len(lines), 40)] {
		fmt.Fprintf(o.out, "\t%.300s\n", l)
	}
	if keep := os.Getenv("ZTUN_PERTURB_KEEP"); keep != "" {
		name := filepath.Join(keep, fmt.Sprintf("%s-%d.log", strings.ReplaceAll(pkg, "/", "_"), seed))
		if err := os.WriteFile(name, out, 0o600); err != nil {
			fmt.Fprintln(o.out, "perturb:", err)
		}
	}
	return false
}

// keepBusy uses n processors up until what it returns is called.
func keepBusy(n int) (end func()) {
	var wg sync.WaitGroup
	var loops []*exec.Cmd
	for range n {
		// Its own process: one of ours would get this one's share only.
		loop := exec.Command("sh", "-c", "while :; do :; done")
		if loop.Start() == nil {
			loops = append(loops, loop)
		}
	}
	for _, l := range loops {
		wg.Go(func() { _ = l.Wait() })
	}
	return func() {
		for _, l := range loops {
			_ = l.Process.Kill()
		}
		wg.Wait()
	}
}

// output is what a command prints; the error has what it printed to stderr.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(slices.Concat([]string{name}, args), " "), err, exit.Stderr)
	}
	return string(out), err
}
