package ca

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ztun/proxy/identity"
)

// TestOrder is upstream's scenario (spec/dataplane.md Appendix C): one call at a time, 1 s each.
func TestOrder(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f, TTL: 100 * time.Second, Concurrency: 1}, func(t *testing.T, m *Manager) {
		start := time.Now()
		var all sync.WaitGroup
		ask := func(name string, prio priority) {
			all.Go(func() {
				if _, err := m.get(t.Context(), id(name), prio); err != nil {
					t.Error(name, err)
				}
			})
			synctest.Wait()
		}
		ask("id1", background)
		ask("id2", background)
		ask("id3", warmup)
		ask("id4", realTime)
		if s := m.Stats(); s.Queued != 3 || s.Running != 1 || s.Waiting != 4 || s.Identities != 4 {
			t.Errorf("%+v", s)
		}
		all.Wait()
		wantOrder(t, f, "id1", "id4", "id3", "id2")
		if took := time.Since(start); took != 4*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// TestBump: what was to be prefetched at leisure is wanted by a connection now.
func TestBump(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f, Concurrency: 1}, func(t *testing.T, m *Manager) {
		for _, name := range []string{"1", "2", "3", "4"} {
			m.Prefetch(id(name))
			synctest.Wait()
		}
		must(t, m, "4")
		must(t, m, "2")
		must(t, m, "3")
		wantOrder(t, f, "1", "4", "2", "3")
	})
}

func TestSharedFetch(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		var all sync.WaitGroup
		var got [100]*identity.Certificate
		for i := range got {
			all.Go(func() { got[i], _ = m.Certificate(t.Context(), id("a")) })
		}
		all.Wait()
		for _, c := range got {
			if c == nil || c != got[0] {
				t.Fatal("callers got different certificates")
			}
		}
		if f.calls() != 1 {
			t.Errorf("%d calls", f.calls())
		}
		m.Prefetch(id("a"))
		must(t, m, "a")
		synctest.Wait()
		if f.calls() != 1 {
			t.Errorf("%d calls", f.calls())
		}
	})
}

func TestConcurrency(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		for i := range 20 {
			m.Prefetch(id(fmt.Sprint(i)))
		}
		time.Sleep(500 * time.Millisecond)
		if s := m.Stats(); s.Running != 8 || s.Queued != 12 {
			t.Errorf("%+v", s)
		}
		time.Sleep(3 * time.Second)
		if s := m.Stats(); s.Signed != 20 || s.Waiting != 0 || f.most != 8 {
			t.Errorf("%+v, %d at once", s, f.most)
		}
	})
}

// TestRenewal: 100 s certificates are renewed every 50 s, callers never wait again, nobody gets an expired one.
func TestRenewal(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f, TTL: 100 * time.Second}, func(t *testing.T, m *Manager) {
		must(t, m, "a")
		got := time.Now()
		for range 100 {
			time.Sleep(10 * time.Second)
			before := time.Now()
			if c := must(t, m, "a"); !c.ValidAt(time.Now()) || !before.Equal(time.Now()) {
				t.Fatalf("at %v: %v", time.Now(), c)
			}
		}
		if n := f.calls(); n < 19 || n > 21 { // 1000 s, each 50 s and the CA's second
			t.Errorf("%d calls", n)
		}
		same(t, "first renewal", f.at[1], got.Add(50*time.Second))
	})
}

// TestDayLong: checklist 128.
func TestDayLong(t *testing.T) {
	f := &fakeSigner{}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		start := time.Now()
		c := must(t, m, "a")
		same(t, "end", c.Leaf.NotAfter, start.Add(24*time.Hour))
		time.Sleep(20 * time.Hour)
		if f.calls() != 2 {
			t.Fatalf("%d calls", f.calls())
		}
		same(t, "renewal", f.at[1], start.Add(12*time.Hour))
	})
}

func TestJitter(t *testing.T) {
	f := &fakeSigner{}
	n := 0.0
	bubble(t, ManagerOptions{Signer: f, Concurrency: 1, Rand: func() float64 {
		n += 0.01
		return n
	}}, func(t *testing.T, m *Manager) {
		start := time.Now()
		for i := range 50 {
			must(t, m, fmt.Sprint(i))
		}
		time.Sleep(12*time.Hour + time.Second)
		if f.calls() != 100 {
			t.Fatalf("%d calls", f.calls())
		}
		first, last := f.at[50].Sub(start), f.at[99].Sub(start)
		if first < 10*time.Hour+48*time.Minute || last > 12*time.Hour || last-first < 30*time.Minute {
			t.Errorf("renewed from %v to %v", first, last)
		}
	})
}

