package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
	"ztun/test/load"
	"ztun/tun/sandwich"
)

// cni gives a pod an eth0, a little smaller than the hosts'.
func (m *mesh) cni(p *lab.Pod, routed bool) {
	m.t.Helper()
	must(m.t, m.CNI(m.ctx, p, routed, 1450))
}

// keep opens connections that echo, and returns what checks that each still does.
func (m *mesh) keep(ends map[*lab.NS]netip.Addr) (still func(what string)) {
	m.t.Helper()
	var conns []net.Conn
	for from, to := range ends {
		c, err := from.Dial(m.ctx, "tcp", netip.AddrPortFrom(to, 9002).String())
		must(m.t, err)
		m.t.Cleanup(func() { c.Close() })
		conns = append(conns, c)
	}
	still = func(what string) {
		m.t.Helper()
		for _, c := range conns {
			if err := bounce(c); err != nil {
				m.t.Errorf("%s: %v to %v: %v", what, c.LocalAddr(), c.RemoteAddr(), err)
			}
		}
	}
	still("at once")
	return still
}

// between is what the namespace between a steered pod and the network is called. It is outside of the world, which a
// test that fails would leave.
func (m *mesh) between(p *lab.Pod) string {
	m.t.Helper()
	var st unix.Stat_t
	must(m.t, unix.Stat(p.NS.Path(), &st))
	name := sandwich.Record{Dev: st.Dev, Ino: st.Ino}.Name()
	m.t.Cleanup(func() {
		if m.t.Failed() {
			m.Run(context.Background(), nil, "ip", "netns", "del", name)
		}
	})
	return name
}

// smallLink puts a link of 1400 bytes between pods whose devices have 1450: HBONE's sockets hear of it, and so does who
// sends datagrams, which the kernel forwards.
func (m *mesh) smallLink(t *testing.T) {
	t.Helper()
	for _, n := range m.Nodes() {
		must(t, m.IP(m.ctx, n.NS, "link set eth0 mtu 1400"))
	}
	for _, p := range [][2]*lab.Pod{{m.a, m.c}, {m.c, m.a}} {
		for _, to := range p[1].IPs {
			r := ztload[load.TransferResult](m, p[0].NS, "xfer", "-to", lab.HostPort(to, 9000), "-up", "8388608", "-down",
				"8388608")
			if !r.OK {
				t.Errorf("1400 bytes, to %s: %s", to, r.Error)
			}
			at := netip.AddrPortFrom(to, 7010)
			m.echoUDP(t, p[1].NS, at)
			c, err := udpFrom(p[0].NS, at)
			must(t, err)
			for _, n := range []int{1, 1380, 8000} {
				text := strings.Repeat("d", n)
				if got, err := sayLarge(c, text); err != nil || got != text {
					t.Errorf("%d bytes to %v: %d came back, %v", n, at, len(got), err)
				}
			}
			c.Close()
		}
	}
}

// TestSteered: on a node where the kernel forwards UDP and ICMP, and on one where netstack does, pods that keep their
// CNI's eth0, of both families of CNI, are captured while they run: new connections are encrypted and those from before
// go on, datagrams pass, the node's own probes reach a pod that is strict and nobody else does, a killed daemon leaves
// nothing open and the next one goes on; let go, the pod is as it was.
func TestSteered(t *testing.T) { steeredPods(t, "steered") }

// TestSteeredByRules: the same where eth0 stays in the pod.
func TestSteeredByRules(t *testing.T) { steeredPods(t, "rules") }

