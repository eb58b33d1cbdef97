package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// mesh is the usual world: pods a and b on n1, c on n2, all HBONE; hosts h1 on n1, h2 on n2, plaintext; a load server
// in each.
type mesh struct {
	*lab.World
	t       testing.TB
	ctx     context.Context
	a, b, c *lab.Pod
	h1, h2  *lab.Host
}

type meshOptions struct {
	env       map[string]string // of both daemons
	workloads []lab.Workload    // more than the pods and hosts
	services  []lab.Service
	policies  []lab.Policy
	noStart   bool // no daemons, nothing attached
	noServers bool
	bin       string // in place of the usual one
}

func newMesh(t testing.TB, o meshOptions) *mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	m := &mesh{t: t, ctx: ctx, World: lab.ForTest(t, lab.Options{Bin: cmp.Or(o.bin, bins.ztun)})}
	m.a, m.b, m.c = m.pod(m.N1, "a"), m.pod(m.N1, "b"), m.pod(m.N2, "c")
	m.h1, m.h2 = m.host(m.N1, "h1"), m.host(m.N2, "h2")
	f := m.DefaultWorld()
	f.Workloads = append(f.Workloads, o.workloads...)
	f.Services, f.Policies = o.services, o.policies
	must(t, m.WriteWorld(f))
	if o.noStart {
		return m
	}
	for _, n := range m.Nodes() {
		m.start(n, o.env)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(ctx, p))
	}
	if !o.noServers {
		for _, ns := range []*lab.NS{m.a.NS, m.b.NS, m.c.NS, m.h1.NS, m.h2.NS} {
			m.serve(ns)
		}
	}
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m *mesh) pod(n *lab.Node, name string) *lab.Pod {
	m.t.Helper()
	p, err := m.AddPod(n, lab.Pod{Name: name})
	must(m.t, err)
	return p
}

// teach replaces the world of running daemons, and returns when each goes by as much as is in it: until then they
// decide by the old one.
func (m *mesh) teach(f lab.WorldFile) {
	m.t.Helper()
	must(m.t, m.WriteWorld(f))
	want := [3]int{len(f.Workloads), len(f.Services), len(f.Policies)}
	m.goneBy(60*time.Second, func(d inForce) error {
		if got := [3]int{len(d.Workloads), len(d.Services), len(d.Policies)}; got != want {
			return fmt.Errorf("%v workloads, services and policies are known; want %v", got, want)
		}
		return nil
	})
}

// inForce is what a daemon goes by, of its dump: not what its file says, which the dump shows elsewhere.
type inForce struct {
	Workloads, Policies []json.RawMessage
	Services            []struct{ Hostname string }
}

