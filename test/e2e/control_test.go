package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"ztun/test/lab"
)

// controlled is a mesh whose nodes get everything from `ztun control`, which runs on n1.
type controlled struct {
	*mesh
	dir     string
	process *lab.Process
	door    *door
	faulty  bool // the nodes go through the door
}

const controlPort = 15012

// newControlled starts the control plane, and with start the nodes and their pods.
func newControlled(t testing.TB, faulty bool, env map[string]string) *controlled {
	t.Helper()
	c := &controlled{mesh: newMesh(t, meshOptions{noStart: true}), faulty: faulty}
	c.dir = c.Path("control")
	_, err := c.Ztun(c.ctx, nil, "control", "init", c.dir)
	must(t, err)
	old, err := filepath.Glob(filepath.Join(c.dir, "mesh", "*"))
	must(t, err)
	for _, f := range old { // the example
		must(t, os.Remove(f))
	}
	c.write("world.yaml", c.DefaultWorld())
	c.startControl()
	port := controlPort
	if faulty {
		port = 15112
		c.door = newDoor(t, c.N1.NS, c.N1.Addr4.String(), port, controlPort)
	}
	for _, n := range c.Nodes() {
		cred := c.Path("cred-" + n.Name)
		_, err := c.Ztun(c.ctx, nil, "control", "join", "--dir", c.dir, "--node", n.Name, "--out", cred)
		must(t, err)
		address := fmt.Sprintf("https://%s:%d", c.N1.Addr4, port)
		e := map[string]string{
			"LOCAL_XDS_PATH": lab.Unset, "LOCAL_CA_DIR": lab.Unset, "XDS_ADDRESS": address, "CA_ADDRESS": address,
			"ZTUN_CONTROL_CREDENTIALS": cred,
		}
		for k, v := range env {
			e[k] = v
		}
		c.start(n, e)
	}
	for _, p := range c.Pods() {
		must(t, c.Attach(c.ctx, p))
	}
	for _, ns := range []*lab.NS{c.a.NS, c.b.NS, c.c.NS, c.h1.NS, c.h2.NS} {
		c.serve(ns)
	}
	return c
}

func (c *controlled) startControl() {
	c.t.Helper()
	c.process = c.background(c.N1.NS, "15012", c.Bin(), "control", "--dir", c.dir, "--listen",
		fmt.Sprintf("%s:%d", c.N1.Addr4, controlPort), "--host", c.N1.Addr4.String(), "--admin", "127.0.0.1:15014")
}

// write replaces a file of the mesh's directory.
func (c *controlled) write(name string, v any) {
	c.t.Helper()
	b, ok := v.([]byte)
	if !ok {
		var err error
		b, err = yaml.Marshal(v)
		must(c.t, err)
	}
	path := filepath.Join(c.dir, "mesh", name)
	must(c.t, os.WriteFile(path+".new", b, 0o644))
	must(c.t, os.Rename(path+".new", path))
}

// visible waits until a node's dump holds a text.
func (c *controlled) visible(n *lab.Node, text string, want bool) {
	c.t.Helper()
	eventually(c.t, 20*time.Second, func() error {
		_, body, err := n.Daemon.Get(c.ctx, lab.AdminPort, "/config_dump")
		if err == nil && strings.Contains(body, text) != want {
			err = fmt.Errorf("%s: %q visible: %v", n.Name, text, !want)
		}
		return err
	})
}

func policy(name, action, principal string) lab.WorldFile {
	return lab.WorldFile{Workloads: []lab.Workload{}, Policies: []lab.Policy{{
		Name: name, Namespace: "default", Scope: "Namespace", Action: action,
		Rules: [][][]map[string]any{{{{"principals": []map[string]string{{"Exact": principal}}}}}},
	}}}
}

// echo opens a connection and sends a little over it, again and again, until it breaks or ctx ends.
type talker struct {
	conn net.Conn
	n    atomic.Int64
	end  chan struct{} // closed when it broke
	when time.Time
	err  error
}

// talk keeps a connection to the echo port of the load server busy, every pause.
func (m *mesh) talk(ctx context.Context, ns *lab.NS, address string, pause time.Duration) (*talker, error) {
	conn, err := ns.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	t := &talker{conn: conn, end: make(chan struct{})}
	go func() {
		defer close(t.end)
		defer conn.Close()
		b := make([]byte, 64)
		for ctx.Err() == nil {
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := conn.Write(bytes.Repeat([]byte("x"), 64)); err != nil {
				t.err, t.when = err, time.Now()
				return
			}
			if _, err := io.ReadFull(conn, b); err != nil {
				t.err, t.when = err, time.Now()
				return
			}
			t.n.Add(1)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}()
	return t, nil
}

// echoServer answers every connection with its own bytes.
func (m *mesh) echoServer(ns *lab.NS, address string) {
	m.t.Helper()
	l, err := ns.Listen("tcp", address)
	must(m.t, err)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() { defer c.Close(); io.Copy(c, c) })
		}
	})
	m.t.Cleanup(func() { l.Close(); work.Wait() })
}

