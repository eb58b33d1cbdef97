package tuntest

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ztun/tun"
)

// Options describe a Pair. The zero value: MTU 1500, no offload, 256 packets of queue in each direction, waiting
// writers.
type Options struct {
	MTU     int  // of both ends at first, in bytes; 0 means tun.DefaultMTU
	Offload bool // both ends take and give headers and super-packets
	Queue   int  // packets in flight in each direction; 0 means 256
	Drop    bool // drop and count what does not fit the queue, instead of making the writer wait
}

// Pair makes the two ends of a link. Both are to be closed by the caller.
func Pair(o Options) (a, b *Device) {
	if o.MTU == 0 {
		o.MTU = tun.DefaultMTU
	}
	if o.Queue == 0 {
		o.Queue = 256
	}
	off := tun.Offload{Why: "tuntest without offload"}
	if o.Offload {
		off = tun.Offload{VNetHdr: true, CSum: true, TSO4: true, TSO6: true, USO: true}
	}
	end := func(name string) *Device {
		d := &Device{
			name: name, off: off, drop: o.Drop,
			in:     make(chan *packet, o.Queue),
			free:   make(chan *packet, o.Queue),
			closed: make(chan struct{}),
		}
		d.mtu.Store(int64(o.MTU))
		return d
	}
	a, b = end("tuntest-a"), end("tuntest-b")
	a.peer, b.peer = b, a
	return a, b
}

// Device is one end of a Pair. It implements tun.Device.
type Device struct {
	name string
	off  tun.Offload
	drop bool
	mtu  atomic.Int64
	peer *Device

	in     chan *packet // to be read here
	free   chan *packet // buffers to be used again by the peer's writer
	closed chan struct{}
	once   sync.Once

	dropped atomic.Uint64
	short   atomic.Uint64
}

var (
	_ tun.Device      = (*Device)(nil)
	_ tun.StatsReader = (*Device)(nil)
	_ tun.TryReader   = (*Device)(nil)
)

type packet struct {
	hdr  tun.VNetHdr
	data []byte
}

// Name implements tun.Device.
func (d *Device) Name() string { return d.name }

// MTU implements tun.Device.
func (d *Device) MTU() int { return int(d.mtu.Load()) }

// Offload implements tun.Device.
func (d *Device) Offload() tun.Offload { return d.off }

// SetMTU implements tun.Device. It is this end's: what the peer writes must not be longer.
func (d *Device) SetMTU(mtu int) error {
	if mtu < tun.MinMTU || mtu > tun.MaxMTU {
		return fmt.Errorf("MTU %d is not between %d and %d", mtu, tun.MinMTU, tun.MaxMTU)
	}
	d.mtu.Store(int64(mtu))
	return nil
}

// Dropped counts packets written here that found the peer's queue full (Options.Drop).
func (d *Device) Dropped() uint64 { return d.dropped.Load() }

// Stats implements tun.StatsReader.
func (d *Device) Stats() tun.Stats { return tun.Stats{ShortBuffers: d.short.Load()} }

// ReadPacket implements tun.Device.
func (d *Device) ReadPacket(h *tun.VNetHdr, bufs [][]byte) (int, error) {
	if d.isClosed() {
		return 0, os.ErrClosed
	}
	var p *packet
	select {
	case p = <-d.in:
	case <-d.closed:
		return 0, os.ErrClosed
	}
	return d.take(p, h, bufs)
}

// TryReadPacket implements tun.TryReader.
func (d *Device) TryReadPacket(h *tun.VNetHdr, bufs [][]byte) (int, error) {
	if d.isClosed() {
		return 0, os.ErrClosed
	}
	select {
	case p := <-d.in:
		return d.take(p, h, bufs)
	default:
		return 0, tun.ErrNothing
	}
}

// take copies a packet to who reads it.
func (d *Device) take(p *packet, h *tun.VNetHdr, bufs [][]byte) (int, error) {
	*h = p.hdr
	n := 0
	for _, b := range bufs {
		n += copy(b, p.data[n:])
	}
	whole := n == len(p.data)
	select {
	case d.free <- p:
	default:
	}
	if !whole {
		d.short.Add(1)
		return 0, tun.ErrShortBuffer
	}
	return n, nil
}

// WritePacket implements tun.Device. Beyond its errors: unix.EMSGSIZE for a packet, or a segment of a super-packet,
// longer than the peer's MTU; unix.EIO when the peer is closed.
func (d *Device) WritePacket(h *tun.VNetHdr, bufs [][]byte) error {
	if d.isClosed() {
		return os.ErrClosed
	}
	if !d.off.VNetHdr && !h.IsZero() {
		return tun.ErrNoOffload
	}
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	switch {
	case n == 0, h.Validate(n) != nil:
		return unix.EINVAL
	case n > tun.MaxPacket,
		!h.GSO() && n > d.peer.MTU(),
		h.GSO() && int(h.HdrLen)+int(h.GSOSize) > d.peer.MTU():
		return unix.EMSGSIZE
	}
	var p *packet
	select {
	case p = <-d.peer.free:
	default:
		p = new(packet)
	}
	p.hdr, p.data = *h, p.data[:0]
	for _, b := range bufs {
		p.data = append(p.data, b...)
	}
	if v := p.data[0] >> 4; v != 4 && v != 6 {
		return unix.EINVAL
	}
	if d.peer.isClosed() {
		return unix.EIO
	}
	if d.drop {
		select {
		case d.peer.in <- p:
		default:
			d.dropped.Add(1)
		}
		return nil
	}
	select {
	case d.peer.in <- p:
		return nil
	case <-d.peer.closed:
		return unix.EIO
	case <-d.closed:
		return os.ErrClosed
	}
}

// Close implements tun.Device.
func (d *Device) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

func (d *Device) isClosed() bool {
	select {
	case <-d.closed:
		return true
	default:
		return false
	}
}
