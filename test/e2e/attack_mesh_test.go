package e2e

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestAttackResets: mesh members open streams and reset them at once, thousands a second, over tunnels to the
// bystander's server; each tunnel is closed for it, and the member makes the next one. What passes beside them stays
// secret.
func TestAttackResets(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.attack(attackOptions{Name: "rapid resets", Witness: true, Attack: func(ctx context.Context) {
		tunnels, streams := 0, 0
		paced(ctx, 5, func(int) bool {
			h, err := m.member(m.h1.NS, mesh15008(m.c), "spiffe://cluster.local/ns/default/sa/a")
			if err != nil {
				return true // refused for being too many is as good
			}
			tunnels++
			for id := uint32(1); id < 4000 && ctx.Err() == nil; id += 2 {
				if h.connect(id, lab.HostPort(m.c.V4(), 9000)) != nil || h.reset(id) != nil {
					break
				}
				streams++
			}
			h.close()
			return true
		})
		t.Logf("%d tunnels, %d streams reset", tunnels, streams)
		if tunnels < 5 || streams < 1000 {
			t.Errorf("%d tunnels and %d streams are no attack", tunnels, streams)
		}
	}})
}

// TestAttackJunk: strangers connect to a pod's 15008 and send what is no handshake.
func TestAttackJunk(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.attack(attackOptions{Name: "junk at 15008", Attack: func(ctx context.Context) {
		junk := make([]byte, 600)
		r := rand.NewChaCha8([32]byte{1})
		_, _ = r.Read(junk)
		junk[0] = 0xff
		stood, ended := m.hold(ctx, m.h1.NS, opener{To: always(mesh15008(m.c)), Rate: 200, Max: 100, First: junk})
		t.Logf("%d connections stood, %d were ended", stood, ended)
		if stood < 100 || ended < stood/2 {
			t.Errorf("%d connections, %d ended: no attack, or nobody ends them", stood, ended)
		}
	}})
}

// TestAttackers: the attackers of these tests do what they say, seen by a capture and by the kernel's own TCP:
// spoofed SYNs of both families that a listener answers, datagrams that arrive, connections from invented addresses,
// and connects that nobody answers.
func TestAttackers(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	m.serve(m.h2.NS)
	cap1, err := m.Capture(m.N2.NS, "eth0", lab.CaptureOptions{Immediate: true})
	must(t, err)
	run := func(f func(ctx context.Context)) {
		ctx, cancel := context.WithTimeout(m.ctx, time.Second)
		defer cancel()
		f(ctx)
	}
	// where answers go
	must(t, m.IP(m.ctx, m.N2.NS, "route add 10.200.0.0/16 via "+m.N1.Addr4.String(), "route add fd77::/64 via "+
		m.N1.Addr6.String()))
	spoof4, spoof6 := netip.MustParsePrefix("10.200.0.0/16"), netip.MustParsePrefix("fd77::/64")
	for _, c := range []struct {
		spoof netip.Prefix
		to    netip.Addr
	}{{spoof4, m.h2.V4()}, {spoof6, m.h2.V6()}} {
		run(func(ctx context.Context) {
			if n := m.synFlood(ctx, m.N1.NS, c.spoof, 100, netip.AddrPortFrom(c.to, 9000)); n < 50 {
				t.Errorf("%d SYNs in a second at 100 a second", n)
			}
		})
	}
	run(func(ctx context.Context) {
		if n := m.udpFlood(ctx, m.h1.NS, netip.AddrPortFrom(m.h2.V4(), 5353), 200, dnsQuery); n < 50 {
			t.Errorf("%d datagrams in a second at 200 a second", n)
		}
	})
	invented := netip.MustParsePrefix("10.77.0.0/20")
	m.invent(m.h1.NS, invented)
	must(t, m.IP(m.ctx, m.N1.NS, "route add 10.77.0.0/20 via "+m.h1.V4().String()))
	must(t, m.IP(m.ctx, m.N2.NS, "route add 10.77.0.0/20 via "+m.N1.Addr4.String()))
	run(func(ctx context.Context) {
		from := func(i int) netip.AddrPort { return netip.AddrPortFrom(nth(invented, i), 0) }
		stood, ended := m.hold(ctx, m.h1.NS, opener{To: always(netip.AddrPortFrom(m.h2.V4(), 9001)), From: from, Rate: 100,
			First: []byte("x")})
		if stood < 50 || ended < 50 {
			t.Errorf("%d connections from invented addresses stood, %d had their byte and end", stood, ended)
		}
	})
	run(func(ctx context.Context) {
		dead := func(i int) netip.AddrPort {
			return netip.AddrPortFrom(netip.MustParseAddr("10.91.2.240"), uint16(1000+i))
		}
		if stood, _ := m.hold(ctx, m.h1.NS, opener{To: dead, Max: 50}); stood != 0 {
			t.Errorf("%d connections to nobody stood", stood)
		}
	})
	ps := stop(t, cap1)
	for _, c := range []struct {
		spoof netip.Prefix
		to    netip.Addr
	}{{spoof4, m.h2.V4()}, {spoof6, m.h2.V6()}} {
		sources := map[netip.Addr]bool{}
		answers := 0
		for _, p := range ps.TCP().Port(9000) {
			if p.SYN && !p.ACK && c.spoof.Contains(p.Src.Addr()) {
				sources[p.Src.Addr()] = true
			}
			if p.SYN && p.ACK && c.spoof.Contains(p.Dst.Addr()) {
				answers++
			}
		}
		if len(sources) < 40 || answers < 40 {
			t.Errorf("SYNs came from %d addresses of %v, %d answers went there", len(sources), c.spoof, answers)
		}
	}
	if n := len(ps.Where(func(p lab.Packet) bool { return p.Dst.Port() == 5353 })); n < 50 {
		t.Errorf("%d datagrams arrived", n)
	}
}
