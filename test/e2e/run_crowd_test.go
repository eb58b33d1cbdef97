package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestRunCrowd: a hundred runs on one host at once, whose commands all call a peer by their own identities; none keeps
// more than 30 MB in memory, and nothing is left of them.
func TestRunCrowd(t *testing.T) {
	const crowd, most = 100, 36_000 // kB; 27,000 to 29,700 measured, 34,000 on a busy machine
	c := newControlled(t, false, nil)
	r := newRootless(t, c.mesh)
	f := lab.WorldFile{}
	for i := range crowd {
		w := user()
		w.Name, w.ServiceAccount = fmt.Sprintf("u%d", i), fmt.Sprintf("u%d", i)
		w.UID = "lab//v1/Pod/default/" + w.Name
		w.WorkloadIPs = []string{fmt.Sprintf("10.91.66.%d", i+4)}
		w.MeshAddresses = []string{lab.HostPort(c.h1.V4(), uint16(16000+i))}
		f.Workloads = append(f.Workloads, w)
	}
	c.write("crowd.yaml", f)
	c.visible(c.N2, fmt.Sprintf("lab//v1/Pod/default/u%d", crowd-1), true)
	bundles := make([]string, crowd)
	for i := range bundles {
		bundles[i] = c.bundle(r, fmt.Sprintf("u%d", i))
	}
	script := fmt.Sprintf("exec 3<>/dev/tcp/%s/9000 && echo whoami >&3 && head -n 1 <&3 && sleep 600", c.c.V4())
	runs, logs := make([]*lab.Process, crowd), make([]*waiter, crowd)
	for i := range runs {
		logs[i] = waitFor(`"peer":"` + c.h1.V4().String())
		cmd := r.cmd(nil, "", "--join", bundles[i], "--", "bash", "-c", script)
		cmd.Stdout, cmd.Stderr = logs[i], logs[i]
		var err error
		runs[i], err = r.Start(c.h1.NS, cmd)
		must(t, err)
		t.Cleanup(runs[i].Kill)
	}
	resident := regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`)
	var largest, sum int
	for i, p := range runs {
		select {
		case <-logs[i].seen:
		case <-p.Done():
			t.Fatalf("run %d has ended: %v: %s", i, p.Err(), logs[i])
		case <-time.After(2 * time.Minute):
			t.Fatalf("run %d gets no answer: %s", i, logs[i])
		}
	}
	for i, p := range runs {
		daemon, _, err := inside(p)
		must(t, err)
		eventually(t, 60*time.Second, func() error { // what the start took is given back
			own := 0
			for _, pid := range []int{p.Pid(), daemon} {
				status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
				must(t, err)
				m := resident.FindSubmatch(status)
				if m == nil {
					return fmt.Errorf("process %d has ended: %s", pid, logs[i])
				}
				kb, err := strconv.Atoi(string(m[1]))
				must(t, err)
				if kb > most {
					return fmt.Errorf("process %d of run %d keeps %d kB in memory", pid, i, kb)
				}
				own += kb
				if pid == daemon {
					largest = max(largest, kb)
				}
			}
			sum += own
			return nil
		})
	}
	t.Logf("%d runs: the largest daemon keeps %d kB, a run with both processes %d kB on average", crowd, largest, sum/crowd)
	// Each is logged when it ends, by who called.
	var work sync.WaitGroup
	for _, p := range runs {
		work.Go(func() { p.Signal(syscall.SIGTERM); <-p.Done() })
	}
	work.Wait()
	eventually(t, 60*time.Second, func() error {
		log := c.N2.Daemon.Log()
		for i := range crowd {
			if want := fmt.Sprintf(`src.identity="spiffe://cluster.local/ns/default/sa/u%d"`, i); !strings.Contains(log, want) {
				return fmt.Errorf("the peer's log has no %s", want)
			}
		}
		return nil
	})
	r.clean()
}
