package tun

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// plain is the device of the fallback: wireguard's, one complete packet at a time. Where the kernel hands over
// super-packets, wireguard's Read splits them into a batch of buffers and computes their checksums; they wait there
// to be read one by one. Writes are always of one packet, so that wireguard never joins packets into a super-packet:
// the kernel's refusal of those is what usually brought us here.
type plain struct {
	*handle
	off    Offload
	dev    wgtun.Device
	closed atomic.Bool

	readMu sync.Mutex // held by the reader, and by Close to wait for it before the arena goes
	arena  []byte     // mapped: the batch's buffers, MaxPacket each
	batch  [][]byte
	sizes  []int
	next   int // the first packet of the batch that has not been read
	filled int // packets in the batch

	writeMu sync.Mutex // held by who writes
	wbuf    []byte     // room for wireguard's header, then the packet
	wbatch  [1][]byte

	badPackets, short, splitLost atomic.Uint64
}

// wgOffset is the room that wireguard's Write wants in front of a packet for its virtio header.
const wgOffset = VNetHdrLen

func newPlain(h *handle, off Offload) (*plain, error) {
	dev, name, err := wgtun.CreateUnmonitoredTUNFromFD(h.fd)
	if err != nil {
		return nil, err
	}
	h.fd = -1 // wireguard's file owns it now
	h.name = name
	d := &plain{handle: h, off: off, dev: dev, wbuf: make([]byte, wgOffset+MaxPacket)}
	n := dev.BatchSize()
	d.arena, err = unix.Mmap(-1, 0, n*MaxPacket, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|
		unix.MAP_NORESERVE)
	if err != nil {
		dev.Close()
		return nil, os.NewSyscallError("mmap", err)
	}
	d.batch, d.sizes = make([][]byte, n), make([]int, n)
	for i := range d.batch {
		d.batch[i] = d.arena[i*MaxPacket : (i+1)*MaxPacket : (i+1)*MaxPacket]
	}
	return d, nil
}

// Offload implements Device.
func (d *plain) Offload() Offload { return d.off }

// Stats implements StatsReader.
func (d *plain) Stats() Stats {
	return Stats{BadHeaders: d.badPackets.Load(), ShortBuffers: d.short.Load(), SplitLost: d.splitLost.Load()}
}

// ReadPacket implements Device.
func (d *plain) ReadPacket(h *VNetHdr, bufs [][]byte) (int, error) {
	*h = VNetHdr{}
	d.readMu.Lock()
	defer d.readMu.Unlock()
	for d.next == d.filled {
		if d.closed.Load() {
			return 0, os.ErrClosed
		}
		d.next, d.filled = 0, 0
		n, err := d.dev.Read(d.batch, d.sizes, 0)
		if errors.Is(err, wgtun.ErrTooManySegments) {
			// The batch is full; what came before the overflow is good.
			d.splitLost.Add(1)
			err = nil
		}
		if err != nil {
			if err = d.failure(err); err == errBadPacket {
				d.badPackets.Add(1)
				continue
			}
			return 0, err
		}
		d.filled = n
	}
	packet := d.batch[d.next][:d.sizes[d.next]]
	d.next++
	n := 0
	for _, b := range bufs {
		n += copy(b, packet[n:])
	}
	if n < len(packet) {
		d.short.Add(1)
		return 0, ErrShortBuffer
	}
	return n, nil
}

// WritePacket implements Device.
func (d *plain) WritePacket(h *VNetHdr, bufs [][]byte) error {
	if !h.IsZero() {
		return ErrNoOffload
	}
	d.writeMu.Lock()
	defer d.writeMu.Unlock()
	n := wgOffset
	for _, b := range bufs {
		if len(b) > len(d.wbuf)-n {
			return unix.EMSGSIZE
		}
		n += copy(d.wbuf[n:], b)
	}
	if n == wgOffset {
		return unix.EINVAL
	}
	d.wbatch[0] = d.wbuf[:n]
	if _, err := d.dev.Write(d.wbatch[:], wgOffset); err != nil {
		return d.failure(err)
	}
	return nil
}

// SetMTU implements Device.
func (d *plain) SetMTU(mtu int) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	return d.handle.SetMTU(mtu)
}

// Close implements Device.
func (d *plain) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	d.handle.close()
	err := d.dev.Close() // unblocks the reader
	d.readMu.Lock()
	defer d.readMu.Unlock()
	d.next, d.filled, d.batch = 0, 0, nil
	return errors.Join(err, unix.Munmap(d.arena))
}

// errBadPacket stands for wireguard's complaints about a packet's contents, which are no reason to stop.
var errBadPacket = errors.New("tun: bad packet")

// failure turns an error of wireguard's into what Device promises. Wireguard takes a deleted device (EBADFD) for a
// closed one; and its file may say first, without an errno, that Go's poller got an error event, as it does from when
// the device is deleted on. What is no error of the file's is about the packet.
func (d *plain) failure(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	var file *os.PathError
	if errors.Is(err, os.ErrClosed) || errors.As(err, &file) {
		if d.closed.Load() {
			return os.ErrClosed
		}
		return ErrDeviceDeleted
	}
	return errBadPacket
}
