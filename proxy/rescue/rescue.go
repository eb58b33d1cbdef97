package rescue

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"ztun/proxy/fair"
)

// Panics counts the panics of the data plane and logs them, with their stacks and within a budget. One per daemon.
// A nil one catches nothing: in tests a panic is to be seen.
type Panics struct {
	lines *fair.Lines
	total atomic.Uint64
}

// New makes the daemon's. log is where the stacks go.
func New(log *slog.Logger) *Panics {
	return &Panics{lines: fair.NewLines(fair.LinesOptions{Log: log, PerSecond: 0.2, Burst: 5})}
}

// Error is a panic that was caught.
type Error struct {
	What  string // what the goroutine was doing
	Value any    // what it panicked with
	Stack string
}

func (e *Error) Error() string { return fmt.Sprintf("panic in %s: %v", e.What, e.Value) }

// Contain runs f on the caller's goroutine and returns its panic, if there is one; whoever asks says it. For those who
// have no Panics: the admin side's, where a panic ends the event or the message that it came from.
func Contain(what string, f func()) (err *Error) {
	defer func() {
		if v := recover(); v != nil {
			if e, ok := v.(*Error); ok { // already described closer to its origin
				err = e
				return
			}
			err = &Error{What: what, Value: v, Stack: string(debug.Stack())}
		}
	}()
	f()
	return nil
}

// Func is f fit for a goroutine or a timer of its own: when it panics, that is counted, logged, and failed (nil:
// nobody) is told. failed ends what f was in charge of, whose locks may still be held (see Seize); if it panics
// itself, that is caught as well.
func (p *Panics) Func(what string, f func(), failed func(error)) func() {
	if p == nil {
		return f
	}
	return func() { p.Run(what, f, failed) }
}

// Run calls f on the caller's goroutine, as Func's function does.
func (p *Panics) Run(what string, f func(), failed func(error)) {
	if p == nil {
		f()
		return
	}
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		err := p.caught(what, v)
		if failed == nil {
			return
		}
		defer func() {
			if v := recover(); v != nil {
				p.caught("clearing up after a panic in "+what, v)
			}
		}()
		failed(err)
	}()
	f()
}

func (p *Panics) caught(what string, v any) *Error {
	p.total.Add(1)
	e := &Error{What: what, Value: v, Stack: string(debug.Stack())}
	p.lines.Log(context.Background(), slog.LevelError, what, "a panic was caught; please report it with its stack",
		slog.String("in", what), slog.Any("panic", fmt.Sprint(v)), slog.String("stack", e.Stack))
	return e
}

// Total is how many panics were caught.
func (p *Panics) Total() uint64 {
	if p == nil {
		return 0
	}
	return p.total.Load()
}

// Close says what log lines were left out.
func (p *Panics) Close() {
	if p != nil {
		p.lines.Close()
	}
}

// orphanWait is how long Wait is patient once there has been a panic.
const orphanWait = 5 * time.Second

// Wait is wg.Wait. Once a panic was caught it gives up after some seconds: a goroutine may wait for ever for what the
// one that panicked left undone, inside a library's lock perhaps, and must not keep the daemon from ending. False
// says that some are left.
func (p *Panics) Wait(wg *sync.WaitGroup) bool {
	if p == nil {
		wg.Wait()
		return true
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	tick := time.NewTicker(orphanWait)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return true
		case <-tick.C:
			if p.Total() > 0 {
				return false
			}
		}
	}
}

// How often, and how far apart, Seize tries.
const (
	seizeTries = 300
	seizeEvery = 10 * time.Millisecond
)

// Seize locks a mutex that the goroutine which panicked may have held. It has to be one that is never held for as
// long as Seize waits, 3 s, by somebody who lives: then who holds it is dead, and the lock is the caller's. What it
// guards is to be ended, not used.
func Seize(mu *sync.Mutex) {
	for range seizeTries {
		if mu.TryLock() {
			return
		}
		time.Sleep(seizeEvery)
	}
}
