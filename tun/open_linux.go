package tun

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
)

const clonePath = "/dev/net/tun"

const tcpOffload = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6

// handle is an attached device file before it becomes a Device, and the part of a Device that is not reading and
// writing.
type handle struct {
	name string
	fd   int      // the device file; owned by the Device's os.File once there is one
	ctl  *os.File // a datagram socket in the device's namespace, for interface ioctls
	rc   syscall.RawConn
	mtu  atomic.Int64

	foreign bool // somebody else's: there is no ctl
}

// Open makes the device that o describes, or takes over a persistent one of that name, and finds out what offload it
// can do. The device is not brought up and gets no address: package steer does that. Errors say what is missing; they
// match unix.EPERM, unix.EBUSY, fs.ErrNotExist and so on by errors.Is.
func Open(o Options) (Device, error) { return open(o, probe) }

// open is Open with the probe replaced, for tests.
func open(o Options, probe func(fd int) (probeResult, error)) (Device, error) {
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	if o.TxQueueLen == 0 {
		o.TxQueueLen = DefaultTxQueueLen
	}
	if err := checkOptions(o); err != nil {
		return nil, err
	}
	var dev Device
	err := inNS(o.NetNS, func() (err error) {
		dev, err = openHere(o, probe)
		return err
	})
	if err != nil {
		return nil, err
	}
	return dev, nil
}

// openHere is open inside the namespace.
func openHere(o Options, probe func(fd int) (probeResult, error)) (Device, error) {
	h, err := attach(o.Device, o.Name, true)
	if err != nil {
		return nil, err
	}
	off := Offload{}
	if o.Plain {
		off.Why = "the plain path was asked for"
	}
	// Without this the kernel hands over only complete packets, and the splitter has nothing to do; wireguard's device
	// demands that it succeeds wherever there is a virtio header.
	vnet := true
	if err := unix.IoctlSetInt(h.fd, unix.TUNSETOFFLOAD, tcpOffload); err != nil {
		vnet = false
		if off.Why == "" {
			off.Why = fmt.Sprintf("the kernel refuses TUNSETOFFLOAD: %v", err)
		}
	}
	if vnet && off.Why == "" {
		r, err := probe(h.fd)
		switch {
		case err != nil:
			off.Why = err.Error()
		default:
			off = Offload{VNetHdr: true, CSum: true, TSO4: true, TSO6: true, USO: r.uso, Why: r.whyNoUSO}
		}
	}
	if !vnet {
		// A file cannot change its flags: close it, and attach again without the header.
		h.close()
		if h, err = attach(o.Device, o.Name, false); err != nil {
			return nil, err
		}
		// A device taken over may still have its former holder's offload, and would give us super-packets without a header.
		if err := unix.IoctlSetInt(h.fd, unix.TUNSETOFFLOAD, 0); err != nil {
			h.close()
			return nil, fmt.Errorf("cannot turn offload off on device %s: %w", o.Name, err)
		}
	}
	dev, err := finish(h, o, off)
	if err != nil {
		h.close()
		return nil, err
	}
	return dev, nil
}

// gsoMaxSize makes super-packets of SuperPayload: a kernel's TCP sets aside what it reserves for headers
// (MAX_TCP_HEADER, 320 bytes where layers beneath may want the most) and one. Packets that are merely routed to the
// device, merged by another at up to 65,212 bytes where the MTU is 1500, are below it: the kernel would cut them up.
const gsoMaxSize = SuperPayload + 321

// finish sets what remains and wraps h. Persistence comes last, so that a failure leaves no device behind that was
// not there before.
func finish(h *handle, o Options, off Offload) (Device, error) {
	err := h.ifreq(unix.SIOCSIFTXQLEN, func(r *unix.Ifreq) { r.SetUint32(uint32(o.TxQueueLen)) })
	if errors.Is(err, unix.EPERM) {
		// In a user namespace the ioctl is refused to everybody, rtnetlink asks for the namespace's own CAP_NET_ADMIN.
		err = netlink.LinkSetTxQLen(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: h.name}}, o.TxQueueLen)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot set the queue length of device %s to %d: %w", h.name, o.TxQueueLen, err)
	}
	if err := h.SetMTU(o.MTU); err != nil {
		return nil, err
	}
	if off.TSO4 || off.TSO6 {
		// A kernel that cannot be asked (before 4.16) sends what it likes, as it did before.
		_ = netlink.LinkSetGSOMaxSize(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: h.name}}, gsoMaxSize)
	}
	persist := 0
	if o.Persistent {
		persist = 1
	}
	if err := unix.IoctlSetInt(h.fd, unix.TUNSETPERSIST, persist); err != nil {
		return nil, fmt.Errorf("cannot make device %s persistent: %w", h.name, err)
	}
	if off.VNetHdr {
		return newFast(h, off)
	}
	return newPlain(h, off)
}

