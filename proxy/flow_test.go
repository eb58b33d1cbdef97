package proxy

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"ztun/proxy/refusal"
)

// syn is a flow of the test's for a proxy, which serves it in the background.
func (w *world) syn(serve func(Flow), src, dst string, mod func(*fakeFlow)) (f *fakeFlow, over <-chan struct{}) {
	f = &fakeFlow{t: w.t, src: netip.MustParseAddrPort(src), dst: netip.MustParseAddrPort(dst),
		decided: make(chan struct{})}
	if mod != nil {
		mod(f)
	}
	done := make(chan struct{})
	go func() { defer close(done); serve(f) }()
	return f, done
}

// counted is how many connections were opened and closed, by what /metrics says.
func counted(t *testing.T, w *world, i int) (opened, closed int) {
	t.Helper()
	for k, v := range gather(t, w.metrics[i]) {
		n, err := strconv.Atoi(v)
		switch {
		case err != nil:
			t.Fatal(err)
		case strings.HasPrefix(k, "istio_tcp_connections_opened"):
			opened += n
		case strings.HasPrefix(k, "istio_tcp_connections_closed"):
			closed += n
		}
	}
	return opened, closed
}

// A client that does not end its handshake is none: the application has not seen it, and nothing is counted or
// logged. The port's state is told all the same, by the answer to the SYN.
func TestPassthroughHandshakeFirst(t *testing.T) {
	w := newWorld(t)
	var seen atomic.Int32
	w.listen(appB, func(c net.Conn) { seen.Add(1); echo(c) })
	serve := w.proxies[1].ServePassthrough
	_, over := w.syn(serve, "192.0.2.1:4000", appB.String(), func(f *fakeFlow) { f.silent = true })
	<-over
	w.mu.Lock()
	probes := w.probes
	_, dialled := w.clients[appB]
	w.mu.Unlock()
	if probes != 1 || dialled || seen.Load() != 0 {
		t.Errorf("%d probes, application dialled: %v, seen by it: %d", probes, dialled, seen.Load())
	}
	if opened, closed := counted(t, w, 1); opened+closed != 0 {
		t.Errorf("a spoofed SYN was counted: %d opened, %d closed", opened, closed)
	}
	if lines := w.lines(1); len(lines) != 0 {
		t.Errorf("a spoofed SYN was logged: %q", lines)
	}

	closed := netip.AddrPortFrom(appB.Addr(), 9).String()
	f, over := w.syn(serve, "192.0.2.1:4000", closed, nil)
	<-over
	if f.app != nil || f.refusal != refusal.Reset {
		t.Errorf("closed port: refusal %v", f.refusal)
	}
	wantTexts(t, w.lastLine(1), "\terror\t", "Connection refused (os error 111)")

	app, _, over, err := w.connect(serve, "192.0.2.1:4000", appB.String())
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, app)
	app.Close()
	<-over
	w.settle()
	if seen.Load() != 1 {
		t.Errorf("seen by the application: %d", seen.Load())
	}

	// It went away between the probe and the connect: a reset, and an error in the books.
	w.mu.Lock()
	w.stale = true
	w.mu.Unlock()
	app, _, over, err = w.connect(serve, "192.0.2.1:4000", closed)
	if err != nil {
		t.Fatal(err)
	}
	app.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := app.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("read: %v", err)
	}
	<-over
	wantTexts(t, w.lastLine(1), "\terror\t", "Connection refused (os error 111)")
}

// The kernel sends the SYN of one connect to a peer that does not answer several times: that is one connection in the
// log and in metrics. When the peer answers after all, that is a connection of its own.
func TestRetransmittedSYN(t *testing.T) {
	for _, inbound := range []bool{false, true} {
		w := newWorld(t)
		var answers atomic.Bool
		timeout := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ETIMEDOUT)}
		i, serve, src, dst := 0, w.proxies[0].ServeOutbound, srcA, appB.String()
		if inbound {
			i, serve, src = 1, w.proxies[1].ServePassthrough, "192.0.2.1:4000"
			w.probed = func() error {
				if answers.Load() {
					return nil
				}
				return timeout
			}
		} else {
			w.dialMesh = func(netip.AddrPort) (net.Conn, error) {
				if answers.Load() {
					return w.dialB(netip.MustParseAddrPort("10.91.1.2:3134"))
				}
				return nil, timeout
			}
		}
		w.listen(appB, echo)
		for n := range 4 {
			f, over := w.syn(serve, src, dst, func(f *fakeFlow) { f.again = n > 0 })
			<-over
			if f.app != nil || f.refusal != refusal.Silent {
				t.Fatalf("inbound %v: refusal %v", inbound, f.refusal)
			}
			if lines := w.lines(i); len(lines) != 1 {
				t.Errorf("inbound %v, SYN %d: %d lines", inbound, n+1, len(lines))
			}
		}
		if opened, closed := counted(t, w, i); opened != 1 || closed != 1 {
			t.Errorf("inbound %v: %d opened, %d closed", inbound, opened, closed)
		}
		answers.Store(true)
		f, over := w.syn(serve, src, dst, func(f *fakeFlow) { f.again = true })
		<-f.decided
		if f.app == nil {
			t.Fatalf("inbound %v: not accepted", inbound)
		}
		roundTrip(t, f.app)
		f.app.Close()
		<-over
		w.settle()
		if lines := w.lines(i); len(lines) != 2 {
			t.Errorf("inbound %v: %d lines", inbound, len(lines))
		}
	}
}

// A flow that loses its place ends what is under way for it, at once, and says why.
func TestEvictedFlow(t *testing.T) {
	w := newWorld(t)
	dialling, release := make(chan struct{}, 1), make(chan struct{})
	w.dialMesh = func(netip.AddrPort) (net.Conn, error) {
		dialling <- struct{}{}
		<-release
		return nil, os.NewSyscallError("connect", syscall.ETIMEDOUT)
	}
	defer close(release)
	f, over := w.syn(w.proxies[0].ServeOutbound, srcA, appB.String(), nil)
	<-dialling
	f.evict()
	select {
	case <-over:
	case <-time.After(20 * time.Second):
		t.Fatal("the flow goes on")
	}
	if f.app != nil || f.refusal != refusal.Silent {
		t.Errorf("refusal %v", f.refusal)
	}
	wantTexts(t, w.lastLine(0), "\terror\t", "ZTUN_MAX_INFLIGHT")

	// Before there is anything to count it is not counted: the pod's record has not come yet.
	w = newWorldWith(t, func(w *world, _ int, o *Options) { o.Info.Name = "unknown" })
	f, over = w.syn(w.proxies[0].ServeOutbound, srcA, appB.String(), nil)
	eventually(t, "the flow may be told that its place is gone", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.gone != nil
	})
	f.evict()
	select {
	case <-over:
	case <-time.After(20 * time.Second):
		t.Fatal("the flow goes on")
	}
	if lines := w.lines(0); len(lines) != 0 {
		t.Errorf("logged: %q", lines)
	}
}
