package e2e

import (
	"context"
	"net/netip"
	"sync"
	"testing"

	"ztun/test/lab"
)

// What all pods of a node share is the listener of 15008, the node's TUN device and whoever reads it. These attacks go at them; the bystander's way is to
// another pod of the node than the one that is attacked.

// TestAttackMeshSYNFlood: spoofed SYNs to a pod's 15008, which one socket of the kernel's answers for all pods of the node.
func TestAttackMeshSYNFlood(t *testing.T) {
	m := newMesh(t, meshOptions{})
	d := m.pod(m.N2, "d")
	must(t, m.Attach(m.ctx, d))
	m.attack(attackOptions{Name: "SYN flood at 15008", Attack: func(ctx context.Context) {
		n := m.synFlood(ctx, m.N1.NS, netip.MustParsePrefix("10.200.0.0/16"), 3000, mesh15008(d))
		t.Logf("%d SYNs", n)
		if n < 3000 {
			t.Errorf("%d SYNs are no flood", n)
		}
	}})
}

// TestAttackUDPFlood: datagrams from the network that no pod asked for, and first fragments of packets that never become whole; each goes by the node's TUN
// device, as the bystander's plaintext connections to another pod do.
func TestAttackUDPFlood(t *testing.T) {
	m := newMesh(t, meshOptions{})
	d := m.pod(m.N2, "d")
	must(t, m.Attach(m.ctx, d))
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
