package steer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/netstack"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/steer"
	"ztun/tun/tuntest/nslab"
)

const patience = 20 * time.Second

// meshCalls are the options of the mesh's own calls: the rules know their answers by the local port.
var meshCalls = netns.SocketOptions{Ports: netns.PortRange{Min: steer.MeshPortMin, Max: steer.MeshPortMax}}

// node is an isolated node with its TUN and listener, as the daemon makes it; pod is a pod of it.
type node struct {
	*nslab.NS
	tun  tun.Device
	plan steer.Plan
}

// destroy ends a device, persistent or not.
func destroy(ns *nslab.NS, d tun.Device) error {
	return errors.Join(d.Close(), tun.Remove(ns.NS, d.Name()))
}

type pod struct {
	*nslab.NS
	node  *node
	tun   tun.Device
	addrs []netip.Addr
	plan  steer.Plan
	stack *netstack.Stack // only of a meshNode's
}

func (p *pod) namespaces() steer.Namespaces {
	return steer.Namespaces{Node: p.node.NS.NS, Pod: p.NS.NS}
}

// newNode makes a namespace that forwards already: turning IPv6 forwarding on adds anycast routes, and Undo leaves it
// on by design.
func newNode(t *testing.T) *node {
	n := &node{NS: nslab.New(t), plan: steer.NodePlan(steer.NodeConfig{TUN: "ztun-node", MTU: 1500, IPv6: true})}
	err := n.Do(func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) open(t *testing.T) {
	t.Helper()
	n.openTUN(t)
	if err := steer.Apply(t.Context(), n.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
		t.Fatal(err)
	}
}

// nodeTUN is the node's TUN, and the device that ends with it here as both do with a daemon.
type nodeTUN struct {
	tun.Device
	live tun.Device
}

func (n nodeTUN) Close() error { return errors.Join(n.live.Close(), n.Device.Close()) }

func (n *node) openTUN(t *testing.T) {
	t.Helper()
	dev, err := tun.Open(tun.Options{Name: "ztun-node", NetNS: n.NS.NS})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	live, err := tun.Open(tun.Options{Name: steer.LiveTUN, NetNS: n.NS.NS})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { live.Close() })
	n.tun = nodeTUN{dev, live}
}

func newPod(t *testing.T, n *node, ips ...string) *pod {
	p := &pod{NS: nslab.New(t), node: n}
	for _, ip := range ips {
		p.addrs = append(p.addrs, netip.MustParseAddr(ip))
	}
	p.plan = steer.PodPlan(steer.PodConfig{Addrs: p.addrs, TUN: "ztun0", NodeTUN: "ztun-node", MTU: 1500})
	return p
}

func (p *pod) open(t *testing.T, persistent bool) {
	t.Helper()
	var err error
	if p.tun, err = tun.Open(tun.Options{Name: "ztun0", NetNS: p.NS.NS, Persistent: persistent}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.tun.Close() })
	if err := steer.Apply(t.Context(), p.plan, p.namespaces()); err != nil {
		t.Fatal(err)
	}
}

// attach is newPod and open.
func attach(t *testing.T, n *node, ips ...string) *pod {
	p := newPod(t, n, ips...)
	p.open(t, false)
	return p
}

func same(t *testing.T, what, before, after string) {
	t.Helper()
	if before == after {
		return
	}
	t.Errorf("%s: the namespace is not as it was:\n%s", what, diff(before, after))
}

func diff(a, b string) string {
	al, bl := slices.Collect(strings.Lines(a)), slices.Collect(strings.Lines(b))
	var out strings.Builder
	for _, l := range al {
		if !slices.Contains(bl, l) {
			out.WriteString("- " + l)
		}
	}
	for _, l := range bl {
		if !slices.Contains(al, l) {
			out.WriteString("+ " + l)
		}
	}
	return out.String()
}

