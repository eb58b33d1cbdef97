package proxy

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// socketRead is how much is read from a kernel socket at once: what netstack makes one packet of.
const socketRead = 64 << 10

var socketBuffers = sync.Pool{New: func() any { return new([socketRead]byte) }}

// moveFromSocket is move from a kernel socket to what is neither a stream nor a socket. It waits without a buffer, and
// has one from a pool while there are bytes: net's own WriteTo makes one of 32 KiB for each connection, which for one
// that carries a few bytes is most of its memory, and much of its time.
func moveFromSocket(dst io.Writer, src *net.TCPConn, count func(int)) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return &copyError{receivePrefix, err}
	}
	r := socketReader{src: src}
	ready := r.ready
	for {
		if err := raw.Read(ready); err != nil {
			return &copyError{receivePrefix, err}
		}
		if r.err == io.EOF {
			return nil
		}
		if r.err != nil {
			return &copyError{receivePrefix, r.err}
		}
		n, err := dst.Write(r.b[:r.n])
		socketBuffers.Put(r.b)
		r.b = nil
		count(n)
		if err != nil {
			return &copyError{"send: ", err}
		}
	}
}

// socketReader reads what there is.
type socketReader struct {
	src *net.TCPConn
	b   *[socketRead]byte // nil: nothing was read
	n   int
	err error
}

// ready is called by the poller; false has it wait and call again.
func (r *socketReader) ready(fd uintptr) bool {
	b := socketBuffers.Get().(*[socketRead]byte)
	for {
		n, err := syscall.Read(int(fd), b[:])
		switch {
		case err == syscall.EINTR:
			continue
		case n > 0:
			r.b, r.n = b, n
			return true
		case err == nil:
			r.err = io.EOF
		case err != syscall.EAGAIN:
			r.err = &net.OpError{Op: "read", Net: "tcp", Source: r.src.LocalAddr(), Addr: r.src.RemoteAddr(),
				Err: os.NewSyscallError("read", err)}
		}
		socketBuffers.Put(b)
		return err != syscall.EAGAIN
	}
}
