package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// inside are the daemon and the command of a run, which `ztun run` has begun as p.
func inside(p *lab.Process) (daemon, command int, err error) {
	for _, task := range tasks(p.Pid()) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.Pid(), task))
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			daemon = n
		}
	}
	oldest := 0
	for _, task := range tasks(daemon) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", daemon, task))
		for _, f := range strings.Fields(string(b)) {
			// The daemon inherits orphans: the command is the oldest. The host's numbers begin again now and then.
			n, err := strconv.Atoi(f)
			if own := ownNumber(n); err == nil && own != 0 && (command == 0 || own < oldest) {
				command, oldest = n, own
			}
		}
	}
	if daemon == 0 || command == 0 {
		return 0, 0, fmt.Errorf("the run of process %d has daemon %d and command %d", p.Pid(), daemon, command)
	}
	return daemon, command, nil
}

// ownNumber is a process's number in its own PID namespace; 0 if it is gone.
func ownNumber(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" {
			n, _ := strconv.Atoi(f[len(f)-1])
			return n
		}
	}
	return 0
}

// tasks are the threads of a process.
func tasks(pid int) (all []int) {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, n)
		}
	}
	return all
}

// holders are the user's processes and descriptors that live in one of the namespaces, or hold it. (Of others they
// would tell nothing: the kernel gives a number again when its namespace is gone.)
func holders(namespaces map[string]bool) (found []string) {
	for _, pattern := range []string{"/proc/[0-9]*/task/[0-9]*/ns/*", "/proc/[0-9]*/fd/*"} {
		paths, _ := filepath.Glob(pattern)
		for _, path := range paths {
			// Not the directory's owner, who is root where a process has more capabilities than its user.
			status, _ := os.ReadFile(strings.Join(strings.Split(path, "/")[:3], "/") + "/status")
			if !strings.Contains(string(status), "\nUid:\t65534\t") {
				continue
			}
			if to, err := os.Readlink(path); err == nil && namespaces[to] {
				found = append(found, path)
			}
		}
	}
	return found
}

// leavesNothing ends runs in every way that there is, a command's own children and those of them that have left its
// session included: no process, no namespace, no descriptor and no file is left of any.
func leavesNothing(t *testing.T, r *rootless) {
	ends := []struct {
		name string
		kill func(outer, daemon, command int)
	}{
		{"kill -9 of ztun", func(outer, _, _ int) { syscall.Kill(outer, syscall.SIGKILL) }},
		{"kill -9 of its daemon", func(_, daemon, _ int) { syscall.Kill(daemon, syscall.SIGKILL) }},
		{"kill -9 of the command", func(_, _, command int) { syscall.Kill(command, syscall.SIGKILL) }},
		{"SIGTERM of ztun", func(outer, _, _ int) { syscall.Kill(outer, syscall.SIGTERM) }},
		{"kill -9 of both of ztun's", func(outer, daemon, _ int) {
			syscall.Kill(outer, syscall.SIGSTOP) // it is not to see the other's end
			syscall.Kill(daemon, syscall.SIGKILL)
			syscall.Kill(outer, syscall.SIGKILL)
		}},
	}
	var mu sync.Mutex
	namespaces := map[string]bool{}
	var runs sync.WaitGroup
	const script = `readlink /proc/self/ns/user /proc/self/ns/net /proc/self/ns/pid /proc/self/ns/mnt
		(setsid sh -c 'trap "" TERM HUP; sleep 600 & echo there; wait' &); exec sleep 600`
	for _, e := range ends {
		runs.Go(func() {
			for range 10 {
				began, errs := waitFor("there\n"), waitFor("\x00")
				cmd := r.cmd(r.knowledge(), "", asUser("--", "sh", "-c", script)...)
				cmd.Stdout, cmd.Stderr = began, errs
				p, err := r.Start(r.h1.NS, cmd)
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case <-began.seen:
				case <-p.Done():
					t.Errorf("%s: ended at once: %v: %s", e.name, p.Err(), errs)
					return
				case <-time.After(60 * time.Second):
					t.Errorf("%s: did not begin: %s", e.name, errs)
					p.Kill()
					return
				}
				mu.Lock()
				for _, link := range strings.Fields(began.String()) {
					namespaces[link] = link != "there"
				}
				mu.Unlock()
				daemon, command, err := inside(p)
				if err != nil {
					t.Errorf("%s: %v", e.name, err)
					p.Kill()
					return
				}
				e.kill(p.Pid(), daemon, command)
				select {
				case <-p.Done(): // nobody has its output any more
				case <-time.After(30 * time.Second):
					t.Errorf("%s: something goes on after it", e.name)
					p.Kill()
					return
				}
			}
		})
	}
	runs.Wait()
	if t.Failed() {
		return
	}
	if len(namespaces) < 4*10*len(ends)/2 {
		t.Errorf("only %d namespaces were seen: %v", len(namespaces), namespaces)
	}
	eventually(t, 30*time.Second, func() error {
		if left := holders(namespaces); len(left) > 0 {
			return fmt.Errorf("namespaces are held: %q", left)
		}
		return nil
	})
	// What two killed at once could not remove goes with the next.
	if _, err := r.run(r.h1.NS, "", asUser("--", "true")...); err != nil {
		t.Error(err)
	}
	r.clean()
}

