package usersock

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

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
		change, gso := c.df != d.DF, !c.noGSO
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
			err = sendOne(int(fd), d.Payload, c.control(d, d.Segment), to)
			if err != unix.EIO && err != unix.EINVAL && err != unix.EOPNOTSUPP {
				return
			}
		}
		err = nil
		for b := d.Payload; len(b) > 0 && err == nil; {
			n := min(d.Segment, len(b))
			err = sendOne(int(fd), b[:n], c.control(d, 0), to)
			b = b[n:]
		}
		if gso && err == nil { // else they are too large for the path, which Linux calls EINVAL, too
			c.mu.Lock()
			c.noGSO = true // no checksum offload on the way out, or an old kernel
			c.mu.Unlock()
		}
	}); werr != nil {
		return ErrClosed
	}
	return err
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

// deaf is how long to wait where the poller cannot.
const deaf = 10 * time.Millisecond

// read delivers what comes until the socket is closed. When an error is all that has happened to a socket whose buffer
// is full as well, Go's poller takes it for none that can be waited for (EPOLLERR alone), until something else happens:
// there is room, or a datagram.
func (c *socket) read() {
	oob := make([]byte, 512)
	for c.rc.Read(func(fd uintptr) bool { return c.drain(int(fd), oob) }) != nil && !c.over.Load() {
		time.Sleep(deaf)
		_ = c.rc.Control(func(fd uintptr) { c.drain(int(fd), oob) }) // an error: it is closed
	}
}

// drain delivers what there is; true: the socket is closed. An error wakes the poller as a datagram does, so the error
// queue is looked at once each time, and when an error stands at the socket: not before every datagram, which would be
// a call more for each.
func (c *socket) drain(fd int, oob []byte) bool {
	p := c.s.buffers.Get().(*[]byte)
	defer c.s.buffers.Put(p)
	c.readErrors(fd, *p, oob)
	for !c.over.Load() {
		n, oobn, flags, from, err := unix.Recvmsg(fd, *p, oob, 0)
		switch {
		case err == unix.EAGAIN:
			return false // wait
		case err != nil: // that of the error queue's head, which this takes away
			c.readErrors(fd, *p, oob)
		case flags&unix.MSG_TRUNC == 0:
			c.deliver((*p)[:n], oob[:oobn], from)
		}
	}
	return true
}

func (c *socket) deliver(b, oob []byte, from unix.Sockaddr) {
	peer, ok := addrOf(from)
	if !ok || !c.admits(peer.Addr()) {
		c.s.filtered.Add(1)
		return
	}
	d := Datagram{Echo: c.key.echo, Pod: c.key.pod, Peer: c.shown(peer), Payload: b}
	if c.key.echo {
		if len(b) < 8 {
			return
		}
		d.Peer = netip.AddrPortFrom(peer.Addr(), 0)
		// The kernel has put its own identifier in the request's place.
		binary.BigEndian.PutUint16(b[4:], c.key.pod.Port())
	}
	eachControl(oob, func(level, typ int32, data []byte) {
		if level == unix.SOL_UDP && typ == unix.UDP_GRO && len(data) >= 2 {
			if n := int(binary.NativeEndian.Uint16(data)); n < len(b) {
				d.Segment = n
			}
		}
	})
	c.s.received.Add(1)
	c.s.bytes.Add(uint64(len(b)))
	c.s.o.Deliver(d)
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
func (c *socket) readErrors(fd int, b, oob []byte) {
	for {
		n, oobn, _, to, err := unix.Recvmsg(fd, b, oob, unix.MSG_ERRQUEUE)
		if err != nil {
			return
		}
		peer, ok := addrOf(to)
		if !ok {
			continue
		}
		if c.key.echo {
			peer = netip.AddrPortFrom(peer.Addr(), 0)
		}
		eachControl(oob[:oobn], func(level, typ int32, data []byte) {
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

func addrOf(s unix.Sockaddr) (netip.AddrPort, bool) {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr).Unmap(), uint16(s.Port)), true
	}
	return netip.AddrPort{}, false
}
