package brief

import (
	"context"
	"sync"
	"time"

	"ztun/proxy/rescue"
)

// every is how often deadlines are looked at.
const every = 500 * time.Millisecond

// ending is what a goroutine of AfterFunc does.
const ending = "the end of a context"

// Set is a parent of brief contexts: a context itself, with which they end.
type Set struct {
	context.Context
	panics *rescue.Panics

	mu    sync.Mutex
	first *Context
	ended error // the parent's, once it has ended
	look  *time.Timer
	due   bool // a look is due
}

// New makes a Set whose contexts end with parent. Panics, which may be nil, catches those of its timer and of what
// AfterFunc has called.
func New(parent context.Context, panics *rescue.Panics) *Set {
	s := &Set{Context: parent, panics: panics}
	context.AfterFunc(parent, panics.Func("the end of all connections in the making", s.endAll, nil))
	return s
}

// Begin makes a context that lasts until end, the end of the Set's parent, or a deadline (Within).
func (s *Set) Begin() (ctx context.Context, end context.CancelFunc) {
	c := &Context{set: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.err = s.ended; c.err == nil {
		if c.next = s.first; c.next != nil {
			c.next.prev = c
		}
		s.first, c.listed = c, true
	}
	return c, c.cancel
}

// Within gives ctx a deadline, until release. A context of a Set ends altogether at it, with DeadlineExceeded; of any
// other a child does.
func Within(ctx context.Context, d time.Duration) (_ context.Context, release context.CancelFunc) {
	c, ok := ctx.(*Context)
	if !ok {
		return context.WithTimeout(ctx, d)
	}
	c.within(time.Now().Add(d))
	return c, c.release
}

// Context is one of a Set's.
type Context struct {
	set *Set

	// Of set.mu.
	prev, next *Context
	listed     bool
	deadline   time.Time // zero: none

	mu   sync.Mutex
	err  error
	done chan struct{} // made when it is asked for
	// after are functions of AfterFunc, by a number.
	after  map[int]func()
	nAfter int
}

var _ context.Context = (*Context)(nil)

// Deadline implements context.Context.
func (c *Context) Deadline() (time.Time, bool) {
	c.set.mu.Lock()
	defer c.set.mu.Unlock()
	return c.deadline, !c.deadline.IsZero()
}

// Done implements context.Context.
func (c *Context) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.err != nil {
			close(c.done)
		}
	}
	return c.done
}

// Err implements context.Context.
func (c *Context) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Value implements context.Context.
func (c *Context) Value(key any) any { return c.set.Value(key) }

// AfterFunc has f called on a goroutine of its own when the context has ended; package context's children use it, which
// would have a goroutine each otherwise.
func (c *Context) AfterFunc(f func()) (stop func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		go c.set.panics.Func(ending, f, nil)()
		return func() bool { return false }
	}
	if c.after == nil {
		c.after = map[int]func(){}
	}
	n := c.nAfter
	c.nAfter++
	c.after[n] = f
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		_, ok := c.after[n]
		delete(c.after, n)
		return ok
	}
}

func (c *Context) cancel() { c.end(context.Canceled) }

func (c *Context) release() { c.within(time.Time{}) }

// within sets the deadline, and has it looked at.
func (c *Context) within(deadline time.Time) {
	s := c.set
	s.mu.Lock()
	defer s.mu.Unlock()
	c.deadline = deadline
	if s.due || deadline.IsZero() || !c.listed {
		return
	}
	s.due = true
	if s.look == nil {
		s.look = time.AfterFunc(every, s.panics.Func("a look for deadlines", s.expire, nil))
	} else {
		s.look.Reset(every)
	}
}

// end ends the context for the reason given, unless it has ended.
func (c *Context) end(why error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = why
	if c.done != nil {
		close(c.done)
	}
	after := c.after
	c.after = nil
	c.mu.Unlock()

	c.set.mu.Lock()
	c.unlist()
	c.set.mu.Unlock()
	for _, f := range after {
		go c.set.panics.Func(ending, f, nil)()
	}
}

// unlist takes c off its Set's list. set.mu is held.
func (c *Context) unlist() {
	if !c.listed {
		return
	}
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		c.set.first = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	c.prev, c.next, c.listed = nil, nil, false
}

// expire ends the contexts whose deadline has passed, and has the others looked at later.
func (s *Set) expire() {
	var passed []*Context
	now := time.Now()
	s.mu.Lock()
	s.due = false
	for c := s.first; c != nil; c = c.next {
		switch {
		case c.deadline.IsZero():
		case now.Before(c.deadline):
			s.due = true
		default:
			passed = append(passed, c)
		}
	}
	if s.due {
		s.look.Reset(every)
	}
	s.mu.Unlock()
	for _, c := range passed {
		c.end(context.DeadlineExceeded)
	}
}

// endAll ends all contexts as the parent has.
func (s *Set) endAll() {
	s.mu.Lock()
	s.ended = s.Err()
	if s.look != nil {
		s.look.Stop()
	}
	s.due = true // nobody looks any more
	var all []*Context
	for c := s.first; c != nil; c = c.next {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.end(s.ended)
	}
}
