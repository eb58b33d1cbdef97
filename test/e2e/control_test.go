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
			"LOCAL_XDS_PATH": lab.Unset, "LOCAL_CA_DIR": lab.Unset, "XDS_ADDRESS": address, "CA_ADDRESS": address, "ZTUN_CONTROL_CREDENTIALS": cred,
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
	c.process = c.background(c.N1.NS, "15012", c.Bin(), "control", "--dir", c.dir, "--listen", fmt.Sprintf("%s:%d", c.N1.Addr4, controlPort), "--host", c.N1.Addr4.String(), "--admin", "127.0.0.1:15014")
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

// TestControlPlane: the real protocol end to end. Certificates, workloads, a service and policies come from `ztun control`, change, and vanish.
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
	if mm.Sum("istio_tcp_connections_opened_total", "reporter=destination", "connection_security_policy=mutual_tls", "source_principal=spiffe://cluster.local/ns/default/sa/a") != 1 {
		t.Error("a's connection is not counted as mutual TLS of a")
	}
	if mm.Sum("istio_xds_message_total") < 2 {
		t.Error("no xDS messages are counted:", mm.Text)
	}

	// A service appears, works, and goes.
	c.write("service.yaml", lab.WorldFile{Workloads: []lab.Workload{}, Services: []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local", VIPs: []string{"/10.96.0.7"}, Ports: map[uint16]uint16{80: 9100}}}})
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
