package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
)

// copying moves one connection's bytes both ways until both directions have ended (spec 9): after one
// side's end of input the other direction goes on for as long as it likes. A reset by either side is
// carried to the other as a reset; an application's is not an error, a tunnel's or stream's is (isReset).
//
// Each direction is a goroutine of its own whose stack holds nothing but the copying: what set the
// connection up has returned; and while nothing comes it rests (rest.go): there is none.
type copying struct {
	c        *connection
	down, up Conn // the side that asked for the connection, and the side that we connected to

	left        atomic.Int32          // directions that have not ended
	crash       atomic.Pointer[Error] // that a direction has panicked
	forth, back error
	rests       [2]restState // of forth and back

	mu    sync.Mutex
	lost  error       // why an end was lost; the first counts
	tear  *time.Timer // set with lost: ends what has not ended by itself
	ended bool
	ways  [2]oneEnd   // what comes from down and from up
	quit  *time.Timer // set when nothing is left of a way whose source wants no answer
}

// oneEnd is what is known of a way's end.
type oneEnd struct {
	passed  bool // its end went to the other side
	unheard bool // its source has reset what goes the other way
}

// tearAfter is how long after the loss of one side the other may still take what has arrived. A direction that
// waits for a reader who may never read again must not keep its bytes for longer.
const tearAfter = 200 * time.Millisecond

// resettable is a side that tells of its loss while nobody reads from it (hbone.Stream, netstack.Conn).
type resettable interface{ OnReset(func(error)) }

// watch has the loss of one side end the whole, also while both directions wait for the other side.
func (s *copying) watch(side Conn) {
	if r, ok := side.(resettable); ok {
		r.OnReset(s.lose)
	}
	if t, ok := side.(*hbone.Stream); ok {
		t.OnStopSending(func() { s.mark(side, func(w *oneEnd) { w.unheard = true }) })
	}
}

// mark notes something of the way from src. Once that has ended and src hears nothing any more, the other side would
// work for nobody, and hold what it holds: it is aborted when it has everything. Locks of src may be held.
func (s *copying) mark(src Conn, note func(*oneEnd)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w, dst := &s.ways[0], s.up
	if src == s.up {
		w, dst = &s.ways[1], s.down
	}
	note(w)
	if w.passed && w.unheard && !s.ended && s.quit == nil {
		s.quitSoon(dst)
	}
}

