package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/admin/pb/zdspb"
	"ztun/test/lab"
	"ztun/test/load"
)

// redirectedMesh is two nodes on which ztun stands in ztunnel's place: pods have an eth0 of a CNI's and istio-cni's
// rules, and a node agent names them.
type redirectedMesh struct {
	*mesh
	d      *lab.Pod // on n1, without rules and unknown to the agent so far
	env    map[*lab.Node]map[string]string
	agents map[*lab.Node]*agent
}

func newRedirected(t *testing.T) *redirectedMesh {
	needTool(t, "iptables")
	r := &redirectedMesh{mesh: newMesh(t, meshOptions{noStart: true}), agents: map[*lab.Node]*agent{},
		env: map[*lab.Node]map[string]string{}}
	m := r.mesh
	r.d = m.pod(m.N1, "d")
	for p, routed := range map[*lab.Pod]bool{m.a: true, m.b: false, m.c: false, r.d: true} {
		m.cni(p, routed)
		r.rules(p)
	}
	f := m.DefaultWorld()
	for i := range f.Workloads {
		if f.Workloads[i].Name == "c" {
			f.Workloads[i].Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9001}}
		}
	}
	f.Services = []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local",
		VIPs: []string{"/10.96.0.7", "/fd96::7"}, Ports: map[uint16]uint16{80: 9001}}}
	must(t, m.WriteWorld(f))
	for _, n := range m.Nodes() {
		r.agents[n] = newAgent(t, m.Path(n.Name+".zds"))
		// What ztunnel's DaemonSet has of its own, and where this agent is: no word of ztun's.
		r.env[n] = map[string]string{"INPOD_ENABLED": "true", "INPOD_UDS": r.agents[n].path, "POD_NAME": "ztunnel-" + n.Name,
			"POD_NAMESPACE": "istio-system", "SERVICE_ACCOUNT": "ztunnel", "TERMINATION_GRACE_PERIOD_SECONDS": "30"}
	}
	return r
}

