package proxy

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
)

// splice joins two proxies of one process: what is written to one of its ends goes straight to whom the other end's
// reader writes to (WriteTo). It holds no bytes: a writer waits for the other side's application and for nobody else,
// and views of one stack's receive queue are copied once, into the other's send queue. Its errors are those of a
// tunnel's stream, by which the copying tells an application's reset from a cut.
type splice struct {
	mu    sync.Mutex
	wake  sync.Cond // of any change below
	ways  [2]way    // what ends[i] writes
	ends  [2]spliceEnd
	reset bool
	by    int // whose end it was
	code  http2.ErrCode
}

// way is one direction.
type way struct {
	sink  *spliceSink // the reader's; nil: it has not come yet, or has gone
	busy  bool        // a writer is in sink
	ended bool        // no more will be written
}

// spliceEnd is one proxy's end.
type spliceEnd struct {
	s       *splice
	i       int
	onReset func(error)
}

// spliced reports whether an end of a connection is that of a splice.
func spliced(c Conn) bool {
	_, ok := c.(*spliceEnd)
	return ok
}

// newSplice returns the end of the source's proxy and that of the destination's.
func newSplice() (up, down *spliceEnd) {
	s := &splice{}
	s.wake.L = &s.mu
	for i := range s.ends {
		s.ends[i] = spliceEnd{s: s, i: i}
	}
	return &s.ends[0], &s.ends[1]
}

// err is the reset as this end sees it. mu is held.
func (e *spliceEnd) err() error {
	if !e.s.reset {
		return nil
	}
	return &hbone.StreamError{Code: e.s.code, Remote: e.s.by != e.i}
}

// Write returns when the other side has written b to its application.
func (e *spliceEnd) Write(b []byte) (int, error) {
	one := [1][]byte{b}
	n, err := e.WriteBuffers(one[:])
	return int(n), err
}

// WriteBuffers returns when the other side has written all the pieces to its application.
func (e *spliceEnd) WriteBuffers(pieces [][]byte) (int64, error) {
	s, w := e.s, &e.s.ways[e.i]
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.reset:
			return 0, e.err()
		case w.ended:
			return 0, io.ErrClosedPipe
		case w.sink != nil && !w.busy:
			return e.pass(w, pieces)
		}
		s.wake.Wait()
	}
}

// pass calls the sink without the lock. The reader stays in WriteTo as long as it lasts.
func (e *spliceEnd) pass(w *way, pieces [][]byte) (n int64, err error) {
	sink := w.sink
	w.busy = true
	e.s.mu.Unlock()
	defer func() { // also if sink panics: whoever waits for it must go on
		e.s.mu.Lock()
		w.busy = false
		if err != nil {
			w.sink = nil // its reader has the error, and will say by a reset what it comes to
		}
		e.s.wake.Broadcast()
	}()
	return sink.write(pieces)
}

// WriteTo has the other end's writers write to w until they end, a write fails, or there is a reset. The error of a
// write is w's own and w knows it.
func (e *spliceEnd) WriteTo(to io.Writer) (int64, error) {
	s, w := e.s, &e.s.ways[1-e.i]
	sink := &spliceSink{w: to}
	s.mu.Lock()
	defer s.mu.Unlock()
	w.sink = sink
	s.wake.Broadcast()
	for w.busy || w.sink != nil && !w.ended && !s.reset {
		s.wake.Wait()
	}
	w.sink = nil
	if sink.err != nil {
		return sink.n, sink.err
	}
	return sink.n, e.err()
}

// spliceSink remembers for the reader what came of its writer's writes.
type spliceSink struct {
	w   io.Writer
	n   int64
	err error
}

// write passes all pieces on; what is left of them is an error.
func (k *spliceSink) write(pieces [][]byte) (n int64, err error) {
	if b, ok := k.w.(bufferWriter); ok {
		n, err = b.WriteBuffers(pieces)
	} else {
		n, err = writeEach(k.w, pieces)
	}
	k.n += n
	k.err = err
	if err != nil {
		// To the writer it is what the stream of a tunnel would say: the other side is gone.
		return n, &hbone.StreamError{Code: http2.ErrCodeConnect, Remote: true}
	}
	return n, nil
}

// writeEach writes one piece after the other.
func writeEach(w io.Writer, pieces [][]byte) (int64, error) {
	var done int64
	for _, p := range pieces {
		n, err := w.Write(p)
		done += int64(n)
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// CloseWrite ends our direction after what was written.
func (e *spliceEnd) CloseWrite() error {
	e.s.mu.Lock()
	defer e.s.mu.Unlock()
	if e.s.reset {
		return e.err()
	}
	e.s.ways[e.i].ended = true
	e.s.wake.Broadcast()
	return nil
}

// Reset ends both directions at once with a code of HTTP/2, as a tunnel's stream is ended. The first counts.
func (e *spliceEnd) Reset(code http2.ErrCode) {
	s := e.s
	s.mu.Lock()
	if s.reset || s.ways[0].ended && s.ways[1].ended {
		s.mu.Unlock()
		return
	}
	s.reset, s.by, s.code = true, e.i, code
	other := &s.ends[1-e.i]
	told, err := other.onReset, other.err()
	s.wake.Broadcast()
	s.mu.Unlock()
	if told != nil {
		told(err)
	}
}

// OnReset has f called when the other end resets; at once if it has.
func (e *spliceEnd) OnReset(f func(error)) {
	e.s.mu.Lock()
	e.onReset = f
	err := e.err()
	mine := e.s.by == e.i
	e.s.mu.Unlock()
	if err != nil && !mine {
		f(err)
	}
}

// Close is a reset unless both directions have ended.
func (e *spliceEnd) Close() error {
	e.Reset(http2.ErrCodeCancel)
	return nil
}

// Read is not how a splice is read: WriteTo is. It is here for net.Conn.
func (e *spliceEnd) Read([]byte) (int, error) { return 0, os.ErrInvalid }

// The copying, the only user, sets no deadlines on its ends.

func (e *spliceEnd) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (e *spliceEnd) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (e *spliceEnd) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (e *spliceEnd) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (e *spliceEnd) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
