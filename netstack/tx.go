package netstack

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/tun"
)

// Bounds of a device's transmit queue. Data is held back before it enters
// gVisor once softBytes wait (Conn.Write parks), so the hard bounds are only
// met by what acknowledgements release at once; beyond them packets are dropped
// and counted, and TCP repairs it.
const (
	txSoftBytes   = 1 << 20
	txHardBytes   = 16 << 20
	txHardPackets = 8192
	// drainBatch bounds how many packets a goroutine that came to write its own
	// data writes on behalf of others before it hands the rest to the writer.
	drainBatch = 16
)

// txQueue is a device's transmit queue. Whoever sets busy writes until the
// queue is empty: the writer goroutine, or a goroutine that has just put its
// own data there (then nobody needs to be woken). Never more than one at a
// time, never with an endpoint's lock held.
type txQueue struct {
	mu     sync.Mutex
	q      []*stack.PacketBuffer
	bytes  int
	busy   bool // someone writes, or the writer goroutine was told to
	users  int  // goroutines inside Conn.Write, which will drain after it
	closed bool
	// waiters for room are woken when the queue has fallen below half of softBytes.
	waiters []*half
	full    atomic.Bool // bytes >= txSoftBytes, readable without the lock

	wake  chan struct{} // to the writer goroutine, capacity 1
	spare []*stack.PacketBuffer

	// Owned by whoever holds busy.
	views [][]byte

	packets, sent, dropped, errors atomic.Uint64
}

// push queues packets, taking a reference of each, and returns how many.
func (t *txQueue) push(pkts []*stack.PacketBuffer) int {
	n, wake := 0, false
	t.mu.Lock()
	for _, p := range pkts {
		if t.closed || len(t.q) >= txHardPackets || t.bytes >= txHardBytes {
			break
		}
		t.q = append(t.q, p.IncRef())
		t.bytes += p.Size()
		n++
	}
	if t.bytes >= txSoftBytes {
		t.full.Store(true)
	}
	if n > 0 && !t.busy && t.users == 0 {
		t.busy, wake = true, true
	}
	t.mu.Unlock()
	if wake {
		t.wakeWriter()
	}
	if d := len(pkts) - n; d > 0 {
		t.dropped.Add(uint64(d))
	}
	return n
}

func (t *txQueue) wakeWriter() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// enter announces a goroutine that will put data in the queue and then leave.
func (t *txQueue) enter() {
	t.mu.Lock()
	t.users++
	t.mu.Unlock()
}

// leave writes what the caller has queued, unless someone is at it already.
func (t *txQueue) leave(dev tun.Device, gso bool) {
	t.mu.Lock()
	t.users--
	if t.busy || len(t.q) == 0 {
		t.mu.Unlock()
		return
	}
	t.busy = true
	t.mu.Unlock()
	if !t.drain(dev, gso, drainBatch) {
		t.wakeWriter() // busy stays set: it is the writer's now
	}
}

// drain writes until the queue is empty, and then gives busy up and returns
// true, or until limit packets are written (0 is no limit), and then returns
// false with busy still held.
func (t *txQueue) drain(dev tun.Device, gso bool, limit int) bool {
	written := 0
	for {
		t.mu.Lock()
		if len(t.q) == 0 {
			t.busy = false
			if cap(t.q) > 256 { // a burst's memory is not kept
				t.q = nil
			}
			t.mu.Unlock()
			return true
		}
		if limit > 0 && written >= limit {
			t.mu.Unlock()
			return false
		}
		batch := t.q
		t.q, t.spare = t.spare[:0], nil
		t.mu.Unlock()

		size := 0
		for i, p := range batch {
			size += p.Size()
			t.write(dev, gso, p)
			p.DecRef()
			batch[i] = nil
		}
		written += len(batch)

		t.mu.Lock()
		t.spare = batch[:0]
		t.bytes -= size
		var waiters []*half
		if t.bytes < txSoftBytes/2 {
			t.full.Store(false)
			waiters, t.waiters = t.waiters, nil
		}
		t.mu.Unlock()
		for _, w := range waiters {
			w.wake()
		}
	}
}

// waitRoom registers h to be woken when there is room, and reports false if
// there is some already.
func (t *txQueue) waitRoom(h *half) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.bytes < txSoftBytes {
		return false
	}
	for _, w := range t.waiters {
		if w == h {
			return true
		}
	}
	t.waiters = append(t.waiters, h)
	return true
}

// write writes one packet; the caller holds busy.
func (t *txQueue) write(dev tun.Device, gso bool, p *stack.PacketBuffer) {
	var h tun.VNetHdr
	if gso {
		fillVNetHdr(&h, p)
	}
	t.views = appendViews(t.views[:0], p)
	err := dev.WritePacket(&h, t.views)
	clear(t.views)
	t.packets.Add(1)
	if err != nil {
		t.errors.Add(1)
		return
	}
	t.sent.Add(uint64(p.Size()))
}

// appendViews lists the packet's bytes without copying them.
func appendViews(vs [][]byte, p *stack.PacketBuffer) [][]byte {
	list, skip := p.AsViewList()
	for v := list.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		vs = append(vs, b[skip:])
		skip = 0
	}
	return vs
}

// fillVNetHdr says what gVisor left to the device: the checksum of every
// segment of a GSO-capable endpoint, and segmentation beyond its MSS.
func fillVNetHdr(h *tun.VNetHdr, p *stack.PacketBuffer) {
	g := &p.GSOOptions
	if g.Type == stack.GSONone || !g.NeedsCsum {
		return
	}
	// The transport header starts after the network header that was pushed; its
	// real length rather than L3HdrLen, so that IP options could come to be used.
	ipLen := len(p.NetworkHeader().Slice())
	h.Flags = tun.FlagNeedsCSum
	h.CSumStart = uint16(ipLen)
	h.CSumOffset = g.CsumOffset
	hdrLen := ipLen + len(p.TransportHeader().Slice())
	if int(g.MSS) < p.Size()-hdrLen {
		h.HdrLen = uint16(hdrLen)
		h.GSOSize = g.MSS
		if g.Type == stack.GSOTCPv4 {
			h.GSOType = tun.GSOTCPv4
		} else {
			h.GSOType = tun.GSOTCPv6
		}
	}
}

// close refuses further packets, releases the waiting ones and wakes everyone.
// Only after the writer has ended.
func (t *txQueue) close() {
	t.mu.Lock()
	t.closed = true
	q, waiters := t.q, t.waiters
	t.q, t.waiters, t.bytes = nil, nil, 0
	t.full.Store(false)
	t.mu.Unlock()
	for _, p := range q {
		p.DecRef()
	}
	t.dropped.Add(uint64(len(q)))
	for _, w := range waiters {
		w.wake()
	}
}

// idle reports whether nothing waits and nobody writes.
func (t *txQueue) idle() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.q) == 0 && !t.busy
}

// rawPacket wraps a packet that we built ourselves (ICMP errors).
func rawPacket(b []byte) *stack.PacketBuffer {
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
}
