package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// TestHalfClose is every order in which two sides can end their directions, by END_STREAM.
func TestHalfClose(t *testing.T) {
	for _, order := range []string{"cs", "sc"} {
		for _, data := range []int{0, 1, 100 << 10} {
			a, b := tcpPair(t)
			cc, sc, reqs, stop := link(t, a, b, Config{})
			c, s := pair(t, cc, reqs)
			ends := map[byte][2]*Stream{'c': {c, s}, 's': {s, c}}
			want := payload(data)
			for _, who := range []byte(order) {
				x, y := ends[who][0], ends[who][1]
				if _, err := x.Write(want); err != nil {
					t.Fatal(err)
				}
				if err := x.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if _, err := x.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
					t.Error("write after CloseWrite:", err)
				}
				got, err := io.ReadAll(y)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatal(order, data, len(got), err)
				}
				if n, err := y.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Error(n, err)
				}
			}
			eventually(t, func() bool { return cc.Streams() == 0 && sc.Streams() == 0 })
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			stop()
		}
	}
}

// patience is how long a test waits for what has to come: a machine that others use may stand still for a second.
const patience = 30 * time.Second

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("did not come to pass within %v", patience)
		}
	}
}

// TestReset: how each code reads at the other end, with data before it. Only END_STREAM is an end of file: a reset
// without it is a reset, whatever the code; after it, whatever the code, no more is wanted.
func TestReset(t *testing.T) {
	a, b := tcpPair(t)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	defer stop()
	for _, code := range []http2.ErrCode{http2.ErrCodeNo, http2.ErrCodeCancel, http2.ErrCodeInternal, http2.ErrCodeConnect,
		http2.ErrCodeStreamClosed} {
		for i := range 4 {
			fromServer, ended := i&1 != 0, i&2 != 0
			x, y := pair(t, cc, reqs)
			if fromServer {
				x, y = y, x
			}
			told := make(chan error, 2)
			y.OnReset(func(err error) { told <- err })
			stopped := make(chan struct{}, 4)
			y.OnStopSending(func() { stopped <- struct{}{} })
			x.Write([]byte("data"))
			io.ReadFull(y, make([]byte, 2))
			if ended {
				x.CloseWrite()
				time.Sleep(5 * time.Millisecond) // an end that was not sent is dropped by the reset
			}
			x.Reset(code)
			rest, err := io.ReadAll(y)
			var se *StreamError
			if string(rest) != "ta" || ended != (err == nil) || !ended && (!errors.As(err, &se) || se.Code != code ||
				!se.Remote) {
				t.Errorf("%v, ended %v: %q %v", code, ended, rest, err)
			}
			eventually(t, func() bool { _, err := y.Write(nil); return err != nil })
			_, werr := y.Write([]byte("x"))
			if errors.Is(werr, syscall.EPIPE) != ended || errors.Is(werr, syscall.ECONNRESET) == ended {
				t.Errorf("%v, ended %v: write after reset: %v", code, ended, werr)
			}
			if cerr := y.CloseWrite(); (cerr == nil) != (ended && code == http2.ErrCodeNo) {
				t.Errorf("%v, ended %v: CloseWrite after reset: %v", code, ended, cerr)
			}
			if n := len(told); n != 1 && !ended || n != 0 && ended {
				t.Errorf("%v, ended %v: told %d times of the reset", code, ended, n)
			}
			y.OnStopSending(func() { stopped <- struct{}{} }) // it is told at once
			want := 0
			if ended && (code != http2.ErrCodeNo || !fromServer) {
				want = 2
			}
			if n := len(stopped); n != want {
				t.Errorf("%v, ended %v, from server %v: %d calls to stop sending, want %d", code, ended, fromServer, n, want)
			}
			if _, err := x.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			y.Close()
		}
	}
	eventually(t, func() bool { return cc.Streams() == 0 && sc.Streams() == 0 })
}

