package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDemoRootless: the demo of `ztun run`, as a user without root: it comes up, its lines do what they say, and
// nothing is left of it.
func TestDemoRootless(t *testing.T) {
	m := newMesh(t, meshOptions{})
	r := newRootless(t, m)
	for _, name := range []string{"demo-rootless", "demo-common"} { // where they are may be closed to others
		script, err := os.ReadFile("../../scripts/" + name)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(r.dir, name), script, 0o755))
	}
	at := filepath.Join(r.dir, "tmp", "demo")
	env := []string{"ZTUN_BIN=" + r.dir + "/ztun", "ZTUN_DEMO_DIR=" + at}
	as := func(args ...string) (string, error) { return m.RunCmd(m.ctx, m.h1.NS, r.asHim(env, "", args...)) }
	t.Cleanup(func() { as(r.dir+"/demo-rootless", "down") })
	out, err := as(r.dir+"/demo-rootless", "up")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const hello = "hello from a web server"
	greeted, refused := 0, 0
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if !strings.Contains(line, "curl ") {
			continue
		}
		got, err := as("sh", "-c", line)
		switch {
		case strings.Contains(line, "visitor"):
			greeted++
			if err != nil || !strings.Contains(got, hello) {
				t.Errorf("%s: %q, %v", line, got, err)
			}
		default: // another identity, and nobody's
			refused++
			if err == nil || strings.Contains(got, hello) {
				t.Errorf("%s: %q", line, got)
			}
		}
	}
	if greeted != 2 || refused != 2 {
		t.Errorf("%d lines with a greeting and %d without in\n%s", greeted, refused, out)
	}
	log, err := os.ReadFile(filepath.Join(at, "web.log"))
	if err != nil || !strings.Contains(string(log), "sa/stranger") || !strings.Contains(string(log), "policy rejection") {
		t.Errorf("the web server's log says nothing of the refusal: %v\n%s", err, log)
	}
	if out, err := as(r.dir+"/demo-rootless", "down"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := os.Stat(at); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", at, err)
	}
	eventually(t, 30*time.Second, func() error {
		of, err := filepath.Glob("/proc/[0-9]*/cmdline")
		must(t, err)
		for _, path := range of {
			if line, err := os.ReadFile(path); err == nil && strings.Contains(string(line), at) {
				return fmt.Errorf("a process is left: %q", line)
			}
		}
		return nil
	})
}
