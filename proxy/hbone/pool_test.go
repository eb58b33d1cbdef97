package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ztun/proxy/identity"
)

func testKey(n int) Key {
	return Key{
		Source: identity.ID{TrustDomain: "td", Namespace: "ns", ServiceAccount: "sa"}, Dest: "spiffe://td/ns/ns/sa/b",
		Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 15008),
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

func (f *farm) dial(ctx context.Context, key Key) (Dialled, error) {
	f.dials.Add(1)
	select {
	case <-time.After(f.delay):
	case <-ctx.Done():
		return Dialled{}, ctx.Err()
	}
	if err := f.fail.Load(); err != nil {
		return Dialled{}, *err
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
	return Dialled{Conn: a}, nil
}

func poolTest(t *testing.T, o PoolOptions, fc Config,
	test func(t *testing.T, p *Pool, f *farm, open func(key int) *Stream)) {
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
	poolTest(t, PoolOptions{MaxStreams: 1000}, Config{MaxStreams: 1000},
		func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
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
	poolTest(t, PoolOptions{MaxStreams: 100}, Config{MaxStreams: 2},
		func(t *testing.T, p *Pool, f *farm, open func(int) *Stream) {
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

// stuck is a connection whose reader stops for good. What is on the way trickles on: whoever waits while there is some
// progress waits for half a minute or all of partingMax, which no busy machine is taken for.
type stuck struct {
	net.Conn
	stop, closed chan struct{}
}

func (s *stuck) Read(p []byte) (int, error) {
	select {
	case <-s.stop:
		trickle(s.Conn, s.closed)
		return 0, net.ErrClosed
	default:
		return s.Conn.Read(p[:min(len(p), 1024)])
	}
}

// trickle reads what c's small buffer holds every two seconds, until closed: a kernel offers no less than all of it.
func trickle(c net.Conn, closed <-chan struct{}) {
	buf := make([]byte, 64<<10)
	for {
		select {
		case <-closed:
			return
		case <-time.After(2 * time.Second):
			c.SetReadDeadline(time.Now().Add(time.Millisecond))
			c.Read(buf)
		}
	}
}

// TestPoolCloseIsBounded: a server that takes nothing any more does not hold up the end of the pool (a pod's deletion,
// the end of the daemon).
func TestPoolCloseIsBounded(t *testing.T) {
	a, b := tcpPair(t)
	a.SetWriteBuffer(1 << 20)
	b.SetReadBuffer(8 << 10)
	server := &stuck{Conn: b, stop: make(chan struct{}), closed: make(chan struct{})}
	accepted := make(chan struct{})
	served := make(chan error, 1)
	go func() {
		served <- NewServerConn(server, Config{}, func(ss *ServerStream) {
			s, err := ss.Accept(&Response{Status: 200})
			if err != nil {
				t.Error(err)
				return
			}
			s.CloseWrite()
			close(accepted)
			io.Copy(io.Discard, s)
		}).Serve(context.Background())
	}()
	p := NewPool(PoolOptions{Config: Config{NotSentLowat: 1 << 20}, Dial: func(context.Context, Key) (Dialled, error) {
		return Dialled{Conn: a}, nil
	}})
	s, _, err := p.Open(context.Background(), testKey(1), &Request{Authority: "h:1"})
	if err != nil {
		t.Fatal(err)
	}
	<-accepted
	close(server.stop)
	s.Write(make([]byte, 400<<10))
	finish(s)
	if n, _ := unacknowledged(a); n == 0 {
		t.Fatal("the server has taken everything")
	}
	start := time.Now()
	p.Close()
	if d := time.Since(start); d > partingMax/3 {
		t.Errorf("took %v", d)
	}
	close(server.closed)
	b.Close()
	<-served
}
