package proxy

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// strict is what istiod makes of PeerAuthentication STRICT, but for some ports.
func strict(exempt ...string) func(string) string {
	policy := "- {name: istio_converted_static_strict, namespace: default, scope: WorkloadSelector, action: Deny, " +
		"dryRun: false, rules: [[[{notPrincipals: [{Presence: []}]}]"
	if len(exempt) > 0 {
		policy += ", [{notDestinationPorts: [" + strings.Join(exempt, ", ") + "]}]"
	}
	policy += "]]}\n"
	return func(s string) string {
		return strings.Replace(s, "  workloadIps: [\"10.91.2.2\"]\n",
			"  workloadIps: [\"10.91.2.2\"]\n  authorizationPolicies: [default/istio_converted_static_strict]\n", 1) + policy
	}
}

// What policy says about plaintext decides about UDP, on the caller's side and on the called one's.
func TestDatagramPolicies(t *testing.T) {
	for _, tt := range []struct {
		name     string
		world    func(string) string
		dst      string
		out, in  bool
		inbound  string // what is asked on b's side, "" if nothing is
		refusals int
	}{
		{"not in the mesh", nil, "192.0.2.1:443", true, false, "", 0},
		{"permissive", nil, "10.91.2.2:9000", true, true, "10.91.2.2:9000", 0},
		{"a port that policy denies to all", nil, "10.91.2.2:7777", false, false, "10.91.2.2:7777", 2},
		{"strict", strict(), "10.91.2.2:9000", false, false, "10.91.2.2:9000", 2},
		{"strict but for this port", strict("9000"), "10.91.2.2:9000", true, true, "10.91.2.2:9000", 0},
		{"strict but for another port", strict("9001"), "10.91.2.2:9000", false, false, "10.91.2.2:9000", 2},
		{"a service whose endpoint is strict", strict(), "10.96.0.10:80", false, false, "", 1},
		{"a service whose endpoint is strict but for the target port", strict("9000"), "10.96.0.10:80", true, false, "", 0},
		{"a service whose endpoint is strict but for the service port", strict("80"), "10.96.0.10:80", false, false, "", 1},
		{"a service outside", strict(), "10.96.0.11:80", true, false, "", 0},
		{"a service of nobody", strict(), "10.96.0.12:80", true, false, "", 0},
	} {
		var log bytes.Buffer
		w := newWorldWith(t, func(w *world, _ int, o *Options) { o.Log = slog.New(slog.NewTextHandler(&log, nil)) })
		w.know.publish(loadView(t, tt.world))
		dst := netip.MustParseAddrPort(tt.dst)
		if got := w.proxies[0].AllowDatagram(false, netip.AddrPortFrom(addrA, 4000), dst); got != tt.out {
			t.Errorf("%s: the caller allows it: %v", tt.name, got)
		}
		if tt.inbound != "" {
			if got := w.proxies[1].AllowDatagram(true, netip.AddrPortFrom(addrA, 4000),
				netip.MustParseAddrPort(tt.inbound)); got != tt.in {
				t.Errorf("%s: the called allows it: %v", tt.name, got)
			}
		}
		if n := strings.Count(log.String(), "UDP dropped"); n != tt.refusals {
			t.Errorf("%s: %d lines:\n%s", tt.name, n, &log)
		}
		w.stop()
	}
}

// What a connection would wait for is no for a datagram until it is there: the pod's record, a policy that is listed,
// a look-up.
func TestDatagramNotYet(t *testing.T) {
	dst := netip.MustParseAddrPort("10.91.2.2:9000")
	src := netip.AddrPortFrom(addrA, 4000)
	w, u, _ := unknownWorld(t, false, time.Minute)
	if w.proxies[1].AllowDatagram(true, src, dst) {
		t.Error("decided without a policy that may still come")
	}
	w.know.publish(loadView(t, listing(lateAllow)))
	if !w.proxies[1].AllowDatagram(true, src, dst) {
		t.Error("refused, though the policy has come")
	}
	w.know.publish(loadView(t, listing("")))
	u.wait = 0
	if !w.proxies[1].AllowDatagram(true, src, dst) {
		t.Error("refused for a policy that does not come")
	}
	u.deny = true
	if w.proxies[1].AllowDatagram(true, src, dst) {
		t.Error("allowed without a policy that does not come")
	}
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "  name: b\n", "  name: elsewhere\n", 1)
	}))
	if w.proxies[1].AllowDatagram(true, src, dst) {
		t.Error("allowed before the pod's record is known")
	}
	w.stop()

	var asked atomic.Int32
	answer := make(chan error)
	w = newWorldWith(t, func(_ *world, i int, o *Options) {
		if i == 0 {
			o.Demand = func(ctx context.Context, key string) error {
				asked.Add(1)
				if key != "/192.0.2.1" {
					t.Errorf("asked for %q", key)
				}
				select {
				case err := <-answer:
					return err
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
	})
	a, outside := w.proxies[0], netip.MustParseAddrPort("192.0.2.1:443")
	for range 3 {
		if a.AllowDatagram(false, src, outside) {
			t.Fatal("allowed before it is known whether it is the mesh's")
		}
	}
	answer <- errors.New("no answer")
	allowed := func() (ok bool) {
		for end := time.Now().Add(20 * time.Second); !ok && time.Now().Before(end); time.Sleep(time.Millisecond) {
			ok = a.AllowDatagram(false, src, outside)
			select {
			case answer <- nil: // the second question
			default:
			}
		}
		return ok
	}
	if !allowed() || asked.Load() != 2 {
		t.Errorf("asked %d times", asked.Load())
	}
	if !a.AllowDatagram(false, src, dst) || asked.Load() != 2 {
		t.Error("what is known is asked for")
	}
}

// Look-ups for datagrams are bounded, and end with the proxy.
func TestDatagramAsks(t *testing.T) {
	var asked atomic.Int32
	w := newWorldWith(t, func(_ *world, i int, o *Options) {
		o.Demand = func(ctx context.Context, _ string) error { asked.Add(1); <-ctx.Done(); return ctx.Err() }
	})
	for i := range 2 * maxDatagramAsks {
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 443)
		if w.proxies[0].AllowDatagram(false, netip.AddrPortFrom(addrA, 4000), dst) {
			t.Fatal("allowed")
		}
	}
	if n := w.proxies[0].Stats().Overloaded; n != maxDatagramAsks {
		t.Errorf("%d turned away", n)
	}
	w.stop()
	if n := asked.Load(); n != maxDatagramAsks {
		t.Errorf("%d look-ups", n)
	}
}
