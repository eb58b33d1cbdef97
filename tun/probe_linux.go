package tun

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// probeResult is what probe found beyond TCP super-packets.
type probeResult struct {
	uso      bool
	whyNoUSO string
}

// probe finds out whether the kernel takes super-packets from us, by writing harmless ones, and asks for UDP ones. An
// error says why the fast path cannot be used. TUNSETOFFLOAD's success says only what the kernel may give us; some
// kernels refuse what we write all the same (tailscale#13041: EINVAL on TCP GSO writes, Linux 6.6.44 and others).
func probe(fd int) (probeResult, error) {
	for _, p := range []struct {
		what string
		kind uint8
	}{{"TCPv4", GSOTCPv4}, {"TCPv6", GSOTCPv6}} {
		if err := writeProbe(fd, p.kind); err != nil {
			return probeResult{}, fmt.Errorf("the kernel refuses %s super-packets: %w", p.what, err)
		}
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcpOffload|unix.TUN_F_USO4|unix.TUN_F_USO6); err != nil {
		return probeResult{whyNoUSO: "the kernel has no UDP segmentation offload for TUN devices (Linux 6.2)"}, nil
	}
	if err := writeProbe(fd, GSOUDPL4); err != nil {
		// Take the promise back, or the kernel would go on sending us UDP super-packets.
		if undo := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcpOffload); undo != nil {
			return probeResult{}, fmt.Errorf("the kernel refuses UDP super-packets: %w, and to turn their offload off: %w",
				err, undo)
		}
		return probeResult{whyNoUSO: fmt.Sprintf("the kernel refuses UDP super-packets: %v", err)}, nil
	}
	return probeResult{uso: true}, nil
}

// writeProbe writes one super-packet of two segments. EIO counts as success: the kernel has parsed header and packet
// by then and found only that the interface is down, as a new one is.
func writeProbe(fd int, kind uint8) error {
	n, err := unix.Write(fd, probePacket(kind))
	switch {
	case err == nil && n > 0, errors.Is(err, unix.EIO):
		return nil
	case err == nil:
		return unix.EIO
	}
	return err
}

// probePacket returns header and packet of a super-packet that the kernel drops before it looks at the destination,
// so that it does no harm on a live device: IPv4 ones have a wrong header checksum (ip_rcv_core), IPv6 ones a
// multicast source (ip6_rcv_core).
func probePacket(kind uint8) []byte {
	const payload, segment = 200, 100
	ip, tail := 20, tcpMinHeader
	hdr := VNetHdr{Flags: FlagNeedsCSum, GSOType: kind, GSOSize: segment, CSumOffset: 16}
	proto := byte(unix.IPPROTO_TCP)
	switch kind {
	case GSOTCPv6:
		ip = 40
	case GSOUDPL4:
		tail, proto, hdr.CSumOffset = udpHeader, unix.IPPROTO_UDP, 6
	}
	hdr.CSumStart, hdr.HdrLen = uint16(ip), uint16(ip+tail)
	b := make([]byte, VNetHdrLen+ip+tail+payload)
	hdr.Encode(b)
	p := b[VNetHdrLen:]
	if ip == 20 {
		p[0] = 0x45
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		p[8], p[9] = 1, proto
		copy(p[12:], []byte{192, 0, 2, 1, 192, 0, 2, 2}) // TEST-NET-1
		// The right checksum of this header is never this: the sum of the other words is neither 0xffff nor a multiple of it.
		p[10], p[11] = 0xde, 0xad
	} else {
		p[0] = 0x60
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ip))
		p[6], p[7] = proto, 1
		copy(p[8:], []byte{0xff, 0x0e})
		copy(p[24:], []byte{0x20, 0x01, 0x0d, 0xb8}) // documentation prefix
	}
	t := p[ip:]
	binary.BigEndian.PutUint16(t, 9) // discard, both ports
	binary.BigEndian.PutUint16(t[2:], 9)
	if proto == unix.IPPROTO_TCP {
		t[12], t[13] = tcpMinHeader/4<<4, 0x10 // ACK
	} else {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	}
	return b
}
