package hbone

import (
	"encoding/binary"
	"runtime"
	"time"

	"golang.org/x/net/http2"
)

// Sending. A stream has at most one frame of data waiting (Stream.pend); control frames wait in conn.ctrl. Nobody
// owns the socket: whoever adds something while nobody flushes becomes the flusher, seals and writes batches until
// nothing is left, or hands the role to a stream user who waits for his turn anyway. So a lone stream costs no
// goroutine switch, and many streams share their writes.

// lightLen is the payload up to which a frame goes before bulk, in bytes.
const lightLen = 4 << 10

// smallEmission is the payload up to which frames are gathered into shared TLS records.
const smallEmission = 2 << 10

// emission is one thing of a batch: a part of a stream's frame, the end of the stream, or both.
type emission struct {
	id     uint32
	f      *frame
	off, n int
	done   bool // f goes back to the buffers after this
	end    bool // followed by an empty DATA frame with END_STREAM
	reset  bool // followed by RST_STREAM
	code   http2.ErrCode
}

// streamList is a queue of streams, linked through them.
type streamList struct{ head, tail *Stream }

func (l *streamList) push(s *Stream) {
	s.list, s.next, s.prev = l, nil, l.tail
	if l.tail == nil {
		l.head = s
	} else {
		l.tail.next = s
	}
	l.tail = s
}

func (l *streamList) remove(s *Stream) {
	if s.prev == nil {
		l.head = s.next
	} else {
		s.prev.next = s.next
	}
	if s.next == nil {
		l.tail = s.prev
	} else {
		s.next.prev = s.prev
	}
	s.list, s.next, s.prev = nil, nil, nil
}

// schedule puts s where its next emission waits, if it has one that may go. mu is held.
func (c *conn) schedule(s *Stream) {
	if s.list != nil || s.gone {
		return
	}
	switch {
	case s.pend != nil:
		n := s.pend.end - s.pend.off
		switch {
		case s.sendWin <= 0: // its WINDOW_UPDATE schedules it again
		case c.sendable(s) <= 0:
			c.starved.push(s)
		case n <= lightLen:
			c.light.push(s)
		default:
			c.bulk.push(s)
		}
	case s.wantEnd && !s.sentEnd || s.lingering:
		c.light.push(s)
	}
}

// revive schedules what waited for the connection's window. mu is held.
func (c *conn) revive() {
	for s, last := c.starved.head, c.starved.tail; s != nil && c.sendWin > 0; {
		next := s.next
		c.starved.remove(s)
		c.schedule(s) // perhaps to the end of the same list
		if s == last {
			return
		}
		s = next
	}
}

// hasWork reports whether a flusher would find something; after the last record there is nothing to say. mu is held.
func (c *conn) hasWork() bool {
	return c.broken == nil && !c.said && (len(c.ctrl) > 0 || len(c.carry) > 0 || c.light.head != nil ||
		c.bulk.head != nil || c.last || c.tr.urgent())
}

// wantFlush sees to it that what is queued goes out, without doing it here: for the reader, which must never
// write, and for whoever must not be held up. mu is held.
func (c *conn) wantFlush() {
	if c.flushing || c.ended || !c.hasWork() {
		return
	}
	c.flushing = true
	if !c.appoint(nil) {
		c.dispatch()
	}
}

