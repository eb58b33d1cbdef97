package istio

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/proxy/identity"
	"ztun/test/interop/rig"
)

// Istio's client against our server.

func TestClientEcho(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	c, err := dialer(r, r.Identity("client")).Dial("tcp", app.String())
	must(t, err)
	defer c.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, rig.Bulk(bulk, 1))
		sent <- err
	}()
	// The pipe that Istio's client hands out has no half-close: the end of the data is known by its length.
	must(t, rig.Verify(io.LimitReader(c, bulk), bulk, 1))
	must(t, <-sent)
}

func TestClientConcurrent(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	d := dialer(r, r.Identity("client"))
	const streams, size = 100, 256 << 10
	first, err := d.Dial("tcp", app.String()) // the tunnel is up, and stays
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
	if n := r.Accepted(); n != 1 {
		t.Errorf("%d connections for %d streams, want 1", n, streams)
	}
}

// More streams than the server allows: the client has to learn of the limit and open another connection.
func TestClientBeyondMaxStreams(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	d := dialer(r, r.Identity("client"))
	for i := range 250 {
		c, err := d.Dial("tcp", app.String())
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		defer c.Close()
		must(t, ping(c))
	}
	if n := r.Accepted(); n != 2 {
		t.Errorf("%d connections for 250 streams of 200 at most, want 2", n)
	}
}

// ping sends a byte to an echo and waits for it.
func ping(c io.ReadWriter) error {
	if _, err := c.Write([]byte{42}); err != nil {
		return err
	}
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	return err
}

func TestClientHalfClose(t *testing.T) {
	r := rig.New(t)
	halfClose(t, r, newTransport(t, r))
}

