package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"ztun/proxy/rescue"
	"ztun/proxy/state"
)

// ErrStopped is returned to those who address a loop that has ended.
var ErrStopped = errors.New("admin loop has ended")

// LoopOptions configure a Loop. All fields are optional.
type LoopOptions struct {
	// Queue bounds the events that wait; 1024 if 0.
	Queue int
	// Handle is called on the loop for every event except closures, after the loop's own reaction. This
	// is where the composition root says what an event means.
	Handle func(Event)
	// Published is called on the loop after a new view has become visible to the workers, for instance
	// to have live connections checked against changed policies.
	Published func(old, new *state.View)
	// Panicked is called on the loop after a panic was contained. What the event was about to change
	// may be half changed: have its source build it anew here.
	Panicked func(*rescue.Error)
	Logger   *slog.Logger
}

// Loop is the one goroutine that publishes what is known. Sources build views on goroutines of their own and send
// them as events; others send closures, and read the View, which is immutable and behind an atomic pointer: workers
// never wait for the loop.
//
// A panic in a handler does not end the process: the data plane has the last good View and goes on. The
// panic is logged with its stack, counted, and given to the caller of Do and to Panicked. A view is
// published whole or not at all, so that nobody sees half a change.
type Loop struct {
	o     LoopOptions
	queue chan queued
	done  chan struct{} // closed when Run has returned
	view  atomic.Pointer[state.View]

	mu     sync.Mutex // protects stats only
	stats  LoopStats
	waited histogram
}

// queued is an event and when it was queued.
type queued struct {
	event Event
	at    time.Time
}

// LoopStats counts what the loop did.
type LoopStats struct {
	Events   map[string]uint64 // handled, by kind
	Queued   int               // waiting now
	Queue    int               // the bound
	Full     uint64            // TryPost calls turned away because the queue was full
	Waits    uint64            // Post and Do calls that had to wait for room
	Panics   uint64
	Views    uint64        // views published
	LastView time.Time     // when the last one was
	Busy     time.Duration // spent in handlers
	Longest  time.Duration // the longest single handler
	Waited   Histogram     // how long events waited for their turn: the admin runtime's scheduling latency
}

