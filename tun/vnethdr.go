package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// VNetHdrLen is the length in bytes of the header in front of every packet at the device file: virtio's legacy header
// without num_buffers.
const VNetHdrLen = 10

// Flags of VNetHdr (linux/virtio_net.h; virtio 1.2, section 5.1.6).
const (
	// the checksum at CSumStart+CSumOffset holds the pseudo-header's sum only; whoever consumes the packet completes or
	// ignores it
	FlagNeedsCSum = 1
	FlagDataValid = 2 // the kernel has verified the checksum
)

// GSO types of VNetHdr (linux/virtio_net.h).
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDPL4 = 5
	// added to a TCP type: CWR is set on the first segment alone. Not asked for, so it does not come from the kernel
	GSOECN = 0x80
)

const (
	tcpMinHeader = 20
	udpHeader    = 8
)

// VNetHdr is struct virtio_net_hdr: what is left to be done to the packet that follows it. The zero value says:
// nothing.
type VNetHdr struct {
	Flags   uint8 // FlagNeedsCSum, FlagDataValid
	GSOType uint8 // GSONone, or the kind of super-packet
	// HdrLen is the length in bytes of a super-packet's IP and transport headers; GSOSize the payload bytes of each
	// segment to be cut.
	HdrLen, GSOSize uint16
	// CSumStart is where the transport header begins, CSumOffset where in it the checksum lies. Meaningful with
	// FlagNeedsCSum.
	CSumStart, CSumOffset uint16
}

var (
	errHdrShort    = errors.New("virtio header: shorter than 10 bytes")
	errHdrType     = errors.New("virtio header: unknown GSO type")
	errHdrCSum     = errors.New("virtio header: checksum field outside the packet")
	errHdrLen      = errors.New("virtio header: header length does not fit the packet")
	errHdrGSOSize  = errors.New("virtio header: super-packet with segment size 0")
	errHdrGSONoSum = errors.New("virtio header: super-packet without checksum start")
	errHdrTCP      = errors.New("virtio header: bad TCP header length in super-packet")
)

// Decode reads the header from the first VNetHdrLen bytes of b, little endian (we ask the kernel for it with
// TUNSETVNETLE). The only error is a b too short. The values may be nonsense: see Validate.
func (h *VNetHdr) Decode(b []byte) error {
	if len(b) < VNetHdrLen {
		return errHdrShort
	}
	h.Flags, h.GSOType = b[0], b[1]
	h.HdrLen = binary.LittleEndian.Uint16(b[2:])
	h.GSOSize = binary.LittleEndian.Uint16(b[4:])
	h.CSumStart = binary.LittleEndian.Uint16(b[6:])
	h.CSumOffset = binary.LittleEndian.Uint16(b[8:])
	return nil
}

// Encode writes the header to the first VNetHdrLen bytes of b; a shorter b panics.
func (h *VNetHdr) Encode(b []byte) {
	_ = b[VNetHdrLen-1]
	b[0], b[1] = h.Flags, h.GSOType
	binary.LittleEndian.PutUint16(b[2:], h.HdrLen)
	binary.LittleEndian.PutUint16(b[4:], h.GSOSize)
	binary.LittleEndian.PutUint16(b[6:], h.CSumStart)
	binary.LittleEndian.PutUint16(b[8:], h.CSumOffset)
}

// IsZero says that nothing is left to be done to the packet.
func (h *VNetHdr) IsZero() bool { return *h == VNetHdr{} }

// GSO says that the packet is a super-packet.
func (h *VNetHdr) GSO() bool { return h.GSOType&^GSOECN != GSONone }

// String is for messages and tests.
func (h *VNetHdr) String() string {
	return fmt.Sprintf("flags=%#x gso=%d hdr_len=%d gso_size=%d csum=%d+%d", h.Flags, h.GSOType, h.HdrLen, h.GSOSize,
		h.CSumStart, h.CSumOffset)
}

// Validate says whether the header fits a packet of n bytes (without the header): all offsets inside the packet, the
// type known, a super-packet with a segment size and a checksum start. Unknown flags are let pass, as virtio demands.
// It does not allocate.
func (h *VNetHdr) Validate(n int) error {
	switch h.GSOType &^ GSOECN {
	case GSONone:
		if h.GSOType != GSONone {
			return errHdrType
		}
	case GSOTCPv4, GSOTCPv6:
	case GSOUDPL4:
		if h.GSOType&GSOECN != 0 {
			return errHdrType
		}
	default:
		return errHdrType
	}
	// Sums are of ints: two uint16 near the top must not wrap round to a small one.
	if h.Flags&FlagNeedsCSum != 0 && int(h.CSumStart)+int(h.CSumOffset)+2 > n {
		return errHdrCSum
	}
	if !h.GSO() {
		return nil
	}
	switch {
	case h.Flags&FlagNeedsCSum == 0:
		return errHdrGSONoSum
	case h.GSOSize == 0:
		return errHdrGSOSize
	case int(h.HdrLen) > n || h.HdrLen < h.CSumStart:
		return errHdrLen
	}
	return nil
}

// Fix recomputes HdrLen of a super-packet of n bytes scattered over bufs, from the TCP data offset. The kernel fills
// in the length of the linear part of its buffer, which is the whole first segment when the packet is forwarded
// rather than local (wireguard-go tun_linux.go has the same cure). It leaves other packets alone. It returns an
// error, and h as it was, if the packet is too short or the TCP header impossible. It does not allocate.
func (h *VNetHdr) Fix(n int, bufs [][]byte) error {
	var hdrLen int
	switch h.GSOType &^ GSOECN {
	case GSOTCPv4, GSOTCPv6:
		at := int(h.CSumStart) + 12
		if at >= n {
			return errHdrLen
		}
		b, ok := byteAt(bufs, at)
		if !ok {
			return errHdrLen
		}
		tcp := int(b>>4) * 4
		if tcp < tcpMinHeader {
			return errHdrTCP
		}
		hdrLen = int(h.CSumStart) + tcp
	case GSOUDPL4:
		hdrLen = int(h.CSumStart) + udpHeader
	default:
		return nil
	}
	if hdrLen > n || hdrLen > 0xffff {
		return errHdrLen
	}
	h.HdrLen = uint16(hdrLen)
	return nil
}

// byteAt returns the byte at offset at of what bufs hold together.
func byteAt(bufs [][]byte, at int) (byte, bool) {
	for _, b := range bufs {
		if at < len(b) {
			return b[at], true
		}
		at -= len(b)
	}
	return 0, false
}
