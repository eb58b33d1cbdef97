package steer_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/steer"
	"ztun/tun/tuntest/nslab"
)

// TestIdempotent: a plan applied again changes nothing.
func TestIdempotent(t *testing.T) {
	n := newNode(t)
	n.open(t)
	p := attach(t, n, "10.1.0.2", "fd01::2")
	nodeState, podState := n.State(t), p.State(t)
	for range 2 {
		if err := steer.Apply(t.Context(), n.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
			t.Fatal(err)
		}
		if err := steer.Apply(t.Context(), p.plan, p.namespaces()); err != nil {
			t.Fatal(err)
		}
	}
	same(t, "node", nodeState, n.State(t))
	same(t, "pod", podState, p.State(t))
}

// TestAfterKill: a daemon that died without undoing anything left routes, rules and perhaps devices. The next one
// opens and applies as if for the first time, and its Undo leaves nothing.
func TestAfterKill(t *testing.T) {
	for _, persistent := range []bool{false, true} {
		t.Run(fmt.Sprintf("persistent=%v", persistent), func(t *testing.T) {
			n := newNode(t)
			p := newPod(t, n, "10.1.0.2", "fd01::2")
			nodeBefore, podBefore := n.State(t), p.State(t)
			n.open(t)
			p.open(t, persistent)
			nodeState, podState := n.State(t), p.State(t)

			// What a kill does to the devices.
			n.tun.Close()
			p.tun.Close()

			n.open(t)
			p.open(t, persistent)
			same(t, "node after a restart", renumbered(nodeState), renumbered(n.State(t)))
			same(t, "pod after a restart", renumbered(podState), renumbered(p.State(t)))
			undoAll(t, n, p)
			same(t, "node", nodeBefore, n.State(t))
			same(t, "pod", podBefore, p.State(t))
		})
	}
}

