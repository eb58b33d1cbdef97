package istio

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	istio "istio.io/istio/pkg/hbone"

	"ztun/proxy/refusal"
	"ztun/proxy/state"
	"ztun/test/interop/rig"
)

// Our client, with its pool, against Istio's double server: gateway and pod of another network in one.

// farService is the service of the other network. Istio's server looks its name up and calls it, as only what is on
// the same machine as the pod can.
const farService = "localhost"

// newFar is a rig whose client pod knows of a service with an application per port, which its workload of another
// network, service account "far", has. Its network's gateway is the peer. The addresses are those to call.
func newFar(t *testing.T, apps ...func(*net.TCPConn)) (*rig.Rig, []netip.AddrPort) {
	t.Helper()
	vip := netip.MustParseAddr("10.96.0.7")
	var addrs []netip.AddrPort
	r := rig.New(t, func(r *rig.Rig, b *state.Builder) {
		var ports []state.PortPair
		for _, app := range apps {
			port := r.App(netip.MustParseAddr("127.0.0.1"), app).Port()
			ports = append(ports, state.PortPair{Service: port, Target: port})
			addrs = append(addrs, netip.AddrPortFrom(vip, port))
		}
		s := &state.Service{
			Name: "far", Namespace: "default", Hostname: farService, Ports: state.SortPorts(ports),
			VIPs: []state.NetworkAddress{{Addr: vip}}, SubjectAltNames: []string{rig.ID("far").String()},
		}
		b.InsertService(s)
		far := rig.Workload("far")
		far.Network = "far"
		far.Services = []state.WorkloadService{{Service: s.Key(), Ports: s.Ports}}
		far.NetworkGateway = &state.GatewayAddress{Addr: state.NetworkAddress{Addr: r.Peer}, Port: rig.Port}
		b.InsertWorkload(far)
	})
	return r, addrs
}

// farServer is Istio's double server, with a count of the outer streams that are open. Its handler never returns
// (http.Server.Shutdown waits for a listener that Close does not wake), so that streams end by our RST_STREAM alone.
type farServer struct {
	*server
	open atomic.Int32
}

func serveFar(t *testing.T, r *rig.Rig, outer, inner string) *farServer {
	t.Helper()
	cfg := rig.ForeignServerTLS(r.Identity(inner))
	double := func() *http.Server {
		// Istio's server offers HTTP/1.1 alone if it has the configuration itself.
		return istio.NewDoubleHBONEServer(&tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return cfg, nil
		}})
	}
	s, srv := new(farServer), double()
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		s.open.Add(1)
		context.AfterFunc(req.Context(), func() { s.open.Add(-1) })
		// each its own: what serves the inner tunnels writes to the configuration that they would share
		double().Handler.ServeHTTP(w, req)
	})
	s.server = serve(t, r, srv, outer)
	return s
}

// settled fails the test if outer streams remain whose connections have ended.
func (s *farServer) settled(t *testing.T) {
	t.Helper()
	if !rig.Eventually(func() bool { return s.open.Load() == 0 }) {
		t.Errorf("%d streams left at the gateway", s.open.Load())
	}
}

func TestDoubleServerEcho(t *testing.T) {
	r, addrs := newFar(t, rig.Echo)
	s := serveFar(t, r, "peer", "far")
	c, err := r.Dial(addrs[0])
	must(t, err)
	defer c.Close()
	// Exchange ends our direction while the echo still comes.
	must(t, rig.Exchange(c, large, 1))
	s.settled(t)
	if !rig.Eventually(func() bool {
		return strings.Contains(r.Log(), fmt.Sprintf("dst.hbone_addr=%s:%d dst.service=%s", farService, addrs[0].Port(),
			farService)) &&
			strings.Contains(r.Log(), "dst.identity=spiffe://cluster.local/ns/default/sa/far direction=outbound")
	}) {
		t.Error("the log does not say whom we reached")
	}
}

func TestDoubleServerConcurrent(t *testing.T) {
	r, addrs := newFar(t, rig.Echo)
	s := serveFar(t, r, "peer", "far")
	const streams, size = 50, 256 << 10
	var all, open sync.WaitGroup
	errs := make(chan error, streams)
	open.Add(streams)
	for i := range streams {
		all.Go(func() {
			errs <- func() error {
				c, err := r.Dial(addrs[0])
				open.Done()
				if err != nil {
					return err
				}
				defer c.Close()
				open.Wait() // all are open at the same time
				return rig.Exchange(c, size, uint64(i))
			}()
		})
	}
	all.Wait()
	for range streams {
		must(t, <-errs)
	}
	s.settled(t)
	if n := s.accepted(); n != 1 {
		t.Errorf("%d outer tunnels for %d connections, want 1", n, streams)
	}
}

