package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"ztun/test/lab"
)

// cni gives a pod an eth0 as a CNI does: routed, a host's address and an on-link gateway that is nowhere (Calico); or
// a subnet's address and a gateway in it (bridge).
func (m *mesh) cni(p *lab.Pod, routed bool) {
	m.t.Helper()
	host, n := "veth"+p.Name, p.Node
	lines := []string{"link add " + host + " type veth peer name eth0 netns " + p.NS.Name, "link set " + host + " up",
		fmt.Sprintf("route add %s/32 dev %s", p.V4(), host), fmt.Sprintf("route add %s/128 dev %s", p.V6(), host),
		"addr add fe80::ecee/64 dev " + host + " nodad"}
	gateway := n.PodNet4.Addr().Next().String()
	in := []string{"link set lo up", "link set eth0 mtu 1450 up"}
	if routed {
		gateway = "169.254.1.1"
		lines = append(lines, "addr add 169.254.1.1/32 dev "+host)
		in = append(in, fmt.Sprintf("addr add %s/32 dev eth0", p.V4()), "route add 169.254.1.1 dev eth0 scope link")
	} else {
		in = append(in, fmt.Sprintf("addr add %s/24 dev eth0", p.V4()))
	}
	in = append(in, "route add default via "+gateway, fmt.Sprintf("addr add %s/128 dev eth0 nodad", p.V6()),
		"route add default via fe80::ecee dev eth0")
	// Without duplicate address detection, which changes what is compared later.
	must(m.t, p.NS.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	must(m.t, m.IP(m.ctx, n.NS, lines...))
	must(m.t, m.IP(m.ctx, p.NS, in...))
}

// TestSteered: pods that keep their CNI's eth0, of both families of CNI, are captured while they run: new
// connections are encrypted, pings pass, the node's own probes reach a pod
// that is strict and nobody else does, a killed daemon leaves nothing open and the next one goes on; let go, the pod is
// as it was.
func TestSteered(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	m.cni(m.a, true)
	m.cni(m.c, false)
	f := m.DefaultWorld()
	f.Policies = []lab.Policy{{Name: "istio_converted_static_strict", Namespace: "default", Scope: "Namespace",
		Action: "Deny", Rules: [][][]map[string]any{{{{"notPrincipals": []any{map[string]any{"Presence": []any{}}}}}}}}}
	must(t, m.WriteWorld(f))
	env := map[string]string{"ZTUN_STEERING": "steered"}
	for _, n := range m.Nodes() {
		m.start(n, env)
	}
	m.serve(m.a.NS)
	m.serve(m.c.NS)
	before := map[*lab.Pod]string{m.a: netState(m, m.a.NS), m.c: netState(m, m.c.NS)}
	get := func(ns *lab.NS, to netip.Addr) error {
		ctx, cancel := context.WithTimeout(m.ctx, 5*time.Second) // what is closed says nothing
		defer cancel()
		return echo(ctx, ns, netip.AddrPortFrom(to, 9001))
	}
	both := func(what string) {
		t.Helper()
		m.meet(what, 30*time.Second, get)
	}
	both("before")
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
	// What somebody takes away is put back.
	out, err := m.Run(m.ctx, nil, "stat", "-L", "-c", "ztun-%d-%i", m.a.NS.Path())
	must(t, err)
	var dev, ino uint64
	_, err = fmt.Sscanf(out, "ztun-%d-%d", &dev, &ino)
	must(t, err)
	_, err = m.Run(m.ctx, nil, "ip", "-n", fmt.Sprintf("ztun-%x-%x", dev, ino), "rule", "del", "pref", "20")
	must(t, err)
	eventually(t, 40*time.Second, func() error { return get(m.N1.NS, m.a.V4()) })
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
}
