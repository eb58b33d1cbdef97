package fair

import (
	"sync"
	"time"
)

// Turns lets a few at a time do work that keeps a processor busy, in turn by source: one of each source that waits, the
// longest waiting first. It bounds nobody's number: whoever waits has a place already. All methods may be called at the
// same time.
//
// After a stretch of such work there is a pause, in which nobody has a turn. It is for all others: Go looks at the
// network when there is nothing else to run, or every 10 ms. With one processor, work without a pause delays by that
// every packet of everybody, however short each piece of it is.
type Turns[S comparable] struct {
	stretch, pause time.Duration

	mu      sync.Mutex
	all     int // turns at a time
	free    int
	waiting map[S][]chan struct{}
	next    []S       // each source that waits, once
	began   time.Time // of the present stretch
	ended   time.Time // of the latest turn
	pausing bool
	fresh   bool // a pause has ended, and nobody had a turn since
}

// NewTurns lets n work at a time, at least one, with pauses of that length after stretches of that length.
func NewTurns[S comparable](n int, stretch, pause time.Duration) *Turns[S] {
	return &Turns[S]{stretch: stretch, pause: pause, all: max(n, 1), free: max(n, 1),
		waiting: map[S][]chan struct{}{}}
}

// Take waits for a turn. Whoever has one waits for nothing else meanwhile, and gives it back soon.
func (t *Turns[S]) Take(source S) {
	t.mu.Lock()
	now := time.Now()
	if !t.pausing && t.free == t.all && now.Sub(t.ended) > t.pause {
		t.fresh, t.began = true, now // there was a pause without our doing
	}
	mine := make(chan struct{})
	if len(t.waiting[source]) == 0 {
		t.next = append(t.next, source)
	}
	t.waiting[source] = append(t.waiting[source], mine)
	t.grant(now)
	t.mu.Unlock()
	<-mine
}

// Give ends a turn.
func (t *Turns[S]) Give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free++
	t.ended = time.Now()
	t.grant(t.ended)
}

// grant gives what turns there are to those who wait. mu is held.
func (t *Turns[S]) grant(now time.Time) {
	for t.free > 0 && len(t.next) > 0 && !t.pausing {
		if !t.fresh && now.Sub(t.began) >= t.stretch {
			t.pausing = true
			time.AfterFunc(t.pause, t.resume)
			return
		}
		t.fresh = false
		source := t.next[0]
		t.next = t.next[1:]
		q := t.waiting[source]
		close(q[0])
		if q = q[1:]; len(q) > 0 {
			t.waiting[source] = q
			t.next = append(t.next, source)
		} else {
			delete(t.waiting, source)
		}
		t.free--
	}
}

// resume ends a pause. Nobody waits for it to be called: whoever waits for a turn does.
func (t *Turns[S]) resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pausing, t.fresh, t.began = false, true, time.Now()
	t.grant(t.began)
}
