package steer_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/netstack"
	"ztun/proxy/refusal"
	"ztun/tun/netns"
	"ztun/tun/steer"
	"ztun/tun/tuntest"
	"ztun/tun/tuntest/nslab"
)

// meshNode is a node whose TUN netstack reads, as the daemon has it.
type meshNode struct {
	*node
	uplink *netstack.Uplink
}

// serve opens the node's TUN and runs an Uplink on it, with a stack for each pod's addresses.
func serve(t *testing.T, n *node) *meshNode {
	t.Helper()
	n.open(t)
	m := &meshNode{node: n, uplink: netstack.NewUplink(n.tun, nil, nil)}
	done := make(chan error, 1)
	go func() { done <- m.uplink.Run(context.Background()) }()
	t.Cleanup(func() {
		m.uplink.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m
}

// attach makes the node's side of a pod: its routes, and a stack whose application nobody is.
func (m *meshNode) attach(t *testing.T, ips ...string) *pod {
	t.Helper()
	p := attach(t, m.node, ips...)
	app, other := tuntest.Pair(tuntest.Options{MTU: 1500})
	s, err := netstack.New(netstack.Config{Addrs: p.addrs, App: app, Uplink: m.uplink, OnFlow: func(f *netstack.Flow) {
		f.Refuse(refusal.HostUnreachable)
	}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	t.Cleanup(func() {
		s.Close()
		<-done
		other.Close()
	})
	p.stack = s
	return p
}

func (n *node) sysctl(t *testing.T, path, value string) {
	t.Helper()
	if err := n.Do(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) }); err != nil {
		t.Fatal(err)
	}
}

// fourHops is two nodes with two routers between them, r1 and r2, of which only the link between the routers is
// narrow. n1 and n2 have the pods' networks 10.1, fd01 and 10.2, fd02; n2's other addresses are on a link where
// nobody is.
func fourHops(t *testing.T, narrow int) (n1, n2 *node) {
	n := []*node{newNode(t), newNode(t), newNode(t), newNode(t)}
	for i, dev := range []string{"left", "mid", "right"} {
		nslab.Join(t, n[i].NS, n[i+1].NS, dev)
		for end := range 2 {
			n[i+end].IP(t, "addr", "add", fmt.Sprintf("172.30.%d.%d/24", i, end+1), "dev", dev)
			n[i+end].IP(t, "addr", "add", fmt.Sprintf("fd30:%d::%d/64", i, end+1), "dev", dev, "nodad")
		}
	}
	for i, x := range n {
		if i < 3 { // to the right
			x.IP(t, "route", "add", "10.2.0.0/16", "via", fmt.Sprintf("172.30.%d.2", i))
			x.IP(t, "-6", "route", "add", "fd02::/64", "via", fmt.Sprintf("fd30:%d::2", i))
		}
		if i > 0 { // to the left
			x.IP(t, "route", "add", "10.1.0.0/16", "via", fmt.Sprintf("172.30.%d.1", i-1))
			x.IP(t, "-6", "route", "add", "fd01::/64", "via", fmt.Sprintf("fd30:%d::1", i-1))
		}
		// Nobody there is found out by two requests in 100 ms rather than by three in 3 s.
		for _, dev := range []string{"left", "mid", "right"} {
			for _, ip := range []string{"ipv4", "ipv6"} {
				x.Do(func() error { // each node has some of the devices
					os.WriteFile("/proc/sys/net/"+ip+"/neigh/"+dev+"/retrans_time_ms", []byte("50"), 0)
					return os.WriteFile("/proc/sys/net/"+ip+"/neigh/"+dev+"/mcast_solicit", []byte("2"), 0)
				})
			}
		}
		x.sysctl(t, "ipv4/tcp_mtu_probing", "0") // or the kernel would find the MTU without being told
		x.sysctl(t, "ipv4/icmp_ratelimit", "0")
		x.sysctl(t, "ipv6/icmp/ratelimit", "0")
	}
	for _, i := range []int{1, 2} {
		n[i].IP(t, "link", "set", "mid", "mtu", fmt.Sprint(narrow))
	}
	// Networks without anybody: on a router, and on the node itself.
	n[1].IP(t, "addr", "add", "10.2.99.1/24", "dev", "mid")
	n[1].IP(t, "addr", "add", "fd02:0:0:0:99::1/80", "dev", "mid", "nodad")
	waitFor(t, "link-local addresses", func() bool {
		for _, x := range n {
			if strings.Contains(x.IP(t, "addr"), "tentative") {
				return false
			}
		}
		return true
	})
	return n[0], n[3]
}

// TestMarks: the mark that netstack writes is the one that the rule knows.
func TestMarks(t *testing.T) {
	if netstack.ReturnTOS != steer.ReturnTOS {
		t.Errorf("netstack writes %#x, the rule knows %#x", netstack.ReturnTOS, steer.ReturnTOS)
	}
	if netstack.MeshPortMin != steer.MeshPortMin {
		t.Errorf("netstack takes the ports from %d for the mesh's, the rule those from %d", netstack.MeshPortMin,
			steer.MeshPortMin)
	}
}

// TestUnreachable: a mesh dial to where nobody is fails when the network says so, not at its deadline: a router's
// word, and the node's own. Whatever the host thinks of reverse paths.
func TestUnreachable(t *testing.T) {
	for _, rpFilter := range []string{"0", "1", "2"} {
		t.Run("rp_filter="+rpFilter, func(t *testing.T) {
			n1, _ := fourHops(t, 1500)
			n1.sysctl(t, "ipv4/conf/all/rp_filter", rpFilter)
			m := serve(t, n1)
			p := m.attach(t, "10.1.0.2", "fd01::2")
			for _, c := range []struct {
				name, dst string
				f         int
			}{
				{"a router says so", "10.2.99.7", 0}, {"a router says so", "fd02:0:0:0:99::7", 1},
				{"the node itself says so", "172.30.0.77", 0}, {"the node itself says so", "fd30::77", 1},
			} {
				before := m.uplink.Stats().RxReturned
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				start := time.Now()
				conn, err := netns.DialTransparent(ctx, n1.NS.NS, p.addrs[c.f],
					netip.MustParseAddrPort(net.JoinHostPort(c.dst, "15008")), meshCalls)
				took := time.Since(start)
				cancel()
				if err == nil {
					conn.Close()
				}
				// The kernel gives up by itself after minutes; its first repetition of the SYN comes after a second.
				if !errors.Is(err, unix.EHOSTUNREACH) || took > patience/2 {
					t.Errorf("%s, %s: %v after %v", c.name, c.dst, err, took)
				}
				if m.uplink.Stats().RxReturned == before {
					t.Errorf("%s, %s: nothing was given back", c.name, c.dst)
				}
			}
		})
	}
}

// TestPathMTU: where the path is narrower than both nodes' links, transfers by the mesh's sockets finish, in both
// directions and families.
func TestPathMTU(t *testing.T) {
	n1, n2 := fourHops(t, 1300)
	m1, m2 := serve(t, n1), serve(t, n2)
	a, c := m1.attach(t, "10.1.0.2", "fd01::2"), m2.attach(t, "10.2.0.2", "fd02::2")
	l, err := netns.ListenTransparent(t.Context(), n2.NS.NS, 15008, true, netns.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for f := range 2 {
		hbone(t, fmt.Sprintf("family %d", f), a, c, f, l) // there and back
	}
	for i, m := range []*meshNode{m1, m2} {
		if st := m.uplink.Stats(); st.RxReturned < 2 {
			t.Errorf("node %d: was told of the path's MTU %d times, want once per family", i+1, st.RxReturned)
		}
	}
}

// TestReturnedOnce: a marked packet for an address that has no local route (a pod being removed) ends; it neither
// comes out of the TUN again nor leaves the node.
func TestReturnedOnce(t *testing.T) {
	n1, _ := fourHops(t, 1500)
	n1.IP(t, "route", "add", "default", "via", "172.30.0.2")
	n1.IP(t, "-6", "route", "add", "default", "via", "fd30:0::2")
	m := serve(t, n1)
	p := m.attach(t, "10.1.0.2", "fd01::2")
	n1.IP(t, "route", "flush", "table", "15008")
	n1.IP(t, "-6", "route", "flush", "table", "15008")
	for f, dst := range []string{"10.2.99.7", "fd02:0:0:0:99::7"} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		conn, err := netns.DialTransparent(ctx, n1.NS.NS, p.addrs[f], netip.AddrPortFrom(netip.MustParseAddr(dst), 15008),
			meshCalls)
		cancel()
		if err == nil {
			conn.Close()
			t.Errorf("connected to %s", dst)
		}
	}
	waitFor(t, "the errors of both families", func() bool { return m.uplink.Stats().RxReturned >= 2 })
	time.Sleep(100 * time.Millisecond) // a loop would have gone far by then
	st := m.uplink.Stats()
	// At most the SYNs were answered; a loop would go round up to 64 times for each.
	if st.RxReturned > 8 || st.RxPackets > st.RxReturned+8 {
		t.Errorf("%+v", st)
	}
}

// TestRefusalBetweenPods: the ICMP error by which one pod's stack refuses another's of the same node still arrives:
// the rule takes marked packets only.
func TestRefusalBetweenPods(t *testing.T) {
	m := serve(t, newNode(t))
	a, b := m.attach(t, "10.1.0.2", "fd01::2"), m.attach(t, "10.1.0.3", "fd01::3")
	for f := range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		start := time.Now()
		_, err := a.stack.DialPlain(ctx, netip.AddrPortFrom(b.addrs[f], 80))
		cancel()
		if !(errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH)) || time.Since(start) > patience/2 {
			t.Errorf("family %d: %v after %v", f, err, time.Since(start))
		}
	}
	if st := m.uplink.Stats(); st.RxReturned != 0 {
		t.Errorf("%+v", st)
	}
}
