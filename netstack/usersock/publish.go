package usersock

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Published is a port of the host's for one of the pod's.
type Published struct {
	At  netip.AddrPort // of the host; the family's unspecified address stands for all
	Pod netip.AddrPort // of the same family
	// Local is what the pod sees in place of a client on the host's loopback, which it could not answer to.
	Local netip.Addr
}

// Publish has anybody reach a port of the pod's at one of the host's, until Close: a mapping that is there before the
// pod has spoken and whose filtering is endpoint-independent. What the pod sends from that port leaves by it, too. It
// is none of MaxSockets and never given up: what is published is the user's choice.
func (s *Sockets) Publish(p Published) error {
	k := key{pod: p.Pod}
	fd, err := newSocket(k)
	if err != nil {
		return err
	}
	if err := bind(fd, p.At); err != nil {
		unix.Close(fd)
		return err
	}
	c := &socket{s: s, key: k, at: &p, free: func() {}, file: os.NewFile(uintptr(fd), "udp")}
	if c.rc, err = c.file.SyscallConn(); err != nil {
		c.file.Close()
		return err
	}
	s.mu.Lock()
	before := s.by[k]
	switch {
	case s.closed:
		err = ErrClosed
	case before != nil && before.at != nil:
		err = unix.EADDRINUSE
	default:
		s.by[k] = c
		s.work.Go(s.o.Panics.Func("a published port's reader", c.read, func(error) { c.end() }))
	}
	s.mu.Unlock()
	if err != nil {
		c.file.Close()
		return err
	}
	if before != nil {
		before.end()
	}
	s.opened.Add(1)
	return nil
}

// bind gives a socket its port. One for all IPv6 addresses leaves those of IPv4 to another.
func bind(fd int, at netip.AddrPort) error {
	if at.Addr().Is4() {
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}))
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}))
}

// shown is a peer as the pod sees it.
func (c *socket) shown(peer netip.AddrPort) netip.AddrPort {
	if c.at != nil && peer.Addr().IsLoopback() && c.at.Local.IsValid() {
		return netip.AddrPortFrom(c.at.Local, peer.Port())
	}
	return peer
}

// meant is the peer whom the pod has been shown as this one.
func (c *socket) meant(peer netip.AddrPort) netip.AddrPort {
	if c.at == nil || peer.Addr() != c.at.Local {
		return peer
	}
	if peer.Addr().Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), peer.Port())
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), peer.Port())
}
