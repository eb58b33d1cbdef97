package steer_test

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"ztun/tun"
)

// udpPacket builds a datagram "hello" whose UDP checksum is left to the kernel.
func udpPacket(src, dst netip.Addr, port uint16) ([]byte, tun.VNetHdr) {
	head := 20
	if src.Is6() {
		head = 40
	}
	p := append(make([]byte, head+8), "hello"...)
	u := p[head:]
	if src.Is6() {
		p[0], p[6], p[7] = 0x60, unix.IPPROTO_UDP, 64
		binary.BigEndian.PutUint16(p[4:], uint16(len(u)))
		copy(p[8:], src.AsSlice())
		copy(p[24:], dst.AsSlice())
	} else {
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		copy(p[12:], src.AsSlice())
		copy(p[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(p[10:], ^sum(0, p[:20]))
	}
	binary.BigEndian.PutUint16(u, 9999)
	binary.BigEndian.PutUint16(u[2:], port)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	binary.BigEndian.PutUint16(u[6:], sum(uint32(unix.IPPROTO_UDP)+uint32(len(u)),
		append(src.AsSlice(), dst.AsSlice()...)))
	return p, tun.VNetHdr{Flags: tun.FlagNeedsCSum, CSumStart: uint16(head), CSumOffset: 6}
}

// sum is the Internet checksum's sum (RFC 1071) of an even number of bytes, folded and not inverted.
func sum(s uint32, b []byte) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
