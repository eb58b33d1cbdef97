package istio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	istio "istio.io/istio/pkg/hbone"

	"ztun/proxy/hbone"
	"ztun/proxy/refusal"
	"ztun/test/interop/rig"
)

// Our client, with its pool, against Istio's server.

func TestServerEcho(t *testing.T) {
	r := rig.New(t)
	serve(t, r, istio.NewServer(), "peer")
	c, err := r.Dial(r.App(r.Peer, rig.Echo))
	must(t, err)
	defer c.Close()
	// Exchange ends our direction while the echo still comes.
	must(t, rig.Exchange(c, bulk, 1))
}

func TestServerConcurrent(t *testing.T) {
	r := rig.New(t)
	s := serve(t, r, istio.NewServer(), "peer")
	app := r.App(r.Peer, rig.Echo)
	const streams, size = 100, 256 << 10
	var all, open sync.WaitGroup
	errs := make(chan error, streams)
	open.Add(streams)
	for i := range streams {
		all.Go(func() {
			errs <- func() error {
				c, err := r.Dial(app)
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
	if n := s.accepted(); n != 1 {
		t.Errorf("%d tunnels for %d streams, want 1", n, streams)
	}
}

func TestServerHalfClose(t *testing.T) {
	r := rig.New(t)
	s := serve(t, r, istio.NewServer(), "peer")
	t.Run("client ends first", func(t *testing.T) {
		c, err := r.Dial(r.App(r.Peer, rig.Sink))
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
	// Istio's server gives the whole stream up when its application has ended, with NO_ERROR if we have not: all that was
	// sent has to arrive, and the end has to be orderly.
	t.Run("server ends first", func(t *testing.T) {
		c, err := r.Dial(r.App(r.Peer, rig.Source(large, 3)))
		must(t, err)
		defer c.Close()
		must(t, rig.Verify(c, large, 3))
	})
	if n := s.accepted(); n != 1 {
		t.Errorf("%d tunnels, want 1", n)
	}
}

// The library beneath Istio's server, with a handler that ends its direction and goes on reading.
func TestServerEndsFirstAndReads(t *testing.T) {
	r := rig.New(t)
	got := make(chan error, 1)
	serve(t, r, h2Server(func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusOK)
		io.WriteString(w, "hello")
		w.(http.Flusher).Flush()
		got <- rig.Verify(req.Body, large, 4)
		io.WriteString(w, "bye")
	}), "peer")
	c, err := r.Dial(netip.AddrPortFrom(r.Peer, 1))
	must(t, err)
	defer c.Close()
	_, err = io.Copy(c, rig.Bulk(large, 4))
	must(t, err)
	must(t, c.CloseWrite())
	text, err := io.ReadAll(c)
	must(t, err)
	if string(text) != "hellobye" {
		t.Errorf("read %q", text)
	}
	must(t, <-got)
}

// h2Server is Istio's server with another handler.
func h2Server(h http.HandlerFunc) *http.Server {
	s := istio.NewServer()
	s.Handler = h
	return s
}

func TestServerCannotReachApplication(t *testing.T) {
	r := rig.New(t)
	serve(t, r, istio.NewServer(), "peer")
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: r.Peer.AsSlice()})
	must(t, err)
	dst := ln.Addr().(*net.TCPAddr).AddrPort()
	ln.Close()
	// It has said 200 before it knows: the application sees a connection that ends at once.
	c, err := r.Dial(dst)
	must(t, err)
	defer c.Close()
	if n, err := io.Copy(io.Discard, c); n != 0 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

func TestServerVanishes(t *testing.T) {
	for name, vanish := range ends {
		t.Run(name, func(t *testing.T) {
			r := rig.New(t)
			s := serve(t, r, istio.NewServer(), "peer")
			app := r.App(r.Peer, rig.Source(1<<40, 5))
			var conns []*net.TCPConn
			for range 3 { // their 4 MiB each fit into the connection's window of 16 MiB, so that unread ones do not stop others
				c, err := r.Dial(app)
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
					t.Errorf("reading from a connection whose tunnel was lost: %v", err)
				}
			}
			s.kill()
			if _, err := r.Dial(app); err == nil {
				t.Error("connected to a pod that is not there")
			}
			// It comes back: the pool must not stick to the tunnel that it lost.
			serve(t, r, istio.NewServer(), "peer")
			c, err := r.Dial(r.App(r.Peer, rig.Echo))
			must(t, err)
			defer c.Close()
			must(t, rig.Exchange(c, rig.MiB, 6))
		})
	}
}

func TestServerShutsDown(t *testing.T) {
	r := rig.New(t)
	old := serve(t, r, istio.NewServer(), "peer")
	app := r.App(r.Peer, rig.Echo)
	c, err := r.Dial(app)
	must(t, err)
	defer c.Close()
	must(t, ping(c))
	ctx, cancel := context.WithTimeout(t.Context(), rig.Wait)
	defer cancel()
	down := make(chan error, 1)
	go func() { down <- old.http.Shutdown(ctx) }()
	<-old.done // it listens no more; GOAWAY is on its way
	fresh := serve(t, r, istio.NewServer(), "peer")
	// Streams that cross with GOAWAY may still go to the old one. In the end they go to the new one.
	if !rig.Eventually(func() bool {
		c, err := r.Dial(app)
		if err != nil {
			t.Errorf("while the server shuts down: %v", err)
			return true
		}
		defer c.Close()
		if err := rig.Exchange(c, 1000, 7); err != nil {
			t.Errorf("while the server shuts down: %v", err)
			return true
		}
		return fresh.accepted() > 0
	}) {
		t.Error("the pool stays with a server that said GOAWAY")
	}
	must(t, rig.Exchange(c, large, 8)) // what is open goes on
	must(t, <-down)
}

func TestServerHasAnotherIdentity(t *testing.T) {
	r := rig.New(t)
	serve(t, r, istio.NewServer(), "client")
	_, err := r.Dial(r.App(r.Peer, rig.Echo))
	var refused *rig.RefusedError
	if !errors.As(err, &refused) || refused.Refusal != refusal.Reset {
		t.Errorf("got %v, want a refusal with RST", err)
	}
	if !rig.Eventually(func() bool {
		return strings.Contains(r.Log(), "did not present the expected SAN (spiffe://cluster.local/ns/default/sa/peer)")
	}) {
		t.Error("the log does not say which identity was wanted")
	}
}

func TestServerRefuses(t *testing.T) {
	r := rig.New(t)
	serve(t, r, h2Server(func(w http.ResponseWriter, req *http.Request) {
		code := http.StatusForbidden
		fmt.Sscanf(req.Host, r.Peer.String()+":%d", &code)
		w.WriteHeader(code)
		io.WriteString(w, "a body that nobody asked for")
	}), "peer")
	for _, code := range []uint16{400, 401, 404, 502, 503} {
		_, err := r.Dial(netip.AddrPortFrom(r.Peer, code))
		var refused *rig.RefusedError
		if !errors.As(err, &refused) || refused.Refusal != refusal.Reset {
			t.Errorf("status %d: got %v, want a refusal with RST", code, err)
		}
		want := fmt.Sprintf("http status: %d %s", code, http.StatusText(int(code)))
		if !rig.Eventually(func() bool { return strings.Contains(r.Log(), want) }) { // the SYN is answered first
			t.Errorf("log lacks %q", want)
		}
	}
	if n := r.Dialled(); n != 1 {
		t.Errorf("refusals cost the tunnel: %d connections, want 1", n)
	}
}

// The handler's context tells whether RST_STREAM arrived.
func TestOpenIsCancelled(t *testing.T) {
	r := rig.New(t)
	entered, left := make(chan struct{}, 2), make(chan error, 2)
	s := serve(t, r, h2Server(func(w http.ResponseWriter, req *http.Request) {
		if req.Host == "opened:1" {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
		}
		entered <- struct{}{}
		select {
		case <-req.Context().Done():
			left <- nil
		case <-time.After(rig.Wait):
			left <- errors.New("handler was not told")
		}
	}), "peer")
	cc, err := r.Tunnel(netip.AddrPortFrom(r.Peer, rig.Port).String(), "peer", hbone.Config{})
	must(t, err)

	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-entered
		cancel()
	}()
	if _, _, err := cc.Open(ctx, &hbone.Request{Authority: "silent:1"}); !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v", err)
	}
	must(t, <-left)

	c, _, err := cc.Open(t.Context(), &hbone.Request{Authority: "opened:1"})
	must(t, err)
	<-entered
	c.Reset(http2.ErrCodeCancel)
	must(t, <-left)
	if cc.Err() != nil || s.accepted() != 1 {
		t.Errorf("the tunnel did not survive: %v, %d connections", cc.Err(), s.accepted())
	}
}

