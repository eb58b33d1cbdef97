package hbone

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollable makes a kernel TCP connection wait without a buffer, as other sources can by themselves.
func pollable(src io.Reader) (interface{ WaitRead() error }, io.Reader) {
	tc, ok := src.(*net.TCPConn)
	if !ok {
		return nil, src
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return nil, src
	}
	w := &socketWaiter{raw: raw}
	w.callback = w.peek
	return w, src
}

type socketWaiter struct {
	raw      syscall.RawConn
	callback func(uintptr) bool
}

// WaitRead asks the kernel first, so that a busy connection does not go through the poller.
func (w *socketWaiter) WaitRead() error { return w.raw.Read(w.callback) }

func (w *socketWaiter) peek(fd uintptr) bool {
	var b [1]byte
	for {
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		return err != unix.EAGAIN
	}
}

// sockWriter writes to a socket without telling Go's scheduler of each call, as wire reads from it. One user at a
// time; deadlines are the connection's.
type sockWriter struct {
	c        net.Conn
	raw      syscall.RawConn
	callback func(uintptr) bool

	b     []byte
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
	err := w.raw.Write(w.callback)
	w.b = nil
	if err == nil && w.errno != 0 {
		err = &net.OpError{Op: "write", Net: "tcp", Source: w.c.LocalAddr(), Addr: w.c.RemoteAddr(), Err: w.errno}
	}
	return w.n, err
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
			return false
		default:
			w.errno = errno
			return true
		}
	}
	return true
}
