package hbone

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// Stream is one CONNECT tunnel: a net.Conn with two independent directions. All methods may be called at the same
// time; several writers take turns by whole Writes.
//
// Write, ReadFrom: the data is on its way or in the stream's one frame buffer when they return; they wait while
// that buffer is full and the peer gives no window. Read, WriteTo: io.EOF (nil from WriteTo) after the peer's
// END_STREAM, and only then. An idle stream has no goroutine and no buffer here.
type Stream struct {
	c       *conn
	id      uint32
	onGone  func()      // the stream is over on the wire; called once, with c.mu held
	onReset func(error) // OnReset's; called once, with c.mu held
	reset   error       // why onReset was called, or would have been
	onStop  func()      // OnStopSending's; called once, with c.mu held
	stopped bool        // onStop was called, or would have been

	// The sending side and the life cycle; c.mu guards them.
	sendWin    int64 // what the peer's window lets us send
	recvWin    int64 // what our window lets the peer send
	late       int64 // what may come beyond that, as it was on its way when the window became small
	debt       int64 // sent, and not given back by the peer's WINDOW_UPDATE
	eaten      int64 // consumed since eatenAt, see widen
	eatenAt    time.Time
	small      bool // its window began small, or was made so
	pend       *frame
	list       *streamList
	prev, next *Stream
	wcond      sync.Cond // L is c.mu: the frame went out, or something ended
	writers    int       // waiting on wcond
	mustFlush  bool      // the next of them is the flusher
	wdl        deadline
	werr       error // nothing more can be written
	linger     *time.Timer
	wantEnd    bool // CloseWrite was called
	sentEnd    bool // our END_STREAM or RST_STREAM is on its way
	gotEnd     bool // so is the peer's
	peerEnd    bool // by its END_STREAM
	peerReset  bool // by its RST_STREAM
	lingering  bool // closed: RST_STREAM follows what was written, unless both sides ended in good order
	closed     bool
	gone       bool

	// A client's answer; c.mu guards it until opened is closed.
	opened   chan struct{}
	answered bool
	response Response
	openErr  error

	wlock sync.Mutex // one Write or ReadFrom at a time
	class uint8      // size class of the next frame; by wlock

	uncredit atomic.Int64 // consumed bytes whose credit was not given back yet
	window   atomic.Int64 // the receive window in force; c.mu to change it

	// The receiving side; rmu guards it. Lock order: c.mu, rmu.
	rmu     sync.Mutex
	rcond   sync.Cond
	chunks  []chunk
	head    int // index of the first chunk
	rerr    error
	rdl     deadline
	rclosed bool   // what comes is thrown away
	readers int    // waiting on rcond; one who rests counts
	owed    bool   // the reader has pushed something and will wake the user
	rest    func() // Rest's, until the wait for which it was meant
	again   func() // starts the user who rests
}

func newStream(c *conn, id uint32) *Stream {
	s := &Stream{c: c, id: id, sendWin: c.peerInitial}
	c.begin(s)
	if !c.acked {
		s.recvWin = max(s.recvWin, 65535) // the peer may not know better yet
	}
	c.updates = min(c.updates+updatesPerStream, maxUpdates)
	s.wcond.L = &c.mu
	s.rcond.L = &s.rmu
	return s
}

// OnReset has f called, at most once, when the stream is cut: by the peer's RST_STREAM, or with its connection. A user
// who waits in a Write elsewhere would not learn of it otherwise. It is not called for what Close and Reset do, nor
// when all that the peer had to say has arrived. f must neither wait nor call the stream: locks are held.
func (s *Stream) OnReset(f func(error)) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.reset != nil {
		f(s.reset)
		return
	}
	s.onReset = f
}

// OnStopSending has f called, at most once, when the peer has ended its direction and then reset the stream: what it
// has sent is there to be read, and what we have for it nobody takes any more. It is not called at a client for
// NO_ERROR, by which a server has said all and only forgoes the rest of the request (RFC 9113 section 8.1). f is as
// OnReset's.
func (s *Stream) OnStopSending(f func()) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.stopped {
		f()
		return
	}
	s.onStop = f
}

// stopSending is the peer's reset, with a code, after its END_STREAM. c.mu is held.
func (s *Stream) stopSending(code http2.ErrCode) {
	if s.c.client && code == http2.ErrCodeNo {
		return
	}
	if s.stopped = true; s.onStop != nil && !s.closed {
		s.onStop()
	}
	s.onStop = nil
}

