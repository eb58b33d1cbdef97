package netns

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SocketOptions are what the mesh's TCP sockets may differ in. The zero value is good: no delay, keepalive after 180
// s, every 180 s, 9 times (ztunnel's KEEPALIVE_TIME, KEEPALIVE_INTERVAL and KEEPALIVE_RETRIES), kernel defaults for
// the rest.
type SocketOptions struct {
	// UserTimeout bounds how long sent data may stay unacknowledged before the connection is given up (TCP_USER_TIMEOUT,
	// whole milliseconds). 0 leaves it to the kernel.
	UserTimeout time.Duration
	// NotSentLowat bounds the bytes that wait in the kernel unsent before the socket stops being writable
	// (TCP_NOTSENT_LOWAT). 0: no bound.
	NotSentLowat int
	// Mark is the socket's SO_MARK, 0 for none. It needs CAP_NET_ADMIN.
	Mark uint32
	// ReusePort lets other sockets of the same user listen on a listener's port beside it (SO_REUSEPORT): the kernel
	// shares connections out among them.
	ReusePort bool
	// Ports is the range from which a dialed socket's local port is drawn; zero leaves it to the kernel.
	Ports PortRange
	// KeepAlive replaces ztunnel's keepalive when it is not the zero value; Enable false in a non-zero value turns
	// keepalive off.
	KeepAlive net.KeepAliveConfig
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ Min, Max uint16 }

// backlog is how many completed connections may wait to be accepted, ztunnel's value.
const backlog = 1024

func (o SocketOptions) keepAlive() net.KeepAliveConfig {
	if o.KeepAlive == (net.KeepAliveConfig{}) {
		return net.KeepAliveConfig{Enable: true, Idle: 180 * time.Second, Interval: 180 * time.Second, Count: 9}
	}
	return o.KeepAlive
}

// transparent lets a socket have an address that is not the host's. v6 says that fd is an AF_INET6 socket.
func transparent(fd int, v6 bool) error {
	// Both levels on an IPv6 socket, since a dual-stack listener takes IPv4 as well. The kernel keeps a single bit,
	// older ones check the level.
	if v6 {
		if err := sockopt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1, "IPV6_TRANSPARENT"); err != nil {
			return err
		}
	}
	return sockopt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1, "IP_TRANSPARENT")
}

// set applies what dialed and listening TCP sockets have in common. Accepted sockets inherit it from their listener.
func (o SocketOptions) set(fd int) error {
	if o.UserTimeout > 0 {
		ms := max(int(o.UserTimeout/time.Millisecond), 1)
		if err := sockopt(fd, unix.SOL_TCP, unix.TCP_USER_TIMEOUT, ms, "TCP_USER_TIMEOUT"); err != nil {
			return err
		}
	}
	if o.NotSentLowat > 0 {
		if err := sockopt(fd, unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT, o.NotSentLowat, "TCP_NOTSENT_LOWAT"); err != nil {
			return err
		}
	}
	return o.mark(fd)
}

// Tune is for a net.Dialer or net.ListenConfig: it sets, on TCP sockets, what takes no privilege: UserTimeout and
// NotSentLowat.
func (o SocketOptions) Tune(network, _ string, rc syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	o.Mark = 0
	var inner error
	err := rc.Control(func(fd uintptr) { inner = o.set(int(fd)) })
	return errors.Join(err, inner)
}

func (o SocketOptions) mark(fd int) error {
	if o.Mark == 0 {
		return nil
	}
	return sockopt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(o.Mark), "SO_MARK")
}

// Control is for a net.Dialer or net.ListenConfig, of TCP or UDP: it sets Mark, and ReusePort.
func (o SocketOptions) Control(_, _ string, rc syscall.RawConn) error {
	var inner error
	err := rc.Control(func(fd uintptr) { inner = errors.Join(o.mark(int(fd)), o.reusePort(int(fd))) })
	return errors.Join(err, inner)
}

func (o SocketOptions) reusePort(fd int) error {
	if !o.ReusePort {
		return nil
	}
	return sockopt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1, "SO_REUSEPORT")
}

func sockopt(fd, level, name, value int, what string) error {
	if err := unix.SetsockoptInt(fd, level, name, value); err != nil {
		if err == unix.EPERM {
			return fmt.Errorf("%w (CAP_NET_ADMIN is needed)", os.NewSyscallError("setsockopt "+what, err))
		}
		return os.NewSyscallError("setsockopt "+what, err)
	}
	return nil
}