// What our client sends, seen with others' eyes.
func TestRequestHeaders(t *testing.T) {
	r := rig.New(t)
	got := make(chan *http.Request, 1)
	serve(t, r, h2Server(func(w http.ResponseWriter, req *http.Request) {
		got <- req.Clone(context.Background())
		w.WriteHeader(http.StatusOK)
	}), "peer")
	dst := netip.AddrPortFrom(r.Peer, 8080)
	c, err := r.Dial(dst)
	must(t, err)
	defer c.Close()
	req := <-got
	if req.Method != http.MethodConnect || req.Host != dst.String() || req.ProtoMajor != 2 {
		t.Errorf("%s %s HTTP/%d", req.Method, req.Host, req.ProtoMajor)
	}
	if b := req.Header.Get("Baggage"); !strings.Contains(b, "k8s.deployment.name=client") {
		t.Errorf("baggage %q", b)
	}
	if f := req.Header.Get("Forwarded"); !strings.HasPrefix(f, "for="+r.Client.String()) &&
		!strings.HasPrefix(f, `for="`+r.Client.String()) {
		t.Errorf("forwarded %q", f)
	}
	if tp := req.Header.Get("Traceparent"); len(tp) != 55 {
		t.Errorf("traceparent %q", tp)
	}
	if p := req.TLS.PeerCertificates; len(p) == 0 || len(p[0].URIs) != 1 ||
		p[0].URIs[0].String() != "spiffe://cluster.local/ns/default/sa/client" {
		t.Error("not our client's certificate")
	}
}
