package netstack

import (
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Every timer fires once and in time, whatever is set, stopped and set anew meanwhile, and none that was stopped.
func TestWheel(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) { turnWheel(t, rand.New(rand.NewPCG(seed, 14))) })
	}
}

func turnWheel(t *testing.T, r *rand.Rand) {
	w := newWheel(nil, nil)
	time.Sleep(time.Duration(r.IntN(1e9))) // not at a tick, and not always in the same slot
	type kept struct {
		*timer
		due time.Time // zero: stopped, or has fired
	}
	var all []*kept
	span := func() time.Duration { // of all levels, and beyond
		return time.Duration(r.Int64N(int64(10*time.Millisecond) << r.IntN(21)))
	}
	set := func(k *kept, d time.Duration) { k.due = time.Now().Add(max(d, minTimer)) }
	var mu sync.Mutex // over what functions and this goroutine note; never waited for in between
	for range 200 {
		synctest.Wait()
		mu.Lock()
		switch k := (*kept)(nil); {
		case len(all) == 0 || r.IntN(2) == 0:
			k = &kept{}
			d := span()
			set(k, d)
			k.timer = w.after(d, func() {
				mu.Lock()
				defer mu.Unlock()
				late := time.Since(k.due)
				if k.due.IsZero() || late < 0 || late > wheelTick {
					t.Errorf("fired %v after its time", late)
				}
				k.due = time.Time{}
			})
			all = append(all, k)
		case r.IntN(2) == 0:
			k = all[r.IntN(len(all))]
			if k.Stop() != !k.due.IsZero() {
				t.Error("Stop does not say what the timer was")
			}
			k.due = time.Time{}
		default:
			k = all[r.IntN(len(all))]
			d := span()
			set(k, d)
			k.Reset(d)
		}
		mu.Unlock()
		if r.IntN(3) == 0 {
			time.Sleep(span() / 8)
			synctest.Wait()
		}
		mu.Lock()
		for _, k := range all {
			if !k.due.IsZero() && time.Since(k.due) > wheelTick {
				t.Fatalf("%v late and not fired", time.Since(k.due))
			}
		}
		mu.Unlock()
	}
	time.Sleep(10 * time.Millisecond << 21)
	synctest.Wait()
	for _, k := range all {
		if !k.due.IsZero() {
			t.Errorf("never fired")
		}
	}
	if w.n != 0 || w.due != 0 {
		t.Errorf("%d timers are left, and the alarm is set for %d", w.n, w.due)
	}
}

// What waits for a lock that somebody holds keeps nothing from firing that is due later.
func TestWheelBlocked(t *testing.T) {
	w := newWheel(nil, nil)
	free, blocked, later := make(chan struct{}), make(chan struct{}), make(chan struct{})
	defer close(free)
	w.after(0, func() {
		close(blocked)
		<-free
	})
	<-blocked // else both may be due at once
	w.after(50*time.Millisecond, func() { close(later) })
	select {
	case <-later:
	case <-time.After(patience):
		t.Error("a timer waits for another one's function")
	}
}

// What one timer costs that is stopped, as most are, and one of the runtime's.
func BenchmarkWheel(b *testing.B) {
	w := newWheel(nil, nil)
	b.ReportAllocs()
	for range b.N {
		t := w.after(time.Second, func() {})
		t.Stop()
	}
}

func BenchmarkRuntimeTimer(b *testing.B) {
	b.ReportAllocs()
	for range b.N {
		t := time.AfterFunc(time.Second, func() {})
		t.Stop()
	}
}
