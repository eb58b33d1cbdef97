package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/identity"
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

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("did not come to pass")
}

// TestReset: how each code reads at the other end, with data before it.
func TestReset(t *testing.T) {
	a, b := tcpPair(t)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	defer stop()
	for _, code := range []http2.ErrCode{http2.ErrCodeNo, http2.ErrCodeCancel, http2.ErrCodeInternal, http2.ErrCodeConnect, http2.ErrCodeStreamClosed} {
		for _, fromServer := range []bool{false, true} {
			x, y := pair(t, cc, reqs)
			if fromServer {
				x, y = y, x
			}
			x.Write([]byte("data"))
			io.ReadFull(y, make([]byte, 2))
			x.Reset(code)
			rest, err := io.ReadAll(y)
			orderly := code == http2.ErrCodeNo || code == http2.ErrCodeCancel
			var se *StreamError
			if string(rest) != "ta" || orderly != (err == nil) || !orderly && (!errors.As(err, &se) || se.Code != code || !se.Remote) {
				t.Errorf("%v: %q %v", code, rest, err)
			}
			_, werr := y.Write([]byte("x"))
			pipe := orderly || code == http2.ErrCodeStreamClosed
			if errors.Is(werr, syscall.EPIPE) != pipe || errors.Is(werr, syscall.ECONNRESET) == pipe {
				t.Errorf("%v: write after reset: %v", code, werr)
			}
			if cerr := y.CloseWrite(); (cerr == nil) != (code == http2.ErrCodeNo) {
				t.Errorf("%v: CloseWrite after reset: %v", code, cerr)
			}
			if _, err := x.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			y.Close()
		}
	}
	eventually(t, func() bool { return cc.Streams() == 0 && sc.Streams() == 0 })
}

// TestAbandon: Close of an unfinished stream sends what was written, then CANCEL; a server that ended its side: NO_ERROR.
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
				fr.WriteSettings()
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
			if last := <-over; server && last != "GOAWAY 0 last=0 NO_ERROR" {
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

func testKey(n int) Key {
	return Key{
		Source: identity.ID{TrustDomain: "td", Namespace: "ns", ServiceAccount: "sa"}, Dest: "spiffe://td/ns/ns/sa/b",
		Addr: netip.MustParseAddrPort("10.0.0.1:15008"), SrcIP: netip.AddrFrom4([4]byte{10, 1, 0, byte(n)}),
	}
}

// farm is the servers that a pool dials.
type farm struct {
	t     testing.TB
	cfg   Config
	mu    sync.Mutex
	conns []*ServerConn
	wg    sync.WaitGroup
	dials atomic.Int32
	fail  atomic.Pointer[error]
	delay time.Duration
}

func (f *farm) dial(ctx context.Context, key Key) (net.Conn, error) {
	f.dials.Add(1)
	select {
	case <-time.After(f.delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := f.fail.Load(); err != nil {
		return nil, *err
	}
	a, b := net.Pipe()
	sc := NewServerConn(b, f.cfg, func(ss *ServerStream) {
		s, err := ss.Accept(&Response{Status: 200})
		if err == nil {
			io.Copy(io.Discard, s)
			s.CloseWrite()
		}
	})
	f.mu.Lock()
	f.conns = append(f.conns, sc)
	f.mu.Unlock()
	f.wg.Go(func() { sc.Serve(context.Background()) })
	return a, nil
}

func poolTest(t *testing.T, o PoolOptions, fc Config, test func(t *testing.T, p *Pool, f *farm, open func(key int) *Stream)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := &farm{t: t, cfg: fc, delay: time.Millisecond}
		o.Dial = f.dial
		p := NewPool(o)
		test(t, p, f, func(key int) *Stream {
			t.Helper()
			s, _, err := p.Open(context.Background(), testKey(key), &Request{Authority: "h:1"})
			if err != nil {
				t.Fatal(err)
			}
			return s
		})
		p.Close()
		f.wg.Wait()
		if st := p.Stats(); st.Keys != 0 || st.Conns != 0 || st.Streams != 0 {
			t.Errorf("left in the pool: %+v", st)
		}
	})
}

// finish ends a stream in good order.
func finish(s *Stream) {
	s.CloseWrite()
	io.Copy(io.Discard, s)
	s.Close()
}

// TestPoolSharing is checks 59-63 of the specification and 71's improvement.
func TestPoolSharing(t *testing.T) {
	poolTest(t, PoolOptions{MaxStreams: 3}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		a, b, c := open(1), open(1), open(1)
		if n := f.dials.Load(); n != 1 {
			t.Error(n, "tunnels for 3 streams")
		}
		d := open(1)
		if n := f.dials.Load(); n != 2 {
			t.Error(n, "tunnels for 4 streams")
		}
		e := open(2)
		if n := f.dials.Load(); n != 3 {
			t.Error("another source address shares a tunnel")
		}
		for _, s := range []*Stream{a, b, c} {
			finish(s)
		}
		synctest.Wait()
		x, y, z := open(1), open(1), open(1) // the saturated tunnel is used again
		if n := f.dials.Load(); n != 3 {
			t.Error(n)
		}
		for _, s := range []*Stream{d, e, x, y, z} {
			finish(s)
		}
	})
	poolTest(t, PoolOptions{MaxStreams: 1000}, Config{MaxStreams: 1000}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { finish(open(1)) })
		}
		wg.Wait()
		if n := f.dials.Load(); n != 1 {
			t.Error(n, "tunnels")
		}
	})
	poolTest(t, PoolOptions{}, Config{MaxStreams: 1000}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		var list []*Stream
		for range 300 {
			list = append(list, open(1))
		}
		if n := f.dials.Load(); n != 3 {
			t.Error(n, "tunnels for 300 streams")
		}
		for _, s := range list {
			finish(s)
		}
	})
}

