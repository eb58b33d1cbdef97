package usersock

import (
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxDatagram is what one call returns at most, a datagram or several that the kernel has joined (UDP_GRO).
	maxDatagram = 65536
	// maxSegments and maxJoined bound what is joined here: what a kernel takes as one (UDP_MAX_SEGMENTS; 128 since Linux
	// 6.9), and what with its headers still is a packet.
	maxSegments = 64
	maxJoined   = 65535 - 48
	// maxMoved bounds what is moved to where there is room for more of its kind behind it.
	maxMoved = 4096
)

// errTruncated is the error of what is longer than the buffer.
const errTruncated = unix.EMSGSIZE

// intake is what a reader has while there is something to read: the call's memory, made once, and the datagrams of one
// size from one peer that it joins, each read behind the one before.
type intake struct {
	msg  unix.Msghdr
	iov  unix.Iovec
	name unix.RawSockaddrInet6 // the larger of the two
	oob  [512]byte
	buf  [2 * maxDatagram]byte

	from     netip.AddrPort // of those that wait
	at, end  int            // where they lie in buf
	size     int            // of each; the last may be shorter
	segments int            // how many; 0: none waits
}

// room is where the next datagram goes.
func (in *intake) room() []byte { return in.buf[in.end : in.end+maxDatagram] }

// receive makes the call. peer is not valid where there is none.
func (in *intake) receive(fd int, b []byte, flags int) (n int, oob []byte, peer netip.AddrPort, err error) {
	in.iov.Base = unsafe.SliceData(b)
	in.iov.SetLen(len(b))
	in.msg = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&in.name)), Namelen: uint32(unsafe.Sizeof(in.name)), Iov: &in.iov,
		Control: &in.oob[0]}
	in.msg.SetIovlen(1)
	in.msg.SetControllen(len(in.oob))
	for {
		// Without telling the scheduler: it never waits (see tun's vector.do).
		r, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&in.msg)),
			uintptr(flags|unix.MSG_DONTWAIT))
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return 0, nil, peer, errno
		case in.msg.Flags&unix.MSG_TRUNC != 0:
			err = errTruncated
		}
		n = int(r)
		break
	}
	port := func(p *uint16) uint16 { return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:]) }
	switch {
	case in.msg.Namelen >= unix.SizeofSockaddrInet4 && in.name.Family == unix.AF_INET:
		a := (*unix.RawSockaddrInet4)(unsafe.Pointer(&in.name))
		peer = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), port(&a.Port))
	case in.msg.Namelen >= unix.SizeofSockaddrInet6 && in.name.Family == unix.AF_INET6:
		peer = netip.AddrPortFrom(netip.AddrFrom16(in.name.Addr).Unmap(), port(&in.name.Port))
	}
	return n, in.oob[:in.msg.Controllen], peer, err
}

// join adds what was read into room, n bytes of size each; false: it is not like what waits.
func (in *intake) join(n, size int, from netip.AddrPort) bool {
	more := (n + size - 1) / max(size, 1)
	if in.segments == 0 {
		in.from, in.size, in.segments, in.at = from, size, max(more, 1), in.end
		in.end += n
		return true
	}
	have := in.end - in.at
	// One that is shorter ends them; of those of another size it may be the last if it is alone.
	if from != in.from || n == 0 || in.size == 0 || have != in.segments*in.size || size > in.size ||
		size < in.size && more > 1 || in.segments+more > maxSegments || have+n > maxJoined {
		return false
	}
	in.end += n
	in.segments += more
	return true
}

// deaf is how long to wait where the poller cannot.
const deaf = 10 * time.Millisecond

// read delivers what comes until the socket is closed. When an error is all that has happened to a socket whose buffer
// is full as well, Go's poller takes it for none that can be waited for (EPOLLERR alone), until something else happens:
// there is room, or a datagram.
func (c *socket) read() {
	for c.rc.Read(func(fd uintptr) bool { return c.drain(int(fd)) }) != nil && !c.over.Load() {
		time.Sleep(deaf)
		_ = c.rc.Control(func(fd uintptr) { c.drain(int(fd)) }) // an error: it is closed
	}
}

// drain delivers what there is; true: the socket is closed. An error wakes the poller as a datagram does, so the error
// queue is looked at once each time, and when an error stands at the socket: not before every datagram, which would be
// a call more for each. Datagrams that are there already and are alike are delivered together.
func (c *socket) drain(fd int) bool {
	in := c.s.intakes.Get().(*intake)
	defer c.s.intakes.Put(in)
	in.end, in.segments = 0, 0
	c.readErrors(fd, in)
	for !c.over.Load() {
		if len(in.buf)-in.end < maxDatagram {
			c.deliver(in)
			in.end = 0
		}
		n, oob, from, err := in.receive(fd, in.room(), 0)
		switch {
		case err == unix.EAGAIN:
			c.deliver(in)
			return false // wait
		case err == errTruncated:
		case err != nil: // that of the error queue's head, which this takes away
			c.readErrors(fd, in)
		default:
			c.received(in, n, oob, from)
		}
	}
	return true
}

// received takes a datagram, or several of one size.
func (c *socket) received(in *intake, n int, oob []byte, from netip.AddrPort) {
	if !from.IsValid() || (in.segments == 0 || from.Addr() != in.from.Addr()) && !c.admits(from.Addr()) {
		c.s.filtered.Add(1)
		return
	}
	size := n
	eachControl(oob, func(level, typ int32, data []byte) {
		if level == unix.SOL_UDP && typ == unix.UDP_GRO && len(data) >= 2 {
			if s := int(binary.NativeEndian.Uint16(data)); s > 0 && s < n {
				size = s
			}
		}
	})
	if c.key.echo || !in.join(n, size, from) {
		c.deliver(in)
		if n <= maxMoved && in.end+n+maxDatagram > len(in.buf) { // else nothing could join it
			copy(in.buf[:], in.buf[in.end:in.end+n])
			in.end = 0
		}
		in.join(n, size, from)
	}
}

// deliver gives away what waits. The buffer's end stays where it is.
func (c *socket) deliver(in *intake) {
	if in.segments == 0 {
		return
	}
	b := in.buf[in.at:in.end]
	d := Datagram{Echo: c.key.echo, Pod: c.key.pod, Peer: c.shown(in.from), Payload: b}
	if in.segments > 1 {
		d.Segment = in.size
	}
	n := in.segments
	in.segments = 0
	if c.key.echo {
		if len(b) < 8 {
			return
		}
		d.Peer = netip.AddrPortFrom(in.from.Addr(), 0)
		// The kernel has put its own identifier in the request's place.
		binary.BigEndian.PutUint16(b[4:], c.key.pod.Port())
	}
	c.s.received.Add(uint64(n))
	c.s.bytes.Add(uint64(len(b)))
	c.s.o.Deliver(d)
}
