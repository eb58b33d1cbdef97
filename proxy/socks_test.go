package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/proxy"
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
	for _, want := range []string{"no healthy upstream: 10.96.0.12:80", "attempted recursive call to ourselves", "http status: 401 Unauthorized", "io error: No route to host (os error 113)"} {
		if !strings.Contains(lines, `error="`+want+`"`) {
			t.Errorf("not logged: %s", want)
		}
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

// TestSOCKSBounds: a client that says nothing is let go when the proxy closes; the number of handshakes is bounded.
func TestSOCKSBounds(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.MaxMeshHandshake = 1 })
	idle, theirs := tcpPair(t)
	over := make(chan struct{})
	go func() { defer close(over); w.proxies[0].ServeSOCKS(theirs) }()
	eventually(t, "the first handshake", func() bool { return len(w.proxies[0].greetings) == 1 })

	second, theirs2 := tcpPair(t)
	w.proxies[0].ServeSOCKS(theirs2)
	got, err := io.ReadAll(second)
	if string(got) != "\x05\x01"+zeroAddr || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%x, %v", got, err)
	}
	second.Close()
	if n := w.proxies[0].Stats().Overloaded; n != 1 {
		t.Errorf("%d turned away", n)
	}
	w.stop()
	<-over
	idle.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := idle.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the idle client read %v", err)
	}
	idle.Close()
}