// TestAbandon: Close of an unfinished stream sends what was written, then CANCEL; a server that ended its side:
// NO_ERROR.
func TestAbandon(t *testing.T) {
	proceed := make(chan struct{})
	p, _, stop := serve(t, Config{}, func(ss *ServerStream) {
		s, err := ss.Accept(&Response{Status: 200})
		if err != nil {
			t.Error(err)
			return
		}
		s.Write(make([]byte, 70000)) // more than the window that the peer gives at first
		if ss.Authority() == "end:1" {
			s.CloseWrite()
		}
		// returning closes
		<-proceed
	})
	defer stop()
	close(proceed)
	p.preface()
	for i, name := range []string{"cancel:1", "end:1"} {
		id := uint32(2*i + 1)
		p.headers(id, false, ":method", "CONNECT", ":authority", name)
		p.fr.WriteWindowUpdate(id, 1<<20)
		p.fr.WriteWindowUpdate(0, 1<<20)
		got := 0
		for got < 70000 {
			f, err := p.fr.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if d, ok := f.(*http2.DataFrame); ok && d.StreamID == id {
				got += len(d.Data())
			}
		}
		if name == "end:1" {
			p.expect("DATA 3 len=0 END_STREAM")
			p.expect("RST_STREAM 3 NO_ERROR")
		} else {
			p.expect("RST_STREAM 1 CANCEL")
		}
	}
}

// TestLinger: what a peer never gives window for is not kept for ever.
func TestLinger(t *testing.T) {
	p, sc, stop := serve(t, Config{Linger: 50 * time.Millisecond}, func(ss *ServerStream) {
		if s, err := ss.Accept(&Response{Status: 200}); err == nil {
			s.Write(make([]byte, 65536))
			s.Write(make([]byte, 1))
		}
	})
	defer stop()
	p.preface()
	p.connect(1)
	p.expect("RST_STREAM 1 CANCEL")
	eventually(t, func() bool { return sc.Streams() == 0 })
}

