package grow

import (
	"context"
	"runtime/pprof"
	"sync"
)

// maxIdle is how many workers wait for work: more than one turn of a busy processor begins, and some 100 KiB.
const maxIdle = 32

// Workers are goroutines that are used again, with the stacks that they have grown. The last that has become idle is
// the next to work, so that few do most of it. The zero value is ready.
type Workers struct {
	mu     sync.Mutex
	idle   []chan func()
	closed bool
	// Work counts the goroutines, for who waits for them after Close.
	Work sync.WaitGroup
	// OnIdle, if there is one, is called by each that has begun to wait for work. It is set before the first Go.
	OnIdle func()
}

// Go runs f on a goroutine of its own, as long as it likes. It does not wait.
func (w *Workers) Go(f func()) {
	w.mu.Lock()
	if n := len(w.idle); n > 0 {
		worker := w.idle[n-1]
		w.idle = w.idle[:n-1]
		w.mu.Unlock()
		worker <- f
		return
	}
	if w.closed {
		w.mu.Unlock()
		go f()
		return
	}
	w.Work.Add(1)
	w.mu.Unlock()
	go w.run(f)
}

func (w *Workers) run(f func()) {
	defer w.Work.Done()
	next := make(chan func(), 1)
	for ; f != nil; f = <-next {
		Stack() // the collector may have halved it
		f()
		pprof.SetGoroutineLabels(context.Background()) // else what comes next is booked as f's kind
		w.mu.Lock()
		if w.closed || len(w.idle) == maxIdle {
			w.mu.Unlock()
			return
		}
		w.idle = append(w.idle, next)
		w.mu.Unlock()
		if w.OnIdle != nil {
			w.OnIdle()
		}
	}
}

// Idle reports whether somebody waits for work.
func (w *Workers) Idle() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.idle) > 0
}

// Trim ends those that wait for work.
func (w *Workers) Trim() {
	w.mu.Lock()
	idle := w.idle
	w.idle = nil
	w.mu.Unlock()
	for _, worker := range idle {
		worker <- nil
	}
}

// Close ends those that wait, and the others with their work. What Go gets afterwards has goroutines that Work does not
// count.
func (w *Workers) Close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.Trim()
}
