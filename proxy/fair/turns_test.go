package fair

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestTurns: no more than n work at a time, and those who wait go in turn by source, whatever the number of each. After
// each stretch of work there is a pause.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := NewTurns[string](2, 1500*time.Millisecond, 100*time.Millisecond)
		var working, most atomic.Int64
		var mu sync.Mutex
		var order []string
		work := func(source string) {
			turns.Take(source)
			defer turns.Give()
			most.Store(max(most.Load(), working.Add(1)))
			mu.Lock()
			order = append(order, source)
			mu.Unlock()
			time.Sleep(time.Second)
			working.Add(-1)
		}
		var wg sync.WaitGroup
		start := time.Now()
		sources := []string{"greedy", "greedy", "greedy", "greedy", "greedy", "greedy", "honest", "other", "honest"}
		for _, source := range sources {
			wg.Go(func() { work(source) })
			synctest.Wait() // they come one after the other
		}
		wg.Wait()
		want := []string{"greedy", "greedy", "greedy", "honest", "other", "greedy", "honest", "greedy", "greedy"}
		// The two of each second are in no order.
		for i := 1; i+1 < len(order); i += 2 {
			slices.Sort(order[i-1 : i+1])
			slices.Sort(want[i-1 : i+1])
		}
		if most.Load() != 2 || !slices.Equal(order, want) || time.Since(start) != 5*time.Second+2*100*time.Millisecond {
			t.Errorf("%d at a time, in %v: %v, want %v", most.Load(), time.Since(start), order, want)
		}
		turns.Take("later") // nobody has worked for a while: without a pause
		time.Sleep(5 * time.Second)
		turns.Give()
		time.Sleep(time.Second)
		start = time.Now()
		turns.Take("again")
		turns.Give()
		if time.Since(start) != 0 {
			t.Errorf("%v until the turn after a pause", time.Since(start))
		}
		if turns.free != 2 || len(turns.waiting) != 0 || len(turns.next) != 0 {
			t.Errorf("left behind: %+v", turns)
		}
	})
}

// TestTurnsShort: with pauses longer than stretches everybody still gets a turn, one after each pause.
func TestTurnsShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := NewTurns[int](1, 0, time.Millisecond)
		time.Sleep(time.Second)
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() { turns.Take(i); turns.Give() })
		}
		wg.Wait()
		if d := time.Since(start); d != 9*time.Millisecond {
			t.Errorf("%v for ten turns", d)
		}
	})
}

// TestTurnsRace: many at once, each gets its turn.
func TestTurnsRace(t *testing.T) {
	turns := NewTurns[int](3, time.Millisecond, 10*time.Microsecond)
	var working, done atomic.Int64
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			for range 50 {
				turns.Take(i % 7)
				if n := working.Add(1); n > 3 {
					t.Errorf("%d at a time", n)
				}
				working.Add(-1)
				turns.Give()
			}
			done.Add(1)
		})
	}
	wg.Wait()
	if done.Load() != 200 || turns.free != 3 {
		t.Errorf("%d done, %d turns free", done.Load(), turns.free)
	}
}