// NewLoop makes a loop with an empty view. Nothing runs before Run; events may be posted already.
func NewLoop(o LoopOptions) *Loop {
	if o.Queue <= 0 {
		o.Queue = 1024
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Loop{o: o, queue: make(chan queued, o.Queue), done: make(chan struct{})}
	l.stats.Events = map[string]uint64{}
	l.view.Store(new(state.View))
	return l
}

// View is the knowledge of now: never nil, immutable. It costs one atomic load.
func (l *Loop) View() *state.View { return l.view.Load() }

// Run handles events until ctx ends. It is called once. Events still queued then are not handled; their
// senders get ErrStopped from Do.
func (l *Loop) Run(ctx context.Context) error {
	defer close(l.done)
	for {
		select {
		case <-ctx.Done():
			return nil
		case q := <-l.queue:
			if ctx.Err() != nil {
				return nil
			}
			l.waited.add(time.Since(q.at))
			l.handle(q.event)
		}
	}
}

func (l *Loop) handle(e Event) {
	start := time.Now()
	name := kind(e)
	err := rescue.Contain(name, func() { l.react(e) })
	if err != nil {
		l.o.Logger.Error("panic contained", "event", err.What, "panic", fmt.Sprint(err.Value), "stack", err.Stack)
		if l.o.Panicked != nil {
			if again := rescue.Contain("panicked", func() { l.o.Panicked(err) }); again != nil {
				l.o.Logger.Error("panic contained", "event", again.What, "panic", fmt.Sprint(again.Value), "stack", again.Stack)
			}
		}
	}
	took := time.Since(start)
	l.mu.Lock()
	l.stats.Events[name]++
	l.stats.Busy += took
	l.stats.Longest = max(l.stats.Longest, took)
	if err != nil {
		l.stats.Panics++
	}
	l.mu.Unlock()
	// Last: who waits for it finds it counted.
	if c, ok := e.(*closure); ok {
		c.finish(err)
	}
}

func (l *Loop) react(e Event) {
	switch e := e.(type) {
	case *closure:
		if e.start() {
			if err := rescue.Contain(e.name, e.f); err != nil {
				panic(err)
			}
		}
		return
	case Closure:
		if err := rescue.Contain(e.Name, e.Func); err != nil {
			panic(err)
		}
		return
	case StateBuilt:
		l.Publish(e.View)
	case SourceBroken:
		l.o.Logger.Warn("source is broken, keeping the last good state", "source", e.Source, "error", e.Err)
	}
	if l.o.Handle != nil {
		l.o.Handle(e)
	}
}

// Publish makes v the view. Only to be called on the loop (from a closure or a handler); nil is ignored.
func (l *Loop) Publish(v *state.View) {
	if v == nil {
		return
	}
	old := l.view.Swap(v)
	l.mu.Lock()
	l.stats.Views++
	l.stats.LastView = time.Now()
	l.mu.Unlock()
	if l.o.Published != nil {
		l.o.Published(old, v)
	}
}

// Post queues e. It waits while the queue is full (back-pressure on the source) and returns the error of
// ctx, or ErrStopped. Do not call it on the loop.
func (l *Loop) Post(ctx context.Context, e Event) error {
	select { // the loop's end comes first: a queue with room must not swallow what nobody will read
	case <-l.done:
		return ErrStopped
	default:
	}
	select {
	case l.queue <- queued{e, time.Now()}:
		return nil
	default:
	}
	l.mu.Lock()
	l.stats.Waits++
	l.mu.Unlock()
	select {
	case l.queue <- queued{e, time.Now()}:
		return nil
	case <-l.done:
		return ErrStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TryPost queues e if there is room and never waits; what is turned away is counted. It may be called on
// the loop and by workers.
func (l *Loop) TryPost(e Event) bool {
	select {
	case <-l.done:
		return false
	default:
	}
	select {
	case l.queue <- queued{e, time.Now()}:
		return true
	default:
		l.mu.Lock()
		l.stats.Full++
		l.mu.Unlock()
		return false
	}
}

// Do runs f on the loop and waits for it. An error means that f did not run and never will (that of ctx,
// or ErrStopped), except *rescue.Error: f panicked. Once f has begun, Do waits for it whatever ctx says, so
// that f may use the caller's variables. Calling it on the loop deadlocks: there, just call f.
func (l *Loop) Do(ctx context.Context, f func()) error { return l.DoNamed(ctx, "closure", f) }

// DoNamed is Do with a name for logs.
func (l *Loop) DoNamed(ctx context.Context, name string, f func()) error {
	c := &closure{name: name, f: f, done: make(chan struct{})}
	if err := l.Post(ctx, c); err != nil {
		return err
	}
	var give error
	select {
	case <-c.done:
		return c.result()
	case <-ctx.Done():
		give = ctx.Err()
	case <-l.done:
		give = ErrStopped
	}
	if c.state.CompareAndSwap(closureWaiting, closureAbandoned) {
		return give
	}
	<-c.done // it has begun
	return c.result()
}

// closure is a Closure whose sender waits.
type closure struct {
	name  string
	f     func()
	state atomic.Int32
	done  chan struct{}
	err   *rescue.Error
}

const (
	closureWaiting = iota
	closureBegun
	closureAbandoned
)

func (*closure) event() {}

func (c *closure) start() bool { return c.state.CompareAndSwap(closureWaiting, closureBegun) }

func (c *closure) finish(err *rescue.Error) {
	c.err = err
	close(c.done)
}

func (c *closure) result() error {
	if c.err != nil {
		return c.err
	}
	return nil
}

// Stats returns the counters.
func (l *Loop) Stats() LoopStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Events = make(map[string]uint64, len(l.stats.Events))
	for k, v := range l.stats.Events {
		s.Events[k] = v
	}
	s.Queued, s.Queue, s.Waited = len(l.queue), cap(l.queue), l.waited.snapshot()
	return s
}
