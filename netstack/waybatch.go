package netstack

import (
	"ztun/tun"
)

const (
	// maxSegments is how many datagrams a kernel takes as one (UDP_MAX_SEGMENTS; 128 since Linux 6.9).
	maxSegments = 64
	// maxBatch is what they may be together: with the largest header still a packet.
	maxBatch = tun.MaxPacket - 48
)

// wayBatch is a datagram of the pod's that waits, while the device has more to be read at once, for others that can
// leave with it: of one size, from one socket to one peer. It is the reader's alone. Nothing waits for what is not
// there yet, and nothing but the next of its kind is read before it leaves, so that order stays and a stream of
// something else does not hold it back.
type wayBatch struct {
	first Datagram // without its payload
	buf   []byte   // the payloads
	n     int      // how many; 0: none waits
	grew  bool     // by the last packet
}

// add takes a datagram; false: it is not of the kind.
func (b *wayBatch) add(d *Datagram) bool {
	size := len(d.Payload)
	switch f := &b.first; {
	case d.Echo || d.Segment != 0 || size == 0:
		return false
	case b.n == 0:
		if b.buf == nil {
			b.buf = make([]byte, 0, maxBatch)
		}
		*f = *d
		f.Payload, f.Segment = nil, size
	case d.Pod != f.Pod || d.Peer != f.Peer || d.TTL != f.TTL || d.DF != f.DF,
		size > f.Segment, len(b.buf) != b.n*f.Segment, // behind a shorter one nothing comes
		b.n == maxSegments, len(b.buf)+size > maxBatch:
		return false
	}
	b.buf = append(b.buf, d.Payload...)
	b.n++
	b.grew = true
	return true
}

// leaves gives a datagram to the Way, or lets it wait for others.
func (d *datagrams) leaves(out *Datagram) {
	d.outPackets.Add(1)
	d.outBytes.Add(uint64(len(out.Payload)))
	if d.s.pump.batching != nil {
		if d.batch.add(out) {
			return
		}
		if d.flush(); d.batch.add(out) {
			return
		}
	}
	d.send(out, 1)
}

// flush sends what waits.
func (d *datagrams) flush() {
	b := &d.batch
	if b.n == 0 {
		return
	}
	out, n := b.first, b.n
	out.Payload = b.buf
	if n == 1 {
		out.Segment = 0
	}
	b.n, b.buf, b.grew = 0, b.buf[:0], false
	d.send(&out, n)
}

// send gives the Way what are n datagrams.
func (d *datagrams) send(out *Datagram, n int) {
	if d.o.Way.Send(*out) != nil {
		d.full.Add(uint64(n))
	}
}

// next reads a packet. What waits for company is sent before the reader waits, or turns to something else.
func (p *pump) next(vh *tun.VNetHdr, bufs [][]byte) (int, error) {
	if d := p.batching; d != nil && d.batch.n > 0 {
		if d.batch.grew {
			d.batch.grew = false
			if n, err := p.try.TryReadPacket(vh, bufs); err != tun.ErrNothing {
				return n, err
			}
		}
		d.flush()
	}
	return p.dev.ReadPacket(vh, bufs)
}