// halfClose: the directions of a stream to the served pod end one by one, in either order. All take one tunnel.
func halfClose(t *testing.T, r *rig.Rig, tr *transport) {
	t.Run("client ends first", func(t *testing.T) {
		app := r.App(r.Served, rig.Sink) // answers when it has seen the end
		c, _, err := tr.connect(t.Context(), app.String())
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
	t.Run("server ends first", func(t *testing.T) {
		got := make(chan error, 1)
		app := r.App(r.Served, func(c *net.TCPConn) {
			io.WriteString(c, "bye")
			c.CloseWrite()
			got <- rig.Verify(c, large, 3)
		})
		c, _, err := tr.connect(t.Context(), app.String())
		must(t, err)
		defer c.Close()
		text, err := io.ReadAll(c)
		must(t, err)
		if string(text) != "bye" {
			t.Errorf("read %q", text)
		}
		// The other direction is still open, for as long as the client likes.
		_, err = io.Copy(c, rig.Bulk(large, 3))
		must(t, err)
		must(t, c.CloseWrite())
		must(t, <-got)
	})
	t.Run("both at once", func(t *testing.T) {
		app := r.App(r.Served, rig.Echo)
		c, _, err := tr.connect(t.Context(), app.String())
		must(t, err)
		must(t, rig.Exchange(c, large, 4))
	})
	if n := r.Accepted(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

func TestClientClosesFirst(t *testing.T) {
	r := rig.New(t)
	end := make(chan error, 1)
	app := r.App(r.Served, func(c *net.TCPConn) {
		data, err := io.ReadAll(c)
		if err == nil && string(data) != "so long" {
			err = fmt.Errorf("application read %q", data)
		}
		end <- err
	})
	c, err := dialer(r, r.Identity("client")).Dial("tcp", app.String())
	must(t, err)
	_, err = io.WriteString(c, "so long")
	must(t, err)
	must(t, c.Close())
	must(t, <-end)
}

func TestServerClosesFirst(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, func(c *net.TCPConn) { io.Copy(c, rig.Bulk(large, 5)) }) // and closes
	c, err := dialer(r, r.Identity("client")).Dial("tcp", app.String())
	must(t, err)
	defer c.Close()
	must(t, rig.Verify(c, large, 5))
}

func TestClientCancels(t *testing.T) {
	r := rig.New(t)
	tr := newTransport(t, r)
	end := make(chan error, 2)
	app := r.App(r.Served, endless(6, end))
	echo := r.App(r.Served, rig.Echo)
	other, _, err := tr.connect(t.Context(), echo.String())
	must(t, err)
	defer other.Close()

	for name, give := range map[string]func(*tunnel, context.CancelFunc){
		"context": func(c *tunnel, cancel context.CancelFunc) {
			c.CloseWrite() // the library looks at the context only when the request's body has ended
			cancel()
		},
		"stream": func(c *tunnel, _ context.CancelFunc) { c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			c, _, err := tr.connect(ctx, app.String())
			must(t, err)
			_, err = io.CopyN(io.Discard, c, rig.MiB)
			must(t, err)
			give(c, cancel)
			if _, err := io.Copy(io.Discard, c); err == nil {
				t.Error("a cancelled stream ended in good order")
			}
			// The application is let go, whatever it had in flight.
			select {
			case err := <-end:
				if err == nil {
					t.Error("application finished what never ends")
				}
			case <-time.After(rig.Wait):
				t.Fatal("application was not told")
			}
		})
	}
	// The other stream of the tunnel did not notice.
	must(t, rig.Exchange(other, rig.MiB, 7))
	if n := r.Accepted(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// endless is an application that sends for ever, and tells how that ended.
func endless(seed uint64, end chan<- error) func(c *net.TCPConn) {
	return func(c *net.TCPConn) {
		read := make(chan struct{})
		go func() {
			defer close(read)
			io.Copy(io.Discard, c)
		}()
		// The error that a socket was reset with is reported once, to a reader or a writer; the writer then has EPIPE.
		_, err := io.Copy(c, rig.Bulk(1<<40, seed))
		end <- err
		c.Close()
		<-read
	}
}

func TestClientVanishes(t *testing.T) {
	for name, vanish := range ends {
		t.Run(name, func(t *testing.T) {
			r := rig.New(t)
			tr := newTransport(t, r)
			const streams = 10
			end, told := make(chan error, streams), make(chan error, streams)
			sender := r.App(r.Served, endless(8, end))
			listener := r.App(r.Served, func(c *net.TCPConn) {
				c.Write([]byte{1})
				_, err := io.Copy(io.Discard, c)
				told <- err
			})
			for range streams {
				c, _, err := tr.connect(t.Context(), sender.String())
				must(t, err)
				defer c.Close()
				_, err = io.CopyN(io.Discard, c, rig.MiB)
				must(t, err)
				l, _, err := tr.connect(t.Context(), listener.String())
				must(t, err)
				defer l.Close()
				_, err = io.CopyN(io.Discard, l, 1)
				must(t, err)
			}
			tr.each(vanish)
			for range streams {
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
			}
		})
	}
}

func TestServedPodVanishes(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Source(1<<40, 9))
	tr := newTransport(t, r)
	c, _, err := tr.connect(t.Context(), app.String())
	must(t, err)
	defer c.Close()
	_, err = io.CopyN(io.Discard, c, rig.MiB)
	must(t, err)
	r.Cut()
	if _, err := io.Copy(io.Discard, c); err == nil {
		t.Error("a cut connection looked like an orderly end to the client")
	}
}

func TestServedPodDrains(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	tr := newTransport(t, r)
	c, _, err := tr.connect(t.Context(), app.String())
	must(t, err)
	must(t, ping(c))
	drained := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), rig.Wait)
	defer cancel()
	go func() {
		defer close(drained)
		r.Drain(ctx)
	}()
	// New connections are refused, as soon as GOAWAY is through.
	if !rig.Eventually(func() bool {
		other, _, err := tr.connect(t.Context(), app.String())
		if err == nil {
			other.Close()
		}
		return err != nil
	}) {
		t.Error("new streams are taken while draining")
	}
	must(t, rig.Exchange(c, large, 10)) // what is open goes on
	select {
	case <-drained:
	case <-time.After(rig.Wait):
		t.Error("drain does not end with the last stream")
	}
	if ctx.Err() != nil {
		t.Error("drain ended by its time limit")
	}
}

func TestClientIsRefused(t *testing.T) {
	r := rig.New(t)
	d := dialer(r, r.Identity("client"))
	closed := r.App(r.Served, rig.Echo)
	unused := netip.AddrPortFrom(r.Client, closed.Port()) // not at this pod
	for _, c := range []struct{ name, authority, want string }{
		{"by policy", netip.AddrPortFrom(r.Served, rig.DeniedPort).String(), "401 Unauthorized"},
		{"nothing listens", netip.AddrPortFrom(r.Served, freePort(t, r)).String(), "503 Service Unavailable"},
		{"another pod's address", unused.String(), "400 Bad Request"},
		{"no address", "nonsense", "400 Bad Request"},
		{"unknown host", "nobody.default.svc.cluster.local:80", "503 Service Unavailable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := d.Dial("tcp", c.authority)
			if err == nil {
				conn.Close()
				t.Fatal("accepted")
			}
			if !strings.HasSuffix(err.Error(), c.want) {
				t.Errorf("got %q, want %q", err, c.want)
			}
		})
	}
	// Each of these refusals said why, in a header that is ours: a client that does not know it minds as little as this
	// one.
	_, resp, _ := newTransport(t, r).connect(t.Context(), netip.AddrPortFrom(r.Served, rig.DeniedPort).String())
	if resp == nil || !strings.Contains(resp.Header.Get("X-Ztun-Reason"), "explicitly denied by: ") {
		t.Errorf("refused without a reason: %+v", resp)
	}
	c, err := d.Dial("tcp", closed.String())
	must(t, err)
	defer c.Close()
	must(t, ping(c))
	if n := r.Accepted(); n != 2 { // one of them newTransport's
		t.Errorf("refusals cost the tunnel: %d connections, want 2", n)
	}
}