// twoNodes makes the lab of design.md section 2: nodes n1 and n2 joined by a veth, each with a route to the other's
// pods.
func twoNodes(t *testing.T) (n1, n2 *node) {
	n1, n2 = newNode(t), newNode(t)
	nslab.Join(t, n1.NS, n2.NS, "eth0")
	for i, n := range []*node{n1, n2} {
		me, peer := i+1, 2-i
		n.IP(t, "addr", "add", fmt.Sprintf("172.30.0.%d/24", me), "dev", "eth0")
		n.IP(t, "addr", "add", fmt.Sprintf("fd30::%d/64", me), "dev", "eth0", "nodad")
		n.IP(t, "route", "add", fmt.Sprintf("10.%d.0.0/16", peer), "via", fmt.Sprintf("172.30.0.%d", peer))
		n.IP(t, "-6", "route", "add", fmt.Sprintf("fd0%d::/64", peer), "via", fmt.Sprintf("fd30::%d", peer))
	}
	waitFor(t, "link-local addresses", func() bool {
		return !strings.Contains(n1.IP(t, "addr")+n2.IP(t, "addr"), "tentative")
	})
	return n1, n2
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestIsolated is the whole picture on two nodes: kernel sockets that carry the pods' addresses, across nodes and on
// one node over its loopback, in both families; every other packet for a pod at the node's TUN, and everything from
// the pod at its own; and nothing left in the end.
func TestIsolated(t *testing.T) {
	n1, n2 := twoNodes(t)
	before1, before2 := n1.State(t), n2.State(t)
	n1.open(t)
	n2.open(t)
	a, b, c := newPod(t, n1, "10.1.0.2", "fd01::2"), newPod(t, n1, "10.1.0.3", "fd01::3"),
		newPod(t, n2, "10.2.0.2", "fd02::2")
	beforeA := a.State(t)
	for _, p := range []*pod{a, b, c} {
		p.open(t, false)
	}

	listeners := map[*node]*net.TCPListener{}
	for _, n := range []*node{n1, n2} {
		l, err := netns.ListenTransparent(t.Context(), n.NS.NS, 15008, true, netns.SocketOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		listeners[n] = l
	}
	for _, f := range []int{0, 1} {
		for _, pair := range []struct {
			name     string
			from, to *pod
		}{{"across", a, c}, {"back", c, a}, {"same node", a, b}, {"same pod", a, a}} {
			hbone(t, fmt.Sprintf("%s, family %d", pair.name, f), pair.from, pair.to, f, listeners[pair.to.node])
		}
		toNodeTUN(t, n2, a, f)
		fromNodeTUN(t, n2, a, f)
		fromPod(t, a, f)
	}

	for _, p := range []*pod{a, b, c} {
		if err := steer.Undo(p.plan, p.namespaces()); err != nil {
			t.Error(err)
		}
		if err := destroy(p.NS, p.tun); err != nil {
			t.Error(err)
		}
	}
	for _, n := range []*node{n1, n2} {
		if err := steer.Undo(n.plan, steer.Namespaces{Node: n.NS.NS}); err != nil {
			t.Error(err)
		}
		if err := destroy(n.NS, n.tun); err != nil {
			t.Error(err)
		}
	}
	same(t, "node 1", before1, n1.State(t))
	same(t, "node 2", before2, n2.State(t))
	same(t, "pod", beforeA, a.State(t))
}

// hbone connects from's address to to's port 15008, by sockets of their nodes.
func hbone(t *testing.T, name string, from, to *pod, f int, l *net.TCPListener) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := netns.DialTransparent(ctx, from.node.NS.NS, from.addrs[f], netip.AddrPortFrom(to.addrs[f], 15008),
		meshCalls)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	defer out.Close()
	l.SetDeadline(time.Now().Add(patience))
	in, err := l.AcceptTCP()
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	defer in.Close()
	src, dst := in.RemoteAddr().(*net.TCPAddr).AddrPort(), in.LocalAddr().(*net.TCPAddr).AddrPort()
	if src.Addr().Unmap() != from.addrs[f] || dst.Addr().Unmap() != to.addrs[f] {
		t.Errorf("%s: accepted %s from %s", name, dst, src)
	}
	if got := out.LocalAddr().(*net.TCPAddr).AddrPort(); got.Addr() != from.addrs[f] || got.Port() != src.Port() {
		t.Errorf("%s: dialed from %s", name, got)
	}
	for _, c := range []*net.TCPConn{out, in} {
		c.SetDeadline(time.Now().Add(patience))
	}
	go func() { io.Copy(in, in); in.CloseWrite() }()
	payload := strings.Repeat("hello ", 50000)
	go func() { io.WriteString(out, payload); out.CloseWrite() }()
	if b, err := io.ReadAll(out); string(b) != payload || err != nil {
		t.Errorf("%s: %d of %d bytes came back, %v", name, len(b), len(payload), err)
	}
}

// toNodeTUN: a datagram from the other node's kernel to a port of the pod's comes out of the node's TUN, with both
// addresses.
func toNodeTUN(t *testing.T, other *node, p *pod, f int) {
	t.Helper()
	sendUDP(t, other.NS.NS, netip.AddrPortFrom(p.addrs[f], 53))
	src, dst := readUDP(t, p.node.tun, 53)
	if dst != p.addrs[f] || !strings.Contains("172.30.0.2 fd30::2", src.String()) {
		t.Errorf("at the node's TUN: %s to %s", src, dst)
	}
}

// fromPod: what an application sends comes out of the pod's TUN, with the pod's address as source.
func fromPod(t *testing.T, p *pod, f int) {
	t.Helper()
	to := []string{"192.0.2.1", "2001:db8::1"}[f]
	sendUDP(t, p.NS.NS, netip.AddrPortFrom(netip.MustParseAddr(to), 99))
	if src, dst := readUDP(t, p.tun, 99); src != p.addrs[f] || dst.String() != to {
		t.Errorf("at the pod's TUN: %s to %s", src, dst)
	}
}

// fromNodeTUN: a packet with the pod's source address, written to the node's TUN, arrives at the other node.
func fromNodeTUN(t *testing.T, other *node, p *pod, f int) {
	t.Helper()
	dst := netip.MustParseAddr([]string{"172.30.0.2", "fd30::2"}[f])
	var c *net.UDPConn
	err := other.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, 77)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if !p.node.tun.Offload().VNetHdr {
		return // the packet below leaves its checksums to the kernel
	}
	pkt, h := udpPacket(p.addrs[f], dst, 77)
	if err := p.node.tun.WritePacket(&h, [][]byte{pkt}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:n]) != "hello" || from.Addr().Unmap() != p.addrs[f] {
		t.Errorf("from the node's TUN: %q from %s, %v", buf[:n], from, err)
	}
}

func sendUDP(t *testing.T, ns *netns.NS, dst netip.AddrPort) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := net.Dial("udp", dst.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("hello"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// readUDP reads from the device until a UDP packet to the port comes.
func readUDP(t *testing.T, dev tun.Device, port byte) (src, dst netip.Addr) {
	t.Helper()
	timer := time.AfterFunc(patience, func() { dev.Close() })
	defer timer.Stop()
	buf := make([]byte, tun.MaxPacket)
	for {
		var h tun.VNetHdr
		n, err := dev.ReadPacket(&h, [][]byte{buf})
		if err != nil {
			t.Fatalf("no packet to port %d: %v", port, err)
		}
		p := buf[:n]
		switch {
		case p[0]>>4 == 4 && p[9] == unix.IPPROTO_UDP && p[23] == port:
			return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		case p[0]>>4 == 6 && p[6] == unix.IPPROTO_UDP && p[43] == port:
			return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		}
	}
}