// TestOpenGivesUp: the caller's context ends first.
func TestOpenGivesUp(t *testing.T) {
	a, b := tcpPair(t)
	cc, err := NewClientConn(a, Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := cc.Open(ctx, &Request{Authority: "h:1"}); err != context.DeadlineExceeded {
		t.Error(err)
	}
	if _, _, err := cc.Open(ctx, &Request{Authority: "h:1"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	p := newRawPeer(t, b)
	io.ReadFull(b, make([]byte, len(http2.ClientPreface)))
	p.expect("HEADERS 1")
	p.expect("RST_STREAM 1 CANCEL")
	b.Close()
	<-cc.Done()
	if _, _, err := cc.Open(context.Background(), &Request{}); err == nil {
		t.Error("opened a stream on a dead connection")
	}
	cc.Close()
}

// TestGoAway: the graceful end from the server; streams finish, new ones go elsewhere.
func TestGoAway(t *testing.T) {
	a, b := tcpPair(t)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	c, s := pair(t, cc, reqs)
	down := make(chan error, 1)
	go func() { down <- sc.Shutdown(context.Background()) }()
	eventually(t, func() bool { return !cc.CanTakeStream() })
	if _, _, err := cc.Open(context.Background(), &Request{}); !errors.Is(err, ErrGoAway) {
		t.Error(err)
	}
	go func() { s.Write([]byte("still here")); s.CloseWrite() }()
	if got, err := io.ReadAll(c); err != nil || string(got) != "still here" {
		t.Error(got, err)
	}
	c.CloseWrite()
	if err := <-down; err != nil {
		t.Error(err)
	}
	<-cc.Done()
	stop()
}

// TestGoAwayOnTheWire: two steps with a PING between.
func TestGoAwayOnTheWire(t *testing.T) {
	p, sc, stop := serve(t, Config{}, nil)
	defer stop()
	p.preface()
	p.connect(1)
	p.expect("HEADERS 1 :status=200")
	sc.GoAway()
	p.expect("GOAWAY 0 last=2147483647 NO_ERROR")
	f, err := p.fr.ReadFrame()
	ping, ok := f.(*http2.PingFrame)
	if err != nil || !ok {
		t.Fatal(f, err)
	}
	p.connect(3) // opened before we knew: still served
	p.expect("HEADERS 3 :status=200")
	p.fr.WritePing(true, ping.Data)
	p.expect("GOAWAY 0 last=3 NO_ERROR")
	p.connect(5)
	p.expect("RST_STREAM 5 REFUSED_STREAM")
	p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
	p.fr.WriteRSTStream(3, http2.ErrCodeCancel)
	if text, _, ok := p.next(); !ok || text != "GOAWAY 0 last=5 NO_ERROR" {
		t.Error(text)
	}
	<-sc.Done()
}

// TestShutdownTooLong: whoever does not end in time is cut.
func TestShutdownTooLong(t *testing.T) {
	a, b := tcpPair(t)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	c, _ := pair(t, cc, reqs)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := sc.Shutdown(ctx); err != context.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
	stop()
}

// TestPings: the first after 10 s, then 10 s after each answer; 20 s without an answer and without anything else
// is the end.
func TestPings(t *testing.T) {
	for _, server := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			start := time.Now()
			var c *conn
			if server {
				sc := NewServerConn(a, Config{}, nil)
				go sc.Serve(context.Background())
				c = sc.c
			} else {
				cc, _ := NewClientConn(a, Config{})
				c = cc.c
			}
			var pings []time.Duration
			var answer atomic.Int32
			answer.Store(2)
			fr := http2.NewFramer(b, b)
			go func() {
				if server {
					io.WriteString(b, http2.ClientPreface)
				}
				http2.NewFramer(b, nil).WriteSettings()
			}()
			over := make(chan string, 1)
			go func() {
				if !server {
					io.ReadFull(b, make([]byte, len(http2.ClientPreface)))
				}
				last := ""
				for {
					f, err := fr.ReadFrame()
					if err != nil {
						over <- last
						return
					}
					last = frameText(f)
					if p, ok := f.(*http2.PingFrame); ok {
						pings = append(pings, time.Since(start))
						if answer.Add(-1) >= 0 {
							time.Sleep(3 * time.Second)
							fr.WritePing(true, p.Data)
						}
					}
				}
			}()
			<-c.done
			last := <-over
			if len(pings) != 3 || pings[0] != 10*time.Second || pings[1] != 23*time.Second || pings[2] != 36*time.Second {
				t.Error(pings)
			}
			if d := time.Since(start); d != 56*time.Second {
				t.Error("gave up after", d)
			}
			if err := c.reason(); err != ErrPingTimeout {
				t.Error(err)
			}
			c.work.Wait()
			if server && last != "GOAWAY 0 last=0 NO_ERROR" {
				t.Error(last)
			}
			b.Close()
		})
	}
}

// TestPingWhileDataFlows: the deadline does not fire while anything arrives.
func TestPingWhileDataFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		cc, _ := NewClientConn(a, Config{})
		fr := http2.NewFramer(b, b)
		go io.Copy(io.Discard, b)
		fr.WriteSettings()
		start := time.Now()
		for time.Since(start) < 5*time.Minute {
			time.Sleep(15 * time.Second)
			if fr.WriteWindowUpdate(0, 1) != nil {
				t.Fatal("closed after", time.Since(start))
			}
		}
		<-cc.Done()
		if d := time.Since(start); d > 6*time.Minute {
			t.Error(d)
		}
		cc.Close()
		b.Close()
	})
}

// TestBeforeServe: GoAway and Close may come before Serve.
func TestBeforeServe(t *testing.T) {
	a, b := tcpPair(t)
	sc := NewServerConn(b, Config{}, nil)
	sc.GoAway()
	served := make(chan error, 1)
	go func() { served <- sc.Serve(context.Background()) }()
	p := newRawPeer(t, a)
	p.preface()
	for _, want := range []string{"SETTINGS 0 MAX", "WINDOW_UPDATE", "GOAWAY 0 last=2147483647"} {
		if text, _, _ := p.next(); !strings.HasPrefix(text, want) {
			t.Error(text)
		}
	}
	a.Close()
	<-served

	a, b = tcpPair(t)
	defer a.Close()
	sc = NewServerConn(b, Config{}, nil)
	sc.Close()
	if err := sc.Serve(context.Background()); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	a, b = tcpPair(t)
	defer a.Close()
	if err := NewServerConn(b, Config{}, nil).Serve(ctx); err != nil {
		t.Error(err)
	}
}

