package hbone

import (
	"io"
	"net"
	"syscall"

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