// SentEnd reports whether all that was written has been sent, and our END_STREAM with it.
func (s *Stream) SentEnd() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.sentEnd && s.pend == nil
}

// deadline is one direction's. The lock of that direction guards it.
type deadline struct {
	timer   *time.Timer
	gen     uint64
	expired bool
}

// set arranges for fire to be called, under mu, which is s's or its connection's, when t has come. mu is held.
func (d *deadline) set(t time.Time, s *Stream, mu sync.Locker, fire func()) {
	d.stop()
	d.expired = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.expired = true
		fire()
		return
	}
	gen := d.gen
	d.timer = time.AfterFunc(wait, s.c.cfg.Panics.Func("an HBONE stream's deadline", func() {
		mu.Lock()
		defer mu.Unlock()
		if d.gen == gen {
			d.expired = true
			fire()
		}
	}, s.Crashed))
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.gen++
}

// LocalAddr is the connection's.
func (s *Stream) LocalAddr() net.Addr { return s.c.nc.LocalAddr() }

// RemoteAddr is the connection's.
func (s *Stream) RemoteAddr() net.Addr { return s.c.nc.RemoteAddr() }

// SetDeadline sets both.
func (s *Stream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline also holds for calls that wait already.
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.rclosed {
		return net.ErrClosed
	}
	s.rdl.set(t, s, &s.rmu, s.wakeReaders)
	return nil
}

// SetWriteDeadline also holds for calls that wait already.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.wdl.set(t, s, &c.mu, func() {
		s.wcond.Broadcast()
		c.callOff(s)
	})
	return nil
}

