package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
	"ztun/test/load"
)

// dialFromPort connects inside a namespace from a port of the caller's choice; the connection is reset when it is
// closed, so that the port is free at once.
func dialFromPort(ctx context.Context, ns *lab.NS, port int, to string) (net.Conn, error) {
	var c net.Conn
	err := ns.Do(func() (err error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}}
		c, err = d.DialContext(ctx, "tcp", to)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, c.(*net.TCPConn).SetLinger(0)
}

// TestAttackPort15008: a stranger calls from port 15008, which is the mesh's, to get at the node's own services by a
// pod's addresses. He gets the pod's, as from any other port; a host outside the mesh may also listen on that port,
// and pods reach it. The bystander notices nothing.
func TestAttackPort15008(t *testing.T) {
	m := newMesh(t, meshOptions{})
	var reached atomic.Int64
	own, err := m.N1.NS.Listen("tcp", "[::]:7777")
	must(t, err)
	defer own.Close()
	go func() {
		for {
			c, err := own.Accept()
			if err != nil {
				return
			}
			if a := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); a == m.a.V4() || a == m.a.V6() {
				reached.Add(1)
			}
			c.Close()
		}
	}()
	// Both directions work, in both families.
	m.background(m.h2.NS, `"listening"`, bins.ztload, "serve", "-listen", ":15008")
	for _, v4 := range []bool{true, false} {
		to := load.Target{Addr: lab.HostPort(pick(m.h2.IPs, v4), 15008), Dial: m.a.NS.Dial}
		if w, err := load.WhoAmI(m.ctx, to); err != nil {
			t.Errorf("from the pod to port 15008 outside the mesh, v4 %v: %v", v4, err)
		} else if h, _, _ := net.SplitHostPort(w.Peer); h != pick(m.a.IPs, v4).String() {
			t.Errorf("the server on port 15008 saw %s", w.Peer)
		}
		from := load.Target{Addr: lab.HostPort(pick(m.a.IPs, v4), 9000),
			Dial: func(ctx context.Context, _, addr string) (net.Conn, error) {
				return dialFromPort(ctx, m.h1.NS, 15008, addr)
			}}
		ctx, cancel := context.WithTimeout(m.ctx, 5*time.Second)
		if w, err := load.WhoAmI(ctx, from); err != nil {
			t.Errorf("from port 15008 outside the mesh to the pod, v4 %v: %v", v4, err)
		} else if h, _, _ := net.SplitHostPort(w.Peer); h != pick(m.h1.IPs, v4).String() {
			t.Errorf("the pod's server saw %s", w.Peer)
		}
		cancel()
	}
	m.attack(attackOptions{Name: "calls from port 15008", Attack: func(ctx context.Context) {
		tries := 0
		paced(ctx, 100, func(i int) bool {
			dctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
			defer cancel()
			c, err := dialFromPort(dctx, m.h1.NS, 15008, lab.HostPort(pick(m.a.IPs, i%2 == 0), 7777))
			tries++
			if err == nil {
				c.Close()
			}
			return true
		})
		if tries < 50 {
			t.Errorf("%d calls are no attack", tries)
		}
	}})
	if n := reached.Load(); n != 0 {
		t.Errorf("the node's own service was reached %d times by the pod's address", n)
	}
}

// TestNodeProcess: what runs in the node's own namespace (a hostNetwork gateway, a kubelet) reaches the pods of its
// node and of the other: the mesh's port with a tunnel and plaintext ports, in both families, and is seen under the
// node's own address.
func TestNodeProcess(t *testing.T) {
	m := newMesh(t, meshOptions{})
	families(t, func(t *testing.T, v4 bool) {
		for _, p := range []*lab.Pod{m.a, m.c} {
			ip := pick(p.IPs, v4)
			up, err := openTunnel(m.ctx, m.N1.NS, netip.AddrPortFrom(ip, lab.HBONEPort), lab.HostPort(ip, 9000),
				loadCA(t, m.Path("ca")).client(t, "spiffe://cluster.local/ns/default/sa/b"), nil)
			if err != nil {
				t.Errorf("a tunnel from the node to pod %s: %v", p.Name, err)
			} else {
				up.Close()
			}
			w, err := load.WhoAmI(m.ctx, target(m.N1.NS, ip))
			if err != nil {
				t.Errorf("from the node to port 9000 of pod %s: %v", p.Name, err)
				continue
			}
			if h, _, _ := net.SplitHostPort(w.Peer); !nodeOwns(m.N1, h) {
				t.Errorf("pod %s was called from %s", p.Name, w.Peer)
			}
		}
	})
}

// nodeOwns says whether an address is the node's own.
func nodeOwns(n *lab.Node, s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && (a == n.Addr4 || a == n.Addr6 || a == n.PodNet4.Addr().Next() || a == n.PodNet6.Addr().Next())
}

