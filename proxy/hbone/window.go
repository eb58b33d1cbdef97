package hbone

import (
	"time"

	"golang.org/x/net/http2"
)

// Windows. A reader who has stopped may stall itself only, so the two kinds of window have different tasks:
//
// Receiving, the stream's window bounds what its reader leaves unread. On a connection with more than few streams it
// begins small as soon as something piles up, grows with the speed of a reader who keeps up, and never so far that
// nothing is left for others to grow by. The connection's window is given back on arrival, whoever reads or does not:
// it bounds what is under way.
//
// Sending to a peer who does otherwise (ztunnel's connection window is four streams' windows, and comes back as it is
// read), no stream may use more of the connection's window than it leaves, and a connection most of whose window has
// not come back takes no new streams.

const (
	// leastWindow is a stream's first receive window on a crowded connection, in bytes: HTTP/2's default.
	leastWindow = 65535
	// fewStreams is how many may fill the largest window, which all begin with while nothing piles up, as ztunnel's do.
	fewStreams = 3
	// pileUp is how much of that window has to lie unread on a connection for it to count as crowded, as a divisor.
	pileUp = 4
	// keepsUp is the time in which a reader has to consume a whole window for it to be doubled: round trips up to
	// this long do not slow a stream down.
	keepsUp = 200 * time.Millisecond
	// fallsBehind is the time for a window beyond which it shrinks again.
	fallsBehind = 5 * time.Second
	// stuckAfter is how long most of a connection's window has to be away before it counts as stuck.
	stuckAfter = 100 * time.Millisecond
)

func (c *conn) leastWindow() int64 { return min(leastWindow, int64(c.cfg.StreamWindow)) }

// begin gives a new stream its receive window. mu is held.
func (c *conn) begin(s *Stream) {
	s.recvWin, s.eatenAt, s.small = c.first, time.Now(), c.first == c.leastWindow()
	s.window.Store(c.first)
	c.grown += c.first - c.leastWindow()
}

// crowd looks whether readers leave so much unread, or memory is so short, that windows have to be small: first ones
// from now on, and those that are large already when the peer has acknowledged it. mu is held.
func (c *conn) crowd() {
	if c.crowded || c.isOver() {
		return
	}
	piled := len(c.streams) > fewStreams && c.unread.Load() >= int64(c.cfg.StreamWindow)/pileUp
	if !piled && !c.cfg.Memory.Tight() {
		return
	}
	c.crowded = true
	if c.first == c.leastWindow() {
		return
	}
	c.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(c.leastWindow())})
	if c.client {
		c.first = c.leastWindow() // the peer has read SETTINGS before it reads of the stream
	}
	c.wantFlush()
}

// acknowledged is the peer's word that it has taken our SETTINGS; those of crowd are the second. It has subtracted the
// difference from the windows of the streams that it knew (RFC 9113, 6.9.2). mu is held.
func (c *conn) acknowledged() {
	c.acked = true
	if c.acks++; c.acks != 2 || !c.crowded {
		return
	}
	less := int64(c.cfg.StreamWindow) - c.leastWindow()
	c.first = c.leastWindow()
	for _, s := range c.streams {
		if s.small {
			continue
		}
		s.small = true
		s.recvWin -= less
		// A frame that the peer had taken out of the large window may be written behind its acknowledgement (as Go's client
		// does, one of each stream).
		s.late = int64(c.cfg.FrameSize)
		s.window.Add(-less)
		c.grown -= less
		// What was not worth a frame of its own may be all that the small window has.
		if inc := s.uncredit.Swap(0); inc > 0 && !s.gotEnd && !c.isOver() {
			s.recvWin += inc
			c.framer.WriteWindowUpdate(s.id, uint32(inc))
		}
	}
	c.wantFlush()
}

