package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// lossy is a connection whose far end can be made to vanish: without a word, or with a reset for the next write.
type lossy struct {
	net.Conn
	hole, reset atomic.Bool
}

func (l *lossy) Write(p []byte) (int, error) {
	switch {
	case l.reset.Load():
		l.Conn.Close()
		return 0, syscall.ECONNRESET
	case l.hole.Load():
		return len(p), nil
	}
	return l.Conn.Write(p)
}

// lossyFarm is a farm whose connections can vanish.
type lossyFarm struct {
	farm
	mu    sync.Mutex
	conns []*lossy
}

func (f *lossyFarm) dial(ctx context.Context, key Key) (Dialled, error) {
	d, err := f.farm.dial(ctx, key)
	if err != nil {
		return d, err
	}
	l := &lossy{Conn: d.Conn}
	f.mu.Lock()
	f.conns = append(f.conns, l)
	f.mu.Unlock()
	return Dialled{Conn: l}, nil
}

// TestStaleTunnel: a tunnel from before whose peer has gone, with a reset or without a word, costs a request a fresh
// tunnel and little time, not its life; so does any number of them.
func TestStaleTunnel(t *testing.T) {
	for name, c := range map[string]struct {
		tunnels int
		lose    func(*lossy)
		within  time.Duration
	}{
		"reset":      {1, func(l *lossy) { l.reset.Store(true) }, 10 * time.Millisecond},
		"resets":     {8, func(l *lossy) { l.reset.Store(true) }, 10 * time.Millisecond},
		"black hole": {1, func(l *lossy) { l.hole.Store(true) }, probeAfter + probeWait + 10*time.Millisecond},
		"holes":      {8, func(l *lossy) { l.hole.Store(true) }, probeAfter + probeWait + 10*time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &lossyFarm{farm: farm{t: t}}
				p := NewPool(PoolOptions{Dial: f.dial, MaxStreams: 1})
				key := testKey(1)
				var open []*Stream
				for range c.tunnels {
					s, _, err := p.Open(t.Context(), key, &Request{Authority: "h:1"})
					if err != nil {
						t.Fatal(err)
					}
					open = append(open, s)
				}
				for _, s := range open {
					s.CloseWrite()
					io.Copy(io.Discard, s)
				}
				synctest.Wait() // the streams' places are free again, so that the next requests meet these tunnels
				for _, l := range f.conns {
					c.lose(l)
				}
				dials := f.dials.Load()
				begin := time.Now()
				var wg sync.WaitGroup
				for range 3 * c.tunnels {
					wg.Go(func() {
						s, _, err := p.Open(t.Context(), key, &Request{Authority: "h:1"})
						if err != nil {
							t.Errorf("after %v: %v", time.Since(begin), err)
							return
						}
						s.Close()
					})
				}
				wg.Wait()
				if took := time.Since(begin); took > c.within {
					t.Errorf("took %v, want %v at most", took, c.within)
				}
				if f.dials.Load() == dials || p.Stats().Stale == 0 {
					t.Errorf("%d dials before and after, %d stale tunnels", dials, p.Stats().Stale)
				}
				for _, l := range f.conns {
					l.Conn.Close()
				}
				p.Close()
				f.wg.Wait()
			})
		})
	}
}

// TestSlowAnswer: a peer that takes its time to answer a request is asked and waited for, not left; an answer that
// turns the request down is an answer; and the second failure is the request's.
func TestSlowAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow, broken atomic.Bool
		dials := 0
		var wg sync.WaitGroup
		p := NewPool(PoolOptions{Dial: func(context.Context, Key) (Dialled, error) {
			dials++
			a, b := net.Pipe()
			var sc *ServerConn
			sc = NewServerConn(b, Config{}, func(ss *ServerStream) {
				switch {
				case broken.Load():
					sc.Abort(errors.New("broken"))
				case slow.Load():
					time.Sleep(9 * time.Second)
					ss.Refuse(503)
				default:
					ss.Accept(&Response{Status: 200})
				}
			})
			wg.Go(func() { sc.Serve(context.Background()) })
			return Dialled{Conn: a}, nil
		}})
		open := func() error {
			s, _, err := p.Open(t.Context(), testKey(1), &Request{Authority: "h:1"})
			if err == nil {
				s.Close()
			}
			return err
		}
		if err := open(); err != nil {
			t.Fatal(err)
		}
		slow.Store(true)
		begin := time.Now()
		var answer *StatusError
		if err := open(); !errors.As(err, &answer) || time.Since(begin) < 9*time.Second || dials != 1 {
			t.Errorf("a slow refusal: %v after %v, %d dials", err, time.Since(begin), dials)
		}
		broken.Store(true)
		if err := open(); err == nil || dials != 2 {
			t.Errorf("a peer that always breaks: %v, %d dials", err, dials)
		}
		p.Close()
		wg.Wait()
	})
}
