package netns

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// addrsApart is the least time between two calls of WatchAddrs's function: a host that starts containers by the dozen
// has as many addresses come and go.
const addrsApart = 50 * time.Millisecond

// WatchAddrs calls changed whenever addresses of the calling thread's network namespace have come or gone, until ctx
// ends, when it returns nil: on this goroutine, once for changes that come together. The first call is at once, for
// what happened before anybody watched. It needs no privilege (rtnetlink's groups are open to all). Errors: a kernel
// without rtnetlink, or a sandbox that does not let us have it.
func WatchAddrs(ctx context.Context, changed func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("cannot watch this host's addresses: %w", os.NewSyscallError("socket", err))
	}
	f := os.NewFile(uintptr(fd), "rtnetlink") // which waits in the runtime's poller: no thread is held
	defer f.Close()
	groups := uint32(unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return fmt.Errorf("cannot watch this host's addresses: %w", os.NewSyscallError("bind", err))
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var work sync.WaitGroup
	defer work.Wait()
	over, stop := context.WithCancel(ctx)
	defer stop()
	work.Go(func() {
		<-over.Done()
		f.SetReadDeadline(time.Unix(1, 0))
	})
	buf := make([]byte, 8<<10)
	for ctx.Err() == nil {
		changed()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(addrsApart):
		}
		var failed error
		err := conn.Read(func(fd uintptr) (something bool) {
			for {
				switch _, err := unix.Read(int(fd), buf); err {
				case nil, unix.ENOBUFS: // more has happened than there was room for
					something = true
				case unix.EINTR:
				case unix.EAGAIN:
					return something
				default:
					failed = err
					return true
				}
			}
		})
		if failed != nil {
			err = failed
		}
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("this host's addresses are watched no more: %w", err)
		}
	}
	return nil
}
