package e2e

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// dialFromPort connects inside a namespace from a port of the caller's choice; the connection is reset when it is closed, so that the port is free at once.
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

// TestAttackPort15008: a stranger calls from port 15008, which is the mesh's, to get at the node's own services by a pod's addresses. He gets the
// pod's, as from any other port; a host outside the mesh may also listen on that port, and pods reach it. The bystander notices nothing.
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
		from := load.Target{Addr: lab.HostPort(pick(m.a.IPs, v4), 9000), Dial: func(ctx context.Context, _, addr string) (net.Conn, error) {
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

// TestNodeProcess: what runs in the node's own namespace (a hostNetwork gateway, a kubelet) reaches the pods of its node and of the other: the
// mesh's port with a tunnel and plaintext ports, in both families, and is seen under the node's own address.
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
