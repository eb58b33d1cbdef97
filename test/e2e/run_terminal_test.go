package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestRunTerminal: a run's command has its caller's terminal as it would have without: Ctrl-C comes once, Ctrl-Z stops
// it and fg goes on, and a shell that takes the terminal for its own jobs leaves it to the caller.
func TestRunTerminal(t *testing.T) {
	needTool(t, "script")
	m := newMesh(t, meshOptions{workloads: []lab.Workload{user()}, noStart: true, noServers: true})
	_, err := m.CADir(m.ctx) // which newRootless copies
	must(t, err)
	r := newRootless(t, m)
	const ctrlC, ctrlZ = "\x03", "\x1a"
	type step struct{ until, types string }
	for name, c := range map[string]struct {
		line  string
		steps []step
		once  string // is there once, and is no more than what was typed
	}{
		"caught": {`trap : INT; $RUN sh -c 'trap "echo it is caught; exit 7" INT; tty && echo ready
			while :; do sleep 0.05; done'; echo "ended by $?"`,
			[]step{{"/dev/pts/", ""}, {"ready", ctrlC}, {"ended by 7", ""}}, "it is caught"},
		"ended": {`trap : INT; $RUN sh -c 'echo ready; exec sleep 600'; echo "ended by $?"`,
			[]step{{"ready", ctrlC}, {"ended by 130", ""}}, ""},
		"stopped": {`set -m; $RUN sh -c 'echo ready; exec sleep 600'; echo "stopped by $?"; fg; echo "ended by $?"`,
			[]step{{"ready", ctrlZ}, {"stopped by 148", ""}, {"$RUN sh -c 'echo ready; exec sleep 600'", ctrlC},
				{"ended by 130", ""}}, ""},
		"given back": {`$RUN bash -ic 'echo inner; (exit 3)'; echo "ended by $?"; read -r x; echo "read $x"`,
			[]step{{"ended by 3", "a line\n"}, {"read a line", ""}}, "inner"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			in, typed, err := os.Pipe()
			must(t, err)
			defer typed.Close()
			out := waitFor("\x00")
			cmd := r.asHim(append(r.knowledge(), "SHELL=/bin/bash",
				"RUN="+strings.Join(append([]string{r.dir + "/ztun", "run"}, asUser("--")...), " ")), "",
				"script", "-qec", c.line, "/dev/null")
			cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, out
			p, err := m.Start(m.h1.NS, cmd)
			in.Close()
			must(t, err)
			defer p.Kill()
			seen := 0
			for _, s := range c.steps {
				eventually(t, 60*time.Second, func() error {
					at := strings.Index(out.String()[seen:], s.until)
					if at < 0 {
						return fmt.Errorf("no %q in %q", s.until, out.String())
					}
					seen += at + len(s.until)
					return nil
				})
				if s.types != "" {

					_, err := typed.WriteString(s.types)
					must(t, err)
				}
			}
			select {
			case <-p.Done():
			case <-time.After(60 * time.Second):
				t.Errorf("it does not end: %q", out)
			}
			if n := strings.Count(out.String(), c.once); c.once != "" && n != 1 {
				t.Errorf("%q is there %d times: %q", c.once, n, out)
			}
		})
	}
	r.clean()
}
