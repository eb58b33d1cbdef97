package netstack

import (
	"sync"
	"sync/atomic"
	"time"
)

// clockBase makes deadlines comparable by the monotonic clock. It is never written.
var clockBase = time.Now()

// half is one direction of a connection: who works on it, who waits for it, and
// until when.
type half struct {
	// mu is held by the one operation at work, also while it waits.
	mu sync.Mutex
	// own is kept from the first wait on, so that waiting does not allocate.
	own *sleeper // guarded by mu
	// armed is own while someone waits.
	armed atomic.Pointer[sleeper]
	// deadline is nanoseconds after clockBase; zero is none.
	deadline atomic.Int64
	timer    *time.Timer // guarded by Conn.mu
}

// sleeper is who waits: a goroutine at ch, or nobody yet: then again starts one, once.
type sleeper struct {
	ch    chan struct{}
	again func()
}

// arm makes wake effective. The condition is to be checked after it, then
// sleep, and so on until disarm.
func (h *half) arm() {
	if h.own == nil {
		h.own = &sleeper{ch: make(chan struct{}, 1)}
	}
	select { // a token left over from the last time
	case <-h.own.ch:
	default:
	}
	h.armed.Store(h.own)
}

func (h *half) disarm() { h.armed.Store(nil) }

func (h *half) sleep() { <-h.own.ch }

// wake makes the one who waits look again. It never blocks.
func (h *half) wake() {
	if s := h.armed.Load(); s != nil {
		if s.again != nil {
			if h.armed.CompareAndSwap(s, nil) {
				s.again()
			}
			return
		}
		select {
		case s.ch <- struct{}{}:
		default:
		}
	}
}

func (h *half) expired() bool {
	d := h.deadline.Load()
	return d != 0 && int64(time.Since(clockBase)) >= d
}

// setDeadline sets the deadline and wakes who waits; Conn.mu is held.
func (h *half) setDeadline(t time.Time) {
	if h.timer != nil {
		h.timer.Stop()
	}
	if t.IsZero() {
		h.deadline.Store(0)
		return
	}
	d := max(int64(t.Sub(clockBase)), 1) // zero would mean none
	h.deadline.Store(d)
	left := time.Duration(d) - time.Since(clockBase)
	if left <= 0 {
		h.wake()
		return
	}
	if h.timer == nil {
		h.timer = time.AfterFunc(left, h.wake)
	} else {
		h.timer.Reset(left)
	}
}
