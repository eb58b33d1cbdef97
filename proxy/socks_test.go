package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"ztun/proxy/state"
)

// socks is a client that says all of its handshake at once and expects these bytes in return.
func (w *world) socks(request, want string) (app *net.TCPConn, done <-chan struct{}) {
	w.t.Helper()
	app, theirs := tcpPair(w.t)
	over := make(chan struct{})
	go func() { defer close(over); w.proxies[0].ServeSOCKS(theirs) }()
	app.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(app, "\x05\x01\x00")
	io.WriteString(app, request)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(app, got); err != nil || string(got) != want {
		w.t.Fatalf("answered %x, %v; want %x", got[:n], err, want)
	}
	return app, over
}

const zeroAddr = "\x00\x01\x00\x00\x00\x00\x00\x00"

// TestSOCKSFailures: what a client is told when there is nothing to be had.
func TestSOCKSFailures(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) {
		o.Config.SOCKS5 = true
		o.Names = func(_ context.Context, host string) ([]netip.Addr, error) {
			if host == "none" {
				return nil, nil
			}
			return nil, errors.New("no such host")
		}
	})
	ip := func(a, b, c, d byte, port uint16) string {
		return string([]byte{5, 1, 0, 1, a, b, c, d, byte(port >> 8), byte(port)})
	}
	for _, tt := range []struct {
		name, request, reply string
	}{
		{"refused by the far application", ip(10, 91, 2, 2, 9998), "\x05"},
		{"denied by policy", ip(10, 91, 2, 2, 7777), "\x02"},
		{"unknown destination, closed port (checklist 112, truthfully)", ip(10, 91, 1, 1, 9000), "\x05"},
		{"no route to host", ip(10, 91, 2, 99, 9000), "\x04"},
		{"no endpoints", ip(10, 96, 0, 12, 80), "\x05"},
		{"our own port", ip(127, 0, 0, 1, 15080), "\x02"},
		{"checklist 113: no such name", "\x05\x01\x00\x03\x04nope\x00\x50", "\x04"},
		{"a name without address", "\x05\x01\x00\x03\x04none\x00\x50", "\x04"},
		{"checklist 111: BIND", "\x05\x02\x00\x01", "\x07"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			app, done := w.socks(tt.request, "\x05\x00\x05"+tt.reply+zeroAddr)
			if n, err := app.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("after the reply: %d, %v; want the end", n, err)
			}
			app.Close()
			<-done
		})
	}
	w.proxies[0].o.Names = nil
	app, done := w.socks("\x05\x01\x00\x03\x04nope\x00\x50", "\x05\x00\x05\x07"+zeroAddr) // checklist 113, resolver off
	app.Close()
	<-done

	w.stop()
	lines := strings.Join(w.lines(0), "\n")
	for _, want := range []string{"no healthy upstream: 10.96.0.12:80", "attempted recursive call to ourselves",
		"http status: 401 Unauthorized", "io error: No route to host (os error 113)"} {
		if !strings.Contains(lines, `error="`+want+`"`) {
			t.Errorf("not logged: %s", want)
		}
	}
}

// TestSOCKSLoopback: loopback is the pod's own and never asked of the network.
func TestSOCKSLoopback(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) {
		o.Config.SOCKS5 = true
		o.Names = func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("::ffff:127.0.0.1")}, nil
		}
	})
	for _, request := range []string{"\x05\x01\x00\x01\x7f\x00\x00\x01\x1f\x90", "\x05\x01\x00\x03\x04evil\x1f\x90"} {
		dst := netip.MustParseAddrPort("127.0.0.1:8080")
		w.listen(dst, echo)
		app, done := w.socks(request, "\x05\x00\x05\x00"+zeroAddr)
		<-done
		roundTrip(t, app)
		app.Close()
		w.mu.Lock()
		if src := w.clients[dst]; src != dst.Addr() {
			t.Errorf("%q was dialled from %v", request, src)
		}
		w.mu.Unlock()
	}
}

// TestSOCKSNames: of a name's addresses the one is taken that client and pod have the family of.
func TestSOCKSNames(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, tt := range []struct {
		name     string
		pod      []netip.Addr
		client6  bool
		names    []netip.Addr
		wantAddr netip.Addr
	}{
		{"client by IPv4", []netip.Addr{v4, v6}, false, []netip.Addr{v6, v4}, v4},
		{"client by IPv6", []netip.Addr{v4, v6}, true, []netip.Addr{v4, v6}, v6},
		{"a pod with IPv6 only, client by 127.0.0.1", []netip.Addr{v6}, false, []netip.Addr{v4, v6}, v6},
		{"a pod with IPv4 only, client by ::1", []netip.Addr{v4}, true, []netip.Addr{v6, v4}, v4},
		{"the name has the other family only", []netip.Addr{v4}, false, []netip.Addr{v6}, v6},
	} {
		info := state.WorkloadInfo{Name: "p", Namespace: "ns", ServiceAccount: "sa"}
		b := state.NewBuilder("")
		b.InsertWorkload(&state.Workload{UID: "p", Name: info.Name, Namespace: info.Namespace,
			ServiceAccount: info.ServiceAccount, Addresses: tt.pod})
		p := New(Options{Info: info, Knowledge: &fakeKnowledge{view: b.Build()}, Log: slog.New(slog.DiscardHandler),
			Names: func(context.Context, string) ([]netip.Addr, error) { return tt.names, nil }})
		if got, err := p.lookupName(t.Context(), "x", tt.client6); err != nil || got != tt.wantAddr {
			t.Errorf("%s: %v, %v; want %v", tt.name, got, err, tt.wantAddr)
		}
		p.Close()
	}
}

// TestSOCKSClient lets a SOCKS5 client that is not ours go through.
func TestSOCKSClient(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err == nil {
			w.proxies[0].ServeSOCKS(c)
		}
	}()
	d, err := proxy.SOCKS5("tcp", ln.Addr().String(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Dial("tcp", "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	<-done
	roundTrip(t, c)
	c.Close()
}

// TestSOCKSBounds: the number of handshakes is bounded, and at the bound the oldest goes; a client that says nothing
// is let go when the proxy closes.
func TestSOCKSBounds(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.MaxMeshHandshake = 1 })
	ended := func(c *net.TCPConn) {
		t.Helper()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a client that is to be let go read %v", err)
		}
		c.Close()
	}
	var work sync.WaitGroup
	first, theirs := tcpPair(t)
	work.Go(func() { w.proxies[0].ServeSOCKS(theirs) })
	eventually(t, "the first handshake", func() bool { return w.proxies[0].bounds.greetings.Used() == 1 })
	second, theirs2 := tcpPair(t)
	work.Go(func() { w.proxies[0].ServeSOCKS(theirs2) })
	ended(first)
	eventually(t, "it is counted as turned away", func() bool { return w.proxies[0].Stats().Overloaded == 1 })
	w.stop()
	work.Wait()
	ended(second)
}
