package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"ztun/test/lab"
)

// freshTunnels makes nearly every connection one over a tunnel of its own.
var freshTunnels = map[string]string{"POOL_UNUSED_RELEASE_TIMEOUT": "1ms", "POOL_MAX_STREAMS_PER_CONNECTION": "1"}

// fewLines checks that the daemons' logs have at most n lines that contain text.
func (m *mesh) fewLines(text string, n int) {
	m.t.Helper()
	for _, d := range []*lab.Daemon{m.N1.Daemon, m.N2.Daemon} {
		if got := strings.Count(d.Log(), text); got > n {
			m.t.Errorf("%d lines with %q in the log of %s, more than %d", got, text, d.Node.Name, n)
		}
	}
}

// TestAttackHandshakes: strangers open hundreds of connections to a pod's 15008, send the first byte of a handshake
// and wait, each again as soon as it is let go. New tunnels to the pod go on, and the log does not grow with them.
func TestAttackHandshakes(t *testing.T) {
	m := newMesh(t, meshOptions{env: freshTunnels})
	m.attack(attackOptions{Name: "handshakes that wait", Tunnels: 40, Attack: func(ctx context.Context) {
		var work sync.WaitGroup
		var stood, ended [2]int64
		for i, ns := range []*lab.NS{m.h1.NS, m.h2.NS} {
			work.Go(func() {
				stood[i], ended[i] = m.hold(ctx, ns, opener{To: always(mesh15008(m.c)), Rate: 200, Max: 400, First: []byte{0x16}})
			})
		}
		work.Wait()
		t.Logf("connections stood %d, were ended %d", stood, ended)
		if stood[0] < 300 || stood[1] < 300 || ended[0]+ended[1] < 100 {
			t.Errorf("%d connections, %d ended: no attack, or no bound", stood, ended)
		}
	}})
	m.fewLines("tls handshake error", 200)
	m.fewLines("bound reached", 30)
	x, err := m.N2.Daemon.Metrics(m.ctx)
	must(t, err)
	if n := x.Sum("ztun_bounded_total"); n < 100 {
		t.Errorf("ztun_bounded_total %v: the bound was not reached, or is not counted", n)
	}
}

// refusedPrincipal is a member of the mesh that policy does not let into c.
const refusedPrincipal = "cluster.local/ns/default/sa/refused"

func refusePrincipal(m *mesh) {
	m.t.Helper()
	f := m.DefaultWorld()
	f.Policies = []lab.Policy{{Name: "refuse", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"principals": []map[string]string{{"Exact": refusedPrincipal}}}}}}}}
	m.teach(f)
}

// refusedRequests sends CONNECTs that policy refuses, rate a second over each of a few tunnels, with baggage, and
// tells how many were answered 401.
func (m *mesh) refusedRequests(ctx context.Context, rate float64, baggage func() string) (refused int) {
	var work sync.WaitGroup
	var mu sync.Mutex
	for range 4 {
		work.Go(func() {
			for ctx.Err() == nil {
				h, err := m.member(m.h1.NS, mesh15008(m.c), "spiffe://"+refusedPrincipal)
				if err != nil {
					time.Sleep(50 * time.Millisecond)
					continue
				}
				paced(ctx, rate, func(i int) bool {
					return i < 5000 && h.headers(uint32(2*i+1), hpack.HeaderField{Name: ":method", Value: "CONNECT"},
						hpack.HeaderField{Name: ":authority", Value: lab.HostPort(m.c.V4(), 9000)},
						hpack.HeaderField{Name: "baggage", Value: baggage(), Sensitive: true}) == nil
				})
				h.mu.Lock()
				n := 0
				for _, e := range h.events {
					if strings.Contains(e.text, "401") {
						n++
					}
				}
				h.mu.Unlock()
				h.close()
				mu.Lock()
				refused += n
				mu.Unlock()
			}
		})
	}
	work.Wait()
	return refused
}

// TestAttackBaggage: a member that policy refuses sends 20 kB of baggage with each request, another name each time.
// None of it becomes a label: neither memory nor /metrics grow.
func TestAttackBaggage(t *testing.T) {
	m := newMesh(t, meshOptions{})
	refusePrincipal(m)
	_, before, err := m.N2.Daemon.Get(m.ctx, lab.StatsPort, "/metrics")
	must(t, err)
	m.attack(attackOptions{Name: "baggage of the refused", Attack: func(ctx context.Context) {
		n := m.refusedRequests(ctx, 25, func() string {
			return fmt.Sprintf("k8s.deployment.name=evil%d,k8s.namespace.name=%s", rand.Uint32(), strings.Repeat("n", 20_000))
		})
		t.Logf("%d requests were refused", n)
		if n < 100 {
			t.Errorf("%d requests were refused: no attack", n)
		}
	}})
	_, after, err := m.N2.Daemon.Get(m.ctx, lab.StatsPort, "/metrics")
	must(t, err)
	if grown := len(after) - len(before); grown > 100_000 || strings.Contains(after, "evil") {
		t.Errorf("/metrics has grown by %d bytes; with the names of the refused: %v", grown, strings.Contains(after, "evil"))
	}
}

// TestAttackRefusals: requests and plaintext connections that are refused, hundreds a second. The log has a budget
// for them and says what it left out.
func TestAttackRefusals(t *testing.T) {
	m := newMesh(t, meshOptions{})
	refusePrincipal(m)
	m.attack(attackOptions{Name: "refusals", Attack: func(ctx context.Context) {
		var work sync.WaitGroup
		work.Go(func() { // to one of the proxy's own ports, in plaintext
			m.hold(ctx, m.h2.NS, opener{To: always(netip.AddrPortFrom(m.c.V4(), 15006)), Rate: 100, Max: 200})
		})
		n := m.refusedRequests(ctx, 100, func() string { return "" })
		work.Wait()
		t.Logf("%d requests were refused", n)
		if n < 400 {
			t.Errorf("%d requests were refused: no attack", n)
		}
	}})
	m.fewLines("src.addr="+m.h1.V4().String()+":", 150)
	m.fewLines("src.addr="+m.h2.V4().String()+":", 150)
	eventually(t, 15*time.Second, func() error {
		if !strings.Contains(m.N2.Daemon.Log(), "log lines left out") {
			return fmt.Errorf("nothing is said of the lines that were left out")
		}
		return nil
	})
}