// quitSoon aborts dst after tearAfter, or as much later as dst's far end takes to acknowledge all. mu is held.
func (s *copying) quitSoon(dst Conn) {
	s.c.p.work.Add(1) // beside the connection's own, which is held until ended is set
	s.quit = time.AfterFunc(tearAfter, s.c.p.o.Panics.Func("the end of a connection", func() {
		defer s.c.p.work.Done()
		if sentEnd(dst) {
			abort(dst)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.ended {
			s.quitSoon(dst)
		}
	}, nil))
}

// sentEnd reports whether c's far end has all that was written to c, and its end: an abort loses nothing. False of what
// cannot tell.
func sentEnd(c Conn) bool {
	switch c := c.(type) {
	case interface{ SentEnd() bool }:
		return c.SentEnd()
	case *net.TCPConn:
		return hbone.SocketSentAll(c)
	}
	return false
}

// lose is called with locks of the lost side held.
func (s *copying) lose(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || s.tear != nil {
		return
	}
	s.lost = err
	s.c.p.work.Add(1) // beside the connection's own, which is held until ended is set
	s.tear = time.AfterFunc(tearAfter, s.c.p.o.Panics.Func("the end of a connection", func() {
		defer s.c.p.work.Done()
		abort(s.down)
		abort(s.up)
	}, nil))
}

// accept completes the handshake of a flow whose upstream stands, and starts copying.
func (c *connection) accept(f Flow, up Conn) {
	down, err := f.Accept()
	if err != nil {
		// The application has given up meanwhile; nothing was asked of the far side but to be there.
		abort(up)
		c.books.record(nil)
		return
	}
	c.carry(down, up)
}

// carry starts copying and returns.
func (c *connection) carry(down, up Conn) {
	c.carried, c.books.carried, c.books.memory = true, true, spliced(down) || spliced(up)
	s := &copying{c: c, down: down, up: up}
	if cut := c.stand(down, up); cut != nil {
		cancel(down)
		cancel(up)
		s.end()
		return
	}
	s.left.Store(2)
	s.watch(down)
	s.watch(up)
	c.mu.Lock()
	c.copying = s
	c.mu.Unlock()
	c.p.workers.Go(s.copyToUpstream)
	c.p.workers.Go(s.copyToDownstream)
	c.p.sweepSoon()
}

// copyToUpstream and copyToDownstream are named so that goroutine dumps read well. Who starts them again after a rest
// has other labels.
func (s *copying) copyToUpstream() {
	pprof.SetGoroutineLabels(s.c.p.labels[s.c.dir])
	s.c.p.o.Panics.Run("copying to upstream", func() {
		if err := s.oneWay(s.up, s.down, s.c.books.addReceived); err != errRests {
			s.forth = err
			s.done()
		}
	}, s.crashed)
}

func (s *copying) copyToDownstream() {
	pprof.SetGoroutineLabels(s.c.p.labels[s.c.dir])
	s.c.p.o.Panics.Run("copying to downstream", func() {
		if err := s.oneWay(s.down, s.up, s.c.books.addSent); err != errRests {
			s.back = err
			s.done()
		}
	}, s.crashed)
}

func (s *copying) done() {
	if s.left.Add(-1) == 0 {
		s.end()
	}
}

// crashed ends the copying of a direction that has panicked. Its ends may be locked for ever: nobody waits for them.
func (s *copying) crashed(err error) {
	s.crash.CompareAndSwap(nil, fail(kindIO, err))
	for _, c := range []Conn{s.down, s.up} {
		go s.c.p.o.Panics.Func("the end of a connection", func() {
			if t, ok := c.(*hbone.Stream); ok {
				t.Crashed(err)
				return
			}
			abort(c)
		}, nil)()
	}
	s.done()
}

// end keeps the books. The error of the way to upstream is the one that is reported if there are two.
func (s *copying) end() {
	if s.crash.Load() == nil { // else they are being closed
		s.up.Close()
		s.down.Close()
	}
	err := s.forth
	if err == nil {
		err = s.back
	}
	s.mu.Lock()
	s.ended = true
	if s.tear != nil && s.tear.Stop() {
		s.c.p.work.Done()
	}
	if s.quit != nil && s.quit.Stop() {
		s.c.p.work.Done()
	}
	if err == nil && s.lost != nil && !isReset(s.lost) {
		err = &copyError{receivePrefix, s.lost}
	}
	s.mu.Unlock()
	if crash := s.crash.Load(); crash != nil {
		err = crash
	}
	if cut := s.c.reason(); cut != nil {
		err = cut
	}
	s.c.books.record(err)
	s.c.leave()
}

// oneWay copies src to dst and ends dst's input when src has ended. errRests: it was interrupted, and src starts it
// again.
func (s *copying) oneWay(dst, src Conn, count func(int)) error {
	m, ok := s.c.p.movers.Get().(*mover)
	if !ok {
		m = new(mover)
	}
	err := m.move(dst, src, count)
	*m = mover{}
	s.c.p.movers.Put(m)
	switch {
	case err != nil && rests(err, src):
		return errRests
	case err != nil && s.c.reason() != nil:
		// Its ends are being canceled one after the other. The far one must not learn of the near one's end as if its
		// application had ended it.
	case err == nil:
		if err = dst.CloseWrite(); err == nil {
			s.mark(src, func(w *oneEnd) { w.passed = true })
			return nil
		}
		if isReset(err) || ignorable(err) {
			return nil
		}
		err = &copyError{"while closing connection: ", err}
	case isReset(err):
		// One side is gone for good: nothing can come from it or go to it any more.
		abort(dst)
		abort(src)
		return nil
	case ignorable(err):
		dst.CloseWrite()
		return nil
	}
	cancel(dst) // to the peer it is an error, too
	cancel(src)
	return err
}

// mover is what counts the bytes of one direction while they are copied. It is used again: an idle direction has none.
type mover struct {
	in  countingReader
	out countingBufferWriter
}

// move is the inner loop, with the fewest copies that the two ends allow: a stream reads from its
// source straight into the frame that it is about to send; a source that can hand its buffers out does.
func (m *mover) move(dst, src Conn, count func(int)) error {
	if done, err := moveSocket(dst, src, count); done {
		return err
	}
	if to, ok := dst.(endReader); ok {
		if w, ok := src.(readWaiter); ok {
			m.in = countingReader{src, w, count}
			_, err := to.ReadToEnd(&m.in)
			var source *hbone.SourceError
			switch {
			case err == nil:
				return nil
			case errors.As(err, &source):
				return &copyError{receivePrefix, source.Err}
			}
			return &copyError{"send: ", err}
		}
	}
	if app, ok := src.(*net.TCPConn); ok {
		if _, kernel := dst.(*net.TCPConn); !kernel { // between two sockets of the kernel's, it moves the bytes itself
			return moveFromSocket(dst, app, count)
		}
	}
	if wt, ok := src.(io.WriterTo); ok {
		m.out = countingBufferWriter{countingWriter: countingWriter{w: dst, count: count}}
		w := &m.out.countingWriter
		var to io.Writer = w
		if b, ok := dst.(bufferWriter); ok {
			m.out.b = b
			to = &m.out
		}
		if _, err := wt.WriteTo(to); err != nil {
			if w.err != nil {
				return &copyError{"send: ", w.err}
			}
			return &copyError{receivePrefix, err}
		}
		return nil
	}
	return moveBuffered(dst, src, count)
}

// moveSocket is move between a stream of a tunnel and an application's kernel socket; false: they are something else.
func moveSocket(dst, src Conn, count func(int)) (done bool, err error) {
	side := "send: " // where an error of the stream's is
	switch to := dst.(type) {
	case *hbone.Stream:
		app, ok := src.(*net.TCPConn)
		if !ok {
			return false, nil
		}
		_, err = to.ReadFromSocket(app, count)
	case *net.TCPConn:
		stream, ok := src.(*hbone.Stream)
		if !ok {
			return false, nil
		}
		side = receivePrefix
		_, err = stream.WriteToSocket(to, count)
	default:
		return false, nil
	}
	var source *hbone.SourceError
	var sink *hbone.SinkError
	switch {
	case err == nil:
		return true, nil
	case errors.As(err, &source):
		return true, &copyError{receivePrefix, source.Err}
	case errors.As(err, &sink):
		return true, &copyError{"send: ", sink.Err}
	}
	return true, &copyError{side, err}
}

// moveBuffered is for ends with no better way.
func moveBuffered(dst, src Conn, count func(int)) error {
	buf := make([]byte, 64<<10)
	for {
		r, rerr := src.Read(buf)
		if r > 0 {
			n, werr := dst.Write(buf[:r])
			count(n)
			if werr != nil {
				return &copyError{"send: ", werr}
			}
		}
		if rerr == io.EOF {
			return nil
		}
		if rerr != nil {
			return &copyError{receivePrefix, rerr}
		}
	}
}

// endReader is a stream of a tunnel: it reads by itself, and is told CloseWrite when the source has ended.
type endReader interface {
	ReadToEnd(io.Reader) (int64, error)
}

type readWaiter interface {
	WaitRead() error
	Readable() bool
}

type countingReader struct {
	io.Reader
	readWaiter
	count func(int)
}

// Buffered is negative of a source that cannot tell.
func (r *countingReader) Buffered() int {
	if b, ok := r.Reader.(interface{ Buffered() int }); ok {
		return b.Buffered()
	}
	return -1
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.count(n)
	}
	return n, err
}

