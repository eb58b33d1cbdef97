package steer_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/steer"
	"ztun/tun/tuntest/nslab"
)

// dialFrom connects in a namespace; port 0 leaves the local port to the kernel.
func dialFrom(t *testing.T, ns *nslab.NS, port int, dst netip.AddrPort) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	err := ns.Do(func() (err error) {
		d := net.Dialer{Timeout: patience / 4}
		if port != 0 {
			d.LocalAddr = &net.TCPAddr{Port: port}
		}
		c, err = d.Dial("tcp", dst.String())
		return err
	})
	return c, err
}

func listenIn(t *testing.T, ns *nslab.NS, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp", addr); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestPortOutsideTheMesh: port 15008 of a host outside the mesh is a port like others, to a pod that calls it and to
// a pod that is called from it; and no service of the node's own is reached at a pod's address, whatever port one
// calls from.
func TestPortOutsideTheMesh(t *testing.T) {
	n1, outside := twoNodes(t)
	m := serve(t, n1)
	p := m.attach(t, "10.1.0.2", "fd01::2")
	own := listenIn(t, n1.NS, "[::]:8080")
	go func() {
		for {
			c, err := own.Accept()
			if err != nil {
				return
			}
			t.Errorf("the node's own service was reached at %s from %s", c.LocalAddr(), c.RemoteAddr())
			c.Close()
		}
	}()
	open := listenIn(t, outside.NS, "[::]:15008")
	for f, host := range []string{"172.30.0.2", "fd30::2"} {
		ctx, cancel := context.WithTimeout(t.Context(), patience/4)
		c, err := p.stack.DialPlain(ctx, netip.AddrPortFrom(netip.MustParseAddr(host), 15008))
		cancel()
		if err != nil {
			t.Errorf("family %d: from the pod to %s:15008: %v", f, host, err)
		} else {
			c.Close()
		}
	}
	open.Close()
	for f := range 2 {
		// The pod's stack refuses with an error of its own, so that its answer is told from the node's.
		out, err := dialFrom(t, outside.NS, 15008, netip.AddrPortFrom(p.addrs[f], 8080))
		if err == nil {
			out.Close()
		}
		if !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("family %d: from port 15008 to the pod: %v, want the pod's own answer", f, err)
		}
	}
}

// TestNodeCallsPod: a process in the node's namespace that leaves its source to the kernel reaches a pod's mesh port,
// from an address of the node's.
func TestNodeCallsPod(t *testing.T) {
	n1, _ := twoNodes(t)
	n1.open(t)
	p := attach(t, n1, "10.1.0.2", "fd01::2")
	l, err := netns.ListenTransparent(t.Context(), n1.NS.NS, 15008, true, netns.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for f, want := range []string{"172.30.0.1", "fd30::1"} {
		c, err := dialFrom(t, n1.NS, 0, netip.AddrPortFrom(p.addrs[f], 15008))
		if err != nil {
			t.Errorf("family %d: %v", f, err)
			continue
		}
		defer c.Close()
		l.SetDeadline(time.Now().Add(patience))
		in, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if got := in.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String(); got != want {
			t.Errorf("family %d: the pod was called from %s, want %s", f, got, want)
		}
	}
}

// TestStaleRules: rules of ours that an earlier version made, and this one does not, go; those of others, and all of
// this one's, stay.
func TestStaleRules(t *testing.T) {
	n := newNode(t)
	n.open(t)
	foreign := func() {
		n.IP(t, "rule", "add", "pref", "77", "ipproto", "tcp", "sport", "15008", "lookup", "15008")
		n.IP(t, "-6", "rule", "add", "pref", "77", "from", "2001:db8::1", "lookup", "main")
		// of one client's alone: its owner's business
		n.IP(t, "rule", "add", "pref", "78", "from", "192.0.2.1", "ipproto", "tcp", "dport", "15008", "lookup", "99")
	}
	foreign()
	want := n.State(t)
	for _, fam := range []string{"-4", "-6"} {
		n.IP(t, fam, "rule", "add", "pref", "11", "ipproto", "tcp", "sport", "15008", "lookup", "15008", "protocol", "158")
		n.IP(t, fam, "rule", "add", "pref", "12", "from", "all", "ipproto", "tcp", "dport", "15009", "lookup", "15008",
			"protocol", "158")
	}
	if err := steer.Apply(t.Context(), n.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
		t.Fatal(err)
	}
	same(t, "node", want, n.State(t))
	// A pod's plan has no rules, and leaves the node's.
	p := attach(t, n, "10.1.0.2")
	if got := n.IP(t, "rule"); strings.Count(got, "proto 158") != 4 {
		t.Errorf("after a pod was attached:\n%s", got)
	}
	if err := steer.Undo(p.plan, p.namespaces()); err != nil {
		t.Error(err)
	}
	// A daemon without IPv6 takes the rules of one that had it away.
	if err := steer.Apply(t.Context(), steer.NodePlan(steer.NodeConfig{TUN: "ztun-node"}),
		steer.Namespaces{Node: n.NS.NS}); err != nil {
		t.Fatal(err)
	}
	if got := n.IP(t, "-6", "rule"); strings.Contains(got, "proto 158") || !strings.Contains(got, "77:") {
		t.Errorf("after IPv6 was turned off:\n%s", got)
	}
}

// TestUndoTakesAddresses: a device that outlives its pod (a persistent TUN) has no address of it any more, and the
// namespace no route by it.
func TestUndoTakesAddresses(t *testing.T) {
	n := newNode(t)
	n.open(t)
	p := newPod(t, n, "10.1.0.2", "fd01::2")
	p.open(t, false)
	if got := p.IP(t, "addr", "show", "dev", "ztun0"); !strings.Contains(got, "fd01::2/128 scope global nodad") {
		t.Errorf("the address may be looked for on the link: %s", got)
	}
	if err := steer.Undo(p.plan, p.namespaces()); err != nil {
		t.Fatal(err)
	}
	if got := p.IP(t, "addr", "show", "dev", "ztun0"); strings.Contains(got, "10.1.0.2") ||
		strings.Contains(got, "fd01::2") {
		t.Errorf("addresses are left: %s", got)
	}
	if got := p.IP(t, "route", "show", "table", "all") + p.IP(t, "-6", "route", "show", "table", "all"); strings.Contains(
		got, "default") {
		t.Errorf("a way out is left: %s", got)
	}
}

// TestFailureGivesBackTheMTU: a plan that fails leaves a device's MTU as it was, whether it was up or not.
func TestFailureGivesBackTheMTU(t *testing.T) {
	n := newNode(t)
	n.open(t)
	for _, state := range []string{"up", "down"} {
		n.IP(t, "link", "set", "ztun-node", "mtu", "1400", state)
		before := n.IP(t, "link", "show", "ztun-node")
		plan := steer.Plan{Steps: []steer.Step{
			{Where: steer.Node, Do: steer.Link{Dev: "ztun-node", MTU: 9000}},
			{Where: steer.Node, Do: steer.Sysctl{Path: "net/ipv4/ip_forward", Value: "banana"}},
		}}
		if err := steer.Apply(t.Context(), plan, steer.Namespaces{Node: n.NS.NS}); !errors.Is(err, unix.EINVAL) {
			t.Fatalf("the plan: %v", err)
		}
		same(t, state, before, n.IP(t, "link", "show", "ztun-node"))
	}
}