// ListenTransparent opens a TCP listener on the wildcard address and port in ns (nil: the process's namespace) that
// accepts connections to any address which routing delivers to it, the host's own or not; an accepted connection's
// local address tells which. With ipv6 the socket takes both families, otherwise IPv4 alone. Connections have no
// delay and keepalive set. Errors keep their errno (EADDRINUSE, EPERM without CAP_NET_ADMIN).
func ListenTransparent(ctx context.Context, ns *NS, port uint16, ipv6 bool, o SocketOptions) (*net.TCPListener, error) {
	lc := net.ListenConfig{
		KeepAliveConfig: o.keepAlive(),
		Control: func(_, _ string, rc syscall.RawConn) error {
			var inner error
			err := rc.Control(func(fd uintptr) {
				inner = errors.Join(transparent(int(fd), ipv6), o.set(int(fd)), o.reusePort(int(fd)))
			})
			return errors.Join(err, inner)
		},
	}
	// Go listens with MPTCP by default; MPTCP knows neither IP_TRANSPARENT nor several of the TCP options.
	lc.SetMultipathTCP(false)
	network, addr := "tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	if ipv6 {
		network, addr = "tcp", netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	var l *net.TCPListener
	err := in(ns, func() error {
		nl, err := lc.Listen(ctx, network, addr.String())
		if err != nil {
			return err
		}
		l = nl.(*net.TCPListener)
		return setBacklog(l)
	})
	if err != nil {
		if l != nil {
			l.Close()
		}
		return nil, err
	}
	return l, nil
}

// Deafen has the kernel drop every SYN that comes to l from now on, as if nobody had received it: who sent it sends it
// again. Connections that stand, or are about to, are not touched. (Without a socket they would be reset.)
func Deafen(l *net.TCPListener) error {
	rc, err := l.SyscallConn()
	if err != nil {
		return err
	}
	// The filter of a listening socket is given segments from their TCP header on.
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 13}, // the flags
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: tcpSYN | tcpACK},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: tcpSYN, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: math.MaxUint32}, // all of it
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	var inner error
	err = rc.Control(func(fd uintptr) {
		inner = os.NewSyscallError("setsockopt SO_ATTACH_FILTER", unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET,
			unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}))
	})
	return errors.Join(err, inner)
}

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// setBacklog lowers Go's backlog (the host's somaxconn) to ours: a second listen(2) does just that.
func setBacklog(l *net.TCPListener) error {
	rc, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(fd uintptr) { inner = os.NewSyscallError("listen", unix.Listen(int(fd), backlog)) })
	return errors.Join(err, inner)
}

// DialTransparent connects to dst from the address src, which need not be the host's own, in ns (nil: the process's
// namespace). The number of connections is bounded per destination, not per source: the kernel draws the source port
// at connect (IP_BIND_ADDRESS_NO_PORT), or we do from o.Ports, where one port serves many destinations. src and dst
// must be of one family; an IPv4 address mapped into IPv6 counts as IPv4.
//
// Errors are *net.OpError as from net.Dialer and keep their errno for errors.Is (ECONNREFUSED, EHOSTUNREACH,
// ENETUNREACH, ETIMEDOUT...; EADDRNOTAVAIL when the ports towards dst are used up, with those of connections that
// ended in the last minute); when ctx ends first, the error matches ctx.Err().
func DialTransparent(ctx context.Context, ns *NS, src netip.Addr, dst netip.AddrPort, o SocketOptions) (*net.TCPConn,
	error) {
	if !src.IsValid() {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst),
			Err: os.NewSyscallError("bind", unix.EAFNOSUPPORT)}
	}
	return dial(ctx, ns, src.Unmap(), dst, o)
}

// Dial connects to dst from whatever address ns (nil: the process's namespace) would use. Errors are those of
// DialTransparent.
func Dial(ctx context.Context, ns *NS, dst netip.AddrPort, o SocketOptions) (*net.TCPConn, error) {
	return dial(ctx, ns, netip.Addr{}, dst, o)
}