// TestControlPlane: the real protocol end to end. Certificates, workloads, a service and policies come from `ztun
// control`, change, and vanish.
func TestControlPlane(t *testing.T) {
	c := newControlled(t, false, nil)
	c.echoServer(c.c.NS, ":9100")
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	ofA, err := c.talk(ctx, c.a.NS, lab.HostPort(c.c.V4(), 9100), 20*time.Millisecond)
	must(t, err)
	ofB, err := c.talk(ctx, c.b.NS, lab.HostPort(c.c.V6(), 9100), 20*time.Millisecond)
	must(t, err)
	eventually(t, 10*time.Second, func() error {
		if ofA.n.Load() < 5 || ofB.n.Load() < 5 {
			return errors.New("no traffic")
		}
		return nil
	})
	mm, err := c.N2.Daemon.Metrics(c.ctx)
	must(t, err)
	if mm.Sum("istio_tcp_connections_opened_total", "reporter=destination", "connection_security_policy=mutual_tls",
		"source_principal=spiffe://cluster.local/ns/default/sa/a") != 1 {
		t.Error("a's connection is not counted as mutual TLS of a")
	}
	if mm.Sum("istio_xds_message_total") < 2 {
		t.Error("no xDS messages are counted:", mm.Text)
	}

	// A service appears, works, and goes.
	c.write("service.yaml",
		lab.WorldFile{Workloads: []lab.Workload{},
			Services: []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local",
				VIPs: []string{"/10.96.0.7"}, Ports: map[uint16]uint16{80: 9100}}}})
	w := c.DefaultWorld()
	for i := range w.Workloads {
		if w.Workloads[i].Name == "c" {
			w.Workloads[i].Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9100}}
		}
	}
	c.write("world.yaml", w)
	c.visible(c.N1, `"/10.96.0.7"`, true)
	eventually(t, 10*time.Second, func() error {
		v, err := c.talk(ctx, c.a.NS, "10.96.0.7:80", time.Millisecond)
		if err == nil {
			v.conn.Close()
		}
		return err
	})

	// A file that cannot be used changes nothing, and says where it is wrong.
	c.write("broken.yaml", []byte("services:\n- name: x\n  vips: 12\n"))
	eventually(t, 10*time.Second, func() error {
		out, err := c.Ztun(c.ctx, nil, "control", "status", "--dir", c.dir)
		if err == nil && !strings.Contains(out, "broken.yaml:") {
			err = errors.New("the status does not name the broken file:\n" + out)
		}
		return err
	})
	must(t, os.Remove(filepath.Join(c.dir, "mesh", "broken.yaml")))

	// Both nodes have acknowledged everything.
	eventually(t, 10*time.Second, func() error {
		out, err := c.Ztun(c.ctx, nil, "control", "status", "--dir", c.dir, "--json")
		if err != nil {
			return err
		}
		var s any
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return err
		}
		if !strings.Contains(out, `"n1"`) || !strings.Contains(out, `"n2"`) {
			return errors.New("the status does not show both nodes: " + out)
		}
		return nil
	})

	// What denies a closes a's connection, and only that.
	c.write("policy.yaml", policy("no-a", "Deny", "cluster.local/ns/default/sa/a"))
	select {
	case <-ofA.end:
	case <-time.After(10 * time.Second):
		t.Error("a's connection lives on")
	}
	if _, err := c.talk(ctx, c.a.NS, lab.HostPort(c.c.V4(), 9100), time.Second); err == nil {
		t.Error("a can still connect")
	}
	n := ofB.n.Load()
	eventually(t, 10*time.Second, func() error {
		if ofB.n.Load() < n+5 {
			return errors.New("b's connection does not go on")
		}
		return nil
	})
	must(t, os.Remove(filepath.Join(c.dir, "mesh", "policy.yaml")))
	eventually(t, 10*time.Second, func() error {
		v, err := c.talk(ctx, c.a.NS, lab.HostPort(c.c.V4(), 9100), time.Second)
		if err == nil {
			v.conn.Close()
		}
		return err
	})

	// What vanished while the control plane was down is learnt when it is back.
	c.process.Kill()
	must(t, os.Remove(filepath.Join(c.dir, "mesh", "service.yaml")))
	c.startControl()
	c.visible(c.N1, `"/10.96.0.7"`, false)
	c.visible(c.N2, `"/10.96.0.7"`, false)
	select {
	case <-ofB.end:
		t.Error("b's connection broke:", ofB.err)
	default:
	}
}