// Remove deletes the persistent device name of namespace ns (nil: the process's own). A device that does not exist is
// no error; one that somebody holds open is unix.EBUSY, one that is no TUN unix.EINVAL.
func Remove(ns *netns.NS, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return inNS(ns, func() error {
		// To attach would create it, if only for a moment.
		if exists, err := linkExists(name); err != nil || !exists {
			return err
		}
		h, err := attach("", name, true)
		if err != nil {
			return err
		}
		defer h.close()
		if err := unix.IoctlSetInt(h.fd, unix.TUNSETPERSIST, 0); err != nil {
			return fmt.Errorf("cannot remove device %s: %w", name, err)
		}
		return nil
	})
}

// attach opens the clone device, which is at path or, by default, where it is everywhere, in the thread's namespace,
// and attaches it to the interface name, which it creates if need be.
func attach(path, name string, vnet bool) (*handle, error) {
	if path == "" {
		path = clonePath
	}
	h, err := attachFlags(path, name, tunFlags(vnet))
	if errors.Is(err, unix.EINVAL) {
		// The interface exists and is something else. The one case to cure is a persistent TUN with several queues: the
		// flag cannot be changed, and to join as one more queue would share the packets with whoever holds the others.
		if dropMultiQueue(path, name) == nil {
			h, err = attachFlags(path, name, tunFlags(vnet))
		}
	}
	switch {
	case errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("cannot open device %s: an interface of that name exists and is not a TUN device for us: %w",
			name, unix.EINVAL)
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("cannot open device %s: it is in use by another process (another ztun on this namespace?): %w",
			name, unix.EBUSY)
	}
	return h, err
}

func tunFlags(vnet bool) uint16 {
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if vnet {
		flags |= unix.IFF_VNET_HDR
	}
	return flags
}

// dropMultiQueue deletes the persistent multi-queue TUN name if nobody holds it. Otherwise it leaves it as it was,
// and returns an error if it is no such device.
func dropMultiQueue(path, name string) error {
	const flags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_MULTI_QUEUE
	h, err := attachFlags(path, name, flags)
	if err != nil {
		return err
	}
	err = unix.IoctlSetInt(h.fd, unix.TUNSETPERSIST, 0)
	h.close()
	if err != nil {
		return err
	}
	if exists, err := linkExists(name); err != nil || !exists {
		return err
	}
	// Somebody holds another queue: put back what we took.
	if h, err = attachFlags(path, name, flags); err != nil {
		return err
	}
	defer h.close()
	return errors.Join(unix.IoctlSetInt(h.fd, unix.TUNSETPERSIST, 1), unix.EBUSY)
}

func attachFlags(path, name string, flags uint16) (*handle, error) {
	ctl, err := controlSocket()
	if err != nil {
		return nil, err
	}
	h := &handle{name: name, fd: -1, ctl: ctl}
	if err := h.attach(path, flags); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *handle) attach(path string, flags uint16) (err error) {
	if h.rc, err = h.ctl.SyscallConn(); err != nil {
		return err
	}
	h.fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("cannot open %s: %w (is the kernel's tun module there? try `modprobe tun`, or in a container "+
			"give it the device)", path, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("cannot open %s: %w (root is needed, or access to the device file)", path, err)
	case err != nil:
		return fmt.Errorf("cannot open %s: %w", path, err)
	}
	ifr, err := unix.NewIfreq(h.name)
	if err != nil {
		return err
	}
	ifr.SetUint16(flags)
	switch err := unix.IoctlIfreq(h.fd, unix.TUNSETIFF, ifr); {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("cannot create device %s: %w (CAP_NET_ADMIN in the namespace is needed)", h.name, err)
	case err != nil:
		return fmt.Errorf("cannot create device %s: %w", h.name, err)
	}
	if flags&unix.IFF_VNET_HDR == 0 {
		return nil
	}
	return h.setHeader()
}