// writable is nil or why a Write fails. c.mu is held.
func (s *Stream) writable() error {
	switch {
	case s.werr != nil:
		return s.werr
	case s.wantEnd:
		return net.ErrClosed
	case s.wdl.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// put hands f to the connection and, if nobody else is at it, has it written, with END_STREAM if it is the last. It
// waits for the slot.
func (s *Stream) put(f *frame, end bool) error {
	c := s.c
	c.mu.Lock()
	if err := s.awaitSlot(); err != nil {
		c.mu.Unlock()
		c.bufs.putFrame(f)
		return err
	}
	s.pend = f
	s.wantEnd = s.wantEnd || end
	c.schedule(s)
	if c.inline && !c.flushing && !c.ended && c.hasWork() {
		c.flushing = true
		c.flush(s) // releases mu
		return nil
	}
	c.wantFlush()
	c.mu.Unlock()
	return nil
}

// awaitSlot waits until no frame is waiting. c.mu is held, but given up meanwhile.
func (s *Stream) awaitSlot() error {
	for {
		if s.mustFlush {
			s.mustFlush = false
			s.c.flush(s) // releases mu
			s.c.mu.Lock()
			continue
		}
		if err := s.writable(); err != nil {
			return err
		}
		if s.pend == nil {
			return nil
		}
		s.writers++
		s.wcond.Wait()
		s.writers--
	}
}

// Write copies p into frames. Errors: os.ErrDeadlineExceeded; net.ErrClosed after Close, CloseWrite, Reset; a
// *StreamError after the peer's RST_STREAM; a *ConnError.
func (s *Stream) Write(p []byte) (n int, err error) {
	s.wlock.Lock()
	defer s.wlock.Unlock()
	if done, err := s.squeezeIn(p); err != nil {
		return 0, err
	} else if done {
		return len(p), nil
	}
	for n < len(p) {
		f := s.c.bufs.frame(classFor(len(p) - n))
		f.end += copy(f.room(), p[n:])
		m := f.end - f.off
		if err := s.put(f, false); err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}

// squeezeIn adds a small p to a frame that waits already.
func (s *Stream) squeezeIn(p []byte) (bool, error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.writable(); err != nil {
		return false, err
	}
	if len(p) == 0 {
		return true, nil
	}
	if f := s.pend; f != nil && len(p) <= lightLen && len(p) <= len(f.room()) {
		f.end += copy(f.room(), p)
		return true, nil
	}
	return false, nil
}

// classFor is the smallest frame class for n bytes of payload, or the largest there is.
func classFor(n int) uint8 {
	for i, size := range frameLens {
		if n <= size-headLen {
			return uint8(i)
		}
	}
	return uint8(len(frameLens) - 1)
}

// CloseWrite ends our direction: END_STREAM follows what was written. It does not wait.
func (s *Stream) CloseWrite() error {
	c := s.c
	c.mu.Lock()
	if s.wantEnd || s.werr != nil {
		defer c.mu.Unlock()
		var se *StreamError
		if s.wantEnd || errors.As(s.werr, &se) && se.orderly() && se.Code == http2.ErrCodeNo {
			return nil // the peer has what it wanted
		}
		return s.werr
	}
	s.wantEnd = true
	s.wcond.Broadcast()
	c.schedule(s)
	c.flushHere()
	return nil
}

// Close gives the stream up: what was written is still sent, then, unless both directions ended in good order,
// RST_STREAM with CANCEL (NO_ERROR from a server that ended its direction), as ztunnel does. It does not wait.
// To end our direction in good order, call CloseWrite first.
func (s *Stream) Close() error {
	c := s.c
	c.mu.Lock()
	if s.closed {
		c.mu.Unlock()
		return nil
	}
	s.closeLocked()
	if !s.gone {
		s.lingering = true
		if s.pend != nil {
			// The peer may never give window for the rest.
			s.linger = time.AfterFunc(c.cfg.Linger, c.cfg.Panics.Func("an HBONE stream's end", func() {
				c.cfg.Stats.Lingered.Add(1)
				s.Reset(http2.ErrCodeCancel)
			}, s.Crashed))
		}
		c.schedule(s)
		c.wantFlush()
	}
	c.mu.Unlock()
	s.stopReading()
	return nil
}

// closeLocked is the common part of Close and Reset. c.mu is held.
func (s *Stream) closeLocked() {
	s.closed = true
	s.onReset, s.onStop = nil, nil
	if s.werr == nil {
		s.werr = net.ErrClosed
	}
	s.wdl.stop()
	s.wcond.Broadcast()
	s.c.callOff(s)
}

// Reset ends the stream at once with RST_STREAM; what was not sent is dropped. Nothing happens if it is over.
func (s *Stream) Reset(code http2.ErrCode) {
	c := s.c
	c.mu.Lock()
	s.closeLocked()
	c.resetLocked(s, code)
	c.mu.Unlock()
	s.stopReading()
}

// resetLocked sends RST_STREAM and forgets s. c.mu is held.
func (c *conn) resetLocked(s *Stream, code http2.ErrCode) {
	if s.gone {
		return
	}
	s.dropPending()
	if !c.isOver() {
		c.framer.WriteRSTStream(s.id, code)
	}
	s.sentEnd, s.gotEnd = true, true
	c.forgetLocked(s)
	if c.client {
		c.ownResets++ // openable looks
	} else {
		c.reply()
	}
	c.wantFlush()
}

// lastWords says how a lingering stream ends, now that everything was sent. c.mu is held.
func (s *Stream) lastWords() (bool, http2.ErrCode) {
	s.lingering = false
	if s.linger != nil {
		s.linger.Stop()
	}
	if s.sentEnd && s.gotEnd {
		return false, 0
	}
	code := http2.ErrCodeCancel
	if s.sentEnd && !s.c.client {
		code = http2.ErrCodeNo // RFC 9113, 8.1: answered without needing the rest of the request
	}
	s.sentEnd, s.gotEnd = true, true
	return true, code
}

// dropPending takes the stream out of the queues. c.mu is held.
func (s *Stream) dropPending() {
	if s.list != nil {
		s.list.remove(s)
	}
	if s.pend != nil {
		s.c.dropFrame(s.pend)
		s.pend = nil
	}
	s.lingering = false
	if s.linger != nil {
		s.linger.Stop()
	}
}

// detachLocked is the end of a stream that the peer or the connection brought about. c.mu is held; the caller
// forgets the stream.
func (s *Stream) detachLocked(err error) {
	s.dropPending()
	var lost *ConnError
	var se *StreamError
	if whole := s.gotEnd && errors.As(err, &lost) || errors.As(err, &se) && se.orderly(); !whole && s.reset == nil {
		if s.reset = err; s.onReset != nil && !s.closed {
			s.onReset(err)
		}
		s.onReset = nil
	}
	s.sentEnd, s.gotEnd = true, true
	if s.werr == nil {
		s.werr = err
	}
	s.wcond.Broadcast()
	s.c.callOff(s)
	s.answerLocked(Response{}, err)
	s.endReading(err)
}

// answerLocked wakes the Open that waits for the stream's answer. c.mu is held.
func (s *Stream) answerLocked(r Response, err error) {
	if s.opened == nil || s.answered {
		return
	}
	s.answered, s.response, s.openErr = true, r, err
	close(s.opened)
}
