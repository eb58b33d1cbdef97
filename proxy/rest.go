package proxy

import (
	"errors"
	"sync/atomic"
	"syscall"
	"time"
)

// restAfter is how often directions are looked for that nothing has come through since the last look. A goroutine that
// only waits costs a stack of 4 KiB, and starting it again some microseconds: at most once in that time.
const restAfter = 2 * time.Second

// resting is a source whose reader can be sent away while nothing comes: its wait ends with EAGAIN, and again is called
// when there is something to read or the source has ended (hbone.Stream, netstack.Conn).
type resting interface{ Rest(again func()) }

// errRests is what a direction comes to that has no goroutine for now. It is never anybody's to see.
var errRests = errors.New("nothing comes")

// rests reports whether the copying from src ended with err because src has sent it away.
func rests(err error, src Conn) bool {
	var c *copyError
	if _, ok := src.(resting); !ok || !errors.As(err, &c) || c.prefix != receivePrefix {
		return false
	}
	return errors.Is(c.err, syscall.EAGAIN)
}

// restState is what sweeps remember of one direction.
type restState struct {
	seen  uint64      // bytes, at the last look; of sweeps alone
	asked atomic.Bool // to rest, and no wake-up came since
}

// idle sends directions away through which nothing has come since the last look. Only sweeps call it, one at a time.
func (s *copying) idle() {
	b := s.c.books
	s.look(&s.rests[0], b.received.Load(), s.down, s.resumeToUpstream)
	s.look(&s.rests[1], b.sent.Load(), s.up, s.resumeToDownstream)
}

func (s *copying) look(r *restState, bytes uint64, src Conn, again func()) {
	switch {
	case bytes != r.seen:
		// It may rest since: who was asked while a write waited takes the bytes first. Only a wake-up says that it does not.
		r.seen = bytes
	case !r.asked.Swap(true): // first: what Rest arranges for may happen at once
		if src, ok := src.(resting); ok {
			src.Rest(again)
		}
	}
}

// resumeToUpstream and resumeToDownstream are called with locks of the source held. A direction that finds its source's
// end says that itself.
func (s *copying) resumeToUpstream() {
	s.rests[0].asked.Store(false)
	s.c.p.workers.Go(s.copyToUpstream)
}

func (s *copying) resumeToDownstream() {
	s.rests[1].asked.Store(false)
	s.c.p.workers.Go(s.copyToDownstream)
}

// sweepSoon has idle directions and workers looked for as long as there are connections or idle workers.
func (p *Proxy) sweepSoon() {
	if p.sweeping.Load() || p.sweeping.Swap(true) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.draining {
		return // it will not be idle for long; and Close waits for timers that it knows
	}
	p.work.Add(1)
	p.sweep = time.AfterFunc(p.restAfter, p.o.Panics.Func("a look for idle connections", func() {
		defer p.work.Done()
		p.mu.Lock()
		p.sweep = nil
		p.mu.Unlock()
		p.sweepIdle()
	}, nil))
}

func (p *Proxy) sweepIdle() {
	p.workers.Trim()
	all := p.table.snapshot()
	for _, c := range all {
		c.mu.Lock()
		s := c.copying
		c.mu.Unlock()
		if s != nil {
			s.idle()
		}
	}
	p.sweeping.Store(false)
	// Looked at after that: who has come, or has become idle, since begins it anew, or is seen here.
	if !p.table.none() || p.workers.Idle() {
		p.sweepSoon()
	}
}
