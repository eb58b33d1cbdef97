package hbone

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// Receiving: the reader goroutine pushes what DATA frames carry, the stream's user takes it out.

const (
	// copyLen is the payload below which a piece is copied, so that it does not keep a large block from reuse.
	copyLen = 2 << 10
	// pinSlack is how much of blocks beyond twice the unread payload a connection may keep in use, in bytes.
	pinSlack = 1 << 20
)

// chunk is received payload: k.b[off:end].
type chunk struct {
	k        *block
	off, end int
	own      bool // k was taken for this chunk alone: later pieces may be added
}

// push adds k.b[off:end] to what s's user will read; wakeOwed tells him. Only the reader calls it. False: nobody
// will, the caller gives the credit back.
func (s *Stream) push(k *block, off, end int) bool {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.rclosed || s.rerr != nil {
		return false
	}
	n := end - off
	s.c.unread.Add(int64(n))
	var tail *chunk
	if len(s.chunks) > s.head {
		tail = &s.chunks[len(s.chunks)-1]
	}
	switch {
	case tail != nil && tail.k == k && tail.end == off:
		tail.end = end
	case n >= copyLen && s.c.pinned.Load()*blockLarge <= 2*s.c.unread.Load()+pinSlack:
		k.ref()
		s.chunks = append(s.chunks, chunk{k: k, off: off, end: end})
	default:
		if n >= copyLen {
			s.c.cfg.Stats.Compacted.Add(1)
		}
		s.pushCopy(tail, k.b[off:end])
	}
	if s.readers > 0 && !s.owed {
		s.owed = true
		s.c.rd.owed = append(s.c.rd.owed, s)
	}
	return true
}

// wakeOwed wakes the users for whom something was pushed: once all that had arrived is theirs, so that they take
// it in few large pieces, and are not woken for each.
func (r *reader) wakeOwed() {
	for i, s := range r.owed {
		s.rmu.Lock()
		s.owed = false
		s.wakeReaders()
		s.rmu.Unlock()
		r.owed[i] = nil
	}
	r.owed = r.owed[:0]
}

// pushCopy adds b to the tail's own block, or to further ones. rmu is held.
func (s *Stream) pushCopy(tail *chunk, b []byte) {
	for len(b) > 0 {
		if tail == nil || !tail.own || tail.end == len(tail.k.b) {
			size := blockSmall
			if len(b) > blockSmall || tail != nil && tail.own {
				size = blockDense // it did not fit, or it fills up: there is more to come
			}
			s.chunks = append(s.chunks, chunk{k: s.c.bufs.block(size), own: true})
			tail = &s.chunks[len(s.chunks)-1]
		}
		n := copy(tail.k.b[tail.end:], b)
		tail.end += n
		b = b[n:]
	}
}

// endReading lets the user see err (io.EOF for an orderly end) after what was received.
func (s *Stream) endReading(err error) {
	var se *StreamError
	if errors.As(err, &se) && se.orderly() {
		err = io.EOF
	}
	s.rmu.Lock()
	if s.rerr == nil {
		s.rerr = err
	}
	s.wakeReaders()
	s.rmu.Unlock()
}

// stopReading throws away what was received and what will be.
func (s *Stream) stopReading() {
	s.rmu.Lock()
	n := 0
	for i := s.head; i < len(s.chunks); i++ {
		n += s.chunks[i].end - s.chunks[i].off
		s.chunks[i].k.release()
		s.chunks[i] = chunk{}
	}
	s.chunks, s.head = nil, 0
	s.rclosed = true
	s.rdl.stop()
	s.wakeReaders()
	s.rmu.Unlock()
	s.c.settleConn(n)
}

// wakeReaders has whoever waits look again. rmu is held.
func (s *Stream) wakeReaders() {
	if f := s.again; f != nil {
		s.again = nil
		s.readers--
		f()
	}
	s.rcond.Broadcast()
}

// Rest sends the reader away: the wait for something to read that is under way, or the next one, ends with EAGAIN, and
// again is called once when there is something to read or a reason to read no more. Nobody else may read until then. A
// wait that finds something does not end so. again must neither wait nor call the stream: locks are held.
func (s *Stream) Rest(again func()) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	s.rest = again
	s.rcond.Broadcast()
}

// await waits until there is something to read, or nothing any more. rmu is held, but given up meanwhile.
func (s *Stream) await() error {
	for {
		switch {
		case s.rclosed:
			return net.ErrClosed
		case s.rdl.expired:
			return os.ErrDeadlineExceeded
		case len(s.chunks) > s.head:
			return nil
		case s.rerr != nil:
			return s.rerr
		}
		s.readers++
		if s.rest != nil {
			s.rest, s.again = nil, s.rest
			return syscall.EAGAIN
		}
		s.rcond.Wait()
		s.readers--
	}
}

// pop takes up to max bytes off the front, as a chunk with a reference of its own. rmu is held, there is a chunk.
func (s *Stream) pop(max int) chunk {
	ch := &s.chunks[s.head]
	out := *ch
	if out.end-out.off > max {
		out.end = out.off + max
		out.k.ref()
		ch.off = out.end
		return out
	}
	*ch = chunk{}
	s.head++
	if s.head == len(s.chunks) {
		if cap(s.chunks) > 64 {
			s.chunks = nil
		}
		s.chunks, s.head = s.chunks[:0], 0
	} else if s.head >= 64 && s.head*2 >= len(s.chunks) {
		s.chunks = s.chunks[:copy(s.chunks, s.chunks[s.head:])]
		s.head = 0
	}
	return out
}

// Read takes what has arrived, up to len(p) bytes.
func (s *Stream) Read(p []byte) (n int, err error) {
	s.rmu.Lock()
	if len(p) == 0 {
		defer s.rmu.Unlock()
		switch {
		case s.rclosed:
			return 0, net.ErrClosed
		case s.rdl.expired:
			return 0, os.ErrDeadlineExceeded
		}
		return 0, nil
	}
	if err := s.await(); err != nil {
		s.rmu.Unlock()
		return 0, err
	}
	for n < len(p) && len(s.chunks) > s.head {
		ch := &s.chunks[s.head]
		m := copy(p[n:], ch.k.b[ch.off:ch.end])
		n += m
		if ch.off += m; ch.off == ch.end {
			out := s.pop(bulkLen)
			out.k.release()
		}
	}
	s.rmu.Unlock()
	s.consumed(n)
	return n, nil
}

// WaitRead returns when Read would not wait: there is data, an end or an error (which Read then reports).
// Its own errors are os.ErrDeadlineExceeded, net.ErrClosed and Rest's.
func (s *Stream) WaitRead() error {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	err := s.await()
	if err == os.ErrDeadlineExceeded || err == net.ErrClosed || err == syscall.EAGAIN {
		return err
	}
	return nil
}

// Readable reports whether Read would return at once.
func (s *Stream) Readable() bool {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	return s.rclosed || s.rdl.expired || len(s.chunks) > s.head || s.rerr != nil
}

// WriteTo hands what arrives to dst without a copy in between, until the peer ends its direction: some pieces at once
// if dst has WriteBuffers([][]byte) (int64, error), as netstack's connections have, whose packets are the fuller for
// it; else at most bulkLen bytes per Write. A failure of dst is a *SinkError. Credit is given back after dst took it.
func (s *Stream) WriteTo(dst io.Writer) (total int64, err error) {
	if w, ok := dst.(bufferWriter); ok {
		return s.writePieces(w, pieceBatch, nil)
	}
	return s.writePieces(oneByOne{dst}, bulkLen, nil)
}
