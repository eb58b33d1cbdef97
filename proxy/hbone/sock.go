package hbone

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockReader reads from a kernel socket into frames, without telling Go's scheduler of each call and without a buffer
// while it waits, as wire reads. One user at a time; deadlines are the connection's.
type sockReader struct {
	c        net.Conn
	raw      syscall.RawConn
	callback func(fd uintptr) bool

	bufs  *Buffers
	class uint8
	f     *frame
	n     int
	err   error
}

func newSockReader(c *net.TCPConn) (*sockReader, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &sockReader{c: c, raw: raw}
	r.callback = r.readFD
	return r, nil
}

// read waits for bytes, and returns a frame of the class with n of them behind its header; after an error, io.EOF
// too, there is no frame.
func (r *sockReader) read(bufs *Buffers, class uint8) (f *frame, n int, err error) {
	r.bufs, r.class, r.n, r.err = bufs, class, 0, nil
	if err = r.raw.Read(r.callback); err == nil {
		err = r.err
	}
	f, r.f = r.f, nil
	return f, r.n, err
}

// readFD reads without waiting; false makes the poller wait and call again.
func (r *sockReader) readFD(fd uintptr) bool {
	f := r.bufs.frame(r.class)
	room := f.room()
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(room))),
			uintptr(len(room)))
		switch {
		case errno == unix.EINTR:
			continue
		case errno == 0 && n > 0:
			r.f, r.n = f, int(n)
			return true
		case errno == 0:
			r.err = io.EOF
		case errno != unix.EAGAIN:
			r.err = &net.OpError{Op: "read", Net: "tcp", Source: r.c.LocalAddr(), Addr: r.c.RemoteAddr(), Err: errno}
		}
		r.bufs.putFrame(f)
		return errno != unix.EAGAIN
	}
}

// sockWriter writes to a socket without telling Go's scheduler of each call, as wire reads from it. One user at a
// time; deadlines are the connection's.
type sockWriter struct {
	c        net.Conn
	raw      syscall.RawConn
	callback func(uintptr) bool

	b     []byte
	brief bool         // not to wait for room
	vec   []unix.Iovec // of WriteBuffers: what is left
	n     int
	errno syscall.Errno
}

// newSockWriter is nil for what is no kernel TCP connection.
func newSockWriter(c net.Conn) *sockWriter {
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return nil
	}
	w := &sockWriter{c: c, raw: raw}
	w.callback = w.writeFD
	return w
}

// Write is net.Conn's.
func (w *sockWriter) Write(b []byte) (int, error) {
	w.b, w.n, w.errno = b, 0, 0
	err := w.failed(w.raw.Write(w.callback))
	w.b = nil
	return w.n, err
}

// writeSome writes what the socket takes without waiting, which may be nothing.
func (w *sockWriter) writeSome(b []byte) (int, error) {
	w.brief = true
	n, err := w.Write(b)
	w.brief = false
	return n, err
}

// WriteBuffers writes the pieces, none of them empty, in order, with as few calls as the kernel takes.
func (w *sockWriter) WriteBuffers(pieces [][]byte) (int64, error) {
	if len(pieces) == 1 {
		n, err := w.Write(pieces[0])
		return int64(n), err
	}
	w.n, w.errno = 0, 0
	full := w.vec[:0]
	for _, p := range pieces {
		full = append(full, unix.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))})
	}
	w.vec = full
	err := w.failed(w.raw.Write(w.writeVec))
	clear(full)
	w.vec = full[:0]
	return int64(w.n), err
}

func (w *sockWriter) failed(err error) error {
	if err == nil && w.errno != 0 {
		err = &net.OpError{Op: "write", Net: "tcp", Source: w.c.LocalAddr(), Addr: w.c.RemoteAddr(), Err: w.errno}
	}
	return err
}

// maxIovec is the kernel's bound of pieces in one call (UIO_MAXIOV).
const maxIovec = 1024

// writeVec is writeFD for vec.
func (w *sockWriter) writeVec(fd uintptr) bool {
	for len(w.vec) > 0 {
		n, _, errno := unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(w.vec))),
			uintptr(min(len(w.vec), maxIovec)))
		switch errno {
		case 0:
			w.n += int(n)
			w.vec = advance(w.vec, uint64(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			w.errno = errno
			return true
		}
	}
	return true
}

// advance takes n bytes off the front.
func advance(vec []unix.Iovec, n uint64) []unix.Iovec {
	for len(vec) > 0 && n >= vec[0].Len {
		n -= vec[0].Len
		vec = vec[1:]
	}
	if n > 0 {
		vec[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(vec[0].Base), n))
		vec[0].Len -= n
	}
	return vec
}

// writeFD writes what goes without waiting; false makes the poller wait and call again.
func (w *sockWriter) writeFD(fd uintptr) bool {
	for w.n < len(w.b) {
		rest := w.b[w.n:]
		n, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(rest))),
			uintptr(len(rest)))
		switch errno {
		case 0:
			w.n += int(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return w.brief
		default:
			w.errno = errno
			return true
		}
	}
	return true
}

// SocketSentAll reports whether the peer of a kernel socket has acknowledged all that was written to it, and our FIN if
// it was sent.
func SocketSentAll(c *net.TCPConn) bool {
	n, ok := unacknowledged(c)
	return ok && n == 0
}
