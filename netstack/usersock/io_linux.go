package usersock

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socketBuffer bounds what waits at a socket in either direction, in bytes; the kernel counts its own overhead, and
// doubles it.
const socketBuffer = 1 << 20

// newSocket makes the socket of a mapping: unconnected, with its errors queued.
func newSocket(k key) (fd int, err error) {
	family, level, recverr := unix.AF_INET, unix.IPPROTO_IP, unix.IP_RECVERR
	proto := unix.IPPROTO_UDP
	if k.pod.Addr().Is6() {
		family, level, recverr = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	if k.echo {
		if proto = unix.IPPROTO_ICMP; family == unix.AF_INET6 {
			proto = unix.IPPROTO_ICMPV6
		}
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		if k.echo && err == unix.EACCES {
			err = ErrNoPing
		}
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, level, recverr, 1); err != nil {
		unix.Close(fd)
		return -1, err
	}
	// As much as the host lets a user have (net.core.rmem_max, wmem_max): what comes while we do not run is lost beyond.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	if !k.echo {
		_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) // Linux 5.0; without it datagrams come one by one
	}
	setDF(fd, k, false)
	return fd, nil
}

// setDF has the host fragment what is too large for a path that it knows (as it does by default), or refuse it with
// EMSGSIZE.
func setDF(fd int, k key, df bool) {
	level, opt := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if k.pod.Addr().Is6() {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	how := unix.IP_PMTUDISC_WANT
	if df {
		how = unix.IP_PMTUDISC_DO
	}
	_ = unix.SetsockoptInt(fd, level, opt, how) // these are the same numbers for IPv6
}

// send sends a datagram, or several of one size.
func (c *socket) send(d *Datagram) error {
	var to unix.Sockaddr
	peer := c.meant(d.Peer)
	if a := peer.Addr(); a.Is4() {
		to = &unix.SockaddrInet4{Addr: a.As4(), Port: int(peer.Port())}
	} else {
		to = &unix.SockaddrInet6{Addr: a.As16(), Port: int(peer.Port())}
	}
	var err error
	if werr := c.rc.Control(func(fd uintptr) {
		c.mu.Lock()
		change, gso := c.df != d.DF, c.oneByOne == 0 || d.Segment < c.oneByOne
		c.df = d.DF
		c.mu.Unlock()
		if change {
			setDF(int(fd), c.key, d.DF)
		}
		if d.Segment <= 0 || d.Segment >= len(d.Payload) {
			err = sendOne(int(fd), d.Payload, c.control(d, 0), to)
			return
		}
		if gso {
			switch err = sendOne(int(fd), d.Payload, c.control(d, d.Segment), to); err {
			case unix.EMSGSIZE, unix.EINVAL: // each is too large for the path; older kernels say EINVAL
				c.refuses(d.Segment)
			case unix.EIO, unix.EOPNOTSUPP: // no checksum offload on the way out, or an old kernel
				c.refuses(1)
			default:
				return
			}
		}
		err = nil
		for b := d.Payload; len(b) > 0 && (err == nil || err == unix.EMSGSIZE); {
			n := min(d.Segment, len(b))
			if e := sendOne(int(fd), b[:n], c.control(d, 0), to); e != nil {
				err = e // of too large ones the first says it all, and the last may be shorter, and go
			}
			b = b[n:]
		}
	}); werr != nil {
		return ErrClosed
	}
	return err
}

// refuses notes that the kernel does not take several datagrams of so many bytes as one.
func (c *socket) refuses(segment int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.oneByOne == 0 || segment < c.oneByOne {
		c.oneByOne = segment
	}
}

// sendOne makes the call. An error of an earlier datagram's that waits at the socket is reported by the first call,
// and is no reason: it is in the queue as well.
func sendOne(fd int, b, oob []byte, to unix.Sockaddr) (err error) {
	for range 2 {
		err = unix.Sendmsg(fd, b, oob, to, unix.MSG_NOSIGNAL)
		switch err {
		case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EPROTO, unix.EACCES, unix.EINTR:
		default:
			return err
		}
	}
	return err
}

// control is the ancillary data of a datagram: hop limit, and the size of the pieces.
func (c *socket) control(d *Datagram, segment int) []byte {
	var oob []byte
	if d.TTL != 0 {
		level, typ := unix.IPPROTO_IP, unix.IP_TTL
		if c.key.pod.Addr().Is6() {
			level, typ = unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT
		}
		oob = appendControl(oob, level, typ, binary.NativeEndian.AppendUint32(nil, uint32(d.TTL)))
	}
	if segment > 0 {
		oob = appendControl(oob, unix.SOL_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint16(nil, uint16(segment)))
	}
	return oob
}

func appendControl(oob []byte, level, typ int, data []byte) []byte {
	at := len(oob)
	oob = append(oob, make([]byte, unix.CmsgSpace(len(data)))...)
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[at]))
	h.Level, h.Type = int32(level), int32(typ)
	h.SetLen(unix.CmsgLen(len(data)))
	copy(oob[at+unix.CmsgLen(0):], data)
	return oob
}

