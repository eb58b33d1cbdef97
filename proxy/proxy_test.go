package proxy

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"ztun/proxy/refusal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var appB = netip.MustParseAddrPort("10.91.2.2:9000")

const srcA = "10.91.1.2:20410"

// echo returns what it gets, and its own end after the client's.
func echo(c net.Conn) {
	io.Copy(c, c)
	c.(*net.TCPConn).CloseWrite()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s did not come true", what)
}

// TestHalfClose sends, ends its side, and expects an answer computed from all that was sent.
func TestHalfClose(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, func(c net.Conn) {
		h := sha256.New()
		io.Copy(h, c)
		c.Write(h.Sum(nil))
	})
	data := make([]byte, 3<<20)
	rand.Read(data)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
			if err != nil {
				t.Error(i, err)
				return
			}
			defer app.Close()
			part := data[:1+i*100000]
			if _, err := app.Write(part); err != nil {
				t.Error(i, err)
			}
			app.CloseWrite()
			got, err := io.ReadAll(app)
			if want := sha256.Sum256(part); err != nil || string(got) != string(want[:]) {
				t.Errorf("%d: answer of %d bytes, %v", i, len(got), err)
			}
			<-done
		})
	}
	wg.Wait()
}

// TestReset checks that a reset on one side arrives as a reset on the other, both ways, and that the
// access line calls it a success as ztunnel's does.
func TestReset(t *testing.T) {
	w := newWorld(t)
	t.Run("application resets", func(t *testing.T) {
		got, arrived := make(chan error, 1), make(chan struct{})
		w.listen(appB, func(c net.Conn) {
			io.ReadFull(c, make([]byte, 4))
			close(arrived)
			_, err := c.Read(make([]byte, 1))
			got <- err
		})
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
		if err != nil {
			t.Fatal(err)
		}
		app.Write([]byte("ping"))
		<-arrived // a reset overtakes what it finds unsent
		app.SetLinger(0)
		app.Close()
		<-done
		if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the far application read %v, want a reset", err)
		}
	})
	t.Run("far application resets", func(t *testing.T) {
		w.listen(appB, func(c net.Conn) {
			io.ReadFull(c, make([]byte, 4))
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		})
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
		if err != nil {
			t.Fatal(err)
		}
		app.Write([]byte("ping"))
		_, err = app.Read(make([]byte, 1))
		app.Close()
		<-done
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the application read %v, want a reset", err)
		}
	})
	w.settle()
	w.stop()
	for i := range 2 {
		for _, l := range w.lines(i) {
			if !strings.Contains(l, "\tinfo\t") || strings.Contains(l, "error=") {
				t.Errorf("a reset was logged as a failure: %s", l)
			}
		}
	}
}

// TestRecheck denies port 9000 while a connection to it is open, and leaves another one alone.
func TestRecheck(t *testing.T) {
	w := newWorld(t)
	other := netip.MustParseAddrPort("10.91.2.2:9001")
	w.listen(appB, echo)
	w.listen(other, echo)
	open := func(dst string) (*net.TCPConn, <-chan struct{}) {
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, dst)
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, app)
		return app, done
	}
	cut, cutDone := open("10.91.2.2:9000")
	kept, keptDone := open("10.91.2.2:9001")
	plain, _, plainDone, err := w.connect(w.proxies[1].ServePassthrough, "10.91.2.1:4444", "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, plain)

	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
	}))
	w.proxies[1].Recheck()
	for _, c := range []*net.TCPConn{cut, plain} {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a connection that policy now denies is still open")
		}
		c.Close()
	}
	<-cutDone
	<-plainDone
	roundTrip(t, kept)
	kept.Close()
	<-keptDone
	if _, r, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000"); err != errRefused ||
		r != refusal.Reset {
		t.Errorf("a new connection: %v, %d", err, r)
	}
	w.stop()
	lines := strings.Join(w.lines(1), "\n")
	if n := strings.Count(lines, `error="connection closed due to policy change"`); n != 2 {
		t.Errorf("%d lines of a policy change, want 2:\n%s", n, lines)
	}
}

func roundTrip(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	defer c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
		t.Fatalf("echo of %q, %v", b, err)
	}
}

// A pod that is let go has no time to finish: where nothing was open, nothing is said to be cut off.
func TestShutdownOfNothing(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range 30 {
		var said bytes.Buffer
		w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Log = slog.New(slog.NewTextHandler(&said, nil)) })
		for _, p := range w.proxies {
			p.Shutdown(over)
		}
		if said.Len() > 0 {
			t.Fatalf("without connections: %s", &said)
		}
	}
}

