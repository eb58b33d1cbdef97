package e2e

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestKill9: the daemon of the client's node is killed while traffic runs, and the pod goes on trying. No plaintext
// may be seen on any interface of either node, no new connection may succeed, and after a restart new ones work
// without anybody touching the pod.
func TestKill9(t *testing.T) {
	m := newMesh(t, meshOptions{})
	var captures []*lab.Capture
	for _, n := range m.Nodes() {
		c, err := m.Capture(n.NS, "any", lab.CaptureOptions{Filter: "not (src host 127.0.0.1 and dst host 127.0.0.1)"})
		must(t, err)
		captures = append(captures, c)
	}
	ctx, cancel := context.WithCancel(m.ctx)
	bulk := make(chan *load.BulkResult, 1)
	go func() {
		bulk <- load.Bulk(ctx, target(m.a.NS, m.c.V4()), 2, "both", 60*time.Second)
	}()
	time.Sleep(time.Second)

	m.N1.Daemon.Kill()

	// The pod goes on: over established connections (the bulk), and with new ones to mesh peers and others, in both
	// families.
	end := time.Now().Add(3 * time.Second)
	for tries := 0; time.Now().Before(end); tries++ {
		for _, dst := range []string{lab.HostPort(m.c.V4(), 9000), lab.HostPort(m.c.V6(), 9000),
			lab.HostPort(m.h2.V4(), 9000), lab.HostPort(m.b.V4(), 9000)} {
			dctx, dcancel := context.WithTimeout(m.ctx, 100*time.Millisecond)
			c, err := m.a.NS.Dial(dctx, "tcp", dst)
			dcancel()
			if err == nil {
				t.Errorf("a connection to %s was made without a daemon", dst)
				fmt.Fprint(c, load.Marker)
				c.Close()
			}
		}
		// UDP, which a daemon would carry in the clear, ends with it as well.
		if u, err := m.a.NS.Dial(m.ctx, "udp", lab.HostPort(m.c.V4(), 9000)); err == nil {
			u.Write([]byte(load.Marker))
			u.Close()
		}
	}
	cancel()
	r := <-bulk
	if r.Failed == 0 {
		t.Errorf("the bulk streams survived the death of the proxy: %+v", r)
	}
	for i, c := range captures {
		ps := stop(t, c)
		n := m.Nodes()[i]
		if ps.Contains([]byte(load.Marker)) {
			t.Errorf("plaintext on %s:\n%v", n.Name, ps.Where(func(p lab.Packet) bool {
				return lab.Packets{p}.Contains([]byte(load.Marker))
			}))
		}
		// Not even a SYN of the pod may be seen outside the tunnel.
		for _, ip := range m.a.IPs {
			if syns := ps.SYNs().Where(func(p lab.Packet) bool {
				return p.Src.Addr() == ip && p.Dst.Port() != 15008
			}); len(syns) > 0 {
				t.Errorf("SYNs of the pod on %s:\n%v", n.Name, syns)
			}
		}
		if n.Index == 1 && ps.Port(15008).Bytes() < 1<<20 {
			t.Errorf("the capture on %s saw only %d bytes on 15008: it proves nothing", n.Name, ps.Port(15008).Bytes())
		}
	}

	m.start(m.N1, nil)
	for _, p := range []*lab.Pod{m.a, m.b} {
		for _, ip := range m.c.IPs {
			var last error
			eventually(t, 20*time.Second, func() error {
				w, err := load.WhoAmI(m.ctx, target(p.NS, ip))
				if err != nil {
					last = err
					return fmt.Errorf("%s to %v after the restart: %w", p.Name, ip, err)
				}
				if h, _, err := net.SplitHostPort(w.Peer); err != nil || h != pick(p.IPs, ip.Is4()).String() {
					return fmt.Errorf("the server saw %q", w.Peer)
				}
				return nil
			})
			if last != nil {
				t.Logf("%s to %v needed more than one try: %v", p.Name, ip, last)
			}
		}
	}
	// And towards the pods of the restarted node.
	if w, err := load.WhoAmI(m.ctx, target(m.c.NS, m.a.V4())); err != nil {
		t.Errorf("from n2 to the restarted node: %v %+v", err, w)
	}
	// The pods are known as before.
	out, err := m.PodCmd(m.ctx, m.N1, "list")
	must(t, err)
	t.Logf("pods after the restart:\n%s", out)
}

// TestKill9OfTheServersNode: the peer's proxy dies. The client is told (a reset or an end), new connections are
// refused or time out honestly, and work again after the restart.
func TestKill9OfTheServersNode(t *testing.T) {
	m := newMesh(t, meshOptions{})
	ic, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 5)
	must(t, err)
	defer ic.Close()
	m.N2.Daemon.Kill()
	if err := ic.Check(); err == nil {
		t.Error("connections through a dead proxy are alive")
	}
	ctx, cancel := context.WithTimeout(m.ctx, 12*time.Second)
	defer cancel()
	if r := load.DialOnce(ctx, target(m.a.NS, m.c.V4())); r.OK {
		t.Errorf("connect through a dead proxy: %+v", r)
	}
	m.start(m.N2, nil)
	eventually(t, 30*time.Second, func() error {
		_, err := load.WhoAmI(m.ctx, target(m.a.NS, m.c.V4()))
		return err
	})
}

// TestNoNetfilter: with daemons, pods and traffic, no namespace holds a table, a chain or a conntrack entry.
func TestNoNetfilter(t *testing.T) {
	m := newMesh(t, meshOptions{})
	ic, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 3)
	must(t, err)
	defer ic.Close()
	plain, err := load.Idle(m.ctx, target(m.a.NS, m.h2.V4()), 3)
	must(t, err)
	defer plain.Close()
	if r := ztload[load.ManyResult](m, m.h2.NS, "half", "-to", lab.HostPort(m.a.V4(), 9000), "-n", "20"); r.OK != 20 {
		t.Errorf("inbound plaintext: %v", r.Errors)
	}
	for _, ns := range []*lab.NS{m.N1.NS, m.N2.NS, m.a.NS, m.b.NS, m.c.NS, m.h1.NS, m.h2.NS} {
		found, err := ns.Netfilter()
		must(t, err)
		if len(found) != 0 {
			t.Errorf("%s holds %v", ns.Name, found)
		}
	}
	must(t, ic.Check())
	must(t, plain.Check())
}