// TestControlPlaneFaults: the control plane is shut, hung, slow and answers garbage, under traffic. No connection is
// lost, new ones work from the last state, recovery needs nobody, memory is flat. ZTUN_TEST_FAULT is how long each
// fault lasts (default 4 s; 75 s each is the five minutes that the project asks for).
func TestControlPlaneFaults(t *testing.T) {
	each := 4 * time.Second
	if v := os.Getenv("ZTUN_TEST_FAULT"); v != "" {
		var err error
		each, err = time.ParseDuration(v)
		must(t, err)
	}
	// Certificates are renewed all the while, and must not run out: their life is longer than a fault.
	ttl := max(20*time.Second, 3*each)
	c := newControlled(t, true, map[string]string{"SECRET_TTL": ttl.String()})
	c.echoServer(c.c.NS, ":9100")
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	var talkers []*talker
	for _, ns := range []*lab.NS{c.a.NS, c.b.NS} {
		for _, ip := range c.c.IPs {
			v, err := c.talk(ctx, ns, lab.HostPort(ip, 9100), 10*time.Millisecond)
			must(t, err)
			talkers = append(talkers, v)
		}
	}
	// New connections all the time.
	var opened, failed atomic.Int64
	var last atomic.Value
	var newcomers sync.WaitGroup
	newcomers.Go(func() {
		for ctx.Err() == nil {
			conn, err := c.a.NS.Dial(ctx, "tcp", lab.HostPort(c.c.V4(), 9100))
			if err == nil {
				conn.SetDeadline(time.Now().Add(10 * time.Second))
				if _, err = conn.Write([]byte("x")); err == nil {
					_, err = io.ReadFull(conn, make([]byte, 1))
				}
				conn.Close()
			}
			if ctx.Err() != nil {
				return
			}
			opened.Add(1)
			if err != nil {
				failed.Add(1)
				last.Store(err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	rss := func() (sum int64) {
		for _, n := range c.Nodes() {
			r, err := n.Daemon.RSS()
			must(t, err)
			sum += r
		}
		return sum
	}
	time.Sleep(2 * time.Second)
	before := rss()
	for i, mode := range []string{"shut", "hung", "slow", "garbage"} {
		c.door.set(mode)
		// What changes meanwhile arrives when the fault is over.
		vip := fmt.Sprintf("/10.96.1.%d", i)
		c.write("service.yaml",
			lab.WorldFile{Workloads: []lab.Workload{},
				Services: []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local",
					VIPs: []string{vip}, Ports: map[uint16]uint16{80: 9100}}}})
		time.Sleep(each)
		if f := failed.Load(); f > 0 {
			t.Fatalf("%s: %d of %d new connections failed: %v", mode, f, opened.Load(), last.Load())
		}
		for j, v := range talkers {
			select {
			case <-v.end:
				t.Fatalf("%s: connection %d broke: %v", mode, j, v.err)
			default:
			}
		}
		c.door.set("")
		start := time.Now()
		limit := 25*time.Second + each // the longest backoff is 15 s
		for _, n := range c.Nodes() {
			eventually(t, limit, func() error {
				_, body, err := n.Daemon.Get(c.ctx, lab.AdminPort, "/config_dump")
				if err == nil && !strings.Contains(body, vip) {
					err = fmt.Errorf("%s: %s does not know the new service", mode, n.Name)
				}
				return err
			})
		}
		t.Logf("%s for %v: up to date again after %v; %d new connections so far, none failed; resident memory of both "+
			"daemons %d MiB, before %d", mode, each, time.Since(start).Round(time.Millisecond), opened.Load(), rss()>>20,
			before>>20)
	}
	for i, v := range talkers {
		if v.n.Load() < 50 {
			t.Errorf("connection %d said only %d times something", i, v.n.Load())
		}
	}
	if grew := rss() - before; grew > 24<<20 {
		t.Errorf("resident memory grew by %d MiB", grew>>20)
	}
	cancel()
	newcomers.Wait()
}

// TestPolicyUnderLoad: when policies turn from allow to deny, every connection that is now forbidden is closed within
// a second, every other one lives.
func TestPolicyUnderLoad(t *testing.T) {
	c := newControlled(t, false, nil)
	c.echoServer(c.c.NS, ":9100")
	const each = 100
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	open := func(ns *lab.NS) (all []*talker) {
		for i := range each {
			v, err := c.talk(ctx, ns, lab.HostPort(c.c.IPs[i%2], 9100), 50*time.Millisecond)
			must(t, err)
			all = append(all, v)
		}
		return all
	}
	ofA, ofB := open(c.a.NS), open(c.b.NS)
	time.Sleep(time.Second)
	c.write("policy.yaml", policy("no-a", "Deny", "cluster.local/ns/default/sa/a"))
	written := time.Now()
	for i, v := range ofA {
		select {
		case <-v.end:
		case <-time.After(10 * time.Second):
			t.Fatalf("connection %d of a lives on", i)
		}
	}
	var last time.Duration
	for _, v := range ofA {
		last = max(last, v.when.Sub(written))
	}
	t.Logf("the last of %d connections was closed %v after the file was written", each, last)
	// A second is what is asked for, and a quarter of one what it takes; a loaded machine gets more before that is
	// called a fault.
	if last > 3*time.Second {
		t.Errorf("a forbidden connection lived %v on", last)
	}
	said := make([]int64, each)
	for i, v := range ofB {
		said[i] = v.n.Load()
	}
	time.Sleep(2 * time.Second)
	for i, v := range ofB {
		if v.n.Load() <= said[i] {
			t.Errorf("connection %d of b, which is allowed, has stopped: %v", i, v.err)
		}
	}
}