// TestOldServed: checklist 129. The CA goes down after the first certificate and comes back.
func TestOldServed(t *testing.T) {
	f := &fakeSigner{}
	bubble(t, ManagerOptions{Signer: f, TTL: 100 * time.Second}, func(t *testing.T, m *Manager) {
		old := must(t, m, "a")
		f.set(errDown)
		time.Sleep(99 * time.Second)
		if c := must(t, m, "a"); c != old {
			t.Fatal("not the old certificate")
		}
		if d := m.Dump(); d[0].State != "Available" || d[0].Chain[0] != old.Leaf {
			t.Errorf("%+v", d)
		}
		tried := f.calls()
		if tried < 12 || tried > 20 { // at 50 s, then after 0.8, 1.6, 3.2, 6.4, 12.8 s, then a third of what is left
			t.Errorf("%d tries", tried)
		}
		time.Sleep(1100 * time.Millisecond)
		if _, err := m.Certificate(t.Context(), id("a")); !errors.Is(err, errDown) {
			t.Fatalf("after the end: %v", err)
		}
		if n := f.calls() - tried; n < 1 || n > 2 {
			t.Errorf("%d tries, want one at the end and perhaps one before", n)
		}
		failed := f.calls() - 1
		if d := m.Dump(); d[0].State != "Unavailable: "+errDown.Error() || len(d[0].Chain) != 0 {
			t.Errorf("%+v", d)
		}
		f.set(nil)
		time.Sleep(20 * time.Second) // the many short pauses did not make those after the end longer
		if c := must(t, m, "a"); c == old {
			t.Error("the old certificate")
		}
		if s := m.Stats(); s.Failed != uint64(failed) {
			t.Errorf("%+v, want %d failed", s, failed)
		}
	})
}

// TestNegativeCache: checklist 130.
func TestNegativeCache(t *testing.T) {
	f := &fakeSigner{latency: 10 * time.Millisecond, fail: errDown}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		for range 100 {
			if _, err := m.Certificate(t.Context(), id("a")); !errors.Is(err, errDown) {
				t.Fatal(err)
			}
		}
		m.Prefetch(id("a"))
		synctest.Wait()
		if f.calls() != 1 {
			t.Fatalf("%d calls", f.calls())
		}
		time.Sleep(time.Hour)
		n := f.calls() // 1, 2, 4 ... 128, then 150 s, all at 0.8
		if n < 30 || n > 45 {
			t.Errorf("%d calls in an hour", n)
		}
		if gap := f.at[n-1].Sub(f.at[n-2]); gap < 119*time.Second || gap > 121*time.Second {
			t.Errorf("last pause %v", gap)
		}
		f.set(nil)
		time.Sleep(lastRetry)
		must(t, m, "a")
		// Back to the start after a success.
		f.set(errDown)
		m.mu.Lock()
		failures := m.entries[id("a")].failures
		m.mu.Unlock()
		if failures != 0 {
			t.Errorf("%d failures kept", failures)
		}
	})
}

// TestForget: waiters are told, the fetch is cancelled, its result discarded, and the identity can come back.
func TestForget(t *testing.T) {
	f := &fakeSigner{latency: time.Minute}
	bubble(t, ManagerOptions{Signer: f, Concurrency: 1, SignTimeout: time.Hour}, func(t *testing.T, m *Manager) {
		var all sync.WaitGroup
		for _, name := range []string{"running", "queued"} {
			all.Go(func() {
				if _, err := m.Certificate(t.Context(), id(name)); err != ErrForgotten {
					t.Error(name, err)
				}
			})
			synctest.Wait()
		}
		start := time.Now()
		m.Forget(id("queued"))
		m.Forget(id("running"))
		m.Forget(id("unknown"))
		all.Wait()
		must(t, m, "running")
		if took := time.Since(start); took != time.Minute {
			t.Errorf("took %v: the forgotten fetch kept its place", took)
		}
		wantOrder(t, f, "running", "running")
		if s := m.Stats(); s.Discarded != 1 || s.Signed != 1 || s.Failed != 0 || s.Identities != 1 {
			t.Errorf("%+v", s)
		}
		m.Forget(id("running"))
		if d := m.Dump(); len(d) != 0 {
			t.Errorf("%+v", d)
		}
		time.Sleep(48 * time.Hour)
		if f.calls() != 2 {
			t.Error("a forgotten identity was renewed")
		}
	})
}

