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

	// txDatagrams bounds the datagrams that wait, which nobody can hold back, beside what holds connections back: a
	// flood of datagrams does not keep them waiting. It is shared as switches share their memory: a pod may have as much
	// as is free, so one that floods has half, two a third each, and the next one always finds room. A megabyte is the
	// 80 ms at 100 Mbit/s that a busy machine may let the writer wait, and 1 ms of a TUN's throughput for who comes
	// behind it. txPacketCost is what a packet counts beside its bytes: of the smallest there are 6,600 at most.
	txDatagrams  = 2 << 20
	txPacketCost = 256
)

// txShare is what one pod's datagrams have waiting in a queue, whose lock guards it.
type txShare struct{ bytes int }

// txItem is a packet that waits. One that is forwarded is a share's and has a header of its own; gVisor's have
// neither.
type txItem struct {
	pkt   *stack.PacketBuffer
	ports uint32 // of mergePorts
	first bool   // of firstAck
	share *txShare
	cost  int // of the share
	vh    tun.VNetHdr
}

// txQueue is a device's transmit queue between gVisor, which fills it with an
// endpoint's lock held, and the device's writer goroutine.
type txQueue struct {
	mu     sync.Mutex
	q      []txItem
	bytes  int  // without the datagrams
	shared int  // what the shares have
	busy   bool // the writer is at work, or was told to
	closed bool
	// waiters for room are woken when the queue has fallen below half of txSoftBytes.
	waiters []*half
	full    atomic.Bool // bytes >= txSoftBytes, readable without the lock
	acks    *[ackFlows]lastAck

	wake  chan struct{} // to the writer, capacity 1
	spare []txItem
	// views and vh are the writer's. The header lies here as a device may keep its address: it would be an object for
	// each packet.
	views [][]byte
	vh    tun.VNetHdr

	packets, sent, dropped, errors, merged atomic.Uint64
}

// push queues packets, taking a reference of each, and returns how many.
func (t *txQueue) push(pkts []*stack.PacketBuffer) int {
	n, merged := 0, 0
	t.mu.Lock()
	for _, p := range pkts {
		if t.closed || len(t.q) >= txHardPackets || t.bytes >= txHardBytes {
			break
		}
		n++
		ports, first := mergePorts(p), t.firstAck(p)
		if ports != 0 && t.merge(p, ports, first) {
			merged++
			continue
		}
		t.q = append(t.q, txItem{pkt: p.IncRef(), ports: ports, first: first})
		t.bytes += p.Size()
	}
	if t.bytes >= txSoftBytes {
		t.full.Store(true)
	}
	t.unlockAndWake(n > 0)
	if merged > 0 {
		t.merged.Add(uint64(merged))
	}
	if d := len(pkts) - n; d > 0 {
		t.dropped.Add(uint64(d))
	}
	return n
}

// forward queues a datagram on account of a share, and consumes the caller's reference; false: there is no room for it.
func (t *txQueue) forward(pkt *stack.PacketBuffer, vh *tun.VNetHdr, share *txShare) bool {
	cost := pkt.Size() + txPacketCost
	t.mu.Lock()
	if t.closed || len(t.q) >= txHardPackets || share.bytes+cost > txDatagrams-t.shared {
		t.mu.Unlock()
		pkt.DecRef()
		return false
	}
	t.q = append(t.q, txItem{pkt: pkt, share: share, cost: cost, vh: *vh})
	t.shared += cost
	share.bytes += cost
	t.unlockAndWake(true)
	return true
}

// writeNow writes a datagram from views, its headers and its payload, at once, if nobody else writes and nothing waits;
// false: it is to be queued. A device waits for nobody, and to hand it to the writer would cost more than writing it.
func (t *txQueue) writeNow(dev tun.Device, h *tun.VNetHdr, head, payload []byte) bool {
	t.mu.Lock()
	if t.busy || t.closed || len(t.q) > 0 {
		t.mu.Unlock()
		return false
	}
	t.busy = true // we are the writer
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.busy = false
		t.unlockAndWake(len(t.q) > 0)
	}()
	t.views = append(t.views[:0], head, payload)
	t.writeViews(dev, h, len(head)+len(payload), true)
	return true
}

// unlockAndWake lets go of the lock and wakes the writer if there is something new that it has not been told of.
func (t *txQueue) unlockAndWake(news bool) {
	wake := news && !t.busy
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

		size, shared := 0, false
		for i := range batch {
			if batch[i].share == nil {
				size += batch[i].pkt.Size()
			} else {
				shared = true
			}
			t.write(dev, gso, &batch[i])
			batch[i].pkt.DecRef()
			batch[i].pkt = nil
		}

		t.mu.Lock()
		t.bytes -= size
		for i := range batch {
			if b := &batch[i]; shared && b.share != nil {
				t.shared -= b.cost
				b.share.bytes -= b.cost
				b.share = nil
			}
		}
		t.spare = batch[:0]
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
func (t *txQueue) write(dev tun.Device, gso bool, i *txItem) {
	p, h := i.pkt, &t.vh
	*h = i.vh
	if gso && i.share == nil {
		fillVNetHdr(h, p)
	}
	t.views = appendViews(t.views[:0], p)
	t.writeViews(dev, h, p.Size(), i.share != nil)
}

// writeViews writes the packet of so many bytes that lies in t.views.
func (t *txQueue) writeViews(dev tun.Device, h *tun.VNetHdr, size int, forwarded bool) {
	var err error
	if forwarded && !takes(dev.Offload(), h) {
		err = writeFinished(dev, h, t.views)
	} else {
		err = dev.WritePacket(h, t.views)
	}
	clear(t.views)
	t.wrote(err, size)
}

// wrote counts a packet of so many bytes that a device has taken, or not.
func (t *txQueue) wrote(err error, size int) {
	t.packets.Add(1)
	if err != nil {
		t.errors.Add(1)
		return
	}
	t.sent.Add(uint64(size))
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
	for _, i := range q {
		i.pkt.DecRef()
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
