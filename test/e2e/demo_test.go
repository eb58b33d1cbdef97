package e2e

import (
	"bytes"
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

func (d *demoRun) cmd(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	d.t.Cleanup(cancel)
	c := exec.CommandContext(ctx, d.script, args...)
	c.Env = append(os.Environ(), "ZTUN_DEMO_PREFIX="+d.prefix, "ZTUN_BIN="+bins.ztun)
	return c
}

func (d *demoRun) run(verb string) (string, int) {
	out, err := d.cmd(verb).CombinedOutput()
	return string(out), lab.ExitCode(err)
}

// pid is that of what the demo has started under a name.
func (d *demoRun) pid(name string) (pid int) {
	d.t.Helper()
	b, err := os.ReadFile("/run/" + d.prefix + "-demo/" + name + ".pid")
	must(d.t, err)
	_, err = fmt.Sscan(string(b), &pid)
	must(d.t, err)
	return pid
}

// gone asserts that nothing of the demo is left: no namespace, no directory, no process.
func (d *demoRun) gone() {
	d.t.Helper()
	left, _ := filepath.Glob("/var/run/netns/" + d.prefix + "-*")
	for _, path := range []string{"/run/" + d.prefix + "-demo", "/run/" + d.prefix + "-demo.lock"} {
		if _, err := os.Stat(path); err == nil {
			left = append(left, path)
		}
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
	if status, code := d.run("status"); code != 0 || !strings.Contains(status, "All is well") ||
		!strings.Contains(status, "10.91.2.3") {
		t.Errorf("status: %d\n%s", code, status)
	}
	// The ready-to-paste lines do what they say, and are of this demo.
	pasted := 0
	for _, line := range strings.Split(out, "\n") {
		line = strings.TrimSpace(line)
		if !regexp.MustCompile(`^(ip netns exec|tail|grep|sed|\(sleep|ZTUN_DEMO_PREFIX|/run/)`).MatchString(line) ||
			strings.Contains(line, "iperf3") ||
			strings.HasSuffix(line, " -f") || strings.HasSuffix(line, " down") {
			continue
		}
		if !strings.Contains(line, d.prefix) {
			t.Errorf("not of this demo: %s", line)
		}
		pasted++
		want := "" // anything
		switch {
		case strings.Contains(line, "grep refused"):
			want = "refused"
		case strings.Contains(line, ":7777 "):
			want = "policy"
		case strings.Contains(line, `[8080]/'`): // denied from now on
			want = "Couldn't connect"
		case strings.Contains(line, "capture a"):
			want = "GET / HTTP/1.1"
		case strings.Contains(line, "capture n1"):
			want = ".15008"
		case strings.Contains(line, "tcpdump-test"):
			want = "ok: pod a got"
		case strings.Contains(line, "exec a sh"):
			want = "10.91.1.2"
		case strings.Contains(line, ":8080/"), strings.Contains(line, "web/"):
			want = "hello from pod"
		}
		paste := func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			b, err := exec.CommandContext(ctx, "bash", "-c", line).CombinedOutput()
			if len(b) == 0 || !strings.Contains(string(b), want) || err != nil && !strings.Contains(line, `[8080]/'`) {
				return fmt.Errorf("%s: want %q, %v\n%s", line, want, err, b)
			}
			return nil
		}
		if strings.HasPrefix(line, "sed") { // the second in it is a person's: a busy machine may need more
			eventually(t, 20*time.Second, paste)
		} else if err := paste(); err != nil {
			t.Error(err)
		}
	}
	if pasted < 18 {
		t.Errorf("only %d lines to paste", pasted)
	}
	if again, code := d.run("up"); code != 0 || !strings.Contains(again, "already") {
		t.Errorf("second up: %d\n%s", code, again)
	}
	for _, what := range []string{"control", "n1", "c"} {
		if b, err := d.cmd("logs", what).CombinedOutput(); err != nil || len(b) < 50 {
			t.Errorf("logs %s: %v %s", what, err, b)
		}
	}
	// A server that is gone is seen; so is what holds the lock; and what has lost its namespace's name is ended all the
	// same.
	must(t, syscall.Kill(d.pid("http-d"), syscall.SIGKILL))
	eventually(t, 10*time.Second, func() error {
		if out, code := d.run("status"); code != 1 || !strings.Contains(out, "the web server of pod d has ended") {
			return fmt.Errorf("status without a server: %d\n%s", code, out)
		}
		return nil
	})
	holder := exec.Command("flock", "--no-fork", "/run/"+d.prefix+"-demo.lock", "sleep", "60")
	must(t, holder.Start())
	eventually(t, 10*time.Second, func() error {
		if out, code := d.run("up"); code != 1 || !strings.Contains(out, "is at work on this demo") {
			return fmt.Errorf("up beside another: %d\n%s", code, out)
		}
		return nil
	})
	must(t, holder.Process.Kill())
	_ = holder.Wait()
	pid := d.pid("ztun-n2")
	must(t, exec.Command("umount", "/var/run/netns/"+d.prefix+"-n2").Run())
	if out, code := d.run("down"); code != 0 {
		t.Errorf("down: %d\n%s", code, out)
	}
	if err := syscall.Kill(pid, 0); err == nil {
		t.Errorf("the daemon of a node without a name goes on: pid %d", pid)
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
	must(t, syscall.Kill(d.pid("ztun-n1"), syscall.SIGKILL))
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
	must(t, syscall.Kill(d.pid("ztun-n2"), syscall.SIGKILL))
	if out, code := d.run("down"); code != 0 {
		t.Errorf("down after a crash: %d\n%s", code, out)
	}
	d.gone()
}

// TestDemoHalfUp: up is killed at different moments; down leaves nothing.
func TestDemoHalfUp(t *testing.T) {
	d := newDemo(t)
	for _, after := range []time.Duration{50 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond,
		900 * time.Millisecond} {
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
	// An up that is interrupted says so, and removes what it has made.
	c := d.cmd("up")
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, &said
	must(t, c.Start())
	eventually(t, 20*time.Second, func() error {
		_, err := os.Stat("/run/" + d.prefix + "-demo/ztun-n2.log")
		return err
	})
	must(t, syscall.Kill(-c.Process.Pid, syscall.SIGINT))
	if code := lab.ExitCode(c.Wait()); code != 130 || !strings.Contains(said.String(), "demo: interrupted, removed") {
		t.Errorf("interrupted: exit code %d\n%s", code, said.String())
	}
	d.gone()
	// A binary that is none is found out before anything is made.
	for _, bin := range []string{"/bin/false", "/bin/ls", "/no/such/file"} {
		c := d.cmd("up")
		c.Env = append(c.Env, "ZTUN_BIN="+bin)
		out, err := c.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "ZTUN_BIN="+bin+" is no ztun") ||
			strings.Contains(string(out), "namespaces") {
			t.Errorf("up with %s: %v\n%s", bin, err, out)
		}
	}
	d.gone()
}

// TestDemoWithoutRoot: a plain message, and nothing made.
func TestDemoWithoutRoot(t *testing.T) {
	needTool(t, "setpriv")
	d := newDemo(t)
	c := exec.Command("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps", "-all",
		"--bounding-set", "-all", "bash", d.script, "up")
	c.Env = append(os.Environ(), "ZTUN_DEMO_PREFIX="+d.prefix)
	out, err := c.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "needs root") ||
		strings.Count(strings.TrimSpace(string(out)), "\n") > 1 {
		t.Errorf("%v: %s", err, out)
	}
	d.gone()
}
