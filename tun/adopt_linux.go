package tun

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrForeign is what SetMTU returns for a device of somebody else's, in whose namespace we are not.
var ErrForeign = errors.New("tun: the device is somebody else's")

// Adopt makes a Device of a descriptor that somebody else has attached to a TUN interface of his (TUNSETIFF), wherever
// that lives: its address, routes and MTU, and that it is up, are his affair. mtu is that MTU in bytes, 0 for
// DefaultMTU. It needs no privilege. The interface has to be a TUN without packet information (IFF_TUN, IFF_NO_PI),
// whose virtio header (IFF_VNET_HDR), if it has one, is given our length and byte order; without one the plain path
// serves it. f stays the caller's, who should neither use nor keep it: it is made non-blocking, and the interface lives
// as long as a descriptor of it is open. Errors say what is wrong with the descriptor.
func Adopt(f *os.File, mtu int) (Device, error) { return adopt(f, mtu, probe) }

func adopt(f *os.File, mtu int, probe func(fd int) (probeResult, error)) (Device, error) {
	if mtu == 0 {
		mtu = DefaultMTU
	}
	if err := checkMTU(mtu); err != nil {
		return nil, err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var inner error
	err = rc.Control(func(old uintptr) { fd, inner = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, inner); err != nil {
		return nil, fmt.Errorf("cannot duplicate the descriptor of a TUN: %w", err)
	}
	h := &handle{fd: fd, foreign: true}
	defer func() {
		if h.fd >= 0 { // no Device has taken it
			unix.Close(h.fd)
		}
	}()
	flags, err := identify(h)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("cannot make the descriptor of %s non-blocking: %w", h.name, err)
	}
	h.mtu.Store(int64(mtu))
	off := Offload{}
	if flags&unix.IFF_VNET_HDR == 0 {
		// Whoever had it before may have asked for super-packets, which would come without a header.
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
			return nil, fmt.Errorf("cannot turn offload off on device %s: %w", h.name, err)
		}
		if err := noPacketInfo(h, 0); err != nil {
			return nil, err
		}
		off.Why = "the device was made without IFF_VNET_HDR"
		return newPlain(h, off)
	}
	if err := h.setHeader(); err != nil {
		return nil, err
	}
	if err := noPacketInfo(h, VNetHdrLen); err != nil {
		return nil, err
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcpOffload); err != nil {
		return nil, fmt.Errorf("the kernel refuses TUNSETOFFLOAD on %s: %w (make the device without IFF_VNET_HDR)", h.name, err)
	}
	r, err := probe(fd)
	if err != nil {
		off.Why = err.Error()
		return newPlain(h, off)
	}
	return newFast(h, Offload{VNetHdr: true, CSum: true, TSO4: true, TSO6: true, USO: r.uso, Why: r.whyNoUSO})
}

// identify reads what the descriptor is attached to, and says why it is of no use.
func identify(h *handle) (flags uint16, err error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return 0, err
	}
	switch err := unix.IoctlIfreq(h.fd, unix.TUNGETIFF, ifr); {
	case errors.Is(err, unix.EBADFD):
		return 0, fmt.Errorf("the descriptor is /dev/net/tun, but attached to no interface: TUNSETIFF comes first, with " +
			"IFF_TUN, IFF_NO_PI and IFF_VNET_HDR")
	case err != nil:
		return 0, fmt.Errorf("the descriptor is none of a TUN interface: %w", err)
	}
	h.name, flags = ifr.Name(), ifr.Uint16()
	if flags&unix.IFF_TAP != 0 {
		return 0, fmt.Errorf("%s is a TAP device, which carries Ethernet frames: make it with IFF_TUN", h.name)
	}
	return flags, nil
}

// noPacketInfo finds out whether packets come bare. TUNGETIFF does not tell: IFF_NO_PI is the bit by which it says
// IFF_NOFILTER. But what is no IP packet is refused by a device of bare packets, also one that is down; by one with
// packet information it is taken for a packet of protocol 0, which nobody receives.
func noPacketInfo(h *handle, header int) error {
	switch _, err := unix.Write(h.fd, make([]byte, header+8)); {
	case errors.Is(err, unix.EINVAL):
		return nil
	case err == nil, errors.Is(err, unix.EIO):
		return fmt.Errorf("%s has packet information before its packets: make it with IFF_NO_PI", h.name)
	default:
		return fmt.Errorf("cannot write to device %s: %w", h.name, err)
	}
}
