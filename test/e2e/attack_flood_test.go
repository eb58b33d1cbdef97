package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// What all pods of a node share is the listener of 15008, the node's TUN device and whoever reads it. These attacks
// go at them; the bystander's way is to another pod of the node than the one that is attacked.

// TestAttackMeshSYNFlood: spoofed SYNs to a pod's 15008, which one socket of the kernel's answers for all pods of the
// node.
func TestAttackMeshSYNFlood(t *testing.T) {
	m := newMesh(t, meshOptions{})
	d := m.another(m.N2, "d")
	m.attack(attackOptions{Name: "SYN flood at 15008", Attack: func(ctx context.Context) {
		n := m.synFlood(ctx, m.N1.NS, netip.MustParsePrefix("10.200.0.0/16"), 3000, mesh15008(d))
		t.Logf("%d SYNs", n)
		if n < 3000 {
			t.Errorf("%d SYNs are no flood", n)
		}
	}})
}

// TestAttackUDPFlood: datagrams from the network that no pod asked for, and first fragments of packets that never
// become whole; each goes by the node's TUN device, as the bystander's plaintext connections to another pod do.
func TestAttackUDPFlood(t *testing.T) {
	m := newMesh(t, meshOptions{})
	d := m.another(m.N2, "d")
	junk := make([]byte, 1200)
	plain := &lab.Pod{NS: m.h1.NS, IPs: m.h1.IPs}
	m.attack(attackOptions{Name: "UDP and fragments from the network", From: plain, Attack: func(ctx context.Context) {
		var datagrams, fragments int64
		var both sync.WaitGroup
		both.Go(func() {
			datagrams = m.udpFlood(ctx, m.N1.NS, netip.AddrPortFrom(d.V4(), 4000), 7000, func(int) []byte { return junk })
		})
		both.Go(func() {
			fragments = m.fragmentFlood(ctx, m.N1.NS, netip.MustParsePrefix("10.200.0.0/16"), 3000, d.V4())
		})
		both.Wait()
		t.Logf("%d datagrams, %d fragments", datagrams, fragments)
		if datagrams < 7000 || fragments < 3000 {
			t.Errorf("%d datagrams and %d fragments are no flood", datagrams, fragments)
		}
	}})
}

// TestAttackPodUDP: a pod sends datagrams that nothing carries, as fast as a few thousand a second.
func TestAttackPodUDP(t *testing.T) {
	m := newMesh(t, meshOptions{})
	junk := make([]byte, 1200)
	m.attack(attackOptions{Name: "UDP flood from a pod", Attack: func(ctx context.Context) {
		n := m.udpFlood(ctx, m.a.NS, netip.AddrPortFrom(m.h2.V4(), 4000), 10000, func(int) []byte { return junk })
		t.Logf("%d datagrams", n)
		if n < 10000 {
			t.Errorf("%d datagrams are no flood", n)
		}
	}})
}

// TestAttackSYNFlood: spoofed SYNs from the network to the open plaintext ports of a pod, whose answers go nowhere.
// Its own connections and its clients notice nothing, and its application sees none of them.
func TestAttackSYNFlood(t *testing.T) {
	m := newMesh(t, meshOptions{})
	spoof := netip.MustParsePrefix("10.200.0.0/16")
	must(t, m.IP(m.ctx, m.N2.NS, "route add "+spoof.String()+" via "+m.N1.Addr4.String()))
	must(t, m.IP(m.ctx, m.N1.NS, "route add blackhole "+spoof.String()))
	var open []netip.AddrPort
	for _, port := range []uint16{9000, 9100, 9200} {
		if port != 9000 {
			m.background(m.c.NS, `"listening"`, bins.ztload, "serve", "-listen", fmt.Sprintf(":%d", port), "-byte",
				fmt.Sprintf(":%d", port+1))
		}
		open = append(open, netip.AddrPortFrom(m.c.V4(), port), netip.AddrPortFrom(m.c.V4(), port+1))
	}
	flood := func(ctx context.Context) {
		n := m.synFlood(ctx, m.N1.NS, spoof, 500, open...)
		t.Logf("%d SYNs", n)
		if n < 1000 {
			t.Errorf("%d SYNs are no flood", n)
		}
		out, err := m.Run(m.ctx, m.c.NS, "ss", "-Htn", "dst", spoof.String())
		if strings.TrimSpace(out) != "" || err != nil {
			t.Errorf("the application's kernel has connections of the attacker: %s %v", out, err)
		}
	}
	const calm, beside = 2 * time.Second, 5 * time.Second
	m.attack(attackOptions{Name: "SYN flood at plaintext ports", Calm: calm, Beside: beside, From: m.c, To: m.b,
		Attack: flood})
	m.attack(attackOptions{Name: "SYN flood at plaintext ports, beside a client", Calm: calm, Beside: beside,
		From: &lab.Pod{NS: m.h1.NS, IPs: m.h1.IPs}, To: m.c, Attack: flood})
	// Truth for those who mean it: a port that nobody listens on refuses.
	if c, err := m.h1.NS.Dial(m.ctx, "tcp", lab.HostPort(m.c.V4(), 9)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("closed port: %v %v", c, err)
	}
}

