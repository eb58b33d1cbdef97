package netstack

import (
	"math/bits"
	"sync"
	"time"

	"ztun/proxy/rescue"
)

// A wheel's levels: slots of one tick each, then of as many ticks as the level below has slots in all. What is further
// away than the last level reaches (70 minutes) waits in its last slot and is put in place anew from there.
const (
	wheelTick = 4 * time.Millisecond // a jiffy at 250 Hz, as coarse as Linux's own
	nearBits  = 8                    // 256 slots, a second
	farBits   = 6                    // 64 slots, a minute and an hour
	nearSlots = 1 << nearBits
	farSlots  = 1 << farBits
	wheelSpan = 1 << (nearBits + 2*farBits) // in ticks

	maxTimer = 1 << 60 // no sum with it overflows; 36 years
)

// wheel holds the timers of one stack: a connection has some four from its SYN to its end, of which one fires. With one
// of the runtime's each that is three objects, a place in its heap, and for each that fires a goroutine and perhaps a
// thread's wake-up; here it is one object, and what is due in the same tick shares all that. A timer is late by up to a
// tick, never early.
type wheel struct {
	base   time.Time
	panics *rescue.Panics // catches those of what is due
	crash  func(error)    // is told of them

	mu    sync.Mutex
	now   int64 // ticks since base of which all is done
	n     int   // timers in the slots
	near  [nearSlots]*timer
	far   [2][farSlots]*timer
	inUse [nearSlots / 64]uint64 // slots of near that are not empty
	farIn [2]uint64
	alarm *time.Timer
	due   int64 // the tick that alarm is set for, 0 if it is not
}

// timer is one timer of a wheel.
type timer struct {
	w          *wheel
	f          func()
	when       int64   // in ticks
	at         **timer // its slot, nil while it is in none
	prev, next *timer  // in the slot
}

func newWheel(panics *rescue.Panics, crash func(error)) *wheel {
	return &wheel{base: time.Now(), panics: panics, crash: crash}
}

// after has f called once, after d (minTimer at least) or up to a tick later, on a goroutine that it shares with what
// is due then.
func (w *wheel) after(d time.Duration, f func()) *timer {
	t := &timer{w: w, f: f}
	w.mu.Lock()
	w.set(t, d)
	w.mu.Unlock()
	return t
}

// Stop has the timer's function called no more. False: it is being called, was, or the timer was stopped.
func (t *timer) Stop() bool {
	t.w.mu.Lock()
	defer t.w.mu.Unlock()
	set := t.at != nil
	t.w.remove(t)
	return set
}

// Reset has the function called after d, and only then.
func (t *timer) Reset(d time.Duration) {
	t.w.mu.Lock()
	t.w.remove(t)
	t.w.set(t, d)
	t.w.mu.Unlock()
}

// set puts t into its slot. mu is held.
func (w *wheel) set(t *timer, d time.Duration) {
	since := time.Since(w.base)
	if w.n == 0 {
		w.now = int64(since / wheelTick) // nothing was to be done meanwhile
	}
	d = min(max(d, minTimer), maxTimer)
	t.when = max(int64((since+d+wheelTick-1)/wheelTick), w.now+1)
	w.n++
	w.place(t)
	if w.due == 0 || t.when < w.due {
		w.wake(t.when, since)
	}
}

// place finds t's slot by how far away it is. mu is held.
func (w *wheel) place(t *timer) {
	when := t.when
	if when-w.now >= wheelSpan {
		when = w.now + wheelSpan - 1
	}
	switch away := when - w.now; {
	case away < nearSlots:
		i := when & (nearSlots - 1)
		w.inUse[i/64] |= 1 << (i % 64)
		t.at = &w.near[i]
	case away < nearSlots*farSlots:
		i := when >> nearBits & (farSlots - 1)
		w.farIn[0] |= 1 << i
		t.at = &w.far[0][i]
	default:
		i := when >> (nearBits + farBits) & (farSlots - 1)
		w.farIn[1] |= 1 << i
		t.at = &w.far[1][i]
	}
	if t.next = *t.at; t.next != nil {
		t.next.prev = t
	}
	t.prev, *t.at = nil, t
}

