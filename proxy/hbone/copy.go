package hbone

import (
	"io"
	"net"
)

// ReadToEnd is ReadFrom for who calls CloseWrite when src has ended: END_STREAM goes with the last bytes then, if src
// says in time that they are (Readable).
func (s *Stream) ReadToEnd(src io.Reader) (total int64, err error) { return s.readFrom(src, true) }

// ReadFrom sends what src yields until its end (nil) or an error: a *SourceError if src failed, else as Write. It
// reads straight into the frame that is sent. If src has WaitRead() error (returns when Read would not wait, as
// netstack's connections and Streams have) or is a kernel socket, an idle stream holds no buffer. If it has
// Readable() bool (whether WaitRead would return at once), a frame takes all that is there; if it has Buffered() int
// (how many bytes those are; negative: it cannot tell), the frame is as large as they need. It does not end our
// direction.
func (s *Stream) ReadFrom(src io.Reader) (total int64, err error) { return s.readFrom(src, false) }

func (s *Stream) readFrom(src io.Reader, end bool) (total int64, err error) {
	if tc, ok := src.(*net.TCPConn); ok {
		return s.ReadFromSocket(tc, nil)
	}
	s.wlock.Lock()
	defer s.wlock.Unlock()
	waiter, _ := src.(interface{ WaitRead() error })
	more, _ := src.(interface{ Readable() bool })
	size, _ := src.(interface{ Buffered() int })
	for {
		if waiter != nil {
			if err := waiter.WaitRead(); err != nil {
				return total, sourceError(err)
			}
		}
		if size != nil {
			if n := size.Buffered(); n >= 0 {
				s.class = classFor(n)
			}
		}
		f := s.c.bufs.frame(s.class)
		n, rerr := src.Read(f.room())
		for more != nil && rerr == nil && n < len(f.room()) && more.Readable() {
			var m int
			m, rerr = src.Read(f.room()[n:])
			n += m
		}
		if err := s.send(f, n, end && rerr == io.EOF); err != nil {
			return total, err
		}
		total += int64(n)
		if rerr != nil {
			return total, sourceError(rerr)
		}
	}
}

// ReadFromSocket is ReadFrom for a kernel socket; count, if there is one, is told of each read.
func (s *Stream) ReadFromSocket(src *net.TCPConn, count func(int)) (total int64, err error) {
	r, err := newSockReader(src)
	if err != nil {
		return 0, &SourceError{err}
	}
	s.wlock.Lock()
	defer s.wlock.Unlock()
	for {
		f, n, rerr := r.read(s.c.bufs, s.class)
		if rerr != nil {
			return total, sourceError(rerr)
		}
		if count != nil {
			count(n)
		}
		if err := s.send(f, n, false); err != nil {
			return total, err
		}
		total += int64(n)
	}
}

// send puts a frame into which n bytes were read, or gives an empty one back. end: they are the last, and CloseWrite
// follows. wlock is held.
func (s *Stream) send(f *frame, n int, end bool) error {
	if n == 0 {
		s.c.bufs.putFrame(f)
		return nil
	}
	// The buffer grows with what is there to be sent: an echo stays at the smallest.
	switch {
	case n == len(f.room()) && int(s.class) < len(frameLens)-1:
		s.class++
	case s.class > 0 && n < frameLens[s.class-1]/2:
		s.class--
	}
	f.end += n
	return s.put(f, end)
}

// pieceBatch is the most that WriteTo and WriteToSocket hand out at once, in bytes: two full packets, and not a byte
// of a third, which would leave either alone or as a third of all. A frame lies in two pieces where a block of the
// reader's ended within it.
const pieceBatch = 2 * bulkLen

// WriteToSocket is WriteTo for a kernel socket; count is told of what the socket took.
func (s *Stream) WriteToSocket(dst *net.TCPConn, count func(int)) (total int64, err error) {
	w := newSockWriter(dst)
	if w == nil {
		return 0, &SinkError{net.ErrClosed}
	}
	return s.writePieces(w, pieceBatch, count)
}

// bufferWriter takes many pieces at once, in order, and none of them for longer than the call.
type bufferWriter interface {
	WriteBuffers(pieces [][]byte) (int64, error)
}

// oneByOne is a writer that takes one piece at a time.
type oneByOne struct{ io.Writer }

func (w oneByOne) WriteBuffers(pieces [][]byte) (total int64, err error) {
	for _, p := range pieces {
		n, err := w.Write(p)
		total += int64(n)
		if err != nil || n < len(p) {
			return total, err
		}
	}
	return total, nil
}

// writePieces is WriteTo with pieces of at most batch bytes together in one write; count, if there is one, is told of
// what dst took.
func (s *Stream) writePieces(dst bufferWriter, batch int, count func(int)) (total int64, err error) {
	var taken []chunk
	var pieces [][]byte
	for {
		s.rmu.Lock()
		if err := s.await(); err != nil {
			s.rmu.Unlock()
			if err == io.EOF {
				err = nil
			}
			return total, err
		}
		size := 0
		for len(s.chunks) > s.head && size < batch {
			ch := s.pop(min(bulkLen, batch-size))
			taken, pieces = append(taken, ch), append(pieces, ch.k.b[ch.off:ch.end])
			size += ch.end - ch.off
		}
		s.rmu.Unlock()
		n, err := dst.WriteBuffers(pieces)
		for i := range taken {
			taken[i].k.release()
		}
		clear(taken)
		taken = taken[:0]
		clear(pieces)
		pieces = pieces[:0]
		s.consumed(size)
		if n > 0 && count != nil {
			count(int(n))
		}
		total += n
		if err == nil && n < int64(size) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return total, &SinkError{err}
		}
	}
}

func sourceError(err error) error {
	if err == io.EOF {
		return nil
	}
	return &SourceError{err}
}
