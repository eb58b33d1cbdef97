package proxy

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztun/proxy/rescue"
)

// crashingConn is an application whose bytes are one too many.
type crashingConn struct{ Conn }

func (c crashingConn) Read([]byte) (int, error) { panic("boom") }

// TestPanicEndsOneConnection: a panic while a connection is copied ends it at both of its ends and in the books; the
// proxy goes on, and can be closed.
func TestPanicEndsOneConnection(t *testing.T) {
	panics := rescue.New(slog.New(slog.DiscardHandler))
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Panics = panics })
	w.listen(appB, echo)
	crash := true
	w.dialApp = func(context.Context) (Conn, error) {
		c, err := w.dial(addrA, appB)
		if err == nil && crash {
			c = crashingConn{c}
		}
		return c, err
	}
	for _, way := range []func() (io.Reader, <-chan struct{}, error){
		func() (io.Reader, <-chan struct{}, error) {
			app, _, done, err := w.connect(w.proxies[1].ServePassthrough, "192.0.2.9:4000", "10.91.2.2:9000")
			if err != nil {
				return nil, nil, err
			}
			app.SetReadDeadline(time.Now().Add(10 * time.Second))
			return app, done, nil
		},
		func() (io.Reader, <-chan struct{}, error) {
			app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
			if err != nil {
				return nil, nil, err
			}
			app.SetReadDeadline(time.Now().Add(10 * time.Second))
			return app, done, nil
		},
	} {
		app, done, err := way()
		if err != nil {
			continue // by HBONE, the tunnel may end before its answer is out
		}
		if _, err := app.Read(make([]byte, 1)); err == nil || isDeadline(err) {
			t.Errorf("the connection that panicked: %v", err)
		}
		<-done
	}
	w.settle()
	if n := panics.Total(); n != 2 {
		t.Errorf("%d panics counted", n)
	}
	crash = false
	if ok, _ := w.attempt(); !ok {
		t.Error("the proxy does not go on")
	}
	closed := make(chan struct{})
	go func() { w.stop(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("the proxy cannot be closed")
	}
	if lines := strings.Join(w.lines(1), "\n"); strings.Count(lines, "panic in copying") < 2 {
		t.Errorf("the access lines do not say what happened:\n%s", lines)
	}
}

// TestPanicBeforeTheVerdict: one that comes while a connection is decided leaves no visit, no socket and no
// connection behind.
func TestPanicBeforeTheVerdict(t *testing.T) {
	panics := rescue.New(slog.New(slog.DiscardHandler))
	w := newWorldWith(t, func(_ *world, i int, o *Options) {
		o.Panics = panics
		if i == 0 {
			o.Network = nil // the dial panics
		}
	})
	w.dialApp = func(context.Context) (Conn, error) { panic("boom") }
	for _, serve := range []func(Flow){
		w.proxies[1].ServePassthrough, // at the dial of the application
		w.proxies[0].ServeOutbound,    // at the dial of the network
	} {
		panics.Run("a flow", func() {
			serve(&fakeFlow{t: t, src: netip.MustParseAddrPort(srcA), dst: appB, decided: make(chan struct{})})
		}, nil)
	}
	w.settle()
	if n := panics.Total(); n == 0 {
		t.Error("nothing has panicked")
	}
	for i, m := range w.metrics {
		for key, value := range gather(t, m) {
			if strings.HasPrefix(key, "istio_tcp_sockets_open") && value != "0" {
				t.Errorf("pod %d: %s %s", i, key, value)
			}
		}
	}
	closed := make(chan struct{})
	go func() { w.stop(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("the proxy cannot be closed")
	}
}