// TestAttackDeadTargets: a pod connects to thousands of addresses that do not answer (a crawler, a scraper with a
// stale list); its other connections go on.
func TestAttackDeadTargets(t *testing.T) {
	m := newMesh(t, meshOptions{})
	dead := netip.MustParsePrefix("10.93.0.0/16")
	must(t, m.IP(m.ctx, m.N1.NS, "route add blackhole "+dead.String()))
	m.attack(attackOptions{Name: "dead targets", From: m.a, Attack: func(ctx context.Context) {
		stood, _ := m.hold(ctx, m.a.NS, opener{To: func(i int) netip.AddrPort {
			return netip.AddrPortFrom(nth(dead, i), 80)
		}, Rate: 800, Max: 6000, First: []byte("x")})
		if stood != 0 {
			t.Errorf("%d of the dead answer", stood)
		}
	}})
	x, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	if n := x.Sum("ztun_bounded_total", "resource=connects", "outcome=evicted"); n < 300 {
		t.Errorf("%v connects were turned away: the bound was not reached, or nobody is told", n)
	}
}

// TestAttackSources: a pod calls from addresses that it invents. Nothing of that leaves it, and no tunnel is made for
// it.
func TestAttackSources(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, p := range []struct {
		invented string
		to       netip.Addr
	}{{"10.77.0.0/16", m.c.V4()}, {"fd77::/64", m.c.V6()}} {
		prefix := netip.MustParsePrefix(p.invented)
		m.invent(m.a.NS, prefix)
		m.attack(attackOptions{Name: "invented sources " + p.invented, Calm: 2 * time.Second, Beside: 5 * time.Second,
			Attack: func(ctx context.Context) {
				stood, _ := m.hold(ctx, m.a.NS, opener{
					To:   always(netip.AddrPortFrom(p.to, 9000)),
					From: func(i int) netip.AddrPort { return netip.AddrPortFrom(nth(prefix, i), 0) },
					Rate: 300, Max: 3000, First: []byte("x"),
				})
				if stood != 0 {
					t.Errorf("%d connections from invented addresses stood", stood)
				}
			}})
	}
	x, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	if n := x.Sum("ztun_stack_foreign_total", "pod=default/a"); n < 500 {
		t.Errorf("%v packets from invented addresses were counted", n)
	}
}

// TestAttackDNSFlood: a pod sends queries for random names as fast as a few thousand a second and more.
func TestAttackDNSFlood(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.attack(attackOptions{Name: "DNS flood from a pod", Attack: func(ctx context.Context) {
		n := m.udpFlood(ctx, m.a.NS, netip.AddrPortFrom(m.h2.V4(), 53), 20000, dnsQuery)
		t.Logf("%d queries", n)
		if n < 20000 {
			t.Errorf("%d queries are no flood", n)
		}
	}})
	x, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	if n := x.Sum("ztun_bounded_total", "resource=DNS queries", "outcome=refused"); n < 10000 {
		t.Errorf("%v queries were turned away", n)
	}
}