type countingWriter struct {
	w     io.Writer
	count func(int)
	err   error // what w failed with: tells its errors from the source's
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	if n > 0 {
		w.count(n)
	}
	if err != nil {
		w.err = err
	}
	return n, err
}

// bufferWriter takes many pieces at once, in order: a connection of a stack (netstack.BufferWriter), and a splice to
// one.
type bufferWriter interface {
	WriteBuffers(pieces [][]byte) (int64, error)
}

// countingBufferWriter is a countingWriter for one.
type countingBufferWriter struct {
	countingWriter
	b bufferWriter
}

func (w *countingBufferWriter) WriteBuffers(pieces [][]byte) (int64, error) {
	n, err := w.b.WriteBuffers(pieces)
	if n > 0 {
		w.count(int(n))
	}
	if err != nil {
		w.err = err
	}
	return n, err
}

// receivePrefix is that of the source's errors.
const receivePrefix = "receive: "

// copyError carries ztunnel's prefix: which way the bytes were going.
type copyError struct {
	prefix string
	err    error
}

func (e *copyError) Error() string { return e.prefix + osText(e.err) }
func (e *copyError) Unwrap() error { return e.err }

// isReset reports whether an end of the copy was reset, by its application or by us. A tunnel that was lost and
// a stream that the peer cut, for whatever reason but its application's reset (CONNECT_ERROR), are errors instead.
func isReset(err error) bool {
	var lost *hbone.ConnError
	if errors.As(err, &lost) {
		return false
	}
	var se *hbone.StreamError
	if errors.As(err, &se) {
		return !se.Remote || se.Code == http2.ErrCodeConnect && !se.Ended
	}
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// ignorable reports whether err only says that the connection is over already (spec 9).
func ignorable(err error) bool {
	var lost *hbone.ConnError
	if errors.As(err, &lost) {
		return false // data that was cut short must not look complete
	}
	var se *hbone.StreamError
	if errors.As(err, &se) {
		return errors.Is(err, syscall.EPIPE)
	}
	return errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ENOTCONN) || errors.Is(err, io.ErrClosedPipe)
}

// resetter is a stream, of a tunnel or in memory: its other end learns why it was reset.
type resetter interface{ Reset(http2.ErrCode) }

// abort ends c so that its peer learns of a failure rather than of an orderly end.
func abort(c net.Conn) {
	switch c := c.(type) {
	case resetter:
		c.Reset(http2.ErrCodeConnect) // RFC 9113 section 8.5
	case interface{ Reset() error }:
		c.Reset()
	case *net.TCPConn:
		c.SetLinger(0)
		c.Close()
	default:
		c.Close()
	}
}