// askedOfRun: a run listens on nothing but its mesh port unless told to; the user asks it by its name and nobody else's
// socket.
func askedOfRun(t *testing.T, r *rootless) {
	begun, log := waitFor("begun"), waitFor("\x00")
	cmd := r.cmd(r.knowledge(), "", asUser("--metrics", "15920", "--", "sh", "-c", "echo begun; exec sleep 600")...)
	cmd.Stdout, cmd.Stderr = begun, log
	p, err := r.Start(r.h1.NS, cmd)
	must(t, err)
	defer p.Kill()
	select {
	case <-begun.seen:
	case <-p.Done():
		t.Fatalf("%v: %s", p.Err(), log)
	}
	listens, err := r.Run(r.ctx, r.h1.NS, "ss", "-Hltn")
	must(t, err)
	for _, line := range strings.Split(strings.TrimSpace(listens), "\n") {
		f := strings.Fields(line)
		at := f[min(3, len(f)-1)]
		_, port, _ := strings.Cut(strings.TrimPrefix(at, "[::]"), ":")
		// 9000 and 9001 are the load server's on this host.
		if at != "127.0.0.1:15920" && !slices.Contains([]string{"15008", "9000", "9001"}, port) {
			t.Errorf("something listens at %s", at)
		}
	}
	metrics, err := r.Run(r.ctx, r.h1.NS, "curl", "-sS", "http://127.0.0.1:15920/metrics")
	if err != nil || !strings.Contains(metrics, "workload_manager_active_proxy_count") {
		t.Errorf("metrics: %v: %.200s", err, metrics)
	}
	ask := func(args ...string) (string, error) {
		return r.RunCmd(r.ctx, r.h1.NS, lab.Cmd{Env: append(lab.BaseEnv(), "TMPDIR="+r.dir+"/tmp"), Args: append([]string{
			"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", r.dir + "/ztun"}, args...)})
	}
	for _, ref := range []string{"user", "default/user", strconv.Itoa(p.Pid())} {
		out, err := ask("explain", "--run", ref, "user", r.h2.IPs[0].String()+":9000")
		if err != nil || !strings.Contains(out, r.h2.IPs[0].String()) {
			t.Errorf("explain --run %s: %v: %s", ref, err, out)
		}
	}
	want := fmt.Sprintf("there is no `ztun run` nobody: there are %d (default/user)", p.Pid())
	if _, err := ask("connections", "--run", "nobody"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a run that there is not: %v, want %q", err, want)
	}
}
