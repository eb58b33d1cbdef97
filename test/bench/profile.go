package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"ztun/test/bench/report"
	"ztun/test/lab"
)

// target is a process that serves its CPU profile on the admin port of a namespace.
type target struct {
	name string // in titles and file names
	ns   *lab.NS
}

func targets(ds []*lab.Daemon) []target {
	var ts []target
	for _, d := range ds {
		ts = append(ts, target{d.Node.Name, d.Node.NS})
	}
	return ts
}

// profiled runs work while each target takes a CPU profile of about the given length, writes the profiles to dir as
// LABEL-NAME.pprof and returns the head of each. The work should last a little longer than the profile.
func profiled(ctx context.Context, dir, label string, ts []target, length time.Duration, work func() error) (
	[]report.Profile, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	seconds := max(1, int(math.Floor(length.Seconds())))
	type got struct {
		p   report.Profile
		err error
	}
	results := make([]chan got, len(ts))
	for i, t := range ts {
		results[i] = make(chan got, 1)
		file := filepath.Join(dir, fileName(label)+"-"+t.name+".pprof")
		go func() {
			err := fetchProfile(ctx, t, seconds, file)
			results[i] <- got{report.Profile{Title: fmt.Sprintf("%s, %s, %d s", label, t.name, seconds), File: file}, err}
		}()
	}
	err := work()
	var ps []report.Profile
	for _, c := range results {
		g := <-c
		if g.err != nil && err == nil {
			err = g.err
		}
		if g.err != nil {
			continue
		}
		if g.p.Top, g.err = top(ctx, g.p.File); g.err != nil && err == nil {
			err = g.err
		}
		ps = append(ps, g.p)
	}
	return ps, err
}

func fetchProfile(ctx context.Context, t target, seconds int, file string) error {
	body, err := get(ctx, t, fmt.Sprintf("/debug/pprof/profile?seconds=%d", seconds), time.Duration(seconds)*time.Second)
	if err != nil {
		return err
	}
	return os.WriteFile(file, body, 0o644)
}

// heapProfiles writes what each target's heap holds now to dir as LABEL-NAME.heap.pprof.
func heapProfiles(ctx context.Context, dir, label string, ts []target) ([]report.Profile, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var ps []report.Profile
	for _, t := range ts {
		body, err := get(ctx, t, "/debug/pprof/heap", 0)
		if err != nil {
			return ps, err
		}
		file := filepath.Join(dir, fileName(label)+"-"+t.name+".heap.pprof")
		if err := os.WriteFile(file, body, 0o644); err != nil {
			return ps, err
		}
		lines, err := top(ctx, file)
		if err != nil {
			return ps, err
		}
		ps = append(ps, report.Profile{Title: label + ", heap of " + t.name, File: file, Top: lines})
	}
	return ps, nil
}

// get asks a target's admin port; the answer may take as long as lasts and a little more.
func get(ctx context.Context, t target, path string, lasts time.Duration) ([]byte, error) {
	return getPort(ctx, t, lab.AdminPort, path, lasts)
}

func getPort(ctx context.Context, t target, port int, path string, lasts time.Duration) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
	if err != nil {
		return nil, err
	}
	resp, err := t.ns.HTTP(lasts + 20*time.Second).Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.at(port, path), err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.at(port, path), err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %.200s", t.at(port, path), resp.Status, body)
	}
	return body, nil
}

// top is the head of `go tool pprof -top`.
func top(ctx context.Context, file string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-nodecount=10", file)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go tool pprof %s: %w: %.300s", file, err, errOut.String())
	}
	return parseTop(string(out)), nil
}

// parseTop takes the table and the line of totals out of what pprof prints.
func parseTop(s string) []string {
	var out []string
	table := false
	for line := range strings.Lines(s) {
		line = strings.TrimRight(line, " \n")
		table = table || strings.HasSuffix(line, "cum%")
		if line != "" && (table || strings.HasPrefix(line, "Duration:")) {
			out = append(out, line)
		}
	}
	return out
}

// fileName makes a label fit for a file.
func fileName(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, s)
}

// shortestProfile is how long a profile lasts at least: at 100 samples a second less says little.
const shortestProfile = 4 // seconds

// profiles runs the profiled subject of each case once more, with the profiler on. Its figures are shown on the way
// and go into no table.
func (b *bench) profiles(ctx context.Context, ks []kase) error {
	defer func(s float64) { b.o.Seconds = s }(b.o.Seconds)
	b.o.Seconds = max(b.o.Seconds, shortestProfile)
	for _, k := range ks {
		if k.profile == nil {
			continue
		}
		name, ts := k.profile()
		for _, s := range k.subjects {
			if s.name != name {
				continue
			}
			label := k.suite + " " + k.name
			var o outcome
			ps, err := profiled(ctx, b.o.Profile, label, ts, b.length(), func() (err error) {
				o, err = s.run(ctx, b.o.Reps)
				return err
			})
			b.r.rep.Profiles = append(b.r.rep.Profiles, ps...)
			if ctx.Err() != nil {
				return fmt.Errorf("stopped: %w", context.Cause(ctx))
			}
			if err != nil {
				b.r.rep.Errors = append(b.r.rep.Errors, fmt.Sprintf("profile of %s: %v", label, err))
				continue
			}
			b.progress("profiled %-37s%s", label, b.r.text(k, o))
		}
	}
	return nil
}
