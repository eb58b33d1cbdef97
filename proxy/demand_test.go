package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// TestDemand: what the View does not know is asked for once, and then decided anew.
func TestDemand(t *testing.T) {
	const waypoint = `
- uid: cluster1//v1/Pod/default/wp
  name: wp
  namespace: default
  serviceAccount: b
  trustDomain: cluster.local
  workloadIps: ["10.91.2.2"]
  protocol: HBONE
  services: {}
- uid: cluster1//v1/Pod/default/guarded
  name: guarded
  namespace: default
  serviceAccount: g
  trustDomain: cluster.local
  workloadIps: ["10.91.3.3"]
  protocol: HBONE
  waypoint: {destination: "default/wp.svc", hboneMtlsPort: 15008}
  services: {}
`
	var asked []string
	var w *world
	answer := map[string]func(string) string{}
	w = newWorldWith(t, func(_ *world, i int, o *Options) {
		if i == 1 {
			return
		}
		o.Demand = func(_ context.Context, key string) error {
			asked = append(asked, key)
			if change, ok := answer[key]; ok {
				w.know.publish(loadView(t, change))
			}
			return nil
		}
	})
	w.listen(appB, echo)
	outside := netip.MustParseAddrPort("192.0.2.1:80")
	w.listen(outside, echo)
	withoutB := func(s string) string {
		return strings.Replace(s, `  workloadIps: ["10.91.2.2"]`, `  workloadIps: ["10.91.9.9"]`, 1)
	}
	try := func(what, dst, wantAsked string) {
		t.Helper()
		asked = nil
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, dst)
		if err != nil {
			t.Fatalf("%s: %v; asked for %q", what, err, asked)
		}
		roundTrip(t, app)
		app.Close()
		<-done
		if got := strings.Join(asked, " "); got != wantAsked {
			t.Errorf("%s: asked for %q, want %q", what, got, wantAsked)
		}
	}
	try("a known destination", "10.91.2.2:9000", "")
	try("a destination that nobody knows passes through", "192.0.2.1:80", "/192.0.2.1")

	w.know.publish(loadView(t, withoutB))
	answer["/10.91.2.2"] = func(s string) string { return s }
	try("a destination that the control plane knows", "10.91.2.2:9000", "/10.91.2.2")

	// A waypoint that is not known is asked for by its hostname; while there is none, the connection fails.
	addGuarded := func(s string) string { return strings.Replace(s, "\nservices:\n", waypoint+"services:\n", 1) }
	answer["/10.91.3.3"] = addGuarded
	asked = nil
	w.know.publish(loadView(t, nil))
	if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.3.3:80"); err != errRefused {
		t.Errorf("unknown waypoint: %v", err)
	}
	if got := strings.Join(asked, " "); got != "/10.91.3.3 default/wp.svc" {
		t.Errorf("asked for %q", got)
	}
	w.settle()
	w.stop()
	if l := strings.Join(w.lines(0), "\n"); !strings.Contains(l, `error="unknown waypoint: default/wp.svc"`) {
		t.Error(l)
	}
}

// TestDemandBounds: a control plane that does not answer holds a connection up for a bounded time, and one
// that answers with ever new questions a bounded number of times.
func TestDemandBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		know := &fakeKnowledge{view: new(state.View), changed: make(chan struct{})}
		p := New(Options{Knowledge: know, Log: slog.New(slog.DiscardHandler),
			Demand: func(ctx context.Context, _ string) error {
				<-ctx.Done()
				return ctx.Err()
			}})
		defer p.Close()
		start := time.Now()
		n := 0
		err := p.asking(t.Context(), demandWait, know.View(), func(_ *state.View, missed *string) {
			n++
			*missed = "/10.0.0.1"
		})
		if d := time.Since(start); d != demandWait || n != 1 || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, %d tries, %v", d, n, err)
		}
		n = 0
		p.o.Demand = func(context.Context, string) error { return nil }
		err = p.asking(t.Context(), demandWait, know.View(), func(_ *state.View, missed *string) {
			n++
			*missed = fmt.Sprint(n)
		})
		if n != maxDemanded+1 || err == nil || !strings.Contains(err.Error(), `"5" is one name more`) {
			t.Errorf("%d tries, %v", n, err)
		}
		if w := p.peer(t.Context(), know.View(), netip.MustParseAddr("10.0.0.1")); w != nil {
			t.Error(w)
		}
	})
}