// TestPoolPeerLimit: the server's own limit holds once it is known.
func TestPoolPeerLimit(t *testing.T) {
	poolTest(t, PoolOptions{MaxStreams: 100}, Config{MaxStreams: 2}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		var list []*Stream
		for range 6 {
			list = append(list, open(1))
			synctest.Wait()
		}
		if n := f.dials.Load(); n != 3 {
			t.Error(n)
		}
		for _, s := range list {
			finish(s)
		}
	})
}

// TestPoolFailure: one failed dial is everybody's, at once, and leaves nothing.
func TestPoolFailure(t *testing.T) {
	poolTest(t, PoolOptions{}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		sad := errors.New("sad")
		f.fail.Store(&sad)
		f.delay = time.Second
		start := time.Now()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, _, err := p.Open(context.Background(), testKey(1), &Request{}); err != sad {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := f.dials.Load(); n != 1 || time.Since(start) != time.Second {
			t.Error(n, time.Since(start))
		}
		if st := p.Stats(); st.Keys != 0 {
			t.Errorf("%+v", st)
		}
		f.fail.Store(nil)
		finish(open(1))
	})
}

// TestPoolImpatience: who gives up does not take the dial from the others; when all have, it is called off.
func TestPoolImpatience(t *testing.T) {
	poolTest(t, PoolOptions{}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		f.delay = time.Second
		short, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, _, err := p.Open(short, testKey(1), &Request{}); err != context.DeadlineExceeded {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() { finish(open(1)) })
		wg.Wait()
		start := time.Now()
		short, cancel = context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		if _, _, err := p.Open(short, testKey(2), &Request{}); err != context.DeadlineExceeded {
			t.Error(err)
		}
		synctest.Wait()
		if time.Since(start) != 100*time.Millisecond || p.Stats().Keys != 1 {
			t.Error(time.Since(start), p.Stats())
		}
	})
}

// TestPoolIdle: an unused tunnel is closed 5 min after its last use, one with a stream is not.
func TestPoolIdle(t *testing.T) {
	poolTest(t, PoolOptions{}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		s := open(1)
		time.Sleep(time.Hour)
		finish(s)
		synctest.Wait()
		time.Sleep(5*time.Minute - time.Second)
		if st := p.Stats(); st.Conns != 1 {
			t.Errorf("%+v", st)
		}
		finish(open(1)) // starts the time anew
		time.Sleep(5*time.Minute - time.Second)
		if st := p.Stats(); st.Conns != 1 || st.Dials != 1 {
			t.Errorf("%+v", st)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if st := p.Stats(); st.Conns != 0 || st.Keys != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestPoolGoAway: check 66.
func TestPoolGoAway(t *testing.T) {
	poolTest(t, PoolOptions{}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		s := open(1)
		f.conns[0].GoAway()
		synctest.Wait()
		x := open(1)
		if n := f.dials.Load(); n != 2 {
			t.Error(n)
		}
		if _, err := s.Write([]byte("goes on")); err != nil {
			t.Error(err)
		}
		finish(s)
		finish(x)
		synctest.Wait()
		if st := p.Stats(); st.Conns != 1 {
			t.Errorf("%+v", st)
		}
		// A dead one is replaced as well.
		f.conns[1].Close()
		finish(open(1))
	})
}

// TestPoolBound: the least recently used tunnel leaves, without harm to its streams.
func TestPoolBound(t *testing.T) {
	poolTest(t, PoolOptions{MaxConns: 2}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		a := open(1)
		time.Sleep(time.Second)
		b := open(2)
		time.Sleep(time.Second)
		c := open(3)
		synctest.Wait()
		if st := p.Stats(); st.Keys != 2 || st.Conns != 3 {
			t.Errorf("%+v", st)
		}
		if _, err := a.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		finish(a)
		synctest.Wait()
		if st := p.Stats(); st.Keys != 2 || st.Conns != 2 {
			t.Errorf("%+v", st)
		}
		finish(b)
		finish(c)
	})
}

func TestPoolShutdown(t *testing.T) {
	poolTest(t, PoolOptions{}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		s := open(1)
		done := make(chan error, 1)
		go func() { done <- p.Shutdown(context.Background()) }()
		synctest.Wait()
		if _, _, err := p.Open(context.Background(), testKey(1), &Request{}); err != ErrPoolClosed {
			t.Error(err)
		}
		finish(s)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	poolTest(t, PoolOptions{}, Config{}, func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
		s := open(1)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := p.Shutdown(ctx); err != context.DeadlineExceeded {
			t.Error(err)
		}
		if _, err := s.Write([]byte("x")); err == nil {
			t.Error("stream survived")
		}
	})
}
