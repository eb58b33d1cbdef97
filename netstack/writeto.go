package netstack

import (
	"io"
	"net"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// BufferWriter is what WriteTo prefers to call: all pieces at once, in order.
// The pieces are only lent for the time of the call and must not be changed.
type BufferWriter interface {
	WriteBuffers(pieces [][]byte) (int64, error)
}

const (
	// lendBytes is how much WriteTo lends at a time, at least one segment, and lendPieces to one who takes all pieces
	// at once: another stack's connection, whose packets are the fuller for it.
	lendBytes  = 64 << 10
	lendPieces = 256 << 10
	// gatherBelow: pieces smaller than this are copied together if the writer
	// takes only one at a time.
	gatherBelow = 8 << 10
)

// lent are the pieces of one round of WriteTo. They come from a pool and only
// while there are bytes.
type lent struct {
	pieces [][]byte
	n      int
	limit  int // of n
	skip   discard
	iov    net.Buffers
	buf    []byte // gathered small pieces, made when first needed
}

// Write collects, for Endpoint.Read with Peek.
func (l *lent) Write(b []byte) (int, error) {
	if l.n >= l.limit || len(l.pieces) == cap(l.pieces) {
		return 0, errShort
	}
	l.pieces = append(l.pieces, b)
	l.n += len(b)
	return len(b), nil
}

// WriteTo implements io.WriterTo: it writes what arrives to w until end of file
// (then the error is nil), an error of either side, or the read deadline. It
// waits without a buffer. What it writes lies in the receive queue itself and
// is taken out of it afterwards, so that a slow w closes the peer's window
// rather than filling memory. Writes are of at most 64 KiB, WriteBuffers of four times as much.
func (c *Conn) WriteTo(w io.Writer) (n int64, err error) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	for {
		if err := c.readable(); err != nil {
			return n, c.opError("read", err)
		}
		m, done, err := c.lend(w)
		n += m
		if done || err != nil {
			return n, err
		}
	}
}

// lend writes one round to w; done means end of file.
func (c *Conn) lend(w io.Writer) (n int64, done bool, err error) {
	if !c.pin() {
		return 0, false, c.opError("read", net.ErrClosed)
	}
	defer c.unpin()
	l := c.h.s.lent.Get().(*lent)
	defer l.put(c.h.s)
	l.limit = lendBytes
	if _, ok := w.(BufferWriter); ok {
		l.limit = lendPieces
	}
	if _, terr := c.ep.Read(l, tcpip.ReadOptions{Peek: true}); l.n == 0 {
		err := c.readError(terr)
		if err == io.EOF {
			return 0, true, nil
		}
		return 0, false, err
	}
	n, err = l.writeTo(w)
	if n > 0 {
		l.skip.n = int(n)
		c.take(&l.skip)
	}
	return n, false, err
}

func (l *lent) put(s *Stack) {
	clear(l.pieces)
	l.pieces, l.n = l.pieces[:0], 0
	s.lent.Put(l)
}

func (l *lent) writeTo(w io.Writer) (int64, error) {
	if len(l.pieces) == 1 {
		n, err := w.Write(l.pieces[0])
		return int64(n), shortWrite(n, len(l.pieces[0]), err)
	}
	switch w := w.(type) {
	case BufferWriter:
		return w.WriteBuffers(l.pieces)
	case *net.TCPConn:
		l.iov = l.pieces // WriteTo consumes the copy of the header, clear the array
		return l.iov.WriteTo(w)
	}
	return l.gather(w)
}

// gather copies runs of small pieces together and writes large ones as they are.
func (l *lent) gather(w io.Writer) (n int64, err error) {
	flush := func(b []byte) {
		if err != nil || len(b) == 0 {
			return
		}
		var m int
		m, err = w.Write(b)
		n += int64(m)
		err = shortWrite(m, len(b), err)
	}
	buf := l.buf[:0]
	for _, p := range l.pieces {
		if len(p) >= gatherBelow {
			flush(buf)
			buf = buf[:0]
			flush(p)
			continue
		}
		if cap(buf) == 0 {
			l.buf = make([]byte, 0, lendBytes)
			buf = l.buf
		}
		if len(buf)+len(p) > cap(buf) {
			flush(buf)
			buf = buf[:0]
		}
		buf = append(buf, p...)
	}
	flush(buf)
	return n, err
}

func shortWrite(n, want int, err error) error {
	if err == nil && n < want {
		return io.ErrShortWrite
	}
	return err
}

// discard takes n bytes out of the receive queue.
type discard struct{ n int }

func (d *discard) Write(b []byte) (int, error) {
	if d.n < len(b) {
		n := d.n
		d.n = 0
		return n, errShort
	}
	d.n -= len(b)
	return len(b), nil
}