// TestShutdown lets a connection finish within the deadline, turns down new ones meanwhile, and cuts what is left at
// the deadline with ztunnel's text.
func TestShutdown(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	first, _, firstDone, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	second, _, secondDone, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, second)
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { defer close(over); w.proxies[0].Shutdown(ctx) }()
	for _, serve := range []func(Flow){w.proxies[0].ServeOutbound, w.proxies[0].ServePassthrough} {
		eventually(t, "turning down new connections", func() bool {
			app, r, _, err := w.connect(serve, srcA, "10.91.2.2:9000")
			if err == nil {
				app.Close()
			}
			return err == errRefused && r == refusal.Reset
		})
	}
	roundTrip(t, first)
	first.Close()
	<-firstDone
	select {
	case <-over:
		t.Fatal("shutdown ended with a connection open")
	case <-time.After(50 * time.Millisecond):
	}
	cancel()
	<-over
	<-secondDone
	if _, err := second.Read(make([]byte, 1)); err == nil {
		t.Error("the second connection lives on")
	}
	second.Close()
	w.stop()
	lines := strings.Join(w.lines(0), "\n")
	if n := strings.Count(lines, `error="connection closed due to connection drain"`); n != 1 {
		t.Errorf("%d lines of a drain, want 1:\n%s", n, lines)
	}
	if strings.Contains(fmt.Sprint(gather(t, w.metrics[0])), "connections_failed") {
		t.Error("a forced drain was counted as a failure")
	}
}

// TestGoAway drains the destination's side: streams that run finish, a new one takes a new tunnel or
// is refused, and nothing hangs.
func TestGoAway(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() { defer close(over); w.proxies[1].Shutdown(context.Background()) }()
	eventually(t, "draining", func() bool {
		w.proxies[1].mu.Lock()
		defer w.proxies[1].mu.Unlock()
		return w.proxies[1].draining
	})
	roundTrip(t, app)
	app.Close()
	<-done
	<-over
}

// TestUnknownWorkload waits for the record of the pod and proceeds when it arrives.
func TestUnknownWorkload(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	full := w.know.View()
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "  serviceAccount: a\n", "  serviceAccount: z\n", 1)
	}))
	go func() {
		time.Sleep(100 * time.Millisecond)
		w.know.publish(full)
	}()
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	app.Close()
	<-done
}

func TestErrorTable(t *testing.T) {
	dial := func(no syscall.Errno) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", no)}
	}
	for _, tc := range []struct {
		err     *Error
		text    string
		flag    string
		refusal refusal.Way
	}{
		{fail(kindIO, dial(syscall.ECONNREFUSED)), "io error: Connection refused (os error 111)", "CONNECT", refusal.Reset},
		{fail(kindIO, dial(syscall.EHOSTUNREACH)), "io error: No route to host (os error 113)", "CONNECT",
			refusal.HostUnreachable},
		{fail(kindIO, dial(syscall.ENETUNREACH)), "io error: Network is unreachable (os error 101)", "CONNECT",
			refusal.NetUnreachable},
		{fail(kindIO, context.DeadlineExceeded), "io error: deadline has elapsed", "CONNECT", refusal.Silent},
		{fail(kindNetworkPolicy, dial(syscall.ETIMEDOUT)),
			"connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: Connection timed out (os error 110)",
			"NETWORK_POLICY", refusal.Silent},
		{fail(kindApp, dial(syscall.ECONNREFUSED)), "connection failed: Connection refused (os error 111)", "CONNECT",
			refusal.Reset},
		{fail(kindTLS, context.DeadlineExceeded), "io error: deadline has elapsed", "CONNECT", refusal.Silent},
		{fail(kindPolicyChange, nil), "connection closed due to policy change", "DENY", refusal.Reset},
		{fail(kindDrain, nil), "connection closed due to connection drain", "-", refusal.Reset},
	} {
		if tc.err.Error() != tc.text || tc.err.Flag().String() != tc.flag || tc.err.Refusal() != tc.refusal {
			t.Errorf("got %q %s %d, want %q %s %d", tc.err, tc.err.Flag(), tc.err.Refusal(), tc.text, tc.flag, tc.refusal)
		}
	}
}

// brokenSource yields a few bytes and fails, however it is read.
type brokenSource struct{ net.Conn }

func (brokenSource) WaitRead() error            { return nil }
func (brokenSource) Readable() bool             { return true }
func (brokenSource) Read(p []byte) (int, error) { return copy(p, "abc"), errBroken }
func (b brokenSource) WriteTo(w io.Writer) (int64, error) {
	n, _ := w.Write([]byte("abc"))
	return int64(n), errBroken
}
func (brokenSource) CloseWrite() error { return nil }

var errBroken = errors.New("broken")

// TestWhoseError: the access line says which side failed, also where the other is a socket of the kernel's (SOCKS5).
func TestWhoseError(t *testing.T) {
	a, b := tcpPair(t)
	defer a.Close()
	defer b.Close()
	if err := new(mover).move(a, brokenSource{}, func(int) {}); err == nil || err.Error() != "receive: broken" {
		t.Errorf("a source that fails: %v", err)
	}
	a.CloseWrite()
	if err := new(mover).move(a, brokenSource{}, func(int) {}); err == nil || !strings.HasPrefix(err.Error(), "send: ") {
		t.Errorf("a sink that fails: %v", err)
	}
}
