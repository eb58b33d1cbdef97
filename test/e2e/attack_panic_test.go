package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// Ports that the daemons of TestAttackPanics panic at (proxy/fault_on.go, netstack/fault_on.go).
const (
	faultOutbound, faultStream, faultPassthrough, faultReader = 6661, 6662, 6663, 6664
)

// TestAttackPanics: somebody has found out how to make a daemon panic, and does so 60 times a second, in an outbound
// connection, in a request of a tunnel and in a plaintext connection. Each panic ends the connection that it came
// from and nothing else. The daemons are of a build that panics where a port says so.
func TestAttackPanics(t *testing.T) {
	bin, err := lab.Build(t.Context(), t.TempDir(), "./cmd/ztun", "-tags", "ztun_faults")
	must(t, err)
	m := newMesh(t, meshOptions{bin: bin})
	d := m.pod(m.N2, "d")
	w := m.DefaultWorld()
	must(t, m.WriteWorld(w))
	must(t, m.Attach(m.ctx, d))
	m.serve(d.NS)

	to := func(port uint16) func(int) netip.AddrPort { return always(netip.AddrPortFrom(m.c.V4(), port)) }
	var caught, asked int64
	m.attack(attackOptions{Name: "panics", Attack: func(ctx context.Context) {
		done := make(chan int64, 3)
		for _, a := range []struct {
			ns   *lab.NS
			port uint16
		}{{m.a.NS, faultOutbound}, {m.a.NS, faultStream}, {m.h1.NS, faultPassthrough}} {
			go func() {
				stood, _ := m.hold(ctx, a.ns, opener{To: to(a.port), Rate: 20, Total: 200})
				done <- stood
			}()
		}
		for range 3 {
			if stood := <-done; stood != 0 {
				t.Errorf("%d connections that end in a panic stood", stood)
			}
		}
		asked++
	}})
	for _, n := range m.Nodes() {
		x, err := n.Daemon.Metrics(m.ctx)
		must(t, err)
		caught += int64(x.Sum("ztun_panics_total"))
	}
	if caught < 100*asked {
		t.Errorf("%d panics were counted in %d rounds: these are no attacks", caught, asked)
	}

	// In a reader, which all of a pod's packets, or those of all pods of the node, go through: the pod that it was at is
	// lost, the others go on.
	m.attack(attackOptions{Name: "panics of readers", NoMemory: true, Attack: func(ctx context.Context) {
		for _, from := range []struct {
			ns *lab.NS
			to netip.AddrPort
		}{
			{m.a.NS, netip.AddrPortFrom(m.c.V4(), faultReader)}, // read from a's device
			{m.h1.NS, netip.AddrPortFrom(d.V4(), faultReader)},  // read from the device of all pods of n2
		} {
			dctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			if c, err := from.ns.Dial(dctx, "tcp", from.to.String()); err == nil {
				t.Errorf("a connection to %v stood", from.to)
				c.Close()
			}
			cancel()
		}
		<-ctx.Done()
	}})
	for _, p := range []*lab.Pod{m.a, d} {
		eventually(t, 10*time.Second, func() error {
			list, err := m.PodCmd(m.ctx, p.Node, "list")
			must(t, err)
			for line := range strings.Lines(list) {
				if f := strings.Fields(line); f[1] == p.Name && f[2] == "Failed" {
					return nil
				}
			}
			return fmt.Errorf("%s is not listed as failed:\n%s", p.Name, list)
		})
		must(t, m.Detach(m.ctx, p))
		must(t, m.Attach(m.ctx, p))
		if r := load.DialOnce(m.ctx, target(p.NS, m.c.V4())); !r.OK {
			t.Errorf("pod %s, attached again: %+v", p.Name, r)
		}
	}
}
