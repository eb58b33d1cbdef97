package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestSmoke runs the benchmark for real, very briefly and without the daemon: worlds, generators, relay, report and
// cleaning up. It looks at no figure but that there is one.
func TestSmoke(t *testing.T) {
	lab.Require(t)
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	for _, pkg := range []string{"./test/load/cmd/ztload", "./test/bench/ztrelay"} {
		if _, err := lab.Build(ctx, bin, pkg); err != nil {
			t.Fatal(err)
		}
	}
	var out, progress bytes.Buffer
	file := filepath.Join(bin, "report.json")
	code, _ := run([]string{"--bin", bin, "--root", root, "relay", "mesh", "conns", "echo", "mixed", "idle", "steered", "--no-daemon",
		"--reps", "1", "--seconds", "0.2",
		"--rates", "200", "--idle-connections", "20", "--json", file}, &out, &progress)
	if code != 0 {
		t.Fatalf("exit code %d\n%s\n%s", code, &progress, &out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var rep struct {
		Rows []struct {
			Suite, Case, Metric string
			Values              map[string][]*float64
		}
		Errors []string
	}
	if err := json.Unmarshal(b, &rep); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, r := range rep.Rows {
		for subject, vs := range r.Values {
			if len(vs) != 1 || vs[0] == nil {
				t.Errorf("%s, %s, %s, %s: %v", r.Suite, r.Case, r.Metric, subject, vs)
			}
			seen[r.Suite+" "+subject]++
		}
	}
	for _, want := range []string{"relay " + bareVeth, "relay " + relayName, "mesh " + bareVeth, "conns " + bareVeth,
		"echo " + bareVeth, "mixed " + bareVeth, "idle " + bareVeth,
		"steered " + bareVeth} {
		if seen[want] == 0 {
			t.Errorf("no figure of %s\n%s", want, &out)
		}
	}
	// Nothing of ours is left.
	names, err := os.ReadDir("/var/run/netns")
	if err != nil {
		t.Fatal(err)
	}
	pid := "-" + strconv.Itoa(os.Getpid()) + "-"
	for _, n := range names {
		if strings.Contains(n.Name(), pid) {
			t.Errorf("namespace %s is left", n.Name())
		}
	}
}

func TestBadCommandLine(t *testing.T) {
	var out, errOut bytes.Buffer
	if code, _ := run([]string{"mash"}, &out, &errOut); code != 2 || !strings.Contains(errOut.String(), "mash") ||
		out.Len() != 0 {
		t.Error(code, &errOut, &out)
	}
	if code, _ := run([]string{"--help"}, &out, &errOut); code != 0 || !strings.Contains(out.String(), "usage:") {
		t.Error(code, &out)
	}
}
