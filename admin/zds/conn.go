package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a connection to the agent.
type conn struct {
	*net.UnixConn
	buf, oob []byte
}

// sendTimeout is how long the agent may take to make room for an ack: it waits 5 s for one.
const sendTimeout = 5 * time.Second

// dial connects to the agent's socket and says hello.
func dial(ctx context.Context, path string) (*conn, error) {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	// One byte more than a message may have, to see that it has.
	c := &conn{UnixConn: raw.(*net.UnixConn), buf: make([]byte, maxMessage+1), oob: make([]byte, unix.CmsgSpace(4*8))}
	if err := c.send(hello()); err != nil {
		c.Close()
		return nil, fmt.Errorf("hello: %w", err)
	}
	return c, nil
}

func (c *conn) send(b []byte) error {
	c.SetWriteDeadline(time.Now().Add(sendTimeout))
	_, err := c.Write(b)
	return err
}

// unreadable is a message that came but cannot be made sense of.
type unreadable struct{ error }

func (u unreadable) Unwrap() error { return u.error }

// next reads one request. The namespace in it is the caller's. Errors are io.EOF, an unreadable, or the socket's;
// no descriptor is left open by any.
func (c *conn) next() (_ message, err error) {
	// Go asks for close-on-exec. Descriptors that find no room in oob the kernel drops (and says MSG_CTRUNC).
	n, oobn, flags, _, err := c.ReadMsgUnix(c.buf, c.oob)
	files, bad := descriptors(c.oob[:oobn]) // also of a message that is empty, which reads as the end
	defer func() {
		if err != nil {
			for _, f := range files {
				f.Close()
			}
		}
	}()
	switch {
	case errors.Is(err, io.EOF) && oobn > 0:
		return message{}, unreadable{errors.New("an empty message")}
	case err != nil:
		return message{}, err
	case flags&unix.MSG_TRUNC != 0 || n > maxMessage:
		return message{}, unreadable{fmt.Errorf("longer than %d bytes", maxMessage)}
	case flags&unix.MSG_CTRUNC != 0:
		return message{}, unreadable{errors.New("its ancillary data is cut off: more than one descriptor, or this " +
			"process has no descriptor left")}
	case bad != nil:
		return message{}, unreadable{bad}
	case len(files) > 1:
		return message{}, unreadable{fmt.Errorf("%d descriptors, at most one is expected", len(files))}
	}
	var netns *os.File
	if len(files) == 1 {
		netns = files[0]
	}
	m, err := decode(c.buf[:n], netns)
	if err != nil {
		return message{}, unreadable{err}
	}
	return m, nil
}

// descriptors are all those that ancillary data carries, open, also where it is at fault.
func descriptors(oob []byte) (files []*os.File, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("ancillary data: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			err = errors.New("ancillary data that is no descriptor")
			continue
		}
		fds, perr := syscall.ParseUnixRights(&syscall.SocketControlMessage{
			Header: syscall.Cmsghdr(m.Header), Data: m.Data})
		err = errors.Join(err, perr)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "a network namespace of the node agent's"))
		}
	}
	return files, err
}