// rules puts istio-cni's rules into a pod.
func (r *redirectedMesh) rules(p *lab.Pod) {
	r.t.Helper()
	for _, c := range lab.IstioRules(true) {
		if out, err := r.Run(r.ctx, p.NS, c...); err != nil {
			r.t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
}

// begin starts a node's daemon and returns when its agent has heard hello.
func (r *redirectedMesh) begin(n *lab.Node) *lab.Daemon {
	r.t.Helper()
	d, err := r.StartDaemon(r.ctx, n, lab.DaemonOptions{Env: r.env[n], NoWait: true})
	must(r.t, err)
	if old := r.agents[n].accept(); old != nil {
		old.Close()
	}
	return d
}

// snapshot tells an agent's newest connection of pods.
func (r *redirectedMesh) snapshot(n *lab.Node, pods ...*lab.Pod) {
	r.t.Helper()
	a := r.agents[n]
	for _, p := range pods {
		a.want(a.add(p))
	}
	a.want(a.raw(snapshotSent))
}

// works waits until the pods a and c reach each other, in both families.
func (r *redirectedMesh) works(what string) {
	r.t.Helper()
	r.meet(what, 60*time.Second, func(from *lab.NS, to netip.Addr) error {
		return takeByte(r.ctx, from, netip.AddrPortFrom(to, 9001))
	})
}

// TestRedirected: with ztunnel's own environment, under istio-cni's rules and a node agent, ztun does ztunnel's work:
// ready with the snapshot and not before; encrypted between nodes, in both families, as the client's own address;
// names; plaintext from outside; a new daemon beside the old one takes over without a lost connection; without one the
// pods are closed; and a pod that is let go has its connections cut.
func TestRedirected(t *testing.T) {
	needTool(t, "dig")
	r := newRedirected(t)
	n1, n2 := r.N1, r.N2
	for _, n := range r.Nodes() {
		d := r.begin(n)
		status, body, err := d.Get(r.ctx, lab.ReadyPort, "/healthz/ready")
		if err != nil || status != 500 || !strings.Contains(body, "workload proxy manager") {
			t.Errorf("before the snapshot: %d %q, %v", status, body, err)
		}
	}
	r.snapshot(n1, r.a, r.b)
	r.snapshot(n2, r.c)
	for _, n := range r.Nodes() {
		must(t, n.Daemon.WaitReady(r.ctx, 60*time.Second))
	}
	for _, ns := range []*lab.NS{r.a.NS, r.c.NS, r.h2.NS} {
		r.serve(ns)
	}
	r.works("at first")
	for _, n := range r.Nodes() {
		if found := r.doctor(n); len(found) > 0 {
			t.Errorf("the doctor of a healthy node: %+v", found)
		}
	}

	wire, err := r.Capture(n1.NS, "eth0", lab.CaptureOptions{Filter: "tcp", Immediate: true})
	must(t, err)
	r.works("again")
	packets := stop(t, wire)
	if got := packets.ServerPorts(); fmt.Sprint(got) != "[15008]" && fmt.Sprint(got) != "[]" { // [] on tunnels that stand
		t.Errorf("on the wire: %v", got)
	}
	for _, p := range packets {
		if p.Src.Port() == 9001 || p.Dst.Port() == 9001 {
			t.Fatalf("plaintext on the wire: %+v", p)
		}
	}
	for _, v4 := range []bool{true, false} {
		who, err := load.WhoAmI(r.ctx, target(r.a.NS, pick(r.c.IPs, v4)))
		if err != nil || !strings.Contains(fmt.Sprint(who), pick(r.a.IPs, v4).String()) {
			t.Errorf("the application sees %+v, %v", who, err)
		}
		// To and from what is not in the mesh.
		if err := takeByte(r.ctx, r.a.NS, netip.AddrPortFrom(pick(r.h2.IPs, v4), 9001)); err != nil {
			t.Errorf("to the outside: %v", err)
		}
		if err := takeByte(r.ctx, r.h2.NS, netip.AddrPortFrom(pick(r.a.IPs, v4), 9001)); err != nil {
			t.Errorf("from the outside: %v", err)
		}
	}
	for _, how := range []string{"+notcp", "+tcp"} {
		out, err := r.Run(r.ctx, r.a.NS, "dig", how, "+time=10", "+tries=1", "+short", "@"+r.h2.V4().String(),
			"shop.default.svc.cluster.local", "A")
		if strings.TrimSpace(out) != "10.96.0.7" {
			t.Errorf("dig %s: %q, %v", how, out, err)
		}
	}
	if err := takeByte(r.ctx, r.a.NS, netip.MustParseAddrPort("10.96.0.7:80")); err != nil {
		t.Errorf("a service: %v", err)
	}
	// The kernel has accepted by the time that anybody knows better.
	if err := takeByte(r.ctx, r.a.NS, netip.AddrPortFrom(r.c.V4(), 81)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a port without listener: %v", err)
	}

	r.replaced()

	// Without a daemon the pods are closed, and the next one goes on.
	n1.Daemon.Kill()
	<-n1.Daemon.Done()
	for _, c := range []struct {
		from *lab.NS
		to   netip.Addr
	}{{r.a.NS, r.c.V4()}, {r.h2.NS, r.a.V4()}} {
		if err := takeByte(r.ctx, c.from, netip.AddrPortFrom(c.to, 9001)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("without a daemon, to %s: %v", c.to, err)
		}
	}
	r.begin(n1)
	r.snapshot(n1, r.a)
	must(t, n1.Daemon.WaitReady(r.ctx, 60*time.Second))
	r.works("after a restart")

	// A pod that is let go: what it had open ends at once.
	held, err := r.a.NS.Dial(r.ctx, "tcp", lab.HostPort(r.c.V4(), 9000))
	must(t, err)
	defer held.Close()
	eventually(t, 30*time.Second, func() error {
		m, err := n1.Daemon.Metrics(r.ctx)
		if err == nil && m.Sum("workload_manager_active_proxy_count") != 1 {
			err = errors.New("not one pod")
		}
		return err
	})
	r.agents[n1].want(r.agents[n1].raw(delOf("uid-a")))
	held.SetReadDeadline(time.Now().Add(agentPatience))
	if _, err := io.Copy(io.Discard, held); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a connection outlives its pod's proxy")
	}
	if err := takeByte(r.ctx, r.a.NS, netip.AddrPortFrom(r.c.V4(), 9001)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("with the pod let go and its rules there: %v", err)
	}
}

// replaced puts a second daemon beside that of n1, as a DaemonSet does that surges, and ends the first: no connection
// fails. Kubernetes gives it a network namespace of its own; here a host's is one.
func (r *redirectedMesh) replaced() {
	t, n1 := r.t, r.N1
	t.Helper()
	agent, old := r.agents[n1], n1.Daemon
	ctx, cancel := context.WithCancel(r.ctx)
	failed := make(chan error, 2)
	for _, c := range []struct {
		from *lab.NS
		to   netip.Addr
	}{{r.a.NS, r.c.V4()}, {r.c.NS, r.a.V4()}} {
		go func() {
			var err error
			for n := 0; ctx.Err() == nil && err == nil; n++ {
				if e := takeByte(r.ctx, c.from, netip.AddrPortFrom(c.to, 9001)); e != nil {
					err = fmt.Errorf("call %d to %s: %w", n, c.to, e)
				}
			}
			failed <- err
		}()
	}
	defer func() {
		cancel()
		for range 2 {
			if err := <-failed; err != nil {
				t.Error(err)
			}
		}
	}()
	elsewhere := &lab.Node{Name: "n1-next", NS: r.h1.NS}
	env := map[string]string{"NODE_NAME": n1.Name}
	for k, v := range r.env[n1] {
		env[k] = v
	}
	_, err := r.StartDaemon(r.ctx, elsewhere, lab.DaemonOptions{Env: env, NoWait: true})
	must(t, err)
	first := agent.accept()
	r.snapshot(n1, r.a, r.b)
	must(t, elsewhere.Daemon.WaitReady(r.ctx, 60*time.Second))
	gone := make(chan error, 1)
	go func() {
		_, err := old.Stop(60 * time.Second)
		gone <- err
	}()
	agent.hungUp(first) // before it drains
	must(t, <-gone)
	n1.Daemon = elsewhere.Daemon
}

// TestNodeAgentSequences: what a node agent may say, good and bad, is answered as a real ztunnel answers it
// (docs/samples/zds-answers.md), but that the daemon never ends of it.
func TestNodeAgentSequences(t *testing.T) {
	r := newRedirected(t)
	d := r.begin(r.N1)
	a, n := r.agents[r.N1], r.N1
	r.snapshot(n, r.b)
	must(t, d.WaitReady(r.ctx, 60*time.Second))
	add := func(uid string, ns *lab.NS) string { return a.raw(addOf(t, uid, "default", "x", "x"), ns.Path()) }
	pods := func(active, pending int) {
		t.Helper()
		eventually(t, 60*time.Second, func() error {
			m, err := d.Metrics(r.ctx)
			if err != nil {
				return err
			}
			is := [2]float64{m.Sum("workload_manager_active_proxy_count"), m.Sum("workload_manager_pending_proxy_count")}
			if is != [2]float64{float64(active), float64(pending)} {
				return fmt.Errorf("%v pods, waiting %v; want %d, %d", is[0], is[1], active, pending)
			}
			return nil
		})
	}
	noInfo := message(t, &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{Uid: "z"}}})
	long := addOf(t, strings.Repeat("u", 5000), "default", "x", "x")
	const read, process, start = "failure to read message : ", "failure to process message : ", "failure to start proxy : "
	for _, s := range []struct {
		what            string
		say             func() string
		want            string // beginning of the reason; "" for success
		anew            bool   // the connection ends, and the next one gets the snapshot b, x
		active, pending int
	}{
		{"an Add", func() string { return add("x", r.a.NS) }, "", false, 2, 0},
		{"the same Add", func() string { return add("x", r.a.NS) }, "", false, 2, 0},
		{"the same with another name", func() string { return a.raw(addOf(t, "x", "default", "y", "y"), r.a.NS.Path()) }, "",
			false, 2, 0},
		{"the same in another namespace", func() string { return add("x", r.d.NS) }, "", false, 2, 0},
		{"and back", func() string { return add("x", r.a.NS) }, "", false, 2, 0},
		{"two uids of one namespace", func() string { return add("x2", r.a.NS) }, "", false, 3, 0},
		{"the end of one of them", func() string { return a.raw(delOf("x2")) }, "", false, 2, 0},
		{"and again", func() string { return a.raw(delOf("x2")) }, "", false, 2, 0},
		{"of nobody", func() string { return a.raw(delOf("nobody")) }, "", false, 2, 0},
		{"a file", func() string { return a.raw(addOf(t, "f", "default", "f", "f"), "/etc/hostname") }, start, false, 2, 1},
		{"a mount namespace", func() string { return a.raw(addOf(t, "f", "default", "f", "f"), "/proc/self/ns/mnt") }, start,
			false, 2, 1},
		{"its end", func() string { return a.raw(delOf("f")) }, "", false, 2, 0},
		{"the node's own namespace", func() string { return add("own", n.NS) }, start, false, 2, 1},
		{"its end", func() string { return a.raw(delOf("own")) }, "", false, 2, 0},
		{"no workload_info", func() string { return a.raw(noInfo, r.d.NS.Path()) }, process, false, 2, 0},
		{"a late Keep", func() string { return a.raw(keepOf(t, "x")) }, process, false, 2, 0},
		{"a second snapshot", func() string { return a.raw(snapshotSent) }, process, false, 2, 0},
		{"no descriptor", func() string { return a.raw(addOf(t, "e", "default", "e", "e")) }, read, true, 2, 0},
		{"two descriptors", func() string {
			return a.raw(addOf(t, "e", "default", "e", "e"), r.d.NS.Path(), r.d.NS.Path())
		}, read, true, 2, 0},
		{"an end with a descriptor", func() string { return a.raw(delOf("x"), r.d.NS.Path()) }, read, true, 2, 0},
		{"garbage", func() string { return a.raw([]byte{0xff, 0xff, 0xff}) }, read, true, 2, 0},
		{"an empty Add", func() string { return a.raw([]byte{0x0a, 0}) }, read, true, 2, 0},
		{"an unknown field", func() string { return a.raw([]byte{0x7a, 1, 'a'}) }, read, true, 2, 0},
		{"too long", func() string { return a.raw(long, r.d.NS.Path()) }, read, true, 2, 0},
	} {
		got := s.say()
		if !strings.HasPrefix(got, s.want) || (got == "") != (s.want == "") {
			t.Errorf("%s: %q, want %q", s.what, got, s.want)
		}
		if s.anew {
			a.hungUp(a.conn)
			a.accept()
			// In the snapshot an agent that has a pod's namespace no more says Keep.
			a.want(add("x", r.a.NS))
			a.want(a.raw(keepOf(t, "uid-b")))
			a.want(a.raw(snapshotSent))
		}
		pods(s.active, s.pending)
	}
	// A port of ours that the application has: the pod waits, and is attached when the port is free.
	var taken net.Listener
	must(t, r.d.NS.Do(func() (err error) { taken, err = net.Listen("tcp", "[::]:15008"); return err }))
	if got := add("p", r.d.NS); !strings.HasPrefix(got, start) || !strings.Contains(got, "15008") {
		t.Errorf("15008 is taken: %q", got)
	}
	pods(2, 1)
	taken.Close()
	pods(3, 0)
	// A snapshot that does not name a pod ends it; before that it goes on.
	a.conn.Close()
	a.accept()
	pods(3, 0)
	// One that ends within the snapshot is not named by it, and one that could not be attached is not waited for.
	a.want(add("x", r.a.NS))
	a.want(a.raw(delOf("x")))
	if got := add("own", n.NS); !strings.HasPrefix(got, start) {
		t.Errorf("the node's own namespace in a snapshot: %q", got)
	}
	a.want(a.raw(delOf("own")))
	pods(3, 1)
	r.snapshot(n, r.b)
	pods(1, 0)
	if !d.Running() {
		t.Error("the daemon has ended")
	}
	must(t, d.WaitReady(r.ctx, 60*time.Second))
}