// renumbered drops interface numbers and the order of lines, which a device made anew changes.
func renumbered(s string) string {
	var lines []string
	for l := range strings.Lines(s) {
		if num, rest, ok := strings.Cut(l, ": "); ok && strings.Trim(num, "0123456789") == "" {
			l = rest
		}
		// Nor does the carrier's history matter.
		lines = append(lines, strings.Replace(l, "state UP ", "state UNKNOWN ", 1))
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

func undoAll(t *testing.T, n *node, pods ...*pod) {
	t.Helper()
	for _, p := range pods {
		if err := steer.Undo(p.plan, p.namespaces()); err != nil {
			t.Error(err)
		}
		if err := destroy(p.NS, p.tun); err != nil {
			t.Error(err)
		}
	}
	if err := steer.Undo(n.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
		t.Error(err)
	}
	if err := destroy(n.NS, n.tun); err != nil {
		t.Error(err)
	}
}

// TestFailClosed: when the node's TUN is gone, packets for a pod end at an unreachable route instead of following the
// node's default route.
func TestFailClosed(t *testing.T) {
	n1, _ := twoNodes(t)
	n1.IP(t, "route", "add", "default", "via", "172.30.0.2")
	n1.IP(t, "-6", "route", "add", "default", "via", "fd30::2")
	n1.open(t)
	attach(t, n1, "10.1.0.2", "fd01::2")
	n1.tun.Close()
	for _, get := range [][]string{{"route", "show", "to", "match", "10.1.0.2"},
		{"-6", "route", "show", "to", "match", "fd01::2"}} {
		if out := n1.IP(t, get...); !strings.Contains(out, "unreachable") || strings.Contains(out, "ztun-node") {
			t.Errorf("ip %v: %s", get, out)
		}
	}
}

// TestUndoTolerant: Undo of what was never applied, of what was undone, of what lost its device, and of what lost its
// namespace.
func TestUndoTolerant(t *testing.T) {
	n := newNode(t)
	p := newPod(t, n, "10.1.0.2", "fd01::2")
	before := n.State(t)
	if err := steer.Undo(p.plan, p.namespaces()); err != nil {
		t.Error(err)
	}
	n.open(t)
	p.open(t, false)
	p.tun.Close()
	if err := steer.Undo(p.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := steer.Undo(p.plan, p.namespaces()); err != nil {
			t.Error(err)
		}
	}
	n.tun.Close()
	for range 2 {
		if err := steer.Undo(n.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
			t.Error(err)
		}
	}
	same(t, "node", before, n.State(t))
	if err := steer.Undo(n.plan, steer.Namespaces{}); err != nil {
		t.Error(err)
	}
}

// TestFailureIsTakenBack: whichever step fails, the namespaces are as before.
func TestFailureIsTakenBack(t *testing.T) {
	n := newNode(t)
	n.open(t)
	nodeBefore := n.State(t)
	p := newPod(t, n, "10.1.0.2", "fd01::2")
	podBefore := p.State(t)
	for at := range len(p.plan.Steps) + 1 {
		var err error
		if p.tun, err = tun.Open(tun.Options{Name: "ztun0", NetNS: p.NS.NS}); err != nil {
			t.Fatal(err)
		}
		defer p.tun.Close()
		bad := steer.Step{Where: steer.Pod, Do: steer.Sysctl{Path: "net/ipv4/ip_forward", Value: "banana"}}
		plan := steer.Plan{Steps: slices.Insert(slices.Clone(p.plan.Steps), at, bad)}
		err = steer.Apply(t.Context(), plan, p.namespaces())
		if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "banana") ||
			!strings.Contains(err.Error(), "pod's namespace") {
			t.Fatalf("step %d: %v", at, err)
		}
		if dev := p.IP(t, "addr", "show", "dev", "ztun0"); strings.Contains(dev, "inet") || strings.Contains(dev, "UP") {
			t.Errorf("failure at step %d: the device is not as it was: %s", at, dev)
		}
		p.tun.Close()
	}
	same(t, "node", nodeBefore, n.State(t))
	same(t, "pod", podBefore, p.State(t))
	// The same when the caller gives up.
	p.open(t, false)
	if err := steer.Undo(p.plan, p.namespaces()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := steer.Apply(ctx, p.plan, p.namespaces()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	same(t, "node", nodeBefore, n.State(t))
}

// TestConflicts: what stands in the way is named, before anything is changed, and left alone.
func TestConflicts(t *testing.T) {
	for _, c := range []struct {
		name string
		cmds func(n *node, p *pod) // what somebody did before
		is   error
		want string
	}{
		{"address on another device of the node", func(n *node, p *pod) {
			n.IP(t, "addr", "add", "10.1.0.2/24", "dev", "v0")
		},
			unix.EADDRINUSE, "address 10.1.0.2 is in use in the node's namespace, on device v0"},
		{"IPv6 address on the node's lo", func(n *node, p *pod) { n.IP(t, "addr", "add", "fd01::2/128", "dev", "lo") },
			unix.EADDRINUSE, "address fd01::2 is in use in the node's namespace, on device lo"},
		{"address on another device of the pod", func(n *node, p *pod) { p.IP(t, "addr", "add", "10.1.0.2/24", "dev", "lo") },
			unix.EADDRINUSE, "address 10.1.0.2 is in use in the pod's namespace, on device lo"},
		{"another's route to the address", func(n *node, p *pod) { n.IP(t, "route", "add", "10.1.0.2/32", "dev", "v0") },
			unix.EADDRINUSE, "address 10.1.0.2 is in use in the node's namespace: table 254 has a route that ztun did not " +
				"make (10.1.0.2/32 dev v0"},
		{"another's IPv6 route to the address", func(n *node, p *pod) {
			n.IP(t, "-6", "route", "add", "fd01::2", "dev", "v0", "metric", "7")
		},
			unix.EADDRINUSE, "(fd01::2/128 dev v0 proto boot metric 7)"},
		{"another way out of the pod", func(n *node, p *pod) {
			p.IP(t, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
			p.IP(t, "link", "set", "eth0", "up")
			p.IP(t, "route", "add", "default", "dev", "eth0", "metric", "50")
		}, unix.EADDRINUSE, "route 0.0.0.0/0 is in use in the pod's namespace"},
		{"the pod's device is missing", func(n *node, p *pod) {
			p.tun.Close()
		}, unix.ENODEV, "there is no device ztun0 (is its TUN open?)"},
		{"the node's device is missing", func(n *node, p *pod) {
			n.tun.Close()
		}, unix.ENODEV, "there is no device ztun-node"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.open(t)
			n.IP(t, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
			n.IP(t, "link", "set", "v1", "up")
			n.IP(t, "link", "set", "v0", "up")
			p := newPod(t, n, "10.1.0.2", "fd01::2")
			var err error
			if p.tun, err = tun.Open(tun.Options{Name: "ztun0", NetNS: p.NS.NS}); err != nil {
				t.Fatal(err)
			}
			defer p.tun.Close()
			c.cmds(n, p)
			waitFor(t, "link-local addresses", func() bool {
				return !strings.Contains(n.IP(t, "addr")+p.IP(t, "addr"), "tentative")
			})
			nodeBefore, podBefore := n.State(t), p.State(t)
			for name, err := range map[string]error{"Check": steer.Check(p.plan, p.namespaces()),
				"Apply": steer.Apply(t.Context(), p.plan, p.namespaces())} {
				if !errors.Is(err, c.is) || !strings.Contains(fmt.Sprint(err), c.want) {
					t.Errorf("%s: %v\nwant: %s", name, err, c.want)
				}
			}
			same(t, "node", nodeBefore, n.State(t))
			same(t, "pod", podBefore, p.State(t))
		})
	}
}

// TestLoopbackUp: up for listeners, and down again if it was.
func TestLoopbackUp(t *testing.T) {
	n := newNode(t)
	n.open(t)
	p := newPod(t, n, "10.1.0.2")
	p.IP(t, "link", "set", "lo", "down")
	up := func() bool { return strings.Contains(p.IP(t, "link", "show", "lo"), "LOOPBACK,UP") }
	first, err := steer.LoopbackUp(p.NS.NS)
	if err != nil || !up() {
		t.Fatal("lo is not up: ", err)
	}
	second, err := steer.LoopbackUp(p.NS.NS)
	if err != nil {
		t.Fatal(err)
	}
	if err := second(); err != nil || !up() {
		t.Error("lo, which was up, went down: ", err)
	}
	if err := first(); err != nil || up() {
		t.Error("lo, which was down, stays up: ", err)
	}
}

// TestNodeConflicts: the table and the ports' rules may be taken.
func TestNodeConflicts(t *testing.T) {
	for _, c := range []struct {
		name string
		cmd  []string
		want string
	}{
		{"table in use", []string{"route", "add", "unreachable", "192.0.2.0/24", "table", "15008"},
			"routing table 15008 is in use by others (unreachable 192.0.2.0/24"},
		{"rule to elsewhere", []string{"rule", "add", "pref", "5", "ipproto", "tcp", "dport", "15008", "lookup", "99"},
			"sends that traffic to table 99 already (pref 5)"},
		{"returned errors to elsewhere", []string{"-6", "rule", "add", "pref", "6", "iif", "ztun-node", "tos", "0x0c",
			"ipproto", "ipv6-icmp", "lookup", "99"},
			"sends that traffic to table 99 already (pref 6)"},
	} {
		n := newNode(t)
		n.IP(t, c.cmd...)
		n.openTUN(t)
		before := n.State(t)
		err := steer.Apply(t.Context(), n.plan, steer.Namespaces{Node: n.NS.NS})
		if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(fmt.Sprint(err), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		same(t, c.name, before, n.State(t))
		n.tun.Close()
	}
}

// TestApplyRefuses: a namespace that is gone, and a pod that is the node.
func TestApplyRefuses(t *testing.T) {
	n := newNode(t)
	n.open(t)
	p := newPod(t, n, "10.1.0.2")
	if err := steer.Apply(t.Context(), p.plan, steer.Namespaces{Node: n.NS.NS}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no pod namespace: %v", err)
	}
	if err := steer.Apply(t.Context(), p.plan, steer.Namespaces{Node: n.NS.NS, Pod: n.NS.NS}); err == nil ||
		!strings.Contains(err.Error(), "is the node's own") {
		t.Errorf("the node as a pod: %v", err)
	}
}

// TestReplacesOwn: routes and rules of an earlier configuration of ours are replaced.
func TestReplacesOwn(t *testing.T) {
	n := newNode(t)
	n.IP(t, "rule", "add", "pref", "12", "ipproto", "tcp", "dport", "15008", "lookup", "15007", "protocol", "158")
	n.IP(t, "rule", "add", "pref", "9", "iif", "ztun-old", "tos", "0x0c", "ipproto", "icmp", "lookup", "15008",
		"protocol", "158")
	n.IP(t, "-6", "rule", "add", "pref", "9", "iif", "ztun-old", "tos", "0x0c", "ipproto", "ipv6-icmp", "lookup", "15008",
		"protocol", "158")
	n.open(t)
	old, err := tun.Open(tun.Options{Name: "ztun-old", NetNS: n.NS.NS})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	n.IP(t, "link", "set", "ztun-old", "up")
	n.IP(t, "route", "add", "10.1.0.2/32", "dev", "ztun-old", "proto", "158")
	n.IP(t, "-6", "route", "add", "fd01::2/128", "dev", "ztun-old", "proto", "158")
	p := attach(t, n, "10.1.0.2", "fd01::2")
	if got := n.IP(t, "rule") + n.IP(t, "-6", "rule") + n.IP(t, "route") + n.IP(t, "-6", "route"); strings.Contains(got,
		"15007") || strings.Contains(got, "iif ztun-old") || strings.Contains(got, "10.1.0.2 dev ztun-old") ||
		strings.Contains(got, "fd01::2 dev ztun-old") {
		t.Errorf("the old configuration is still there:\n%s", got)
	}
	undoAll(t, n, p)
}

// TestSweep: of the pods that a killed daemon left, those that are no more lose their routes; others, and others'
// routes, stay.
func TestSweep(t *testing.T) {
	n := newNode(t)
	n.open(t)
	nothing := n.State(t)
	keep := attach(t, n, "10.1.0.2", "fd01::2")
	n.IP(t, "route", "add", "192.0.2.7/32", "dev", "ztun-node")
	want := n.State(t)
	lost := attach(t, n, "10.1.0.3", "fd01::3")
	swept, err := steer.Sweep(n.NS.NS, keep.addrs)
	if err != nil || !slices.Equal(swept, lost.addrs) {
		t.Errorf("swept %v, %v", swept, err)
	}
	same(t, "node", want, n.State(t))
	if swept, err := steer.Sweep(n.NS.NS, keep.addrs); err != nil || len(swept) != 0 {
		t.Errorf("swept again: %v, %v", swept, err)
	}
	n.IP(t, "route", "del", "192.0.2.7/32")
	// Also routes by a device without carrier, or none.
	n.tun.Close()
	if swept, err := steer.Sweep(n.NS.NS, nil); err != nil ||
		!slices.Equal(swept, []netip.Addr{keep.addrs[0], keep.addrs[1]}) {
		t.Errorf("swept %v, %v", swept, err)
	}
	n.open(t)
	same(t, "node", renumbered(nothing), renumbered(n.State(t)))
}

// TestPodsApart: attaching and detaching pods leaves other pods alone.
func TestPodsApart(t *testing.T) {
	n := newNode(t)
	n.open(t)
	a := attach(t, n, "10.1.0.2", "fd01::2")
	nodeState, podState := n.State(t), a.State(t)
	var others []*pod
	for i := range 5 {
		others = append(others, attach(t, n, fmt.Sprintf("10.1.0.%d", 10+i), fmt.Sprintf("fd01::%d", 10+i)))
	}
	for _, p := range others {
		if err := steer.Undo(p.plan, p.namespaces()); err != nil {
			t.Error(err)
		}
		destroy(p.NS, p.tun)
	}
	same(t, "node", nodeState, n.State(t))
	same(t, "pod", podState, a.State(t))
}

// TestVanishedPod: the pod's namespace has lost its name and its processes; what is in the node's is undone all the
// same.
func TestVanishedPod(t *testing.T) {
	n := newNode(t)
	n.open(t)
	before := n.State(t)
	p := attach(t, n, "10.1.0.2")
	nslab.IP(t, "netns", "del", p.Name)
	if _, err := netns.Open(p.Name); !errors.Is(err, netns.ErrNotExist) {
		t.Errorf("the name is still there: %v", err)
	}
	if err := steer.Undo(p.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
		t.Error(err)
	}
	if err := destroy(p.NS, p.tun); err != nil {
		t.Error(err)
	}
	same(t, "node", before, n.State(t))
}

// TestIPv6Off: a pod with an IPv6 address on a node that was planned without says what is wrong.
func TestIPv6Off(t *testing.T) {
	n := newNode(t)
	n.plan = steer.NodePlan(steer.NodeConfig{TUN: "ztun-node"})
	n.open(t)
	p := newPod(t, n, "10.1.0.2", "fd01::2")
	var err error
	if p.tun, err = tun.Open(tun.Options{Name: "ztun0", NetNS: p.NS.NS}); err != nil {
		t.Fatal(err)
	}
	defer p.tun.Close()
	before := n.State(t)
	err = steer.Apply(t.Context(), p.plan, p.namespaces())
	if err == nil || !strings.Contains(err.Error(), "is IPv6 turned off on device ztun-node?") {
		t.Error(err)
	}
	same(t, "node", before, n.State(t))
}
