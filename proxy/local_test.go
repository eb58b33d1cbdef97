package proxy

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"ztun/proxy/refusal"
)

// newLocalWorld is a world whose two pods are of one daemon.
func newLocalWorld(t *testing.T) *world {
	return newWorldWith(t, func(w *world, _ int, o *Options) {
		o.Local = w.proxyAt
		o.Config.SendReason, o.Config.Remember = true, 10
	})
}

// noWire fails the test if a connection took the wire.
func (w *world) noWire() {
	w.t.Helper()
	if n := w.proxies[0].Stats().Pool.Dials; n != 0 {
		w.t.Errorf("%d tunnels were dialled for a pod of the same daemon", n)
	}
}

// TestLocalRelay: two pods of one daemon are relayed without a tunnel, with the access lines of both sides.
func TestLocalRelay(t *testing.T) {
	w := newLocalWorld(t)
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	w.listen(appB, func(c net.Conn) {
		n, _ := io.Copy(io.Discard, c) // until the caller's half is closed
		if int(n) == len(body) {
			c.Write(body)
		}
	})
	app, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, appB.String())
	if err != nil {
		t.Fatal(err, w.lines(0), w.lines(1))
	}
	app.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := app.Write(body); err != nil {
		t.Fatal(err)
	}
	app.CloseWrite()
	if got, err := io.ReadAll(app); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes came back of %d: %v", len(got), len(body), err)
	}
	w.settle()
	w.noWire()
	for _, p := range w.proxies {
		for c := range p.Ended() {
			if !c.Memory || c.TunnelLocal.IsValid() {
				t.Errorf("as an operator sees it: %+v", c)
			}
		}
	}
	for i, dir := range []string{"outbound", "inbound"} {
		lines := w.lines(i)
		if len(lines) != 1 {
			t.Fatalf("%s: %d access lines: %q", dir, len(lines), lines)
		}
		for _, want := range []string{`direction="` + dir + `"`, `src.identity="spiffe://cluster.local/ns/default/sa/a"`,
			`dst.identity="spiffe://cluster.local/ns/default/sa/b"`, "bytes_sent=1048576", "bytes_recv=1048576"} {
			if !strings.Contains(lines[0], want) {
				t.Errorf("%s: no %s in %s", dir, want, lines[0])
			}
		}
	}
	if w.clients[appB] != addrA {
		t.Errorf("the application saw %s as its client", w.clients[appB])
	}
}

// TestLocalRefused: a port where nobody listens is a refusal of the SYN.
func TestLocalRefused(t *testing.T) {
	w := newLocalWorld(t)
	_, way, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, appB.String())
	if err == nil || way != refusal.Reset {
		t.Errorf("refused by %v, error %v", way, err)
	}
	w.settle()
	w.noWire()
	for i, want := range []string{"http status: 503 Service Unavailable", "Connection refused (os error 111)"} {
		if lines := w.lines(i); len(lines) != 1 || !strings.Contains(lines[0], want) {
			t.Errorf("no %q in %q", want, lines)
		}
	}
}

// TestLocalReset: a reset of either application reaches the other one.
func TestLocalReset(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run(who, func(t *testing.T) {
			w := newLocalWorld(t)
			apps := make(chan net.Conn, 1)
			hold := make(chan struct{})
			w.listen(appB, func(c net.Conn) { apps <- c; <-hold })
			defer close(hold)
			app, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, appB.String())
			if err != nil {
				t.Fatal(err)
			}
			ends := []net.Conn{app, <-apps}
			if who == "server" {
				ends[0], ends[1] = ends[1], ends[0]
			}
			abort(ends[0])
			ends[1].SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := ends[1].Read(make([]byte, 1)); !isReset(err) {
				t.Errorf("the other application read %v", err)
			}
			w.settle()
			w.noWire()
		})
	}
}