// TestDemandUnanswered: what cannot be looked up is refused, with a reset and at once when the error comes; it may be
// in the mesh, and nothing of it may go out in plaintext.
func TestDemandUnanswered(t *testing.T) {
	for what, failure := range map[string]error{"silence": fmt.Errorf("no answer: %w", context.DeadlineExceeded),
		"full": errors.New("too many names wait")} {
		var asked atomic.Int32
		w := newWorldWith(t, func(_ *world, i int, o *Options) {
			if i == 0 {
				o.Demand = func(context.Context, string) error { asked.Add(1); return failure }
			}
		})
		outside := netip.MustParseAddrPort("192.0.2.1:80")
		var plain atomic.Int32
		w.listen(outside, func(c net.Conn) { plain.Add(1); echo(c) })
		if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, outside.String()); err != errRefused {
			t.Errorf("%s: %v", what, err)
		}
		w.settle()
		w.stop()
		if plain.Load() != 0 || asked.Load() != 1 {
			t.Errorf("%s: %d plaintext connections, asked %d times", what, plain.Load(), asked.Load())
		}
		if l := strings.Join(w.lines(0), "\n"); !strings.Contains(l,
			`error="failed to look up the destination, which may be in the mesh: `) {
			t.Error(what, l)
		}
	}
	if r := fail(kindLookup, context.DeadlineExceeded).Refusal(); r != refusal.Reset {
		t.Error("not refused but left waiting:", r)
	}
}

// TestOnDemandDNS: checklist 39, and the counter's labels.
func TestOnDemandDNS(t *testing.T) {
	count := NewOnDemandDNS()
	var lookups atomic.Int32
	var answer []netip.Addr
	var failure error
	w := newWorldWith(t, func(_ *world, i int, o *Options) {
		o.OnDemandDNS = count
		o.Resolver = resolverFunc(func(_ context.Context, network, host string) ([]netip.Addr, error) {
			lookups.Add(1)
			if network != "ip" || host != "db.example.com" {
				t.Error(network, host)
			}
			return answer, failure
		})
	})
	w.know.publish(loadView(t, func(s string) string {
		return strings.NewReplacer("\nservices:\n", `
- uid: cluster1//v1/Entry/default/db
  name: db
  namespace: default
  workloadIps: []
  hostname: db.example.com
  protocol: TCP
  services: {"default/db.svc": {80: 5432}}
services:
- {name: db, namespace: default, hostname: db.svc, vips: ["/10.96.0.20"], ports: {80: 5432}}
`).Replace(s)
	}))
	w.listen(netip.MustParseAddrPort("192.0.2.7:5432"), echo)
	answer = []netip.Addr{netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("192.0.2.7")}
	for range 2 {
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.20:80")
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, app)
		app.Close()
		<-done
	}
	answer = nil
	if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.20:80"); err != errRefused {
		t.Error(err)
	}
	failure = errors.New("SERVFAIL")
	if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.20:80"); err != errRefused {
		t.Error(err)
	}
	w.stop()
	lines := strings.Join(w.lines(0), "\n")
	for _, want := range []string{
		`dst.addr=192.0.2.7:5432 dst.service="db.svc" dst.workload="db"`,
		`error="ip addresses were resolved for workload cluster1//v1/Entry/default/db, but valid dns response had no A/AAAA records"`,
		`error="no ip addresses were resolved for workload: cluster1//v1/Entry/default/db"`,
	} {
		if !strings.Contains(lines, want) {
			t.Errorf("not logged: %s\n%s", want, lines)
		}
	}

	ch := make(chan prometheus.Metric, 10)
	count.Collect(ch)
	close(ch)
	var got []string
	for m := range ch {
		var d dto.Metric
		m.Write(&d)
		s := fmt.Sprint(d.Counter.GetValue())
		for _, l := range d.Label {
			s += " " + l.GetName() + "=" + l.GetValue()
		}
		got = append(got, s)
	}
	want := "4 source_workload=a-deploy source_canonical_service=a source_canonical_revision=v1 " +
		"source_workload_namespace=default source_principal=spiffe://cluster.local/ns/default/sa/a source_app=a " +
		"source_version=v1 source_cluster=Kubernetes hostname=db.example.com"
	if len(got) != 1 || got[0] != want {
		t.Errorf("%q", got)
	}
	for i := range 2 * maxOnDemand {
		count.count(&state.Workload{}, fmt.Sprint(i))
	}
	if n := len(count.counts); n != maxOnDemand+1 {
		t.Errorf("%d label sets", n)
	}
}

type resolverFunc func(ctx context.Context, network, host string) ([]netip.Addr, error)

func (f resolverFunc) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	return f(ctx, network, host)
}
