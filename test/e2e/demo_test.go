package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// demoRun is a demo of its own, beside any that a person may have up.
type demoRun struct {
	t      *testing.T
	prefix string
	script string
}

func newDemo(t *testing.T) *demoRun {
	t.Helper()
	needTool(t, "curl")
	needTool(t, "python3")
	root, err := lab.Root()
	must(t, err)
	d := &demoRun{t: t, prefix: fmt.Sprintf("zd%d", os.Getpid()), script: filepath.Join(root, "scripts/demo")}
	t.Cleanup(func() {
		d.run("down")
		d.gone()
	})
	return d
}

func (d *demoRun) cmd(verb string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	d.t.Cleanup(cancel)
	c := exec.CommandContext(ctx, d.script, verb)
	c.Env = append(os.Environ(), "ZTUN_DEMO_PREFIX="+d.prefix, "ZTUN_BIN="+bins.ztun)
	return c
}

func (d *demoRun) run(verb string) (string, int) {
	out, err := d.cmd(verb).CombinedOutput()
	return string(out), lab.ExitCode(err)
}

// gone asserts that nothing of the demo is left: no namespace, no directory, no process.
func (d *demoRun) gone() {
	d.t.Helper()
	left, _ := filepath.Glob("/var/run/netns/" + d.prefix + "-*")
	if _, err := os.Stat("/run/" + d.prefix + "-demo"); err == nil {
		left = append(left, "/run/"+d.prefix+"-demo")
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), d.prefix+"-") {
			left = append(left, p+": "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	if len(left) > 0 {
		d.t.Errorf("the demo left %q", left)
	}
}

// TestDemo: up, status, every line that it prints, a second up, down, a second down.
func TestDemo(t *testing.T) {
	d := newDemo(t)
	if out, code := d.run("status"); code == 0 || !strings.Contains(out, "down") {
		t.Errorf("status before up: %d %s", code, out)
	}
	out, code := d.run("up")
	if code != 0 {
		t.Fatalf("up: %d\n%s", code, out)
	}
	t.Logf("%s", out)
	if status, code := d.run("status"); code != 0 || strings.Count(status, "ready") != 2 || !strings.Contains(status, "10.91.2.3") {
		t.Errorf("status: %d\n%s", code, status)
	}
	// The ready-to-paste lines do what they say.
	pasted := 0
	for _, line := range strings.Split(out, "\n") {
		line = strings.TrimSpace(line)
		if !regexp.MustCompile(`^(ip netns exec|tail|grep|/run/)`).MatchString(line) || strings.Contains(line, "iperf3") || strings.Contains(line, "tcpdump") {
			continue
		}
		pasted++
		b, err := exec.Command("bash", "-c", "set -o pipefail; "+line).CombinedOutput()
		if strings.Contains(line, ":8081/") {
			if !strings.Contains(string(b), "refused") {
				t.Errorf("%s\n%s", line, b)
			}
			continue
		}
		// head closes its pipe early: curl's complaint about that (23) is none.
		if err != nil && !(strings.Contains(line, "| head") && lab.ExitCode(err) == 23) || len(b) == 0 {
			t.Errorf("%s: %v\n%s", line, err, b)
		}
		if strings.Contains(line, ":8080/") && !strings.Contains(string(b), "hello from pod") {
			t.Errorf("%s\n%s", line, b)
		}
	}
	if pasted < 10 {
		t.Errorf("only %d lines to paste", pasted)
	}
	// tcpdump between the nodes shows only 15008, and no hello.
	dump := exec.Command("bash", "-c", fmt.Sprintf(`ip netns exec %[1]s-n1 timeout 4 tcpdump -l -n -A -i eth0 tcp 2>/dev/null & sleep 1.5
		for i in 1 2 3; do ip netns exec %[1]s-a curl -s http://10.91.2.2:8080/; done; wait`, d.prefix))
	b, _ := dump.CombinedOutput()
	hello := strings.Count(string(b), "hello from pod")
	if hello != 3 { // the three of curl itself
		t.Errorf("%d hellos in output and capture, want 3:\n%s", hello, b)
	}
	n15008 := 0
	for _, line := range strings.Split(string(b), "\n") {
		if strings.Contains(line, " > ") && strings.Contains(line, "Flags") {
			if !strings.Contains(line, ".15008") {
				t.Errorf("not on 15008: %s", line)
			}
			n15008++
		}
	}
	if n15008 == 0 {
		t.Errorf("tcpdump saw nothing:\n%s", b)
	}
	if again, code := d.run("up"); code != 0 || !strings.Contains(again, "already") {
		t.Errorf("second up: %d\n%s", code, again)
	}
	if out, code := d.run("down"); code != 0 {
		t.Errorf("down: %d\n%s", code, out)
	}
	d.gone()
	if out, code := d.run("down"); code != 0 {
		t.Errorf("second down: %d\n%s", code, out)
	}
}

// TestDemoAfterCrash: down is complete after a daemon was killed, and up repairs.
func TestDemoAfterCrash(t *testing.T) {
	d := newDemo(t)
	if out, code := d.run("up"); code != 0 {
		t.Fatalf("up: %d\n%s", code, out)
	}
	b, err := os.ReadFile("/run/" + d.prefix + "-demo/ztun-n1.pid")
	must(t, err)
	var pid int
	_, err = fmt.Sscan(string(b), &pid)
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	eventually(t, 10*time.Second, func() error {
		if out, code := d.run("status"); code == 0 || !strings.Contains(out, "NOT ready") {
			return fmt.Errorf("status after a crash: %d\n%s", code, out)
		}
		return nil
	})
	if out, code := d.run("up"); code != 0 {
		t.Errorf("up after a crash: %d\n%s", code, out)
	}
	if out, code := d.run("status"); code != 0 {
		t.Errorf("status after the repair: %d\n%s", code, out)
	}
	// Again, and now down.
	b, err = os.ReadFile("/run/" + d.prefix + "-demo/ztun-n2.pid")
	must(t, err)
	_, err = fmt.Sscan(string(b), &pid)
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	if out, code := d.run("down"); code != 0 {
		t.Errorf("down after a crash: %d\n%s", code, out)
	}
	d.gone()
}

// TestDemoHalfUp: up is killed at different moments; down leaves nothing.
func TestDemoHalfUp(t *testing.T) {
	d := newDemo(t)
	for _, after := range []time.Duration{50 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond, 900 * time.Millisecond} {
		c := d.cmd("up")
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		must(t, c.Start())
		time.Sleep(after)
		_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
		_ = c.Wait()
		if out, code := d.run("down"); code != 0 {
			t.Errorf("down after %v of up: %d\n%s", after, code, out)
		}
		d.gone()
	}
	// An up that fails by itself cleans up and says why.
	c := d.cmd("up")
	c.Env = append(c.Env, "ZTUN_BIN=/bin/false")
	out, err := c.CombinedOutput()
	if err == nil {
		t.Errorf("up with a broken binary succeeded:\n%s", out)
	}
	d.gone()
}

// TestDemoWithoutRoot: a plain message, and nothing made.
func TestDemoWithoutRoot(t *testing.T) {
	needTool(t, "setpriv")
	d := newDemo(t)
	c := exec.Command("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps", "-all", "--bounding-set", "-all", "bash", d.script, "up")
	c.Env = append(os.Environ(), "ZTUN_DEMO_PREFIX="+d.prefix)
	out, err := c.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "needs root") || strings.Count(strings.TrimSpace(string(out)), "\n") > 1 {
		t.Errorf("%v: %s", err, out)
	}
	d.gone()
}
