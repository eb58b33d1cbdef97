package proxy

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// socketRead is how much is read from a kernel socket at once: what netstack makes one packet of. socketReadFew is that
// while there is little: a write that waits holds the buffer for as long as the far side does not read.
const (
	socketRead    = 64 << 10
	socketReadFew = 16 << 10
)

// socketPool has buffers of one size.
type socketPool struct {
	size int
	pool sync.Pool // of *[]byte
}

var fewBuffers, socketBuffers = socketPool{size: socketReadFew}, socketPool{size: socketRead}

func (p *socketPool) get() *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, p.size)
	return &b
}

// moveFromSocket is move from a kernel socket to what is neither a stream nor a socket. It waits without a buffer, and
// has one from a pool while there are bytes: net's own WriteTo makes one of 32 KiB for each connection, which for one
// that carries a few bytes is most of its memory, and much of its time.
func moveFromSocket(dst io.Writer, src *net.TCPConn, count func(int)) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return &copyError{receivePrefix, err}
	}
	r := socketReader{src: src, pool: &fewBuffers}
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
		n, err := dst.Write((*r.b)[:r.n])
		r.pool.pool.Put(r.b)
		r.b = nil
		switch {
		case r.n == r.pool.size:
			r.pool = &socketBuffers
		case r.n <= socketReadFew:
			r.pool = &fewBuffers
		}
		count(n)
		if err != nil {
			return &copyError{"send: ", err}
		}
	}
}

// socketReader reads what there is.
type socketReader struct {
	src  *net.TCPConn
	pool *socketPool // of the next read
	b    *[]byte     // nil: nothing was read
	n    int
	err  error
}

// ready is called by the poller; false has it wait and call again.
func (r *socketReader) ready(fd uintptr) bool {
	b := r.pool.get()
	for {
		n, err := syscall.Read(int(fd), *b)
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
		r.pool.pool.Put(b)
		return err != syscall.EAGAIN
	}
}