// goneBy waits until what every node's daemon goes by satisfies holds.
func (m *mesh) goneBy(limit time.Duration, holds func(inForce) error) {
	m.t.Helper()
	for _, n := range m.Nodes() {
		eventually(m.t, limit, func() error {
			_, body, err := n.Daemon.Get(m.ctx, lab.AdminPort, "/config_dump")
			if err != nil {
				return err
			}
			var d inForce
			if err = json.Unmarshal([]byte(body), &d); err == nil {
				err = holds(d)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
			return nil
		})
	}
}

// takeByte connects to a one-byte server and takes the byte. Nothing is sent: the server ends without reading, and
// would reset the connection, now and then before the byte is here.
func takeByte(ctx context.Context, ns *lab.NS, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := ns.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

// bounce sends a byte and waits until one comes back.
func bounce(c net.Conn) error {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// meet waits until the pods a and c, of one node each, reach each other in both families.
func (m *mesh) meet(what string, limit time.Duration, reach func(from *lab.NS, to netip.Addr) error) {
	m.t.Helper()
	for _, c := range []struct {
		from *lab.NS
		to   netip.Addr
	}{{m.a.NS, m.c.V4()}, {m.a.NS, m.c.V6()}, {m.c.NS, m.a.V4()}, {m.c.NS, m.a.V6()}} {
		eventually(m.t, limit, func() error {
			if err := reach(c.from, c.to); err != nil {
				return fmt.Errorf("%s: to %s: %w", what, c.to, err)
			}
			return nil
		})
	}
}

// another adds a pod to the running mesh.
func (m *mesh) another(n *lab.Node, name string) *lab.Pod {
	m.t.Helper()
	p := m.pod(n, name)
	must(m.t, m.WriteWorld(m.DefaultWorld()))
	must(m.t, m.Attach(m.ctx, p))
	return p
}

func (m *mesh) host(n *lab.Node, name string) *lab.Host {
	m.t.Helper()
	h, err := m.AddHost(n, name)
	must(m.t, err)
	return h
}

func (m *mesh) start(n *lab.Node, env map[string]string) *lab.Daemon {
	m.t.Helper()
	d, err := m.StartDaemon(m.ctx, n, lab.DaemonOptions{Env: env})
	must(m.t, err)
	return d
}

// waiter is a writer that tells when a text has come by.
type waiter struct {
	mu   sync.Mutex
	text strings.Builder
	want string
	seen chan struct{}
}

func waitFor(text string) *waiter { return &waiter{want: text, seen: make(chan struct{})} }

func (w *waiter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(p)
	select {
	case <-w.seen:
	default:
		if strings.Contains(w.text.String(), w.want) {
			close(w.seen)
		}
	}
	return len(p), nil
}

func (w *waiter) String() string { w.mu.Lock(); defer w.mu.Unlock(); return w.text.String() }

// serve starts the load server in a namespace: 9000 for everything, 9001 for one byte.
func (m *mesh) serve(ns *lab.NS) *lab.Process {
	m.t.Helper()
	return m.background(ns, `"listening"`, bins.ztload, "serve", "-listen", ":9000", "-byte", ":9001")
}

// background starts a program and waits until it has printed a text.
func (m *mesh) background(ns *lab.NS, until string, args ...string) *lab.Process {
	m.t.Helper()
	out := waitFor(until)
	p, err := m.Start(ns, lab.Cmd{Args: args, Stdout: out, Stderr: out})
	must(m.t, err)
	select {
	case <-out.seen:
	case <-p.Done():
		m.t.Fatalf("%v ended: %v: %s", args, p.Err(), out)
	case <-time.After(30 * time.Second):
		m.t.Fatalf("%v did not say %q: %s", args, until, out)
	}
	return p
}

// ztload runs the load command in a namespace and decodes its result, which says itself whether it went well; no
// result at all fails the test.
func ztload[T any](m *mesh, ns *lab.NS, args ...string) T {
	m.t.Helper()
	r, err := tryLoad[T](m, ns, args...)
	must(m.t, err)
	return r
}

func tryLoad[T any](m *mesh, ns *lab.NS, args ...string) (T, error) {
	var r T
	out, err := m.Run(m.ctx, ns, append([]string{bins.ztload}, args...)...)
	if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
		return r, fmt.Errorf("ztload %v: %w", args, errors.Join(err, jerr))
	}
	return r, nil
}

// target of the load server at an address, dialled from a namespace in this process.
func target(ns *lab.NS, ip netip.Addr) load.Target {
	return load.Target{Addr: lab.HostPort(ip, 9000), Dial: ns.Dial}
}

// transferBytes is what a transfer of the matrix moves each way.
func transferBytes(t testing.TB) int64 {
	v := os.Getenv("ZTUN_TEST_BYTES")
	if v == "" {
		return 1 << 30
	}
	n, err := strconv.ParseInt(v, 10, 64)
	must(t, err)
	t.Logf("ZTUN_TEST_BYTES=%d: this is not the proof that the issue asks for", n)
	return n
}

// eventually polls until f is content; what it said last is the failure.
func eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// family runs f for both address families.
func families(t *testing.T, f func(t *testing.T, v4 bool)) {
	for _, v4 := range []bool{true, false} {
		t.Run(map[bool]string{true: "v4", false: "v6"}[v4], func(t *testing.T) { f(t, v4) })
	}
}

func pick(ips []netip.Addr, v4 bool) netip.Addr {
	for _, ip := range ips {
		if ip.Is4() == v4 {
			return ip
		}
	}
	return netip.Addr{}
}

// stop ends a capture; lost packets are only told: the caller's checks say whether what was seen is enough.
func stop(t testing.TB, c *lab.Capture) lab.Packets {
	t.Helper()
	ps, err := c.Stop()
	if errors.Is(err, lab.ErrDropped) {
		t.Log(err)
	} else {
		must(t, err)
	}
	return ps
}

func needTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%v: this test needs it (.ci/run installs it)", err)
	}
}