func steeredPods(t *testing.T, way string) {
	m := newMesh(t, meshOptions{noStart: true})
	m.cni(m.a, true)
	m.cni(m.b, false)
	m.cni(m.c, false)
	f := m.DefaultWorld()
	f.Policies = []lab.Policy{{Name: "istio_converted_static_strict", Namespace: "default", Scope: "Namespace",
		Action: "Deny", Rules: [][][]map[string]any{{{{"notPrincipals": []any{map[string]any{"Presence": []any{}}},
			"destinationPorts": []int{9001}}}}}}} // no datagrams', which have no identity and which netstack judges
	must(t, m.WriteWorld(f))
	env := map[string]string{"ZTUN_STEERING": way}
	m.start(m.N1, env)
	// As where the kernel cannot copy ICMP.
	m.start(m.N2, map[string]string{"ZTUN_STEERING": way, "ZTUN_STEERED_NATIVE": "false"})
	for _, p := range []*lab.Pod{m.a, m.b, m.c} {
		m.serve(p.NS)
		m.echoServer(p.NS, "[::]:9002")
	}
	between := map[*lab.Pod]string{m.a: m.between(m.a), m.b: m.between(m.b), m.c: m.between(m.c)}
	before := map[*lab.Pod]string{m.a: netState(m, m.a.NS), m.c: netState(m, m.c.NS)}
	get := func(ns *lab.NS, to netip.Addr) error {
		ctx, cancel := context.WithTimeout(m.ctx, 5*time.Second) // what is closed says nothing
		defer cancel()
		return takeByte(ctx, ns, netip.AddrPortFrom(to, 9001))
	}
	both := func(what string) {
		t.Helper()
		m.meet(what, 30*time.Second, get)
	}
	both("before")
	kept := m.keep(map[*lab.NS]netip.Addr{m.a.NS: m.c.V6(), m.c.NS: m.a.V4(), m.h2.NS: m.a.V6()})
	// Its addresses are read from its namespace.
	_, err := m.PodCmd(m.ctx, m.N1, "add", "--uid", "uid-a", "--name", m.a.Name, "--namespace", m.a.Namespace,
		"--service-account", m.a.ServiceAccount, "--netns", m.a.NS.Path())
	must(t, err)
	must(t, m.Attach(m.ctx, m.c))
	wire, err := m.Capture(m.N1.NS, "eth0", lab.CaptureOptions{Filter: "tcp", Immediate: true})
	must(t, err)
	both("captured")
	packets, err := wire.Stop()
	must(t, err)
	if got := packets.ServerPorts(); fmt.Sprint(got) != "[15008]" {
		t.Errorf("on the wire: %v", got)
	}
	kept("after the capture of both ends")
	for p, h := range map[*lab.Pod]*lab.Host{m.a: m.h2, m.c: m.h1} {
		newNameserver(t, h.NS, h.IPs) // which the pod's DNS proxy asks for what the mesh does not know
		for _, at := range h.IPs {
			if _, err := ask(p.NS, netip.AddrPortFrom(at, 53), "www.example."); err != nil {
				t.Errorf("pod %s, a name outside the mesh, by %s: %v", p.Name, at, err)
			}
		}
	}
	eventually(t, 30*time.Second, func() error { // peers' certificates are there
		for _, n := range m.Nodes() {
			if found := m.doctor(n); len(found) > 0 {
				return fmt.Errorf("the doctor of a healthy node: %+v", found)
			}
		}
		return nil
	})
	m.smallLink(t)
	for to, size := range map[netip.Addr]string{m.c.V4(): "4000", m.c.V6(): "1300"} {
		if out, err := m.Run(m.ctx, m.a.NS, "ping", "-c1", "-w20", "-s"+size, to.String()); err != nil {
			t.Errorf("ping: %v: %s", err, out)
		}
	}
	// Policy refuses whoever has no identity, but not the node's own sockets.
	for _, to := range []netip.Addr{m.a.V4(), m.a.V6()} {
		if err := get(m.N1.NS, to); err != nil {
			t.Errorf("a probe of %s: %v", to, err)
		}
		if err := get(m.N2.NS, to); err == nil {
			t.Errorf("another node's connection to %s was let in", to)
		}
		if err := get(m.h1.NS, to); err == nil {
			t.Errorf("a connection of a neighbour without identity to %s was let in", to)
		}
	}
	m.N1.Daemon.Kill()
	if err := get(m.h1.NS, m.a.V4()); err == nil {
		t.Error("without a daemon the pod is open")
	}
	m.start(m.N1, env)
	both("after a restart")
	kept("after a restart")
	// What somebody takes away is put back.
	if way == "rules" {
		must(t, m.IP(m.ctx, m.a.NS, "rule del pref 20"))
		must(t, m.IP(m.ctx, m.a.NS, "rule add pref 1 lookup local"))
	} else {
		_, err = m.Run(m.ctx, nil, "ip", "-n", between[m.a], "rule", "del", "pref", "20")
		must(t, err)
	}
	eventually(t, 40*time.Second, func() error { return get(m.N1.NS, m.a.V4()) })
	// A CNI's DEL takes eth0 away, which is ours: its own goes with S, and its address with it.
	must(t, m.Attach(m.ctx, m.b))
	eventually(t, 30*time.Second, func() error { return get(m.N1.NS, m.b.V4()) })
	must(t, m.IP(m.ctx, m.b.NS, "link del eth0"))
	eventually(t, 30*time.Second, func() error {
		if out, err := m.Run(m.ctx, m.N1.NS, "ip", "-o", "link", "show", "veth"+m.b.Name); err == nil {
			return fmt.Errorf("the CNI's end on the host is still there: %s", out)
		}
		return nil
	})
	eventually(t, 30*time.Second, func() error { // where eth0 is the CNI's own, its end is noticed at the next look
		found := m.doctor(m.N1)
		if !slices.ContainsFunc(found, func(g doctorFinding) bool {
			return strings.Contains(g.What, m.b.Name) && strings.Contains(g.What, "eth0 was deleted")
		}) {
			return fmt.Errorf("the doctor of a pod whose eth0 is deleted: %+v", found)
		}
		return nil
	})
	must(t, m.Detach(m.ctx, m.b))
	_, err = m.PodCmd(m.ctx, m.N1, "del", "--uid", "uid-a")
	must(t, err)
	m.N2.Daemon.Kill()
	if out, err := m.Ztun(m.ctx, m.N2.NS, "node", "clean", "--state-dir", m.DaemonEnv(m.N2)["ZTUN_STATE_DIR"]); err != nil {
		t.Errorf("clean: %v: %s", err, out)
	}
	for p, was := range before {
		if now := netState(m, p.NS); now != was {
			t.Errorf("pod %s: before\n%s\nafter\n%s", p.Name, was, now)
		}
	}
	for p, name := range between {
		if _, err := os.Stat("/var/run/netns/" + name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("pod %s: %s is left: %v", p.Name, name, err)
		}
	}
}