// eachControl lists ancillary data without allocating.
func eachControl(oob []byte, f func(level, typ int32, data []byte)) {
	for len(oob) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(oob) {
			return
		}
		f(h.Level, h.Type, oob[unix.CmsgLen(0):n])
		oob = oob[min(unix.CmsgSpace(n-unix.CmsgLen(0)), len(oob)):]
	}
}

// readErrors tells of what is in the socket's error queue.
func (c *socket) readErrors(fd int, in *intake) {
	b := in.room()
	for {
		n, oob, peer, err := in.receive(fd, b, unix.MSG_ERRQUEUE)
		if err != nil && err != errTruncated { // as much as fits is enough
			return
		}
		if !peer.IsValid() {
			continue
		}
		if c.key.echo {
			peer = netip.AddrPortFrom(peer.Addr(), 0)
		}
		eachControl(oob, func(level, typ int32, data []byte) {
			ip4 := level == unix.IPPROTO_IP && typ == unix.IP_RECVERR
			ip6 := level == unix.IPPROTO_IPV6 && typ == unix.IPV6_RECVERR
			if !ip4 && !ip6 || len(data) < extendedErr {
				return
			}
			c.failed(peer, data, b[:n])
		})
	}
}

// extendedErr is the length of struct sock_extended_err (linux/errqueue.h): errno, origin, type, code, padding, info,
// data. Behind it stands the address of who said so.
const extendedErr = 16

// failed tells of the error e, about the datagram of which sent is as much as was quoted.
func (c *socket) failed(peer netip.AddrPort, e, sent []byte) {
	f := Failure{Echo: c.key.echo, Pod: c.key.pod, Peer: c.shown(peer)}
	errno, info := syscall.Errno(binary.NativeEndian.Uint32(e)), binary.NativeEndian.Uint32(e[8:])
	switch e[4] {
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
		f.Type, f.Code = e[5], e[6]
		switch s := e[extendedErr:]; {
		case len(s) >= 8 && binary.NativeEndian.Uint16(s) == unix.AF_INET:
			f.From = netip.AddrFrom4([4]byte(s[4:8]))
		case len(s) >= 24 && binary.NativeEndian.Uint16(s) == unix.AF_INET6:
			f.From = netip.AddrFrom16([16]byte(s[8:24]))
		}
	default: // what the host itself says, hostSays has told, with the peer's port
		return
	}
	if errno == unix.EMSGSIZE {
		f.MTU = int(info)
	}
	if f.Echo && len(sent) >= 8 {
		f.Seq = binary.BigEndian.Uint16(sent[6:])
	}
	c.s.failures.Add(1)
	c.s.o.Fail(f)
}

// hostSays tells of a datagram that the host itself has refused.
func (s *Sockets) hostSays(d *Datagram, err error) {
	errno, ok := err.(syscall.Errno)
	if err == ErrNoPing {
		errno, ok = unix.EACCES, true
	}
	if !ok {
		return
	}
	f := Failure{Echo: d.Echo, Pod: d.Pod, Peer: d.Peer}
	if f.Type, f.Code, ok = icmpOf(errno, d.Peer.Addr().Is6()); !ok {
		return
	}
	if d.Echo {
		f.Seq = binary.BigEndian.Uint16(d.Payload[6:])
	}
	if errno == unix.EMSGSIZE {
		f.MTU = pathMTU(d.Peer.Addr())
	}
	s.failures.Add(1)
	s.o.Fail(f)
}

// pathMTU is what the host knows of the path to a peer, in bytes; 0: nothing. Only a connected socket can be asked.
func pathMTU(peer netip.Addr) int {
	family, level, opt := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU
	var to unix.Sockaddr
	if peer.Is6() {
		family, level, opt = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU
		to = &unix.SockaddrInet6{Addr: peer.As16(), Port: 9}
	} else {
		to = &unix.SockaddrInet4{Addr: peer.As4(), Port: 9}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if unix.Connect(fd, to) != nil {
		return 0
	}
	n, err := unix.GetsockoptInt(fd, level, opt)
	if err != nil {
		return 0
	}
	return n
}

// icmpOf is the ICMP error, or ICMPv6 error, that would have made the kernel say this (RFC 792, RFC 4443).
func icmpOf(e syscall.Errno, v6 bool) (typ, code uint8, ok bool) {
	const unreachable4, unreachable6, tooBig6 = 3, 1, 2
	switch {
	case e == unix.EMSGSIZE && v6:
		return tooBig6, 0, true
	case e == unix.EMSGSIZE:
		return unreachable4, 4, true
	case e == unix.ENETUNREACH && v6:
		return unreachable6, 0, true
	case e == unix.ENETUNREACH:
		return unreachable4, 0, true
	case e == unix.EHOSTUNREACH && v6:
		return unreachable6, 3, true
	case e == unix.EHOSTUNREACH:
		return unreachable4, 1, true
	case (e == unix.EACCES || e == unix.EPERM) && v6:
		return unreachable6, 1, true
	case e == unix.EACCES || e == unix.EPERM:
		return unreachable4, 13, true
	}
	return 0, 0, false
}
