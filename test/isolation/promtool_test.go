package isolation

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// reviewed are the complaints of promtool that stay, by the metric's name, and why.
var reviewed = []struct{ metric, complaint, why string }{
	{`workload_manager_(active|pending)_proxy_count`, `"_count" suffix`, "ztunnel's own names, which dashboards know"},
}

// TestPromtool: `promtool check metrics` accepts 15020 of a running daemon that has carried a connection.
//
// promtool 2 reads the older text format, in which a counter's HELP and TYPE carry the same name as its samples;
// ztunnel's exposition, and so ours, is OpenMetrics whatever the content type, in which they leave out _total. Both
// are given to it: as it is served it must be readable, and with those names made equal also be free of complaints.
func TestPromtool(t *testing.T) {
	tool, err := exec.LookPath("promtool")
	if err != nil {
		if os.Getenv("ZTUN_TEST_NOROOT") == "1" {
			t.Skip("no promtool (Debian: apt-get install prometheus)")
		}
		t.Fatalf("%v (Debian: apt-get install prometheus; .ci/run installs it)", err)
	}
	lab.Require(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	bin, err := lab.Build(ctx, t.TempDir(), "./cmd/ztun")
	if err != nil {
		t.Fatal(err)
	}
	w := lab.ForTest(t, lab.Options{Bin: bin})
	pod, err := w.AddPod(w.N1, lab.Pod{Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.StartDaemon(ctx, w.N1, lab.DaemonOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Attach(ctx, pod); err != nil {
		t.Fatal(err)
	}
	// Nobody listens there, which is as good for series as a success.
	if r := load.DialOnce(ctx, load.Target{Addr: lab.HostPort(w.N1.Addr4, 9999), Dial: pod.NS.Dial}); r.OK {
		t.Fatalf("%+v", r)
	}
	var text string
	for text == "" || !strings.Contains(text, "istio_tcp_connections_failed_total{") {
		m, err := d.Metrics(ctx)
		if err != nil {
			t.Fatal(err)
		}
		text = m.Text
	}
	if !strings.HasSuffix(text, "\n# EOF\n") {
		t.Errorf("the end is %q", text[max(0, len(text)-40):])
	}
	// 0: nothing to complain of; 3: complaints; anything else: it could not be read.
	_, code := promtool(ctx, t, tool, text)
	if code != 0 && code != 3 {
		t.Errorf("as served: exit code %d", code)
	}
	out, code := promtool(ctx, t, tool, oldNames(text))
	if code != 0 && code != 3 {
		t.Errorf("exit code %d: %s", code, out)
	}
	for line := range strings.Lines(out) {
		metric, complaint, _ := strings.Cut(strings.TrimSpace(line), " ")
		known := false
		for _, r := range reviewed {
			known = known || regexp.MustCompile("^(?:"+r.metric+")$").MatchString(metric) &&
				regexp.MustCompile(r.complaint).MatchString(complaint)
		}
		if !known {
			t.Errorf("promtool: %s", line)
		}
	}
}

// promtool returns what it printed and its exit code.
func promtool(ctx context.Context, t *testing.T, tool, text string) (string, int) {
	cmd := exec.CommandContext(ctx, tool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// oldNames gives the HELP and TYPE of counters the names of their samples, and leaves out what only OpenMetrics has.
func oldNames(text string) string {
	counters := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) counter$`).FindAllStringSubmatch(text, -1) {
		counters[m[1]] = true
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		f := strings.SplitN(line, " ", 4)
		switch {
		case strings.HasPrefix(line, "# EOF"), strings.HasPrefix(line, "# UNIT"):
			continue
		case len(f) == 4 && f[0] == "#" && counters[f[2]]:
			f[2] += "_total"
			line = strings.Join(f, " ")
		}
		b.WriteString(line)
	}
	return b.String()
}
