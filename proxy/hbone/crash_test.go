package hbone

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"ztun/proxy/rescue"
)

// TestPanicEndsOneTunnel: a panic in one of a connection's goroutines, also with locks held, ends that connection for
// all who use it, soon, and no other.
func TestPanicEndsOneTunnel(t *testing.T) {
	for _, tt := range []struct {
		name     string
		sabotage func(*ServerConn)
		h        func(first bool, s *ServerStream)
	}{
		{"in the reader, with the connection's lock held", func(sc *ServerConn) {
			sc.c.mu.Lock()
			defer sc.c.mu.Unlock()
			sc.c.leftAt, sc.c.cfg.Stats = 0, nil // the next request is refused, and that is to be counted
		}, nil},
		{"in a handler", nil, func(first bool, s *ServerStream) {
			if !first {
				panic("boom")
			}
		}},
		{"in a handler, with the connection's lock held", nil, func(first bool, s *ServerStream) {
			if !first {
				s.s.c.mu.Lock()
				panic("boom")
			}
		}},
		{"in a handler, with a stream's lock held", nil, func(first bool, s *ServerStream) {
			if !first {
				s.s.rmu.Lock()
				panic("boom")
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			panics := rescue.New(slog.New(slog.DiscardHandler))
			cfg := Config{Panics: panics}
			a, b := tcpPair(t)
			n := 0
			sc := NewServerConn(b, cfg, func(s *ServerStream) {
				n++
				if tt.h != nil {
					tt.h(n == 1, s)
				}
				st, err := s.Accept(&Response{Status: 200})
				if err == nil {
					st.Read(make([]byte, 1)) // until the end
				}
			})
			served := make(chan struct{})
			go func() { defer close(served); sc.Serve(context.Background()) }()
			cc, err := NewClientConn(a, Config{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
			defer cancel()
			first, _, err := cc.Open(ctx, &Request{Authority: "x:1"})
			if err != nil {
				t.Fatal(err)
			}
			if tt.sabotage != nil {
				tt.sabotage(sc)
			}
			if _, _, err := cc.Open(ctx, &Request{Authority: "x:1"}); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the request that panics: %v", err)
			}
			first.SetReadDeadline(time.Now().Add(patience))
			if _, err := first.Read(make([]byte, 1)); err == nil || isTimeout(err) {
				t.Errorf("a stream beside it: %v", err)
			}
			select {
			case <-served:
			case <-time.After(15 * time.Second):
				t.Fatal("the connection does not end")
			}
			if got := panics.Total(); got != 1 {
				t.Errorf("%d panics counted", got)
			}
			cc.Close()

			// Another one beside the same guard.
			a, b = tcpPair(t)
			other, _, reqs, end := link(t, a, b, cfg)
			c, s := pair(t, other, reqs)
			c.Close()
			s.Close()
			end()
		})
	}
}

// TestDialPanics: who waits for a dial that panics is told.
func TestDialPanics(t *testing.T) {
	panics := rescue.New(slog.New(slog.DiscardHandler))
	p := NewPool(PoolOptions{Config: Config{Panics: panics}, Dial: func(context.Context, Key) (Dialled, error) {
		panic("boom")
	}})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for range 2 {
		var e *rescue.Error
		if _, _, err := p.Open(ctx, Key{}, &Request{Authority: "x:1"}); !errors.As(err, &e) {
			t.Errorf("Open: %v", err)
		}
	}
	if s := p.Stats(); s.Keys != 0 || s.DialFailures != 2 {
		t.Errorf("%+v", s)
	}
	p.Close()
}