// flushHere is wantFlush by the caller's own hand, one batch and as far as the socket takes it without waiting: for
// users who have something small to say and nothing better to do. It spares a goroutine for each CONNECT, answer and
// end of a stream, except an answer that refuses a request whose client has not ended it. Where there are other
// streams, those of their users who are ready to run come first: what they have to say goes in the same record and
// write. mu is held, and released on return.
func (c *conn) flushHere() {
	if c.brief == nil || c.flushing || c.isOver() || !c.hasWork() {
		c.wantFlush()
		c.mu.Unlock()
		return
	}
	c.flushing, c.flusher = true, nil
	if len(c.streams) > 1 {
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	c.cfg.Panics.Run("an HBONE writer", c.flushBriefly, c.crashes)
}

// flushRound writes one batch without waiting, and leaves what is left to others. mu is held and flushing is set; mu is
// released on return.
func (c *conn) flushRound() {
	if !c.ended && (c.assemble() || len(c.carry) > 0) {
		c.mu.Unlock()
		err := c.sealAndWrite(true)
		c.mu.Lock()
		c.settle()
		if err != nil && !c.ended && !isTimeout(err) { // whose deadline it was is of no interest: none was to be kept
			c.hangUp(err)
			c.mu.Unlock()
			return
		}
	}
	switch {
	case c.ended, !c.hasWork():
		c.flushing = false
	case !c.appoint(nil):
		c.dispatch()
	}
	c.mu.Unlock()
}

// hangUp is the end of flushing for good: a write has failed. Why the peer hung up may stand in what it sent before
// (an alert, a GOAWAY): the reader ends it, unless it was the last thing that we had to say, for which a reader that is
// gone may be waiting. mu is held.
func (c *conn) hangUp(err error) {
	c.flushing, c.flusher = false, nil
	if c.last {
		c.endLocked(err)
		return
	}
	c.broken = err
	c.raw.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
}

// dispatch has a goroutine of its own flush. mu is held, flushing is set.
func (c *conn) dispatch() {
	c.flusher = nil
	c.work.Add(1)
	c.cfg.Go(c.flushAlone)
}

// appoint makes a stream user the flusher who waits for his frame to go out anyway. mu is held, flushing is set.
func (c *conn) appoint(not *Stream) bool {
	if !c.inline {
		return false
	}
	for _, l := range [...]*streamList{&c.light, &c.bulk} {
		for s := l.head; s != nil; s = s.next {
			if s.writers > 0 && s != not {
				s.mustFlush = true
				c.flusher = s
				s.wcond.Signal()
				return true
			}
		}
	}
	return false
}

// flush works off the queue. mu is held and c.flushing was set by the caller; mu is released on return.
func (c *conn) flush(self *Stream) {
	c.flusher = self
	for round := 0; ; round++ {
		if c.ended {
			c.flushing, c.flusher = false, nil
			c.mu.Unlock()
			return
		}
		if self != nil && round > 0 && self.pend == nil && c.hasWork() && c.handOver(self, round) {
			c.mu.Unlock()
			return
		}
		if c.broken != nil || !c.assemble() && len(c.carry) == 0 {
			if c.last && !c.said && c.broken == nil {
				c.part()
			}
			c.flushing, c.flusher = false, nil
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		err := c.sealAndWrite(false)
		c.mu.Lock()
		c.settle()
		switch {
		case err == nil, c.ended:
		case isTimeout(err) && !c.last:
			// A deadline of one of our users, or his Close, called us off: somebody else finishes the write.
			c.raw.SetWriteDeadline(time.Time{})
			if self != nil {
				c.dispatch()
				c.mu.Unlock()
				return
			}
		default:
			c.hangUp(err)
			c.mu.Unlock()
			return
		}
	}
}

// handOver gives the flusher's role away once the flusher's own frame is out: to a stream user who waits for his
// frame to go, else, after some rounds, to a goroutine of its own. mu is held.
func (c *conn) handOver(self *Stream, round int) bool {
	if c.appoint(self) {
		return true
	}
	if round < 4 {
		return false
	}
	c.dispatch()
	return true
}

// assemble takes the next batch from the queues: control frames, small frames (up to half of it while bulk
// waits), bulk in turn. mu is held.
func (c *conn) assemble() bool {
	c.plan = c.plan[:0]
	if len(c.carry) > 0 {
		return false
	}
	c.ctrl, c.spareCtrl = c.spareCtrl[:0], c.ctrl
	c.replies, c.ownResets = 0, 0
	c.scratch = append(c.scratch[:0], c.spareCtrl...)
	budget := c.cfg.Batch - len(c.scratch)
	for budget > 0 {
		l := &c.light
		if l.head == nil || c.bulk.head != nil && budget <= c.cfg.Batch/2 {
			l = &c.bulk
		}
		s := l.head
		if s == nil {
			break
		}
		l.remove(s)
		budget -= c.emit(s)
	}
	return len(c.plan) > 0 || len(c.scratch) > 0 || c.tr.urgent()
}

// emit adds to the batch what s may send now, at most one frame of DATA, and returns its bytes on the wire.
// mu is held, s is in no list.
func (c *conn) emit(s *Stream) int {
	e := emission{id: s.id}
	size := 0
	if f := s.pend; f != nil {
		e.n = min(f.end-f.off, int(min(c.sendable(s), int64(c.peerMaxFrame))))
		if e.n <= 0 {
			c.schedule(s) // to where it waits for window
			return 0
		}
		e.f, e.off = f, f.off
		f.off += e.n
		c.spend(s, int64(e.n))
		c.earn(e.n)
		size = headLen + e.n
		if f.off < f.end {
			f.sealing = true
			c.plan = append(c.plan, e)
			c.schedule(s)
			return size
		}
		e.done = true
		s.pend = nil
		if s.writers > 0 {
			s.wcond.Signal()
		}
	}
	if s.wantEnd && !s.sentEnd {
		s.sentEnd, e.end = true, true
		size += headLen
	}
	if s.lingering {
		e.reset, e.code = s.lastWords()
	}
	if e.f == nil && !e.end && !e.reset {
		return 0
	}
	c.plan = append(c.plan, e)
	if s.sentEnd && s.gotEnd {
		c.forgetLocked(s)
	}
	return size
}

// sealAndWrite puts the batch into one buffer in wire form and writes that; briefly: as much as goes without waiting.
// Without mu: the batch is the flusher's.
func (c *conn) sealAndWrite(briefly bool) error {
	if len(c.carry) == 0 {
		want := len(c.scratch) + 256
		for i := range c.plan {
			want += headLen + c.plan[i].n + 128
		}
		buf := c.bufs.out(max(want+want/256, c.cfg.Batch+8<<10))
		out, err := c.sealBatch(*buf)
		*buf = out
		if err != nil {
			c.bufs.putOut(buf)
			return err
		}
		c.carry, c.carryBuf = out, buf
	}
	var n int
	var err error
	if briefly {
		n, err = c.brief.writeSome(c.carry)
	} else {
		n, err = c.sock.Write(c.carry)
	}
	c.carry = c.carry[n:]
	if len(c.carry) == 0 {
		c.bufs.putOut(c.carryBuf)
		c.carry, c.carryBuf = nil, nil
	}
	return err
}

// sealBatch appends the batch to out. Small things share records; a large frame is sealed from where it lies.
func (c *conn) sealBatch(out []byte) (_ []byte, err error) {
	small := c.scratch
	for i := range c.plan {
		e := &c.plan[i]
		if e.n > 0 {
			// The header goes right before the payload: over the header space, or over payload that is out already.
			head := e.f.buf[e.off-headLen : e.off]
			putDataHeader(head, e.n, 0, e.id)
			whole := e.f.buf[e.off-headLen : e.off+e.n]
			if e.n <= smallEmission {
				small = append(small, whole...)
			} else {
				if out, err = c.sealSmall(out, small); err != nil {
					return out, err
				}
				small = small[:0]
				if out, err = c.tr.seal(out, whole); err != nil {
					return out, err
				}
			}
			if e.done {
				if e.f.sealing {
					// Earlier parts are in this batch, too: settle must not touch what is somebody else's from here on.
					for j := range c.plan[:i] {
						if c.plan[j].f == e.f {
							c.plan[j].f = nil
						}
					}
				}
				c.bufs.putFrame(e.f)
				e.f = nil
			}
		}
		if e.end {
			var head [headLen]byte
			putDataHeader(head[:], 0, http2.FlagDataEndStream, e.id)
			small = append(small, head[:]...)
		}
		if e.reset {
			small = append(small, 0, 0, 4, byte(http2.FrameRSTStream), 0)
			small = binary.BigEndian.AppendUint32(small, e.id)
			small = binary.BigEndian.AppendUint32(small, uint32(e.code))
		}
	}
	out, err = c.sealSmall(out, small)
	c.scratch = small[:0]
	return out, err
}

func (c *conn) sealSmall(out, small []byte) ([]byte, error) {
	if len(small) == 0 && !c.tr.urgent() {
		return out, nil
	}
	small = append(small, 0) // the spare byte
	return c.tr.seal(out, small[:len(small)-1])
}

func putDataHeader(b []byte, n int, flags http2.Flags, id uint32) {
	b[0], b[1], b[2] = byte(n>>16), byte(n>>8), byte(n)
	b[3], b[4] = byte(http2.FrameData), byte(flags)
	binary.BigEndian.PutUint32(b[5:], id)
}

// settle gives back frames that were dropped while parts of them were being sealed. mu is held.
func (c *conn) settle() {
	for i := range c.plan {
		if f := c.plan[i].f; f != nil {
			f.sealing = false
			if f.dropped {
				f.dropped = false
				c.bufs.putFrame(f)
			}
		}
		c.plan[i].f = nil
	}
}

// dropFrame is for a frame that will not be sent. mu is held.
func (c *conn) dropFrame(f *frame) {
	if f.sealing {
		f.dropped = true
	} else {
		c.bufs.putFrame(f)
	}
}

// part is the flusher's last act: he is still the flusher while he seals it, and nobody seals after it. mu is held,
// but given up meanwhile.
func (c *conn) part() {
	c.said = true
	listen := !c.readerGone
	c.mu.Unlock()
	if out := c.tr.closeNotify(nil); len(out) > 0 {
		c.raw.Write(out)
	}
	c.mu.Lock()
	if !listen || c.readerGone || !c.parting.start(c.raw) {
		c.endLocked(ErrClosed)
	}
}

// callOff interrupts a write to the socket that s's user is stuck in. mu is held.
func (c *conn) callOff(s *Stream) {
	if c.flushing && c.flusher == s && c.inline {
		c.raw.SetWriteDeadline(time.Unix(1, 0))
	}
}