func TestBounds(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f, Concurrency: 1, QueueLimit: 8, MaxIdentities: 9}, func(t *testing.T, m *Manager) {
		for i := range 5 {
			m.Prefetch(id(fmt.Sprint("warm", i)))
			synctest.Wait()
		}
		if s := m.Stats(); s.PrefetchDropped != 2 || s.Queued != 2 || s.Running != 1 {
			t.Errorf("%+v", s)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for i := range 6 {
			all.Go(func() { _, _ = m.Certificate(ctx, id(fmt.Sprint("real", i))) })
		}
		synctest.Wait()
		if _, err := m.Certificate(ctx, id("one too many")); err != ErrBusy {
			t.Error(err)
		}
		cancel()
		all.Wait()
		time.Sleep(time.Minute)
		if _, err := m.Certificate(t.Context(), id("ten")); err != ErrBusy { // nine are known
			t.Error(err)
		}
		m.Forget(id("warm0"))
		must(t, m, "ten")
		if s := m.Stats(); s.Busy != 2 || s.Identities != 9 || s.Signed != 10 {
			t.Errorf("%+v", s)
		}
	})
}

// TestCallerGone: a caller's end is not the fetch's, and is told apart from failure.
func TestCallerGone(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := m.Certificate(ctx, id("a"))
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), id("a").String()) {
			t.Error(err)
		}
		must(t, m, "a")
		if f.calls() != 1 {
			t.Errorf("%d calls", f.calls())
		}
	})
}

// TestSignTimeout: a CA that never answers holds its place for a limited time, and others come through.
func TestSignTimeout(t *testing.T) {
	f := &fakeSigner{latency: 24 * time.Hour}
	bubble(t, ManagerOptions{Signer: f, SignTimeout: 5 * time.Second, Concurrency: 1}, func(t *testing.T, m *Manager) {
		start := time.Now()
		_, err := m.Certificate(t.Context(), id("a"))
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 5*time.Second {
			t.Error(err, time.Since(start))
		}
	})
}

// TestShutdown: Run waits for its goroutines, waiters are told, valid certificates are served on.
func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeSigner{}
		m := NewManager(ManagerOptions{Signer: f})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- m.Run(ctx) }()
		must(t, m, "a")
		f.latency = time.Hour
		waiter := make(chan error)
		go func() {
			_, err := m.Certificate(t.Context(), id("b"))
			waiter <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-waiter; err != ErrStopped {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		must(t, m, "a")
		if _, err := m.Certificate(t.Context(), id("c")); err != ErrStopped {
			t.Error(err)
		}
		time.Sleep(25 * time.Hour)
		if _, err := m.Certificate(t.Context(), id("a")); err != ErrStopped {
			t.Error(err)
		}
		if err := m.Run(t.Context()); err == nil {
			t.Error("Run ran twice")
		}
		if s := m.Stats(); s.Failed != 0 {
			t.Errorf("%+v: the end of Run is no failure", s)
		}
	})
}

// TestBeforeRun: what is asked before Run starts is answered once it runs.
func TestBeforeRun(t *testing.T) {
	f := &fakeSigner{}
	synctest.Test(t, func(t *testing.T) {
		m := NewManager(ManagerOptions{Signer: f})
		m.Prefetch(id("a"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		time.Sleep(time.Hour)
		go func() { done <- m.Run(ctx) }()
		must(t, m, "a")
		cancel()
		<-done
	})
}

// TestWarning: the fake CA says what it is; keys are in no log line.
func TestWarning(t *testing.T) {
	var log bytes.Buffer
	bubble(t,
		ManagerOptions{Signer: NewFake(),
			Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))},
		func(t *testing.T, m *Manager) {
			must(t, m, "a")
			if s := log.String(); !strings.Contains(s, "level=WARN") || !strings.Contains(s, "fake CA") ||
				!strings.Contains(s, "certificate received") {
				t.Error(s)
			}
		})
}

// TestFirstExpiry: the certificate that ends first is told, and is no longer once it is renewed or its identity
// forgotten.
func TestFirstExpiry(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f, TTL: time.Hour}, func(t *testing.T, m *Manager) {
		if s := m.Stats(); !s.FirstExpiry.IsZero() {
			t.Errorf("of nothing: %v", s.FirstExpiry)
		}
		must(t, m, "a")
		first := m.Stats().FirstExpiry
		time.Sleep(10 * time.Minute)
		must(t, m, "b")
		if got := m.Stats().FirstExpiry; !got.Equal(first) || !first.After(time.Now()) {
			t.Errorf("%v, a's is %v", got, first)
		}
		m.Forget(id("a"))
		if got := m.Stats().FirstExpiry; !got.After(first) {
			t.Errorf("%v though a is forgotten", got)
		}
	})
}