// freePort is one of the served pod's at which nobody listens.
func freePort(t *testing.T, r *rig.Rig) uint16 {
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: r.Served.AsSlice()})
	must(t, err)
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

func TestClientCertificates(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	foreign := rig.ID("client")
	foreign.TrustDomain = "elsewhere"
	// A certificate that our CA did not sign, but which trusts our CA, so that only the server has a reason to refuse.
	stranger := *rig.Issue(t, rig.NewCA(t, "cluster.local"), rig.ID("client"))
	stranger.Pool = r.Identity("client").Pool
	elsewhere := *rig.Issue(t, rig.NewCA(t, "elsewhere"), foreign)
	elsewhere.Pool = stranger.Pool
	none := *r.Identity("client")
	none.TLS.Certificate = nil
	for name, c := range map[string]*identity.Certificate{"of another CA": &stranger,
		"of another trust domain": &elsewhere, "none": &none} {
		t.Run(name, func(t *testing.T) {
			conn, err := dialer(r, c).Dial("tcp", app.String())
			if err == nil {
				conn.Close()
				t.Fatal("accepted")
			}
			t.Log(err)
		})
	}
	if n := len(r.Connections()); n != 0 {
		t.Errorf("%d connections reached the application", n)
	}
}

// What the server's answer carries: its baggage, and nothing that HTTP/2 frowns upon.
func TestAnswerHeaders(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, func(c *net.TCPConn) { bufio.NewReader(c).ReadString('\n') })
	c, resp, err := newTransport(t, r).connect(t.Context(), app.String())
	must(t, err)
	defer c.Close()
	if got := resp.Header.Get("Baggage"); !strings.Contains(got, "k8s.deployment.name=served") {
		t.Errorf("baggage %q does not name the served deployment", got)
	}
	if resp.ContentLength > 0 {
		t.Errorf("content length %d of a tunnel", resp.ContentLength)
	}
}
