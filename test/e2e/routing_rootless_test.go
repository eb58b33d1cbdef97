package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// bytesMoved are what an access line counts: an application says whom it sees, which is longer or shorter.
var bytesMoved = regexp.MustCompile(`bytes_(sent|recv)=[1-9]\d*`)

// rootlessRoutes has an ordinary user's `ztun run` be pod a, and do all of the table that pod a does by itself: each
// connection ends as the pod's, and the run's log says of it what node n1 says of the pod's. What differs is the
// source: peers and plaintext hosts see the user's host.
func rootlessRoutes(t *testing.T, r *routing) {
	r.t = t
	if r.changed {
		r.apply(nil)
	}
	user := newRootless(t, r.mesh)
	pod, host := r.places["a"], r.places["h1"]
	w := r.record("a")
	var ips []string
	for _, ip := range pod.ips {
		ips = append(ips, ip.String())
	}
	const marker = "86399" // seconds that nobody else sleeps
	log := waitFor("it runs")
	// What the host's resolver knows, which names of workloads are asked of.
	before := fmt.Sprintf("mount --bind %s /etc/hosts && mount --bind %s /etc/resolv.conf && ", r.Path("hosts"),
		r.Path("resolv.conf"))
	cmd := user.cmd(append(user.knowledge(), "RUST_LOG=warn,access=info"), before, "--name", w.Name, "--namespace",
		w.Namespace, "--service-account", w.ServiceAccount, "--ip", strings.Join(ips, ","), "--", "sh", "-c",
		"echo it runs; exec sleep "+marker)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := r.Start(r.h1.NS, cmd)
	must(t, err)
	defer p.Kill()
	select {
	case <-log.seen:
	case <-time.After(30 * time.Second):
		t.Fatal(log)
	}
	var ns *lab.NS
	eventually(t, 20*time.Second, func() (err error) {
		ns, err = nsOfSleeper(marker)
		return err
	})
	defer ns.Close()
	defer func() { r.places["a"] = pod }()
	for _, s := range scenarios() {
		// Its own application is not there, SOCKS5 is off, and a run has no CONNECT of its own.
		if s.from != "a" || s.via != nil || s.world != nil || strings.HasPrefix(s.name, "itself ") {
			continue
		}
		t.Run(strings.ReplaceAll(s.name, " ", "-"), func(t *testing.T) {
			families(t, func(t *testing.T, v4 bool) {
				r.t = t
				f := family{r, v4}
				r.places["a"] = place{ns, host.ips, pod.node}
				want := s.want(f)
				r.places["a"] = place{ns, pod.ips, pod.node}
				inside := s.want(f) // and as it looks from inside
				seen := map[int]bool{}
				for try := 0; len(seen) < len(want); try++ {
					if try == 100 {
						t.Fatalf("after %d connections only %d of %d outcomes were seen", try, len(seen), len(want))
					}
					begin := len(log.String())
					says, refused, _ := f.call(s, s.to(f))
					i := slices.IndexFunc(want, func(o outcome) bool {
						return refused == o.refused || refused != "" && strings.Contains(" "+o.refused+" ", " "+refused+" ")
					})
					// A waypoint is told where the connection begins, in the command's namespace.
					if i >= 0 && says != want[i].says && says != inside[i].says {
						i = slices.IndexFunc(want, func(o outcome) bool { return refused == "" && says == o.says })
					}
					if i < 0 {
						t.Fatalf("answered by %q, refused %q; want one of %+v; the run says: %s", says, refused, want,
							log.String()[begin:])
					}
					seen[i] = true
					if len(inside[i].hops) == 0 {
						continue
					}
					line := bytesMoved.ReplaceAllString(r.line(inside[i].hops[0]), "moved")
					eventually(t, 20*time.Second, func() error {
						text := log.String()[begin:]
						for _, l := range parseAccess(t, text[:strings.LastIndexByte(text, '\n')+1]) {
							if bytesMoved.ReplaceAllString(exactly(l), "moved") == line {
								return nil
							}
						}
						return fmt.Errorf("the run says %s\nwant %s", text, line)
					})
				}
			})
		})
	}
}

// nsOfSleeper is the network namespace of the process that sleeps for so long.
func nsOfSleeper(seconds string) (*lab.NS, error) {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && string(b) == "sleep\x00"+seconds+"\x00" {
			pid, err := strconv.Atoi(strings.Split(path, "/")[2])
			if err != nil {
				return nil, err
			}
			return lab.NSOf(pid)
		}
	}
	return nil, fmt.Errorf("nobody sleeps for %s s", seconds)
}
