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
)

// txQueue is a device's transmit queue between gVisor, which fills it with an
// endpoint's lock held, and the device's writer goroutine.
type txQueue struct {
	mu     sync.Mutex
	q      []*stack.PacketBuffer
	bytes  int
	busy   bool // the writer is at work, or was told to
	closed bool
	// waiters for room are woken when the queue has fallen below half of txSoftBytes.
	waiters []*half
	full    atomic.Bool // bytes >= txSoftBytes, readable without the lock

	wake  chan struct{} // to the writer, capacity 1
	spare []*stack.PacketBuffer
	views [][]byte // the writer's

	packets, sent, dropped, errors atomic.Uint64
}

// push queues packets, taking a reference of each, and returns how many.
func (t *txQueue) push(pkts []*stack.PacketBuffer) int {
	n := 0
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
	wake := n > 0 && !t.busy
	if wake {
		t.busy = true
	}
	t.mu.Unlock()
	if wake {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
	if d := len(pkts) - n; d > 0 {
		t.dropped.Add(uint64(d))
	}
	return n
}

// drain writes until the queue is empty. Only the writer calls it.
func (t *txQueue) drain(dev tun.Device, gso bool) {
	for {
		t.mu.Lock()
		if len(t.q) == 0 {
			t.busy = false
			if cap(t.q) > 256 { // a burst's memory is not kept
				t.q, t.spare = nil, nil
			}
			t.mu.Unlock()
			return
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

// write writes one packet.
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

// idle reports whether nothing waits and the writer is at rest.
func (t *txQueue) idle() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.q) == 0 && !t.busy
}

// rawPacket wraps a packet that we built ourselves (ICMP errors).
func rawPacket(b []byte) *stack.PacketBuffer {
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
}
