package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
)

// copyBoth moves bytes both ways until both directions have ended (spec 9): after one side's end of
// input the other direction goes on for as long as it likes. down is the side that asked for the
// connection, up the side that we connected to. It returns the error to report; a reset by either side
// is carried to the other as a reset and is not an error.
func copyBoth(c *connection, down, up Conn) error {
	var wg sync.WaitGroup
	var back error
	wg.Add(1)
	go func() {
		defer wg.Done()
		back = copyToDownstream(c, down, up)
	}()
	forth := copyToUpstream(c, down, up)
	wg.Wait()
	if forth != nil {
		return forth
	}
	return back
}

// copyToUpstream and copyToDownstream are named so that goroutine dumps read well.
func copyToUpstream(c *connection, down, up Conn) error   { return copyOneWay(up, down, c.addReceived) }
func copyToDownstream(c *connection, down, up Conn) error { return copyOneWay(down, up, c.addSent) }

// copyOneWay copies src to dst and ends dst's input when src has ended.
func copyOneWay(dst, src Conn, count func(int)) error {
	err := move(dst, src, count)
	switch {
	case err == nil:
		if err = dst.CloseWrite(); err == nil || isReset(err) || ignorable(err) {
			return nil
		}
		err = &copyError{"while closing connection: ", err}
	case isReset(err):
		// One side is gone for good: nothing can come from it or go to it any more.
		err = nil
	case ignorable(err):
		dst.CloseWrite()
		return nil
	}
	abort(dst)
	abort(src)
	return err
}

// move is the inner loop, with the fewest copies that the two ends allow: a stream reads from its
// source straight into the frame that it is about to send; a source that can hand its buffers out does.
func move(dst, src Conn, count func(int)) error {
	if rf, ok := dst.(io.ReaderFrom); ok {
		if w, ok := src.(readWaiter); ok {
			_, err := rf.ReadFrom(&countingReader{src, w, count})
			var source *hbone.SourceError
			switch {
			case err == nil:
				return nil
			case errors.As(err, &source):
				return &copyError{"receive: ", source.Err}
			}
			return &copyError{"send: ", err}
		}
	}
	if wt, ok := src.(io.WriterTo); ok {
		w := &countingWriter{w: dst, count: count}
		if _, err := wt.WriteTo(w); err != nil {
			if w.err != nil {
				return &copyError{"send: ", w.err}
			}
			return &copyError{"receive: ", err}
		}
		return nil
	}
	return moveBuffered(dst, src, count)
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
			return &copyError{"receive: ", rerr}
		}
	}
}

type readWaiter interface{ WaitRead() error }

type countingReader struct {
	io.Reader
	readWaiter
	count func(int)
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

// copyError carries ztunnel's prefix: which way the bytes were going.
type copyError struct {
	prefix string
	err    error
}

func (e *copyError) Error() string { return e.prefix + osText(e.err) }
func (e *copyError) Unwrap() error { return e.err }

// isReset reports whether an end of the copy was reset, by its peer or by us. A tunnel that was lost and
// a stream that the peer ended for a fault of its own are errors instead.
func isReset(err error) bool {
	var lost *hbone.ConnError
	if errors.As(err, &lost) {
		return false
	}
	var se *hbone.StreamError
	if errors.As(err, &se) {
		return !se.Remote || se.Code == http2.ErrCodeConnect
	}
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// ignorable reports whether err only says that the connection is over already (spec 9).
func ignorable(err error) bool {
	var se *hbone.StreamError
	if errors.As(err, &se) {
		return errors.Is(err, syscall.EPIPE)
	}
	return errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ENOTCONN) || errors.Is(err, io.ErrClosedPipe)
}

// abort ends c so that its peer learns of a failure rather than of an orderly end.
func abort(c net.Conn) {
	switch c := c.(type) {
	case *hbone.Stream:
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
