package tun

import (
	"errors"

	"ztun/tun/netns"
)

// MaxPacket is the largest packet, in bytes without the virtio header, that passes a device in either direction: the
// most that an IPv4 header can describe. Jumbograms and BIG TCP are not asked for.
const MaxPacket = 65535

// SuperPayload is the most TCP payload, in bytes, that the pod's kernel is asked to put into one super-packet towards
// us: what leaves as one frame of a tunnel and as one super-packet at its other end. The kernel's own choice is 136
// bytes more (45 segments of 1448), which then went round by themselves, as packets, frames and packets again.
const SuperPayload = 65024

// DefaultTxQueueLen is how many packets the kernel queues towards us, when Options say nothing. A burst of connects
// or closes is as many packets as there are connections, and what does not fit is lost: with 64 entries 1,000
// concurrent half-closes lost 3,000 to 6,000 packets and took 9 to 25 s instead of 2 to 5 (measured 2026-11-23). Bulk
// does not fill the queue: the receive windows behind it are smaller.
const DefaultTxQueueLen = 1000

// MinMTU and MaxMTU bound Options.MTU and SetMTU. IPv6 needs 1280, IPv4 alone works with less; the kernel's own
// minimum for a TUN is 68.
const (
	MinMTU = 68
	MaxMTU = MaxPacket
)

// DefaultMTU is what Options.MTU zero means, in bytes.
const DefaultMTU = 1500

// ErrShortBuffer is what ReadPacket returns when the packet was longer than the buffers together. The packet is lost,
// the device is fine.
var ErrShortBuffer = errors.New("tun: packet longer than the buffers")

// ErrTooManyBuffers is what ReadPacket and WritePacket return when a packet is spread over more buffers than one
// system call takes (1022).
var ErrTooManyBuffers = errors.New("tun: packet in too many buffers")

// ErrDeviceDeleted is what ReadPacket and WritePacket return when somebody else deleted the device while it was open.
var ErrDeviceDeleted = errors.New("tun: device deleted")

// ErrNoOffload is what WritePacket returns when it is given a non-zero header although Offload().VNetHdr is false.
var ErrNoOffload = errors.New("tun: header with offload given to a device without")

// Offload says which work the device's two ends may leave to each other.
type Offload struct {
	// VNetHdr: headers and super-packets pass in both directions. False on the plain path: then every packet is
	// complete, with its checksums, and no longer than the MTU.
	VNetHdr bool
	// CSum: packets whose transport checksum is still to be computed pass. TSO4, TSO6: TCP super-packets. USO: UDP ones,
	// both families.
	CSum, TSO4, TSO6, USO bool
	// Why gives the reason of a fallback to the plain path, or of USO's absence; "" if there is none.
	Why string
}

// Device is a TUN device: one end of a point to point link whose other end is the kernel's IP layer in some
// namespace. One goroutine reads, any may call the rest.
type Device interface {
	// Name is the interface's name in its namespace.
	Name() string

	// MTU in bytes, as last set here.
	MTU() int

	// Offload says what passes the device. It does not change while the device is open.
	Offload() Offload

	// ReadPacket waits for one packet and scatters it over bufs in order, filling each before the next; n is its length
	// without the header. bufs should hold MaxPacket bytes together, else ErrShortBuffer is possible. h.HdrLen is
	// recomputed from the packet, because the kernel's value is wrong for forwarded super-packets. One reader at a time.
	// It does not allocate. After Close, also while it waits: os.ErrClosed. Other errors: ErrShortBuffer and
	// ErrTooManyBuffers (go on reading), ErrDeviceDeleted (give up).
	ReadPacket(h *VNetHdr, bufs [][]byte) (n int, err error)

	// WritePacket writes one packet gathered from bufs. If Offload().VNetHdr is false, h must be zero. A full queue is
	// waited for. Several may write at once: what each writes stays whole, and in its order. It does not allocate. Errors
	// are os.ErrClosed, ErrDeviceDeleted, ErrTooManyBuffers, ErrNoOffload, or a bare errno: EIO while the interface is
	// down, EINVAL for what is no IP packet or has a header that does not fit it, ENOBUFS, ENOMEM. The packet is then
	// lost.
	WritePacket(h *VNetHdr, bufs [][]byte) error

	// SetMTU changes the interface's MTU, in bytes; ErrForeign of one that Adopt has taken.
	SetMTU(mtu int) error

	// Close closes the device and returns when a waiting reader has been sent home. The interface goes away with it
	// unless it is persistent. A second Close does nothing and returns nil.
	Close() error
}

// ErrNothing is what TryReadPacket returns when there is no packet to be had without waiting.
var ErrNothing = errors.New("tun: no packet waits")

// TryReader is implemented by devices that can be read without waiting.
type TryReader interface {
	// TryReadPacket is ReadPacket, but for ErrNothing where that would wait. It counts as the one reader.
	TryReadPacket(h *VNetHdr, bufs [][]byte) (n int, err error)
}

// Stats counts what a device has turned away. The numbers only grow.
type Stats struct {
	// BadHeaders: packets from the kernel whose virtio header did not fit them; dropped.
	BadHeaders uint64
	// ShortBuffers: packets lost because the reader's buffers were too small.
	ShortBuffers uint64
	// SplitLost: on the plain path, super-packets that fell into more segments than a batch holds; their tails are lost.
	SplitLost uint64
}

// StatsReader is implemented by all devices of this package.
type StatsReader interface{ Stats() Stats }

// Options say how to open a device.
type Options struct {
	// Name of the interface, 1 to 15 bytes. If it exists as a persistent TUN that nobody holds, it is taken over, with its
	// addresses and routes.
	Name string
	// Device is the path of the device file; "": /dev/net/tun.
	Device string
	// NetNS is the namespace to make it in; nil is the process's own.
	NetNS *netns.NS
	// MTU in bytes, 0 for DefaultMTU.
	MTU int
	// Persistent: the interface outlives Close and the process, with its addresses and routes but without carrier: what
	// is sent into it is dropped (fail closed). Remove deletes it.
	Persistent bool
	// Plain forces the plain path.
	Plain bool
	// TxQueueLen in packets, 0 for DefaultTxQueueLen.
	TxQueueLen int
}
