package hbone

import (
	"sync"
	"sync/atomic"
)

// Sizes, all in bytes.
const (
	headLen   = 9        // a frame header (RFC 9113, 4.1)
	spareLen  = 1        // the byte after a frame, where sealing puts the record's content type for a moment
	recordLen = 16 << 10 // plaintext of a full TLS record (RFC 8446, 5.1)

	blockSmall = 4 << 10   // for received pieces that are not worth pinning a large block for
	blockDense = 16 << 10  // the same when a connection has pinned too much
	blockLarge = 128 << 10 // what is read and decrypted at a time
	wireLen    = 132 << 10 // ciphertext read at a time: eight full records and a bit

	// fillRoom is the least room that a transport is given to decrypt into.
	fillRoom = recordLen + 256
)

// bulkLen is the payload of a full frame, and what WriteTo hands out at a time: what fits into one TCP super-packet
// of an IPv6 connection with room for options (netstack.MaxWrite). A little more would leave as two packets, the
// second one tiny, and cost the receiving application's kernel twice the work.
const bulkLen = 65024

// frameLens are the sizes of send buffers with the frame header: what a stream gets grows with what it carries.
var frameLens = [...]int{4 << 10, 16 << 10, headLen + bulkLen}

// Buffers recycles the buffers of any number of connections. The zero value is ready; nil is not allowed.
// Nothing is held for idle connections or streams: a buffer is taken when there are bytes for it.
type Buffers struct {
	frames [len(frameLens)]sync.Pool // *frame
	small  sync.Pool                 // *block
	dense  sync.Pool                 // *block
	large  sync.Pool                 // *block
	wires  sync.Pool                 // *[]byte
	outs   sync.Pool                 // *[]byte
}

// frame is one DATA frame on its way out: room for the header, the payload, one spare byte.
type frame struct {
	buf      []byte
	off, end int // the payload that was not emitted yet is buf[off:end]; off >= headLen
	class    uint8
	// A frame may go out in parts (window, the peer's frame size). While the flusher works on a part, whoever drops
	// the rest must leave the release to it. Guarded by conn.mu.
	sealing, dropped bool
}

func (b *Buffers) frame(class uint8) *frame {
	f, _ := b.frames[class].Get().(*frame)
	if f == nil {
		f = &frame{buf: make([]byte, frameLens[class]+spareLen), class: class}
	}
	f.off, f.end = headLen, headLen
	f.sealing, f.dropped = false, false
	return f
}

func (b *Buffers) putFrame(f *frame) { b.frames[f.class].Put(f) }

// room is where further payload goes.
func (f *frame) room() []byte { return f.buf[f.end : len(f.buf)-spareLen] }

// block is received plaintext, shared by the reader, which fills it, and the chunks that point into it.
type block struct {
	refs   atomic.Int32
	b      []byte
	pool   *sync.Pool
	pinned *atomic.Int64 // large blocks of a connection that are in use
}

func (b *Buffers) block(size int) *block {
	pool := &b.small
	switch size {
	case blockDense:
		pool = &b.dense
	case blockLarge:
		pool = &b.large
	}
	k, _ := pool.Get().(*block)
	if k == nil {
		k = &block{b: make([]byte, size), pool: pool}
	}
	k.refs.Store(1)
	return k
}

func (k *block) ref() { k.refs.Add(1) }

func (k *block) release() {
	switch n := k.refs.Add(-1); {
	case n == 0:
		if k.pinned != nil {
			k.pinned.Add(-1)
			k.pinned = nil
		}
		k.pool.Put(k)
	case n < 0:
		panic("hbone: block released too often") // our own mistake, never the peer's
	}
}

func (b *Buffers) wire() *[]byte {
	p, _ := b.wires.Get().(*[]byte)
	if p == nil {
		s := make([]byte, wireLen)
		p = &s
	}
	return p
}

func (b *Buffers) putWire(p *[]byte) { b.wires.Put(p) }

// out is an empty buffer for what goes to the socket, with the given capacity or more.
func (b *Buffers) out(capacity int) *[]byte {
	p, _ := b.outs.Get().(*[]byte)
	if p == nil || cap(*p) < capacity {
		s := make([]byte, 0, capacity)
		p = &s
	}
	return p
}

func (b *Buffers) putOut(p *[]byte) {
	if cap(*p) <= 1<<20 { // an unusually long queue of control frames is not kept
		*p = (*p)[:0]
		b.outs.Put(p)
	}
}
