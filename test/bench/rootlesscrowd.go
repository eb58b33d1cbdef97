package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"ztun/test/bench/report"
	"ztun/test/lab"
)

// crowdSize is how many runs of one user start at once, each a workload of its own.
const crowdSize = 100

// crowd is a control plane on the user's host and what its workloads have of it.
type crowd struct {
	control *lab.Process
	bundles []string
}

// newCrowd starts the control plane and lets the workloads join.
func (b *bench) newCrowd(ctx context.Context, r *rootlessWorld) (*crowd, error) {
	dir := filepath.Join(r.dir, "control")
	ztun := b.tool("ztun")
	if _, err := r.lab.Run(ctx, r.client.ns, ztun, "control", "init", dir); err != nil {
		return nil, err
	}
	old, err := filepath.Glob(filepath.Join(dir, "mesh", "*"))
	if err != nil {
		return nil, err
	}
	for _, f := range old { // the example
		if err := os.Remove(f); err != nil {
			return nil, err
		}
	}
	var f lab.WorldFile
	for i := range crowdSize {
		name := fmt.Sprintf("crowd-%d", i)
		f.Workloads = append(f.Workloads, lab.Workload{UID: "lab//v1/Pod/default/" + name, Name: name, Namespace: "default",
			ServiceAccount: name, TrustDomain: "cluster.local", WorkloadIPs: []string{fmt.Sprintf("10.91.80.%d", i+1)},
			Protocol: "TCP", Services: map[string]map[uint16]uint16{}})
	}
	text, err := yaml.Marshal(f)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "mesh", "crowd.yaml"), text, 0o644); err != nil {
		return nil, err
	}
	host := r.client.ip.String()
	c := &crowd{}
	for i := range crowdSize {
		out := filepath.Join(r.dir, fmt.Sprintf("crowd-%d.json", i))
		if _, err := r.lab.Run(ctx, r.client.ns, ztun, "control", "join", "--dir", dir, "--workload",
			fmt.Sprintf("default/crowd-%d", i), "--out", out, "--host", host); err != nil {
			return nil, err
		}
		if err := os.Chown(out, nobody, nobody); err != nil {
			return nil, err
		}
		c.bundles = append(c.bundles, out)
	}
	c.control, err = r.lab.Start(r.client.ns, lab.Cmd{Args: []string{ztun, "control", "--dir", dir, "--listen",
		host + ":15012", "--admin", "", "--log", "error"}})
	return c, err
}

// nobody is the number of the user and group of runs.
const nobody = 65534

// arrival is how one run of a crowd went.
type arrival struct {
	took, cpu time.Duration // to the first answer; of the run and its command, to their end
	err       error
}

// startRuns starts n runs at once, each of which asks a plain host for a byte.
func (b *bench) startRuns(ctx context.Context, r *rootlessWorld, c *crowd, n int) (outcome, error) {
	// The shell's own clock: no process more, where a hundred are counted.
	ask := fmt.Sprintf("exec 3<>/dev/tcp/%s/%d && IFS= read -r -N 1 x <&3; [ -n \"$x\" ] && echo $EPOCHREALTIME",
		r.server.ip, bytePort)
	tun := filepath.Join(r.dir, "tun")
	// Once the device is everybody's: what is measured is the run, not the making of mount namespaces.
	hold := "mount --bind " + tun + ` /dev/net/tun && cd / && exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"`
	before, err := b.r.proc.Stat(c.control.Pid())
	if err != nil {
		return nil, err
	}
	all := make([]arrival, n)
	var work sync.WaitGroup
	for i := range all {
		work.Go(func() {
			a := &all[i]
			var out, errOut lockedBuffer
			begin := time.Now()
			p, err := r.lab.Start(r.client.ns, lab.Cmd{Args: []string{"unshare", "-m", "sh", "-c", hold, "sh",
				r.runs[runName].bin, "run", "--join", c.bundles[i], "--", "bash", "-c", ask},
				Env: append(lab.BaseEnv(), "TMPDIR=/tmp"), Stdout: &out, Stderr: &errOut})
			if err != nil {
				a.err = err
				return
			}
			select {
			case <-p.Done():
			case <-ctx.Done():
				p.Kill()
			}
			user, system := p.CPU()
			a.cpu = user + system
			seconds, err := strconv.ParseFloat(strings.TrimSpace(out.String()), 64)
			if err != nil {
				a.err = fmt.Errorf("%w: %s", errors.Join(p.Err(), context.Cause(ctx)), errOut.String())
				return
			}
			a.took = time.Duration(seconds*1e9) - time.Duration(begin.UnixNano())
		})
	}
	work.Wait()
	after, err := b.r.proc.Stat(c.control.Pid())
	if err != nil {
		return nil, err
	}
	var times, cpu []float64
	var failed error
	for _, a := range all {
		if a.err != nil {
			failed = a.err
			continue
		}
		times, cpu = append(times, float64(a.took.Milliseconds())), append(cpu, float64(a.cpu.Milliseconds()))
	}
	if len(times) == 0 {
		return nil, failed
	}
	if failed != nil {
		b.note("of a crowd of %d: %v", n, failed)
	}
	slices.Sort(times)
	slices.Sort(cpu)
	return outcome{"answered": float64(len(times)), "p50": times[len(times)/2], "max": times[len(times)-1],
			"CPU of a run": cpu[len(cpu)/2], "CPU of the control plane": float64((after.CPU - before.CPU).Milliseconds()) / float64(n)},
		nil
}

// crowdCases are how soon runs have their first answer: one alone, and a crowd that begins at once.
func (b *bench) crowdCases(ctx context.Context, r *rootlessWorld) ([]kase, error) {
	if _, err := exec.LookPath("bash"); err != nil {
		return nil, err
	}
	c, err := b.newCrowd(ctx, r)
	if err != nil {
		return nil, err
	}
	var ks []kase
	for _, n := range []int{1, crowdSize} {
		ks = append(ks, kase{suite: "rootless", name: fmt.Sprintf("start, %d at once", n), lasts: time.Duration(1+n/4) * time.Second,
			rows: []report.Row{{Metric: "answered", Unit: "runs"}, {Metric: "p50", Unit: "ms"}, {Metric: "max", Unit: "ms"},
				{Metric: "CPU of a run", Unit: "ms"}, {Metric: "CPU of the control plane", Unit: "ms"}},
			subjects: []subject{{runName, func(ctx context.Context, _ int) (outcome, error) {
				return b.startRuns(ctx, r, c, n)
			}}}})
	}
	return ks, nil
}
