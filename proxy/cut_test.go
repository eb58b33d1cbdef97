package proxy

import (
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"ztun/proxy/hbone"
)

// deaf is an application that reads nothing until it is told to; it reports how its connection ended.
func deaf(read <-chan struct{}, ended chan<- error) func(net.Conn) {
	return func(c net.Conn) {
		c.(*net.TCPConn).SetReadBuffer(4096)
		<-read
		_, err := io.Copy(io.Discard, c)
		ended <- err
	}
}

// TestLostWhileWriting: the copier waits for an application that does not read. A reset by the peer, or the loss of its
// tunnel, ends both directions all the same, frees what waited, and is a reset to the application.
func TestLostWhileWriting(t *testing.T) {
	for name, lose := range map[string]func(*hbone.ClientConn, *hbone.Stream){
		"reset":  func(_ *hbone.ClientConn, s *hbone.Stream) { s.Reset(http2.ErrCodeConnect) },
		"cancel": func(_ *hbone.ClientConn, s *hbone.Stream) { s.Reset(http2.ErrCodeCancel) },
		"tunnel": func(cc *hbone.ClientConn, _ *hbone.Stream) { cc.Abort(errors.New("cut")) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			read, ended := make(chan struct{}), make(chan error, 1)
			w.listen(appB, deaf(read, ended))
			cc := w.peerOfB("10.91.1.2:4000")
			s, _, err := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
			if err != nil {
				t.Fatal(err)
			}
			s.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			if _, err := io.Copy(s, endless{}); err == nil {
				t.Fatal("the deaf application took everything")
			}
			lose(cc, s)
			w.settle() // without the application's doing anything
			close(read)
			if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the application read %v, want a reset", err)
			}
			if l := w.lastLine(1); strings.Contains(l, "error=") != (name != "reset") {
				t.Errorf("access line: %s", l)
			}
		})
	}
}

// TestSlowReaderGetsTheRest: what has arrived before a reset is still taken by an application that reads.
func TestSlowReaderGetsTheRest(t *testing.T) {
	w := newWorld(t)
	got := make(chan int64, 1)
	w.listen(appB, func(c net.Conn) {
		n, _ := io.Copy(io.Discard, c)
		got <- n
	})
	cc := w.peerOfB("10.91.1.2:4000")
	s, _, err := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
	if err != nil {
		t.Fatal(err)
	}
	const sent = 32 << 10 // what a kernel takes at once; more may wait in the sender's socket, whose reset drops it
	if _, err := s.Write(make([]byte, sent)); err != nil {
		t.Fatal(err)
	}
	s.Close() // after what was written, and without END_STREAM
	if n := <-got; n != sent {
		t.Errorf("%d of %d bytes arrived before the reset", n, sent)
	}
	w.settle()
}

// TestAllAfterTheEnd: what a peer has ended in good order arrives in full at an application that takes its time, also
// if the peer then resets the stream, with whatever code: that is about the other direction.
func TestAllAfterTheEnd(t *testing.T) {
	const sent = 512 << 10 // more than the application's kernel takes, and less than a window
	for _, code := range []http2.ErrCode{http2.ErrCodeConnect, http2.ErrCodeInternal, http2.ErrCodeCancel} {
		t.Run(code.String(), func(t *testing.T) {
			var n int64
			var err error
			for _, pause := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, time.Second, 5 * time.Second} {
				if n, err = afterTheEnd(t, sent, pause, code); n == sent && err == nil {
					return
				} // else the end was not sent yet, and dropped by the reset
			}
			t.Errorf("%d of %d bytes arrived, then %v", n, sent, err)
		})
	}
}

// afterTheEnd sends, ends, resets after a pause, and tells what an application reads that begins long after it.
func afterTheEnd(t *testing.T, sent int, pause time.Duration, code http2.ErrCode) (int64, error) {
	w := newWorld(t)
	defer w.stop()
	type result struct {
		n   int64
		err error
	}
	read, got := make(chan struct{}), make(chan result, 1)
	w.listen(appB, func(c net.Conn) {
		<-read
		n, err := io.Copy(io.Discard, c)
		got <- result{n, err}
	})
	s, _, err := w.peerOfB("10.91.1.2:4000").Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(make([]byte, sent)); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(pause)
	s.Reset(code)
	time.Sleep(3 * tearAfter)
	close(read)
	r := <-got
	return r.n, r.err
}

// TestStoppedPeer: an application that works on after a peer's end learns that the peer has reset the stream since, and
// its connection does not outlast it: the stream that bounded its number is gone.
func TestStoppedPeer(t *testing.T) {
	for _, code := range []http2.ErrCode{http2.ErrCodeNo, http2.ErrCodeCancel, http2.ErrCodeConnect} {
		t.Run(code.String(), func(t *testing.T) {
			w := newWorld(t)
			ended, learnt := make(chan error, 1), make(chan error, 1)
			w.listen(appB, func(c net.Conn) {
				got, err := io.ReadAll(c)
				if string(got) != "ping" && err == nil {
					err = errors.New(string(got))
				}
				ended <- err
				for err == nil { // it writes nothing, and looks after its socket
					time.Sleep(5 * time.Millisecond)
					err = socketError(c.(*net.TCPConn))
				}
				learnt <- err
			})
			s, _, err := w.peerOfB("10.91.1.2:4000").Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(s, "ping")
			s.CloseWrite()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			s.Reset(code)
			select {
			case <-learnt:
			case <-time.After(20 * time.Second):
				t.Error("the application does not learn of the reset")
			}
			w.settle()
		})
	}
}

// socketError is what a socket's connection has ended with (SO_ERROR).
func socketError(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	n := 0
	if cerr := raw.Control(func(fd uintptr) {
		n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	}); cerr != nil {
		return cerr
	}
	if n != 0 {
		return syscall.Errno(n)
	}
	return err
}

// TestCutLooksCut: a running connection that policy cuts at the server's side is a reset to the client's application,
// and an error in both access lines; so is one that a drain cuts at its deadline.
func TestCutLooksCut(t *testing.T) {
	for _, what := range []string{"policy", "drain"} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			w.listen(appB, func(c net.Conn) { // a download whose end is the connection's
				io.ReadFull(c, make([]byte, 4))
				io.WriteString(c, "half of it")
				io.Copy(io.Discard, c)
			})
			app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			io.WriteString(app, "ping")
			if _, err := io.ReadFull(app, make([]byte, 10)); err != nil {
				t.Fatal(err)
			}
			if what == "policy" {
				w.know.publish(loadView(t, func(s string) string {
					return strings.Replace(s, "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
				}))
				w.proxies[1].Recheck()
			} else {
				w.proxies[1].Close()
			}
			if n, err := app.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the client's application read %d, %v; want a reset", n, err)
			}
			<-done
			w.settle()
			for i := range 2 {
				if l := w.lastLine(i); !strings.Contains(l, "\terror\t") {
					t.Errorf("pod %d: %s", i, l)
				}
			}
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
