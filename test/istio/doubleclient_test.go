package istio

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	istio "istio.io/istio/pkg/hbone"

	"ztun/proxy/state"
	"ztun/test/interop/rig"
)

// Istio's double client, and its server as the gateway in between, against our server: the outer tunnel ends at the
// gateway, the inner one, which it cannot read, at the served pod.

// shop is the service that the served pod is of, its port 80 the application's.
const shop = "shop.default.svc.cluster.local"

// gateway is Istio's server at the peer's address, with the one thing that it lacks to be a gateway: what it carries
// for a pod or a service goes to the pod's HBONE port.
func gateway(t testing.TB, r *rig.Rig) *server {
	t.Helper()
	srv := istio.NewServer()
	h := srv.Handler
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		req.Host = r.Mesh()
		h.ServeHTTP(w, req)
	})
	return serve(t, r, srv, "peer")
}

func gatewayAddr(r *rig.Rig) string { return netip.AddrPortFrom(r.Peer, rig.Port).String() }

// doubleDialer is Istio's double client with a certificate for both tunnels, and who answered at their ends.
func doubleDialer(r *rig.Rig) (d istio.Dialer, outer, inner *witness) {
	c := r.Identity("client")
	outer, inner = new(witness), new(witness)
	innerTLS := inner.watch(rig.ForeignClientTLS(c))
	return istio.NewDoubleDialer(
		istio.Config{ProxyAddress: gatewayAddr(r), TLS: outer.watch(rig.ForeignClientTLS(c))},
		istio.Config{ProxyAddress: r.Mesh(), TLS: innerTLS}, innerTLS), outer, inner
}

// witness notes whom handshakes were with.
type witness struct {
	mu  sync.Mutex
	ids []string
}

func (w *witness) watch(cfg *tls.Config) *tls.Config {
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		w.mu.Lock()
		w.ids = append(w.ids, cs.PeerCertificates[0].URIs[0].String())
		w.mu.Unlock()
		return verify(cs)
	}
	return cfg
}

// saw fails the test unless there were n handshakes, all with one service account.
func (w *witness) saw(t *testing.T, n int, account string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.ids) != n {
		t.Errorf("%d handshakes with %s, want %d", len(w.ids), account, n)
	}
	for _, id := range w.ids {
		if id != rig.ID(account).String() {
			t.Errorf("%s answered, want %s", id, account)
		}
	}
}

func TestDoubleClientEcho(t *testing.T) {
	var app netip.AddrPort
	r := rig.New(t, func(r *rig.Rig, b *state.Builder) {
		app = r.App(r.Served, rig.Echo)
		served := rig.Workload("served", r.Served)
		served.Services = []state.WorkloadService{{Service: state.ServiceKey{Namespace: "default", Hostname: shop},
			Ports: state.PortMap{{Service: 80, Target: app.Port()}}}}
		b.InsertWorkload(served)
		b.InsertService(&state.Service{
			Name: "shop", Namespace: "default", Hostname: shop, Ports: state.PortMap{{Service: 80, Target: app.Port()}},
			VIPs: []state.NetworkAddress{{Addr: netip.MustParseAddr("10.96.0.7")}},
		})
	})
	gateway(t, r)
	for _, authority := range []string{app.String(), shop + ":80"} {
		t.Run(authority, func(t *testing.T) {
			d, outer, inner := doubleDialer(r)
			c, err := d.Dial("tcp", authority)
			must(t, err)
			defer c.Close()
			sent := make(chan error, 1)
			go func() {
				_, err := io.Copy(c, rig.Bulk(large, 1))
				sent <- err
			}()
			must(t, rig.Verify(io.LimitReader(c, large), large, 1))
			must(t, <-sent)
			outer.saw(t, 1, "peer")
			inner.saw(t, 1, "served")
		})
	}
	// The gateway's address is not what the served pod takes the client for: the inner tunnel's certificate is the
	// client's own.
	if !rig.Eventually(func() bool {
		return strings.Contains(r.Log(), "src.identity=spiffe://cluster.local/ns/default/sa/client dst.addr="+r.Mesh()+
			" dst.hbone_addr="+shop+":80 dst.service="+shop)
	}) {
		t.Error("the log does not say who came, for which service")
	}
}

