package e2e

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// attaches is how often TestAttachLeavesNothing adds and removes a pod of each way: a few, or as many as asked for.
func attaches(t *testing.T) int {
	v := os.Getenv("ZTUN_TEST_ATTACHES")
	if v == "" {
		return 6
	}
	n, err := strconv.Atoi(v)
	must(t, err)
	return n
}

// TestAttachLeavesNothing: pods that are added and removed time and again, by the daemon, by their CNI's DEL, and by
// their end, leave nothing: no namespace, device, rule, route, neighbour or setting, on the node or in the pods, no
// descriptor and no goroutine in the daemon. ZTUN_TEST_ATTACHES says how often; from 100 on it tells pods' memory.
func TestAttachLeavesNothing(t *testing.T) { attachLeavesNothing(t, "steered", "redirected") }

// TestAttachLeavesNothingByRules: the same where eth0 stays in the pods.
func TestAttachLeavesNothingByRules(t *testing.T) { attachLeavesNothing(t, "rules", "rules") }

// attachLeavesNothing has the ways of both nodes. (The second's UDP goes by netstack.)
func attachLeavesNothing(t *testing.T, ways ...string) {
	needTool(t, "iptables")
	m := newMesh(t, meshOptions{noStart: true})
	r := &redirectedMesh{mesh: m}
	for p, routed := range map[*lab.Pod]bool{m.a: true, m.b: false, m.c: true} {
		m.cni(p, routed)
	}
	redirected := ways[1] == "redirected"
	if redirected {
		r.rules(m.c)
	}
	m.start(m.N1, map[string]string{"ZTUN_STEERING": ways[0]})
	m.start(m.N2, map[string]string{"ZTUN_STEERING": ways[1], "INPOD_ENABLED": "false", "ZTUN_STEERED_NATIVE": "false"})
	between := []string{m.between(m.a), m.between(m.b)}
	took := map[*lab.Node][]time.Duration{}
	add := func(p *lab.Pod) {
		t.Helper()
		start := time.Now()
		must(t, m.Attach(m.ctx, p))
		took[p.Node] = append(took[p.Node], time.Since(start))
	}
	cycle := func(n int) {
		t.Helper()
		every := max(10, n/20) // the lab has some 90 addresses for pods
		for i := range n {
			for _, p := range []*lab.Pod{m.a, m.b, m.c} {
				add(p)
			}
			if i%every == 0 { // pods that end, of which the CNI takes care
				whole := i/every%2 == 0 // with their namespace
				for _, node := range m.Nodes() {
					p := m.pod(node, fmt.Sprintf("gone%d", len(between)))
					m.cni(p, whole)
					between = append(between, m.between(p))
					add(p)
					must(t, m.IP(m.ctx, p.NS, "link del eth0"))
					if whole {
						must(t, m.RemoveNS(p.NS))
					}
					// The daemon may have noticed the end of a namespace by itself.
					if err := m.Detach(m.ctx, p); err != nil && (!whole || !strings.Contains(err.Error(), "no such pod")) {
						t.Fatal(err)
					}
				}
			}
			for _, p := range []*lab.Pod{m.c, m.b, m.a} {
				must(t, m.Detach(m.ctx, p))
			}
		}
	}
	type state struct {
		net  map[string]string  // by namespace
		held map[string]holding // by node
	}
	look := func() state {
		s := state{map[string]string{}, map[string]holding{}}
		for _, ns := range []*lab.NS{m.N1.NS, m.N2.NS, m.a.NS, m.b.NS, m.c.NS} {
			s.net[ns.Name] = netState(m, ns)
			for _, of := range []string{"nud permanent", "proxy"} {
				out, err := m.Run(m.ctx, ns, append([]string{"ip", "neigh", "show"}, strings.Fields(of)...)...)
				must(t, err)
				s.net[ns.Name] += "\n" + of + "\n" + out
			}
		}
		for _, n := range m.Nodes() {
			s.held[n.Name] = m.holds(n.Daemon)
		}
		return s
	}
	bare := look()
	cycle(1) // what is made once and stays
	before := look()
	clear(took)
	n := attaches(t)
	cycle(n)
	eventually(t, 60*time.Second, func() error {
		after := look()
		for ns, was := range before.net {
			if now := after.net[ns]; now != was {
				return fmt.Errorf("%s: before\n%s\nafter\n%s", ns, was, now)
			}
		}
		for _, name := range between {
			if _, err := os.Stat("/var/run/netns/" + name); !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s is left: %v", name, err)
			}
		}
		for node, was := range before.held {
			if now := after.held[node]; now.fds > was.fds || now.goroutines > was.goroutines {
				return fmt.Errorf("%s: descriptors %v -> %v, goroutines %v -> %v", node, was.fds, now.fds, was.goroutines,
					now.goroutines)
			}
		}
		return nil
	})
	for ns, was := range bare.net {
		if now := before.net[ns]; now != was {
			t.Errorf("%s: never captured\n%s\ncaptured once\n%s", ns, was, now)
		}
	}
	for _, node := range m.Nodes() {
		d := took[node]
		slices.Sort(d)
		t.Logf("%s: %d times added and removed; ztun pod add took %v p50, %v p99", node.Name, len(d),
			d[len(d)/2].Round(time.Millisecond), d[int(math.Ceil(float64(len(d))*0.99))-1].Round(time.Millisecond))
	}
	if n >= 100 {
		m.weighPods(r, 50, redirected)
	}
}

// holding is what a daemon holds, of a daemon that has carried nothing yet.
type holding struct{ fds, goroutines, heap, rss float64 }

func (m *mesh) holds(d *lab.Daemon) holding {
	m.t.Helper()
	for range 2 { // collections
		status, _, err := d.Get(m.ctx, lab.AdminPort, "/debug/pprof/heap?gc=1")
		if err != nil || status != 200 {
			m.t.Fatalf("pprof heap: %d %v", status, err)
		}
	}
	x, err := d.Metrics(m.ctx)
	must(m.t, err)
	rss, err := d.RSS()
	must(m.t, err)
	return holding{x.Sum("process_open_fds"), x.Sum("go_goroutines"), x.Sum("go_memstats_heap_inuse_bytes"), float64(rss)}
}

// weighPods tells what n idle pods at once take of a daemon's memory.
func (m *mesh) weighPods(r *redirectedMesh, n int, redirected bool) {
	m.t.Helper()
	for _, node := range m.Nodes() {
		before := m.holds(node.Daemon)
		var pods []*lab.Pod
		for i := range n {
			p := m.pod(node, fmt.Sprintf("w%d%d", node.Index, i))
			m.cni(p, true)
			if node == m.N2 && redirected {
				r.rules(p)
			}
			m.between(p)
			must(m.t, m.Attach(m.ctx, p))
			pods = append(pods, p)
		}
		after := m.holds(node.Daemon)
		m.t.Logf("%s: of each of %d idle pods: %.0f KiB resident, %.0f KiB of heap, %.1f descriptors, %.1f goroutines",
			node.Name, n, (after.rss-before.rss)/1024/float64(n), (after.heap-before.heap)/1024/float64(n),
			(after.fds-before.fds)/float64(n), (after.goroutines-before.goroutines)/float64(n))
		for _, p := range pods {
			must(m.t, m.Detach(m.ctx, p))
		}
	}
}
