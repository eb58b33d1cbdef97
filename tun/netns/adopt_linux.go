package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrUnfit is what Adopt and its like return (wrapped) for a socket that is not the one that would be opened instead.
var ErrUnfit = errors.New("not the socket that is wanted")

// AdoptTransparent makes a listener of a descriptor of one that an earlier life of this process got from
// ListenTransparent with the same arguments. Connections that wait in its queue are accepted like others. Those that it
// accepts have Go's default keepalive: see KeepAliveConfig. f stays the caller's.
func AdoptTransparent(f *os.File, ns *NS, port uint16, ipv6 bool, o SocketOptions) (*net.TCPListener, error) {
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	if ipv6 {
		at = netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	err := control(f, func(fd int) error {
		if err := fits(fd, ns, unix.SOCK_STREAM, at, o); err != nil {
			return err
		}
		if on, err := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT); err != nil || on != 1 {
			return fmt.Errorf("%w: IP_TRANSPARENT is %d (%v)", ErrUnfit, on, err)
		}
		if ipv6 {
			if only, err := unix.GetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY); err != nil || only != 0 {
				return fmt.Errorf("%w: IPV6_V6ONLY is %d (%v)", ErrUnfit, only, err)
			}
		}
		// Deafen's, by a life that was told to end and could not take its socket out of the store.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil && err != unix.ENOENT {
			return os.NewSyscallError("setsockopt SO_DETACH_FILTER", err)
		}
		return o.set(fd)
	})
	if err != nil {
		return nil, err
	}
	return adopted(f)
}

// AdoptListener is AdoptTransparent for a listener that was opened in ns at this address with Control of o.
func AdoptListener(f *os.File, ns *NS, at netip.AddrPort, o SocketOptions) (*net.TCPListener, error) {
	if err := control(f, func(fd int) error { return fits(fd, ns, unix.SOCK_STREAM, at, o) }); err != nil {
		return nil, err
	}
	return adopted(f)
}

// AdoptPacket is AdoptListener for a UDP socket.
func AdoptPacket(f *os.File, ns *NS, at netip.AddrPort, o SocketOptions) (*net.UDPConn, error) {
	if err := control(f, func(fd int) error { return fits(fd, ns, unix.SOCK_DGRAM, at, o) }); err != nil {
		return nil, err
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// KeepAliveConfig is what connections of an adopted listener are to be given.
func (o SocketOptions) KeepAliveConfig() net.KeepAliveConfig { return o.keepAlive() }

func adopted(f *os.File) (*net.TCPListener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func control(f *os.File, do func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(fd uintptr) { inner = do(int(fd)) })
	return errors.Join(err, inner)
}

// fits says why a descriptor is not a socket of this type and address, which listens if it is TCP's, in ns (nil: the
// process's namespace) and with what o wants of every socket.
func fits(fd int, ns *NS, kind int, at netip.AddrPort, o SocketOptions) error {
	is, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, os.NewSyscallError("getsockopt SO_TYPE", err))
	}
	if is != kind {
		return fmt.Errorf("%w: its type is %d", ErrUnfit, is)
	}
	reuse := 0
	if o.ReusePort {
		reuse = 1
	}
	listens := 0
	if kind == unix.SOCK_STREAM {
		listens = 1
	}
	for _, c := range []struct {
		option, want int
		name         string
	}{{unix.SO_ACCEPTCONN, listens, "SO_ACCEPTCONN"}, {unix.SO_MARK, int(o.Mark), "SO_MARK"},
		{unix.SO_REUSEPORT, reuse, "SO_REUSEPORT"}} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, c.option); err != nil || got != c.want {
			return fmt.Errorf("%w: %s is %d (%v), not %d", ErrUnfit, c.name, got, err, c.want)
		}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, os.NewSyscallError("getsockname", err))
	}
	var local netip.AddrPort
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		local = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		local = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	if local != at {
		return fmt.Errorf("%w: it is at %s", ErrUnfit, local)
	}
	return livesIn(fd, ns)
}

// livesIn says why a socket is not ns's (nil: the process's namespace).
func livesIn(fd int, ns *NS) error {
	if ns == nil {
		own, err := Current()
		if err != nil {
			return err
		}
		defer own.Close()
		ns = own
	}
	got, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), unix.SIOCGSKNS, 0)
	if errno != 0 {
		return fmt.Errorf("%w: its namespace is not known: %w", ErrUnfit, os.NewSyscallError("ioctl SIOCGSKNS", errno))
	}
	defer unix.Close(int(got))
	unix.CloseOnExec(int(got))
	var st unix.Stat_t
	if err := unix.Fstat(int(got), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if uint64(st.Dev) != ns.dev || st.Ino != ns.ino {
		return fmt.Errorf("%w: it is in another network namespace", ErrUnfit)
	}
	return nil
}