// Istio's double client makes an inner tunnel per connection, as ours does: many TLS connections in one.
func TestDoubleClientConcurrent(t *testing.T) {
	r := rig.New(t)
	g := gateway(t, r)
	app := r.App(r.Served, rig.Echo)
	d, outer, inner := doubleDialer(r)
	const streams, size = 50, 256 << 10
	first, err := d.Dial("tcp", app.String()) // the outer tunnel is up, and stays
	must(t, err)
	defer first.Close()
	var all, open sync.WaitGroup
	errs := make(chan error, streams)
	open.Add(streams)
	for i := range streams {
		all.Go(func() {
			errs <- func() error {
				c, err := d.Dial("tcp", app.String())
				open.Done()
				if err != nil {
					return err
				}
				defer c.Close()
				open.Wait() // all are open at the same time
				go io.Copy(c, rig.Bulk(size, uint64(i)))
				return rig.Verify(io.LimitReader(c, size), size, uint64(i))
			}()
		})
	}
	all.Wait()
	for range streams {
		must(t, <-errs)
	}
	outer.saw(t, 1, "peer")
	inner.saw(t, streams+1, "served")
	if n, m := g.accepted(), r.Accepted(); n != 1 || m != streams+1 {
		t.Errorf("%d outer tunnels and %d inner, want 1 and %d", n, m, streams+1)
	}
}

// newDoubleTransports are the two libraries beneath Istio's double client, one within the other.
func newDoubleTransports(t testing.TB, r *rig.Rig) (inner, outer *transport) {
	outer = newTransportTo(t, r, gatewayAddr(r), new(net.Dialer).DialContext)
	inner = newTransportTo(t, r, r.Mesh(), func(ctx context.Context, _, addr string) (net.Conn, error) {
		c, _, err := outer.connect(t.Context(), addr)
		return carried{c}, err
	})
	return inner, outer
}

// carried is a tunnel as a connection for another, as Istio's pipeConn is.
type carried struct{ *tunnel }

func (carried) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (carried) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (carried) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (carried) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (carried) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

func TestDoubleClientHalfClose(t *testing.T) {
	r := rig.New(t)
	gateway(t, r)
	inner, _ := newDoubleTransports(t, r)
	halfClose(t, r, inner)
}

func TestDoubleClientIsRefused(t *testing.T) {
	r := rig.New(t)
	gateway(t, r)
	app := r.App(r.Served, rig.Echo)
	d, _, _ := doubleDialer(r)
	for _, c := range []struct{ name, authority, want string }{
		{"by policy", netip.AddrPortFrom(r.Served, rig.DeniedPort).String(), "401 Unauthorized"},
		{"nothing listens", netip.AddrPortFrom(r.Served, freePort(t, r)).String(), "503 Service Unavailable"},
		{"another pod's address", netip.AddrPortFrom(r.Client, app.Port()).String(), "400 Bad Request"},
		{"unknown host", "nobody.default.svc.cluster.local:80", "503 Service Unavailable"},
	} {
		conn, err := d.Dial("tcp", c.authority)
		if err == nil {
			conn.Close()
			t.Fatalf("%s: accepted", c.name)
		}
		if !strings.HasSuffix(err.Error(), c.want) {
			t.Errorf("%s: got %q, want %q", c.name, err, c.want)
		}
	}
	c, err := d.Dial("tcp", app.String())
	must(t, err)
	defer c.Close()
	must(t, ping(c))
}

// Who ends the outer tunnel can end the inner one, too, but not so that it looks as if the application's peer had.
func TestGatewayVanishes(t *testing.T) {
	for name, vanish := range map[string]func(g *server, outer *transport){
		"gateway": func(g *server, _ *transport) { g.kill() },
		"client":  func(_ *server, outer *transport) { outer.each(reset) },
	} {
		t.Run(name, func(t *testing.T) {
			r := rig.New(t)
			g := gateway(t, r)
			end, told := make(chan error, 1), make(chan error, 1)
			sender := r.App(r.Served, endless(8, end))
			listener := r.App(r.Served, func(c *net.TCPConn) {
				c.Write([]byte{1})
				_, err := io.Copy(io.Discard, c)
				told <- err
			})
			inner, outer := newDoubleTransports(t, r)
			c, _, err := inner.connect(t.Context(), sender.String())
			must(t, err)
			defer c.Close()
			_, err = io.CopyN(io.Discard, c, rig.MiB)
			must(t, err)
			l, _, err := inner.connect(t.Context(), listener.String())
			must(t, err)
			defer l.Close()
			_, err = io.CopyN(io.Discard, l, 1)
			must(t, err)
			vanish(g, outer)
			for _, ch := range []chan error{end, told} {
				select {
				case err := <-ch:
					if err == nil {
						t.Error("a lost tunnel looked like an orderly end to the application")
					}
				case <-time.After(rig.Wait):
					t.Fatal("application was not told")
				}
			}
			if _, err := io.Copy(io.Discard, c); err == nil {
				t.Error("a lost tunnel looked like an orderly end to the client")
			}
		})
	}
}
