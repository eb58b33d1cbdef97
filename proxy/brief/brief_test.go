package brief

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func begin(t *testing.T, s *Set) (context.Context, context.CancelFunc) {
	t.Helper()
	ctx, end := s.Begin()
	if ctx.Err() != nil {
		t.Fatalf("begins ended: %v", ctx.Err())
	}
	return ctx, end
}

// ended reports how ctx has ended, as everybody who looks sees it.
func ended(t *testing.T, ctx context.Context) error {
	t.Helper()
	select {
	case <-ctx.Done():
		if ctx.Err() == nil {
			t.Error("done without an error")
		}
	default:
		if ctx.Err() != nil {
			t.Errorf("%v, and not done", ctx.Err())
		}
	}
	return ctx.Err()
}

func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, stop := context.WithCancel(context.Background())
		s := New(parent, nil)
		a, endA := begin(t, s)
		b, endB := begin(t, s)
		c, endC := begin(t, s)
		defer endC()
		endB()
		endB()
		if ended(t, a) != nil || ended(t, b) != context.Canceled || ended(t, c) != nil {
			t.Error(a.Err(), b.Err(), c.Err())
		}
		a, release := Within(a, 10*time.Second)
		if d, ok := a.Deadline(); !ok || time.Until(d) != 10*time.Second {
			t.Errorf("deadline %v, %v", d, ok)
		}
		time.Sleep(10*time.Second - 1)
		synctest.Wait()
		if ended(t, a) != nil {
			t.Error("early:", a.Err())
		}
		time.Sleep(every + 1)
		synctest.Wait()
		if !errors.Is(ended(t, a), context.DeadlineExceeded) || ended(t, c) != nil {
			t.Error(a.Err(), c.Err())
		}
		release()
		endA() // it stays what it was
		if !errors.Is(ended(t, a), context.DeadlineExceeded) {
			t.Error(a.Err())
		}
		_, release = Within(c, time.Second)
		release()
		time.Sleep(time.Minute)
		synctest.Wait()
		if _, ok := c.Deadline(); ok || ended(t, c) != nil {
			t.Error("a deadline that was given up:", c.Err())
		}
		if s.due {
			t.Error("looks on although there is no deadline")
		}
		stop()
		synctest.Wait()
		if ended(t, c) != context.Canceled {
			t.Error("the parent's end:", c.Err())
		}
		if late, _ := s.Begin(); ended(t, late) != context.Canceled {
			t.Error("begun after the parent's end:", late.Err())
		}
		if s.first != nil {
			t.Error("ended contexts are kept")
		}
	})
}

// Package context's children end with it, without a goroutine, and with the Set itself.
func TestChildren(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, stop := context.WithCancel(context.WithValue(context.Background(), t, "value"))
		defer stop()
		s := New(parent, nil)
		a, endA := begin(t, s)
		child, endChild := context.WithTimeout(a, time.Hour)
		defer endChild()
		other, endOther := context.WithCancel(a)
		endOther()
		if ended(t, child) != nil || ended(t, other) != context.Canceled || ended(t, a) != nil {
			t.Error(child.Err(), other.Err(), a.Err())
		}
		if child.Value(t) != "value" {
			t.Error("no value of the parent's")
		}
		if n := len(a.(*Context).after); n != 1 {
			t.Errorf("%d children are known, want 1", n)
		}
		endA()
		synctest.Wait()
		if ended(t, child) != context.Canceled {
			t.Error(child.Err())
		}
		late, endLate := context.WithCancel(a)
		defer endLate()
		if ended(t, late) != context.Canceled {
			t.Error(late.Err())
		}
		plain, release := Within(s, time.Second)
		defer release()
		time.Sleep(time.Second)
		synctest.Wait()
		if !errors.Is(ended(t, plain), context.DeadlineExceeded) || s.Err() != nil {
			t.Error(plain.Err(), s.Err())
		}
	})
}

// Ends of all kinds at once leave nothing behind.
func TestAtOnce(t *testing.T) {
	parent, stop := context.WithCancel(context.Background())
	defer stop()
	s := New(parent, nil)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for range 50 {
				ctx, end := s.Begin()
				_, release := Within(ctx, time.Hour)
				go end()
				<-ctx.Done()
				release()
			}
			if i == 32 {
				stop()
			}
		})
	}
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := s.first; c != nil; c = c.next {
		if c.Err() == nil {
			t.Fatal("a context is left")
		}
	}
}