// remove takes t out of its slot if it is in one. That the slot is empty then is found out when its time comes. mu is
// held.
func (w *wheel) remove(t *timer) {
	if t.at == nil {
		return
	}
	if t.next != nil {
		t.next.prev = t.prev
	}
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		*t.at = t.next
	}
	t.at, t.prev, t.next = nil, nil, nil
	w.n--
}

// wake sets the alarm for a tick. mu is held.
func (w *wheel) wake(tick int64, since time.Duration) {
	w.due = tick
	d := time.Duration(tick)*wheelTick - since
	if w.alarm == nil {
		w.alarm = time.AfterFunc(d, w.panics.Func("the timers of a stack", w.ring, w.crash))
	} else {
		w.alarm.Reset(d)
	}
}

// ring is the alarm: it runs what is due.
func (w *wheel) ring() {
	var few [16]func()
	due := few[:0]
	w.mu.Lock()
	since := time.Since(w.base)
	for until := int64(since / wheelTick); w.now < until && w.n > 0; {
		w.now = min(w.next(), until)
		due = w.turn(due)
	}
	// The next alarm before what is due now: that may wait for a lock.
	if w.due = 0; w.n > 0 {
		w.wake(w.next(), since)
	}
	w.mu.Unlock()
	for _, f := range due {
		w.panics.Run("a timer of a stack's", f, w.crash)
	}
}

// next is the first tick from now on in which there may be something to be done: not later than what is due first. mu
// is held.
func (w *wheel) next() int64 {
	first := w.now + 1
	if first&(nearSlots-1) == 0 {
		return first // the levels above have their turn
	}
	// The rest of this round of near slots, by words of the bitmap.
	for tick := first; tick&^(nearSlots-1) == first&^(nearSlots-1); tick = (tick | 63) + 1 {
		i := tick & (nearSlots - 1)
		if word := w.inUse[i/64] >> (i % 64); word != 0 {
			return tick + int64(bits.TrailingZeros64(word))
		}
	}
	round := (first + nearSlots - 1) &^ (nearSlots - 1) // where the next one begins
	if w.inUse != [nearSlots / 64]uint64{} {
		return round
	}
	// Nothing is near: the next slot of the levels above, of which each is looked at when its time begins.
	for tick := round; ; tick += nearSlots {
		i := tick >> nearBits & (farSlots - 1)
		if i == 0 || w.farIn[0]>>i&1 != 0 {
			return tick
		}
	}
}

// turn does what there is to be done at the tick that is now, and adds what is due to due. mu is held.
func (w *wheel) turn(due []func()) []func() {
	if w.now&(nearSlots-1) == 0 {
		i := w.now >> nearBits & (farSlots - 1)
		if i == 0 {
			w.refill(1, w.now>>(nearBits+farBits)&(farSlots-1))
		}
		w.refill(0, i)
	}
	i := w.now & (nearSlots - 1)
	w.inUse[i/64] &^= 1 << (i % 64)
	for t := w.near[i]; t != nil; t = w.near[i] {
		w.remove(t)
		due = append(due, t.f)
	}
	return due
}

// refill gives the timers of a slot the place that they have now. mu is held.
func (w *wheel) refill(level int, i int64) {
	t := w.far[level][i]
	w.far[level][i] = nil
	w.farIn[level] &^= 1 << i
	for t != nil {
		next := t.next
		w.place(t)
		t = next
	}
}

// stop is for a wheel whose timers nobody needs any more: its alarm would keep it, and the stack, until it rings.
func (w *wheel) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.alarm != nil {
		w.alarm.Stop()
	}
}