// TestNothingIsLostAtTheEnd: a connection that ends in good order must not be reset by a frame of a peer that has not
// read the last bytes yet.
func TestNothingIsLostAtTheEnd(t *testing.T) {
	const size = 128 << 10
	finished := make(chan struct{})
	p, sc, stop := serve(t, Config{}, func(ss *ServerStream) {
		s, err := ss.Accept(&Response{Status: 200})
		if err != nil {
			t.Error(err)
			return
		}
		s.Write(make([]byte, size))
		s.CloseWrite()
		close(finished)
		io.Copy(io.Discard, s)
	})
	defer stop()
	sc.c.raw.(*net.TCPConn).SetWriteBuffer(8 * size) // all of it is the kernel's at once
	p.preface()
	p.fr.WriteWindowUpdate(0, 4<<20)
	p.connect(1)
	p.fr.WriteWindowUpdate(1, 4<<20)
	p.fr.WriteData(1, true, nil)
	<-finished
	down := make(chan struct{})
	go func() { sc.Shutdown(context.Background()); close(down) }()
	// Its PING is not answered; after a second it goes on without, and has said its last.
	eventually(t, func() bool { sc.c.mu.Lock(); defer sc.c.mu.Unlock(); return sc.c.said })
	for range 3 { // the second frame to a closed socket would be answered with a reset
		p.fr.WriteWindowUpdate(0, 1000)
		time.Sleep(20 * time.Millisecond)
	}
	got := 0
	for {
		f, err := p.fr.ReadFrame()
		if err != nil {
			if err != io.EOF {
				t.Error("after ", got, " bytes: ", err)
			}
			break
		}
		if d, ok := f.(*http2.DataFrame); ok {
			got += len(d.Data())
		}
	}
	if got != size {
		t.Errorf("got %d of %d bytes", got, size)
	}
	p.c.Close()
	<-down
}

// TestEndIsBounded: a peer that takes nothing any more does not hold up whoever closes, although the connection ends in
// good order and would be listened to for longer otherwise.
func TestEndIsBounded(t *testing.T) {
	const size = 512 << 10
	for name, end := range map[string]func(sc *ServerConn, cancel func()){
		"Close": func(sc *ServerConn, _ func()) { sc.Close() },
		"Shutdown": func(sc *ServerConn, _ func()) {
			ctx, stop := context.WithCancel(context.Background())
			stop()
			sc.Shutdown(ctx)
		},
		"end of Serve":   func(_ *ServerConn, cancel func()) { cancel() },
		"Close, drained": func(sc *ServerConn, _ func()) { sc.GoAway(); time.Sleep(1500 * time.Millisecond); sc.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := tcpPair(t)
			defer a.Close()
			a.SetReadBuffer(8 << 10)
			b.SetWriteBuffer(2 * size)
			finished := make(chan struct{})
			sc := NewServerConn(b, Config{NotSentLowat: 2 * size}, func(ss *ServerStream) {
				s, err := ss.Accept(&Response{Status: 200})
				if err != nil {
					t.Error(err)
					return
				}
				s.Write(make([]byte, size))
				s.CloseWrite()
				io.Copy(io.Discard, s)
				close(finished)
			})
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			served := make(chan error, 1)
			go func() { served <- sc.Serve(ctx) }()
			p := newRawPeer(t, a)
			p.preface()
			p.fr.WriteWindowUpdate(0, 4<<20)
			p.connect(1)
			p.fr.WriteWindowUpdate(1, 4<<20)
			p.fr.WriteData(1, true, nil)
			<-finished
			eventually(t, func() bool { return sc.Streams() == 0 })
			if n, _ := unacknowledged(b); n == 0 {
				t.Fatal("the peer has taken everything")
			}
			closed, over := make(chan struct{}), make(chan struct{})
			go func() { defer close(over); trickle(a, closed) }()
			start := time.Now()
			end(sc, cancel)
			<-served
			if d := time.Since(start); d > partingMax/3 {
				t.Errorf("took %v", d)
			}
			close(closed)
			<-over
		})
	}
}