// consumed gives the peer credit back, in batches of a quarter of the window.
func (s *Stream) consumed(n int) {
	c := s.c
	if s.uncredit.Add(int64(n)) >= s.window.Load()/4 {
		c.mu.Lock()
		if inc := s.uncredit.Swap(0); inc > 0 && !s.gotEnd && !c.isOver() {
			if inc += c.widen(s, inc); inc > 0 {
				s.recvWin += inc
				c.framer.WriteWindowUpdate(s.id, uint32(inc))
				c.wantFlush()
			}
		}
		c.mu.Unlock()
	}
	c.settleConn(n)
}

// widen fits s's window to its reader's speed, now that n bytes more were consumed, and returns what to add to their
// credit. mu is held.
func (c *conn) widen(s *Stream, n int64) int64 {
	window := s.window.Load()
	if s.eaten += n; s.eaten < window {
		return 0
	}
	now := time.Now()
	took := now.Sub(s.eatenAt)
	s.eaten, s.eatenAt = 0, now
	extra := window - c.leastWindow()
	var d int64
	switch {
	case c.cfg.Memory.Tight(), took > fallsBehind:
		d = -min(n, extra)
	case took <= keepsUp:
		// As much at most as is left for the others.
		left := int64(c.cfg.ConnWindow) - c.grown - extra
		d = max(min(window, int64(c.cfg.StreamWindow)-window, left), 0)
	}
	c.grown += d
	s.window.Store(window + d)
	return d
}

// narrow forgets what s's window has grown by, as s is over. mu is held.
func (c *conn) narrow(s *Stream) { c.grown -= s.window.Load() - c.leastWindow() }

// received gives the connection's credit for n bytes back that are now s's user's to read, or keeps it until they are
// read: live streams cannot hold that much, but what streams that are over have left behind can.
func (c *conn) received(n int) {
	if c.unread.Load() <= 2*int64(c.cfg.ConnWindow) {
		c.creditConn(n)
		return
	}
	c.cfg.Stats.Withheld.Add(1)
	c.withheld.Add(int64(n))
}

// settleConn is told of n bytes that were consumed or thrown away.
func (c *conn) settleConn(n int) {
	c.unread.Add(int64(-n))
	for {
		kept := c.withheld.Load()
		if kept == 0 || n == 0 {
			return
		}
		if back := min(kept, int64(n)); c.withheld.CompareAndSwap(kept, kept-back) {
			c.creditConn(int(back))
			return
		}
	}
}

// creditConn gives the connection's credit for n bytes back, in batches.
func (c *conn) creditConn(n int) {
	if n > 0 && c.uncredit.Add(int64(n)) >= int64(c.cfg.ConnWindow/4) {
		c.mu.Lock()
		if inc := c.uncredit.Swap(0); inc > 0 && !c.isOver() {
			c.recvWin += inc
			c.framer.WriteWindowUpdate(0, uint32(inc))
			c.wantFlush()
		}
		c.mu.Unlock()
	}
}

// sendable is how many bytes of DATA the windows let s send. mu is held.
func (c *conn) sendable(s *Stream) int64 {
	n := min(s.sendWin, c.sendWin)
	if c.sendTop < 2*c.peerInitial {
		// One stream may use the whole connection's window, and perhaps has to before any of it comes back.
		return n
	}
	// Half of its window a stream may always use: there are peers that give nothing back before.
	return min(n, max(c.sendWin, c.peerInitial/2+bulkLen)-s.debt)
}

// spend accounts for n bytes of DATA of s. mu is held.
func (c *conn) spend(s *Stream, n int64) {
	s.sendWin -= n
	s.debt += n
	if c.sendWin -= n; c.sendWin < c.sendTop/2 && c.lowSince.Load() == 0 {
		c.lowSince.Store(time.Now().UnixNano())
	}
}

// credited is the peer's credit for the connection. mu is held.
func (c *conn) credited(inc int64) {
	c.sendWin += inc
	c.sendTop = max(c.sendTop, c.sendWin)
	if c.sendWin >= c.sendTop/2 {
		c.lowSince.Store(0)
	}
}

// stuck reports whether streams whose readers have stopped hold most of the connection's window. It takes no lock.
func (c *conn) stuck() bool {
	since := c.lowSince.Load()
	return since != 0 && time.Now().UnixNano()-since > int64(stuckAfter)
}