// TestAttackDescriptors: mesh members open more tunnels to the pods of a node than its daemon has descriptors. They
// lose their own oldest ones; the daemon accepts, calls and looks after its pods as before.
func TestAttackDescriptors(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	d, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{Wrap: []string{"prlimit", "--nofile=300"}})
	must(t, err)
	m.start(m.N2, nil)
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	for _, ns := range []*lab.NS{m.a.NS, m.b.NS, m.c.NS} {
		m.serve(ns)
	}
	m.attack(attackOptions{Name: "more tunnels than descriptors", Attack: func(ctx context.Context) {
		var open []*h2Client
		defer func() {
			for _, h := range open {
				h.close()
			}
		}()
		paced(ctx, 80, func(i int) bool {
			to := []*lab.Pod{m.a, m.b}[i%2]
			h, err := m.member(m.h1.NS, mesh15008(to), "spiffe://cluster.local/ns/default/sa/c")
			if err == nil {
				open = append(open, h)
				_ = h.connect(1, lab.HostPort(to.V4(), 9000))
			}
			return true
		})
		if len(open) < 200 {
			t.Errorf("%d tunnels are no attack", len(open))
		}
	}})
	x, err := d.Metrics(m.ctx)
	must(t, err)
	if x.Sum("ztun_bounded_total", "resource=descriptors") == 0 {
		t.Errorf("no bound was met: the attack proves nothing: %v", x.Find("ztun_bounded_total"))
	}
	m.stillAttached(m.N1, "a", "b")
}

// TestDescriptorShortage: for some seconds the daemon can open nothing at all. Its pods stay attached and remembered,
// what stands goes on, and who comes meanwhile waits and is served.
func TestDescriptorShortage(t *testing.T) {
	m := newMesh(t, meshOptions{})
	idle, err := load.Idle(m.ctx, target(m.b.NS, m.c.V4()), 3)
	must(t, err)
	defer idle.Close()
	pid := m.N1.Daemon.Pid()
	var old unix.Rlimit
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old))
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}, nil))
	waiting := make(chan error, 1)
	go func() {
		h, err := m.member(m.h1.NS, mesh15008(m.a), "spiffe://cluster.local/ns/default/sa/c")
		if err == nil {
			h.close()
		}
		waiting <- err
	}()
	time.Sleep(5 * time.Second) // two looks at the pods' namespaces
	must(t, idle.Check())
	select {
	case err := <-waiting:
		t.Errorf("served without a descriptor: %v", err)
	default:
	}
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil))
	select {
	case err := <-waiting:
		must(t, err)
	case <-time.After(5 * time.Second):
		t.Error("who waited is not served")
	}
	m.stillAttached(m.N1, "a", "b")
	if _, err := load.WhoAmI(m.ctx, target(m.a.NS, m.c.V4())); err != nil {
		t.Error(err)
	}
	// A pod whose namespace does go is let go of.
	must(t, m.RemoveNS(m.b.NS))
	eventually(t, 10*time.Second, func() error {
		if out, err := m.PodCmd(m.ctx, m.N1, "list"); err != nil || strings.Contains(out, "default  b ") ||
			strings.Contains(out, "/b") {
			return fmt.Errorf("still there: %s (%w)", out, err)
		}
		return nil
	})
}

// stillAttached checks that the daemon of a node has pods and remembers them.
func (m *mesh) stillAttached(n *lab.Node, names ...string) {
	m.t.Helper()
	saved, err := os.ReadFile(n.Daemon.StateDir + "/pods.json")
	must(m.t, err)
	out, err := m.PodCmd(m.ctx, n, "list")
	must(m.t, err)
	for _, name := range names {
		if !strings.Contains(string(saved), `"name": "`+name+`"`) {
			m.t.Errorf("pod %s is not remembered: %s", name, saved)
		}
		if !strings.Contains(out, name) || strings.Contains(out, "Pending") {
			m.t.Errorf("pod %s is not attached: %s", name, out)
		}
	}
	if strings.Contains(n.Daemon.Log(), "vanished") {
		m.t.Errorf("a pod was taken for vanished")
	}
}

// TestKill9IdleConnections: connections over which nothing is said when the daemon dies. After the restart every one
// of the node's pods has ended with a reset: the clients that only read, and the servers whose clients only wait, to
// mesh peers, to a pod of the same node and to hosts outside, in both families.
func TestKill9IdleConnections(t *testing.T) {
	m := newMesh(t, meshOptions{})
	var idle []net.Conn
	var names []string
	for _, v4 := range []bool{true, false} {
		for _, c := range []struct {
			from *lab.NS
			to   []netip.Addr
		}{{m.a.NS, m.c.IPs}, {m.a.NS, m.h2.IPs}, {m.a.NS, m.b.IPs}, {m.c.NS, m.a.IPs}, {m.h2.NS, m.a.IPs}} {
			for range 2 {
				conn, err := c.from.Dial(m.ctx, "tcp", lab.HostPort(pick(c.to, v4), 9000))
				must(t, err)
				defer conn.Close()
				if c.from == m.a.NS {
					idle, names = append(idle, conn), append(names, fmt.Sprintf("%s to %s", conn.LocalAddr(), conn.RemoteAddr()))
				}
			}
		}
	}
	count := func(ns *lab.NS) (n int) {
		for _, f := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
			b, err := ns.ReadFile(f)
			must(t, err)
			for line := range strings.Lines(string(b)) {
				if x := strings.Fields(line); len(x) > 3 && (x[3] == "01" || x[3] == "05" || x[3] == "08") {
					n++
				}
			}
		}
		return n
	}
	if n := count(m.a.NS); n != 20 {
		t.Errorf("pod a has %d connections, want 20", n)
	}
	m.N1.Daemon.Kill()
	time.Sleep(500 * time.Millisecond)
	if n := count(m.a.NS); n == 0 {
		t.Error("no connection is left without a daemon: this proves nothing")
	}
	m.start(m.N1, nil)
	for i, c := range idle {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: a client that only reads: %v, want a reset", names[i], err)
		}
	}
	eventually(t, 5*time.Second, func() error {
		if a, b := count(m.a.NS), count(m.b.NS); a != 0 || b != 0 {
			return fmt.Errorf("pods a and b still have %d and %d connections", a, b)
		}
		return nil
	})
}
