package hbone

import (
	"errors"
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// transport is what lies between the frames and the socket: nothing, or TLS records.
type transport interface {
	// wait returns when fill has work to do: bytes have arrived. It holds no buffer while it sleeps, where the
	// connection beneath allows that.
	wait() error
	// fill puts what has arrived into b, as much as fits (records are not split: b must have room for one), and
	// never blocks. Zero is possible: a record without application data.
	fill(b []byte) (int, error)
	// pending reports whether another fill, with a fresh buffer, would find work at once.
	pending() bool
	// seal appends the wire form of plain to out. The byte after plain in its array is used and restored.
	seal(out, plain []byte) ([]byte, error)
	// closeNotify appends what ends the connection in good order (TLS close_notify).
	closeNotify(out []byte) []byte
	// urgent reports whether seal has something of its own to send (a KeyUpdate that the peer asked for).
	urgent() bool
}

// wire reads from the connection beneath into one large buffer, taken when bytes arrive and given back when all
// of them are used up. One goroutine at a time.
type wire struct {
	c net.Conn
	// the socket, if it is one: read in the poller's callback, so that waiting needs no buffer
	raw    syscall.RawConn
	waiter interface{ WaitRead() error } // netstack's and our own streams can say when there are bytes
	bufs   *Buffers

	buf        *[]byte
	start, end int
	readErr    error
	first      []byte // for connections that can do neither: what their first bytes go to
	callback   func(fd uintptr) bool
}

func newWire(c net.Conn, bufs *Buffers) *wire {
	w := &wire{c: c, bufs: bufs}
	if wr, ok := c.(interface{ WaitRead() error }); ok {
		w.waiter = wr
	} else if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			w.raw = raw
			w.callback = w.readFD
		}
	}
	return w
}

func (w *wire) bytes() []byte {
	if w.buf == nil {
		return nil
	}
	return (*w.buf)[w.start:w.end]
}

// skip drops n bytes from the front; an empty buffer goes back.
func (w *wire) skip(n int) {
	w.start += n
	if w.start == w.end && w.buf != nil {
		w.giveBack()
	}
}

func (w *wire) giveBack() {
	w.bufs.putWire(w.buf)
	w.buf, w.start, w.end = nil, 0, 0
}

// take makes sure that there is a buffer with room.
func (w *wire) take() []byte {
	if w.buf == nil {
		w.buf, w.start, w.end = w.bufs.wire(), 0, 0
	} else if w.start > 0 {
		w.end = copy(*w.buf, (*w.buf)[w.start:w.end])
		w.start = 0
	}
	return (*w.buf)[w.end:]
}

// more waits for further bytes and adds them.
func (w *wire) more() error {
	if w.raw != nil {
		if err := w.raw.Read(w.callback); err != nil {
			return err
		}
		err := w.readErr
		w.readErr = nil
		return err
	}
	if w.waiter != nil {
		if w.buf == nil {
			if err := w.waiter.WaitRead(); err != nil {
				return err
			}
		}
	} else if w.buf == nil {
		if w.first == nil {
			w.first = make([]byte, recordLen)
		}
		n, err := w.c.Read(w.first)
		if n > 0 {
			w.end += copy(w.take(), w.first[:n])
			return nil
		}
		return err
	}
	n, err := w.c.Read(w.take())
	w.end += n
	if n > 0 {
		return nil
	}
	if w.start == w.end {
		w.giveBack()
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// readFD reads without waiting; false makes the poller wait and call again.
func (w *wire) readFD(fd uintptr) bool {
	room := w.take()
	for {
		// Without telling the scheduler: the socket is non-blocking, see tun's fast path for the reason.
		got, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(room))),
			uintptr(len(room)))
		n := int(got)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			if w.start == w.end {
				w.giveBack()
			}
			return false
		case errno != 0:
			w.readErr = &net.OpError{Op: "read", Net: "tcp", Source: w.c.LocalAddr(), Addr: w.c.RemoteAddr(), Err: errno}
		case n == 0:
			w.readErr = io.EOF
		default:
			w.end += n
			return true
		}
		if w.start == w.end {
			w.giveBack()
		}
		return true
	}
}

// plain is the transport without TLS, or above a net.Conn that does its TLS itself.
type plain struct{ *wire }

func (p plain) wait() error {
	if len(p.bytes()) > 0 {
		return nil
	}
	return p.more()
}

func (p plain) fill(b []byte) (int, error) {
	n := copy(b, p.bytes())
	p.skip(n)
	return n, nil
}

func (p plain) pending() bool                       { return len(p.bytes()) > 0 }
func (p plain) seal(out, in []byte) ([]byte, error) { return append(out, in...), nil }
func (p plain) closeNotify(out []byte) []byte       { return out }
func (p plain) urgent() bool                        { return false }

// setNotSentLowat limits what the kernel takes beyond what it has sent.
func setNotSentLowat(c net.Conn, bytes int) {
	sc, ok := c.(syscall.Conn)
	if !ok || bytes <= 0 {
		return
	}
	if raw, err := sc.SyscallConn(); err == nil {
		// Not a TCP socket, or a kernel without the option: then it is as it was.
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, bytes)
		})
	}
}

// isTimeout reports whether a socket operation ended because its deadline was moved into the past.
func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