// dial is DialTransparent, and without a src Dial.
func dial(ctx context.Context, ns *NS, src netip.Addr, dst netip.AddrPort, o SocketOptions) (*net.TCPConn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	fail := func(err error) error {
		e := &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
		if src.IsValid() {
			e.Source = net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
		}
		return e
	}
	if !dst.Addr().IsValid() || src.IsValid() && src.Is4() != dst.Addr().Is4() {
		return nil, fail(os.NewSyscallError("bind", unix.EAFNOSUPPORT))
	}
	if err := ctx.Err(); err != nil {
		return nil, fail(err)
	}
	file, err := connectFrom(ctx, ns, src, dst, o)
	if err != nil {
		return nil, fail(err)
	}
	// net.FileConn works on a duplicate, so the file is ours to close in any case.
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fail(err)
	}
	tcp := conn.(*net.TCPConn)
	if err := errors.Join(tcp.SetNoDelay(true), tcp.SetKeepAliveConfig(o.keepAlive())); err != nil {
		tcp.Close()
		return nil, fail(err)
	}
	return tcp, nil
}

// maxPortTries bounds how many ports of a range are tried for one connection: each costs a few microseconds, and with
// nine tenths of the range in use the first ten or so find one.
const maxPortTries = 1024

// connectFrom makes a socket and connects it, by the first port of o.Ports that is free towards dst, beginning
// anywhere in the range.
func connectFrom(ctx context.Context, ns *NS, src netip.Addr, dst netip.AddrPort, o SocketOptions) (*os.File, error) {
	size := int(o.Ports.Max) - int(o.Ports.Min) + 1
	if o.Ports == (PortRange{}) || size < 1 {
		return connectOnce(ctx, ns, netip.AddrPortFrom(src, 0), dst, o)
	}
	start := rand.IntN(size)
	for i := range min(size, maxPortTries) {
		port := o.Ports.Min + uint16((start+i)%size)
		file, err := connectOnce(ctx, ns, netip.AddrPortFrom(src, port), dst, o)
		// Somebody listens on the port for any address, or has this very connection.
		if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) {
			continue
		}
		return file, err
	}
	return nil, fmt.Errorf("%w: the local ports %d-%d are used up towards this destination", unix.EADDRNOTAVAIL,
		o.Ports.Min, o.Ports.Max)
}

func connectOnce(ctx context.Context, ns *NS, src, dst netip.AddrPort, o SocketOptions) (*os.File, error) {
	file, err := newSocket(ns, src, dst.Addr(), o)
	if err != nil {
		return nil, err
	}
	if err := connect(ctx, file, dst); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// newSocket makes a nonblocking TCP socket in ns for dst, bound to src unless that is not valid; with port 0 the
// kernel draws the port when it is connected.
func newSocket(ns *NS, src netip.AddrPort, dst netip.Addr, o SocketOptions) (*os.File, error) {
	family := unix.AF_INET
	if dst.Is6() {
		family = unix.AF_INET6
	}
	fd := -1
	err := in(ns, func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	err = func() error {
		if err := o.set(fd); err != nil || !src.Addr().IsValid() {
			return err
		}
		if err := transparent(fd, family == unix.AF_INET6); err != nil {
			return err
		}
		if src.Port() == 0 {
			err = sockopt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1, "IP_BIND_ADDRESS_NO_PORT")
		} else {
			// One port for connections to many destinations: connect(2) sees to it that no two are the same.
			err = sockopt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, "SO_REUSEADDR")
		}
		if err != nil {
			return err
		}
		return os.NewSyscallError("bind", unix.Bind(fd, sockaddr(src)))
	}()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tcp"), nil
}

// connect starts the handshake and waits for its end, in Go's poller, for as long as ctx allows.
func connect(ctx context.Context, file *os.File, dst netip.AddrPort) error {
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	// An ended ctx wakes the wait by a deadline in the past, as net.Dialer does it.
	stop := context.AfterFunc(ctx, func() { file.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	sa := sockaddr(dst)
	started := false
	var result error
	err = rc.Write(func(fd uintptr) (done bool) {
		if !started {
			started = true
			switch err := unix.Connect(int(fd), sa); err {
			case nil:
				return true
			case unix.EINPROGRESS, unix.EINTR, unix.EALREADY:
				return false
			default:
				result = os.NewSyscallError("connect", err)
				return true
			}
		}
		soerr, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			result = os.NewSyscallError("getsockopt SO_ERROR", err)
			return true
		}
		switch errno := syscall.Errno(soerr); errno {
		case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
			return false
		case unix.EISCONN:
			return true
		case 0:
			// The poller wakes us for nothing too (a fresh socket counts as hung up); only a connected socket has a peer.
			_, err := unix.Getpeername(int(fd))
			return err == nil
		default:
			result = os.NewSyscallError("connect", errno)
			return true
		}
	})
	switch {
	case result != nil:
		return result
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	// Zones are ignored: the mesh has no link-local addresses.
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}