// setHeader has the virtio header be ours.
func (h *handle) setHeader() error {
	// The header's length and byte order belong to the interface, so a device taken over may have others.
	if err := unix.IoctlSetPointerInt(h.fd, unix.TUNSETVNETHDRSZ, VNetHdrLen); err != nil {
		return fmt.Errorf("cannot set the header length of device %s: %w", h.name, err)
	}
	if err := unix.IoctlSetPointerInt(h.fd, unix.TUNSETVNETLE, 1); err != nil {
		return fmt.Errorf("cannot set the header's byte order of device %s: %w", h.name, err)
	}
	return nil
}

// close gives up the device file, unless a Device has taken it (fd -1), and the control socket.
func (h *handle) close() {
	if h.fd >= 0 {
		unix.Close(h.fd)
		h.fd = -1
	}
	if h.ctl != nil {
		h.ctl.Close()
	}
}

// Name implements Device.
func (h *handle) Name() string { return h.name }

// MTU implements Device.
func (h *handle) MTU() int { return int(h.mtu.Load()) }

// SetMTU implements Device.
func (h *handle) SetMTU(mtu int) error {
	if err := checkMTU(mtu); err != nil {
		return err
	}
	if h.foreign {
		return ErrForeign
	}
	err := h.ifreq(unix.SIOCSIFMTU, func(r *unix.Ifreq) { r.SetUint32(uint32(mtu)) })
	switch {
	case errors.Is(err, os.ErrClosed):
		return os.ErrClosed
	case err != nil:
		return fmt.Errorf("cannot set the MTU of device %s to %d: %w", h.name, mtu, err)
	}
	h.mtu.Store(int64(mtu))
	return nil
}

// ifreq performs an interface ioctl in the device's namespace.
func (h *handle) ifreq(req uint, set func(*unix.Ifreq)) error {
	ifr, err := unix.NewIfreq(h.name)
	if err != nil {
		return err
	}
	set(ifr)
	var inner error
	err = h.rc.Control(func(fd uintptr) { inner = unix.IoctlIfreq(int(fd), req, ifr) })
	if err != nil {
		return os.ErrClosed
	}
	return inner
}

// controlSocket makes a socket for interface ioctls in the thread's namespace.
func controlSocket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open a control socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "ifreq"), nil
}

// linkExists says whether the thread's namespace has an interface of that name.
func linkExists(name string) (bool, error) {
	ctl, err := controlSocket()
	if err != nil {
		return false, err
	}
	defer ctl.Close()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return false, err
	}
	switch err := unix.IoctlIfreq(int(ctl.Fd()), unix.SIOCGIFINDEX, ifr); {
	case errors.Is(err, unix.ENODEV):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("cannot look for device %s: %w", name, err)
	}
	return true, nil
}

func inNS(ns *netns.NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

func checkOptions(o Options) error {
	if err := checkName(o.Name); err != nil {
		return err
	}
	if o.TxQueueLen < 0 || o.TxQueueLen > 1<<16 {
		return fmt.Errorf("queue length %d of device %s is not between 1 and %d", o.TxQueueLen, o.Name, 1<<16)
	}
	return checkMTU(o.MTU)
}

func checkMTU(mtu int) error {
	if mtu < MinMTU || mtu > MaxMTU {
		return fmt.Errorf("MTU %d is not between %d and %d", mtu, MinMTU, MaxMTU)
	}
	return nil
}

// checkName applies the kernel's rules for interface names (dev_valid_name), and refuses '%', which the kernel takes
// as a pattern to fill in.
func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..",
		len(name) >= unix.IFNAMSIZ,
		strings.ContainsAny(name, "/:%"),
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f }):
		return fmt.Errorf("%q is not a name for a device: 1 to %d bytes without spaces, '/', ':' or '%%' are allowed", name,
			unix.IFNAMSIZ-1)
	}
	return nil
}