func TestDoubleServerHalfClose(t *testing.T) {
	r, addrs := newFar(t, rig.Sink, rig.Source(large, 3))
	s := serveFar(t, r, "peer", "far")
	t.Run("client ends first", func(t *testing.T) {
		c, err := r.Dial(addrs[0])
		must(t, err)
		defer c.Close()
		_, err = io.Copy(c, rig.Bulk(large, 2))
		must(t, err)
		must(t, c.CloseWrite())
		answer, err := io.ReadAll(c)
		must(t, err)
		if want := fmt.Sprintf("%d %s\n", large, rig.BulkHash(large, 2)); string(answer) != want {
			t.Errorf("application saw %q, want %q", answer, want)
		}
	})
	t.Run("server ends first", func(t *testing.T) { // and gives the whole inner stream up, with NO_ERROR
		c, err := r.Dial(addrs[1])
		must(t, err)
		defer c.Close()
		must(t, rig.Verify(c, large, 3))
	})
	s.settled(t)
}

func TestDoubleServerHasAnotherIdentity(t *testing.T) {
	for name, row := range map[string]struct{ outer, inner, want string }{
		"gateway":  {"far", "far", "peer"},
		"workload": {"peer", "peer", "far"},
	} {
		t.Run(name, func(t *testing.T) {
			r, addrs := newFar(t, func(*net.TCPConn) { t.Error("the application was reached") })
			s := serveFar(t, r, row.outer, row.inner)
			_, err := r.Dial(addrs[0])
			var refused *rig.RefusedError
			if !errors.As(err, &refused) || refused.Refusal != refusal.Reset {
				t.Errorf("got %v, want a refusal with RST", err)
			}
			if !rig.Eventually(func() bool {
				return strings.Contains(r.Log(), "did not present the expected SAN (spiffe://cluster.local/ns/default/sa/"+
					row.want+")")
			}) {
				t.Error("the log does not say which identity was wanted")
			}
			s.settled(t)
		})
	}
}

func TestDoubleServerVanishes(t *testing.T) {
	for name, vanish := range ends {
		t.Run(name, func(t *testing.T) {
			r, addrs := newFar(t, rig.Source(1<<40, 5), rig.Echo)
			s := serveFar(t, r, "peer", "far")
			var conns []*net.TCPConn
			for range 3 {
				c, err := r.Dial(addrs[0])
				must(t, err)
				defer c.Close()
				_, err = io.CopyN(io.Discard, c, rig.MiB)
				must(t, err)
				conns = append(conns, c)
			}
			s.each(vanish)
			for _, c := range conns {
				c.SetReadDeadline(time.Now().Add(rig.Wait))
				if _, err := io.Copy(io.Discard, c); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("reading from a connection whose tunnels were lost: %v", err)
				}
			}
			s.kill()
			serveFar(t, r, "peer", "far")
			c, err := r.Dial(addrs[1])
			must(t, err)
			defer c.Close()
			must(t, rig.Exchange(c, rig.MiB, 6))
		})
	}
}

// An application that goes away takes its two streams along, not the outer tunnel.
func TestDoubleServerIsLeft(t *testing.T) {
	r, addrs := newFar(t, rig.Source(1<<40, 7), rig.Echo)
	s := serveFar(t, r, "peer", "far")
	other, err := r.Dial(addrs[1])
	must(t, err)
	defer other.Close()
	must(t, ping(other))
	for range 3 {
		c, err := r.Dial(addrs[0])
		must(t, err)
		_, err = io.CopyN(io.Discard, c, rig.MiB)
		must(t, err)
		reset(c)
	}
	if !rig.Eventually(func() bool { return s.open.Load() == 1 }) {
		t.Errorf("%d streams at the gateway, want 1", s.open.Load())
	}
	must(t, rig.Exchange(other, rig.MiB, 8))
	s.settled(t)
	if n := s.accepted(); n != 1 {
		t.Errorf("%d outer tunnels, want 1", n)
	}
}
