package tun

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIOVec is the kernel's UIO_MAXIOV.
const maxIOVec = 1024

// fast is the device with virtio headers and super-packets.
type fast struct {
	*handle
	off    Offload
	file   *os.File
	rc     syscall.RawConn
	closed atomic.Bool

	rd, wr  vector
	writing sync.Mutex // held by who uses wr
	spare   sync.Pool  // of *vector, for those who write while another does

	badHeaders, short atomic.Uint64
}

// vector is one system call: everything that it needs, made once. The reader has its own, and so has each of those who
// write at the same time: nobody waits for another's copying.
type vector struct {
	call  func(fd uintptr) bool // rd.read or wr.write, bound once: a method value made per call would allocate
	once  func(fd uintptr)      // of writers: the same without waiting, which several may do at a time
	iov   []unix.Iovec          // header, then the caller's buffers; for reads, then spill
	hdr   [VNetHdrLen]byte
	spill [1]byte // what does not fit the caller's buffers begins here
	try   bool    // do not wait: EAGAIN is a result
	n     int     // the system call's results
	errno syscall.Errno
}

func newFast(h *handle, off Offload) (*fast, error) {
	// The file must be attached and nonblocking before it meets the poller: an unattached one reports an error event and
	// is never polled again.
	d := &fast{handle: h, off: off, file: os.NewFile(uintptr(h.fd), clonePath)}
	h.fd = -1 // the file owns it now
	rc, err := d.file.SyscallConn()
	if err != nil {
		d.file.Close()
		return nil, err
	}
	d.rc = rc
	d.rd.call, d.wr.call, d.wr.once = d.rd.read, d.wr.write, d.wr.tryWrite
	d.rd.iov, d.wr.iov = make([]unix.Iovec, 0, 16), make([]unix.Iovec, 0, 32)
	d.spare.New = func() any {
		v := &vector{iov: make([]unix.Iovec, 0, 4)}
		v.call, v.once = v.write, v.tryWrite
		return v
	}
	return d, nil
}

// Offload implements Device.
func (d *fast) Offload() Offload { return d.off }

// Stats implements StatsReader.
func (d *fast) Stats() Stats {
	return Stats{BadHeaders: d.badHeaders.Load(), ShortBuffers: d.short.Load()}
}

// ReadPacket implements Device.
func (d *fast) ReadPacket(h *VNetHdr, bufs [][]byte) (int, error) {
	return d.readPacket(h, bufs, false)
}

// TryReadPacket implements TryReader.
func (d *fast) TryReadPacket(h *VNetHdr, bufs [][]byte) (int, error) {
	return d.readPacket(h, bufs, true)
}

func (d *fast) readPacket(h *VNetHdr, bufs [][]byte, try bool) (int, error) {
	v := &d.rd
	v.try = try
	room, ok := v.load(bufs)
	if !ok {
		return 0, ErrTooManyBuffers
	}
	v.add(v.spill[:])
	defer v.unload()
	for {
		if d.rc.Read(v.call) != nil {
			return 0, d.refused()
		}
		if v.errno == unix.EAGAIN {
			return 0, ErrNothing
		}
		if v.errno != 0 {
			return 0, d.errno(v.errno)
		}
		n := v.n - VNetHdrLen
		if n > room {
			d.short.Add(1)
			return 0, ErrShortBuffer
		}
		// Neither happens with a sane kernel; a packet that we cannot describe is better lost than passed on.
		if n <= 0 || h.Decode(v.hdr[:]) != nil || h.Fix(n, bufs) != nil || h.Validate(n) != nil {
			d.badHeaders.Add(1)
			continue
		}
		return n, nil
	}
}

// WritePacket implements Device.
func (d *fast) WritePacket(h *VNetHdr, bufs [][]byte) error {
	if d.writing.TryLock() {
		defer d.writing.Unlock()
		return d.writePacket(&d.wr, h, bufs)
	}
	v := d.spare.Get().(*vector)
	defer d.spare.Put(v)
	return d.writePacket(v, h, bufs)
}

func (d *fast) writePacket(v *vector, h *VNetHdr, bufs [][]byte) error {
	h.Encode(v.hdr[:])
	if _, ok := v.load(bufs); !ok {
		return ErrTooManyBuffers
	}
	defer v.unload()
	if d.rc.Control(v.once) != nil {
		return d.refused()
	}
	if v.errno == unix.EAGAIN && d.rc.Write(v.call) != nil { // one at a time
		return d.refused()
	}
	if v.errno != 0 {
		return d.errno(v.errno)
	}
	return nil
}

// SetMTU implements Device.
func (d *fast) SetMTU(mtu int) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	return d.handle.SetMTU(mtu)
}

// Close implements Device.
func (d *fast) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	d.handle.close()
	// It returns when no call is under way any more, so that afterwards the interface is gone.
	return d.file.Close()
}

// refused says why the poller made no call: we closed the file, or it reports an error event, as it does from when the
// device is deleted on.
func (d *fast) refused() error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	return ErrDeviceDeleted
}

// errno turns a system call's errno into what Device promises. An Errno becomes an error without allocating, since
// all are below 256.
func (d *fast) errno(e syscall.Errno) error {
	if e == unix.EBADFD {
		return ErrDeviceDeleted
	}
	return e
}

// load points the vector at the header and bufs, and returns the bytes that bufs hold together.
func (v *vector) load(bufs [][]byte) (room int, ok bool) {
	if len(bufs) > maxIOVec-2 {
		return 0, false
	}
	v.iov = v.iov[:0]
	v.add(v.hdr[:])
	for _, b := range bufs {
		if len(b) > 0 {
			v.add(b)
			room += len(b)
		}
	}
	return room, true
}

func (v *vector) add(b []byte) {
	e := unix.Iovec{Base: unsafe.SliceData(b)}
	e.SetLen(len(b))
	v.iov = append(v.iov, e)
}

// unload forgets the caller's buffers, which would otherwise stay reachable until the next packet.
func (v *vector) unload() { clear(v.iov) }

// read and write are what the poller calls: false means "not ready, wait".
func (v *vector) read(fd uintptr) bool  { return v.do(unix.SYS_READV, fd) }
func (v *vector) write(fd uintptr) bool { return v.do(unix.SYS_WRITEV, fd) }

func (v *vector) tryWrite(fd uintptr) {
	v.try = true
	v.do(unix.SYS_WRITEV, fd)
	v.try = false
}

// do makes the call without telling the scheduler: the file is non-blocking, so the call takes as long as the copying
// does, and handing this thread's processor to another thread meanwhile costs more wake-ups than it wins (10 to 15 %
// of a relay's CPU with 8 streams, measured 2026-11-23).
func (v *vector) do(trap, fd uintptr) bool {
	for {
		n, _, errno := unix.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(v.iov))), uintptr(len(v.iov)))
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if !v.try {
				return false
			}
		}
		v.n, v.errno = int(n), errno
		return true
	}
}
