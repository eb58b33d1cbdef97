package proxy

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// withDead adds pod c, 10.91.2.99, to the service of b.
func withDead(s string) string {
	i := strings.Index(s, "workloadIps: [\"10.91.2.99\"]")
	return s[:i] + strings.Replace(s[i:], "services: {}",
		"services:\n    \"default/b.default.svc.cluster.local\":\n      80: 9000", 1)
}

// deadNetwork answers dials of c's port 15008 in its own way.
type deadNetwork struct {
	Network
	dial  func(ctx context.Context) (net.Conn, error)
	dials *atomic.Int32
}

func (n deadNetwork) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if dst.Addr() == netip.MustParseAddr("10.91.2.99") {
		n.dials.Add(1)
		return n.dial(ctx)
	}
	return n.Network.DialMesh(ctx, dst)
}

func refusing(context.Context) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
}

func vanished(ctx context.Context) (net.Conn, error) {
	<-ctx.Done()
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
}

// TestNextEndpoint: a service of which one endpoint refuses, is gone, or is somebody else by now, is reached at the
// other one, for every connection; a connection counts once. Only the first pays for a pod that is gone.
func TestNextEndpoint(t *testing.T) {
	for _, tt := range []struct {
		name string
		dial func(w *world) func(ctx context.Context) (net.Conn, error)
	}{
		{"refuses", func(*world) func(context.Context) (net.Conn, error) { return refusing }},
		{"is gone", func(*world) func(context.Context) (net.Conn, error) { return vanished }},
		{"is another pod by now", func(w *world) func(context.Context) (net.Conn, error) {
			return func(context.Context) (net.Conn, error) { return w.dialB(netip.AddrPortFrom(addrA, 3135)) }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var dials atomic.Int32
			w := newWorldWith(t, func(w *world, i int, o *Options) {
				o.Network = deadNetwork{o.Network, tt.dial(w), &dials}
			})
			w.know.publish(loadView(t, withDead))
			w.listen(appB, echo)
			const tries = 24
			began := time.Now()
			for range tries {
				app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80")
				if err != nil {
					t.Fatalf("a service that has an endpoint is refused: %v", err)
				}
				roundTrip(t, app)
				app.Close()
				<-done
			}
			// Who does not dial it does not wait for it.
			if n := dials.Load(); n < 1 || int64(n) > 1+int64(time.Since(began)/ailingFor) {
				t.Errorf("the dead endpoint was tried %d times within %v", n, ailingFor)
			}
			w.settle()
			if s := w.proxies[0].Stats(); s.Retried != uint64(dials.Load()) {
				t.Errorf("%d retries counted after %d dials", s.Retried, dials.Load())
			}
			if n := len(slices.Collect(w.proxies[0].Live())); n != 0 {
				t.Errorf("%d connections are left in the table", n)
			}
			w.stop()
			lines := w.lines(0)
			for _, l := range lines {
				if !strings.Contains(l, `dst.workload="b"`) || strings.Contains(l, "error=") {
					t.Errorf("line %s", l)
				}
			}
			if len(lines) != tries {
				t.Errorf("%d lines of %d connections", len(lines), tries)
			}
			for key, value := range gather(t, w.metrics[0]) {
				if strings.HasPrefix(key, "istio_tcp_connections_failed_total") {
					t.Errorf("%s %s", key, value)
				}
			}
		})
	}
}

// TestRefusedIsAnAnswer: what an endpoint refuses is not asked of another one; and an application that is not there is.
func TestRefusedIsAnAnswer(t *testing.T) {
	var dials atomic.Int32
	w := newWorldWith(t, func(w *world, i int, o *Options) { o.Network = deadNetwork{o.Network, refusing, &dials} })
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(withDead(s), "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
	}))
	w.proxies[0].ailing.add(&state.Workload{UID: "cluster1//v1/Pod/other/c"}) // b is asked first
	if _, r, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80"); err != errRefused ||
		r != refusal.Reset {
		t.Errorf("refused by policy: %v", err)
	}
	if n := dials.Load(); n != 0 {
		t.Errorf("after a policy's refusal another endpoint was tried %d times", n)
	}
	w.know.publish(loadView(t, withDead)) // allowed now, but no application listens
	if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80"); err != errRefused {
		t.Errorf("without an application: %v", err)
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("after an application's refusal another endpoint was tried %d times, want once", n)
	}
	// A pod that is called by its own address has no other endpoint.
	dials.Store(0)
	if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.99:9000"); err != errRefused ||
		dials.Load() != 1 {
		t.Errorf("by its own address: %v, %d dials", err, dials.Load())
	}
}

// TestAllEndpointsFail: the tries are bounded, and the failure is that of the last.
func TestAllEndpointsFail(t *testing.T) {
	var dials atomic.Int32
	w := newWorldWith(t, func(w *world, i int, o *Options) {
		w.dialMesh = func(netip.AddrPort) (net.Conn, error) { dials.Add(1); return refusing(t.Context()) }
	})
	w.know.publish(loadView(t, withDead))
	for want := int32(2); want <= 6; want += 2 { // also while all of them ail
		if _, r, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80"); err != errRefused ||
			r != refusal.Reset {
			t.Errorf("%v, %d", err, r)
		}
		if n := dials.Load(); n != want {
			t.Errorf("%d dials, want %d", n, want)
		}
	}
	w.settle()
	w.stop()
	if lines := w.lines(0); len(lines) != 3 || !strings.Contains(lines[0], "Connection refused") {
		t.Errorf("lines: %q", lines)
	}
}
