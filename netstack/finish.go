package netstack

import (
	"bytes"
	"encoding/binary"
	"errors"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/tun"
)

// A forwarded datagram comes with what one device has left undone, and the other may not do it: only one of them may
// be on the plain path, or have the kernel cut UDP super-packets. Then it is done here.

// takes reports whether a device with these offloads does what is left to be done.
func takes(o tun.Offload, h *tun.VNetHdr) bool {
	switch {
	case h.IsZero():
		return true
	case !o.VNetHdr || !o.CSum:
		return false
	}
	return !h.GSO() || o.USO
}

var errNotUDP = errors.New("netstack: a super-packet that is not of UDP cannot be forwarded")

// writeFinished writes a packet to a device that takes finished ones only, super-packets as the datagrams that they
// are made of.
func writeFinished(dev tun.Device, h *tun.VNetHdr, views [][]byte) error {
	b := bytes.Join(views, nil)
	var none tun.VNetHdr
	if !h.GSO() {
		fillSum(b, h)
		return dev.WritePacket(&none, [][]byte{b})
	}
	at := int(h.CSumStart)
	if h.GSOType != tun.GSOUDPL4 || h.Validate(len(b)) != nil || at < header.IPv4MinimumSize ||
		at+header.UDPMinimumSize > len(b) {
		return errNotUDP
	}
	head, data := b[:at+header.UDPMinimumSize], b[at+header.UDPMinimumSize:]
	for n := uint16(0); len(data) > 0; n++ {
		size := min(int(h.GSOSize), len(data))
		p := append(bytes.Clone(head), data[:size]...)
		data = data[size:]
		u := header.UDP(p[at:])
		u.SetLength(uint16(header.UDPMinimumSize + size))
		if p[0]>>4 == 4 {
			ip := header.IPv4(p)
			ip.SetTotalLength(uint16(len(p)))
			ip.SetID(ip.ID() + n)
			ip.SetChecksum(0)
			ip.SetChecksum(^ip.CalculateChecksum())
			u.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(),
				u.Length()))
		} else {
			ip := header.IPv6(p)
			ip.SetPayloadLength(uint16(len(p) - header.IPv6MinimumSize))
			u.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(),
				u.Length()))
		}
		fillSum(p, h)
		if err := dev.WritePacket(&none, [][]byte{p}); err != nil {
			return err
		}
	}
	return nil
}

// fillSum fills in the checksum that was left to the device: its field holds the sum of what the transport header
// does not.
func fillSum(b []byte, h *tun.VNetHdr) {
	if h.Flags&tun.FlagNeedsCSum == 0 {
		return
	}
	at := int(h.CSumStart) + int(h.CSumOffset)
	if at+2 > len(b) {
		return
	}
	c := ^checksum.Checksum(b[h.CSumStart:], 0)
	if c == 0 { // RFC 768: zero says that there is none
		c = 0xffff
	}
	binary.BigEndian.PutUint16(b[at:], c)
}
