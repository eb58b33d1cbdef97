package capture

import (
	"sync"
	"time"
)

// Captured is a packet on its way to who writes it.
type Captured struct {
	At     time.Time
	Sent   bool // by the interface's own side
	Data   []byte
	Length int // on the wire
	Packet
}

// Queue is between the data path, which must not wait, and who writes: a packet that does not fit is dropped, and
// counted.
type Queue struct {
	want  Filter
	snap  int
	limit int // bytes

	mu      sync.Mutex
	list    []Captured
	bytes   int
	dropped uint64
	wake    chan struct{} // capacity 1: there is something
}

// NewQueue makes one for packets that want asks for, up to snap bytes of each, of limit bytes in all.
func NewQueue(want Filter, snap, limit int) *Queue {
	return &Queue{want: want, snap: snap, limit: limit, wake: make(chan struct{}, 1)}
}

// headBytes are enough to see what a packet is.
const headBytes = 128

// See takes a packet from the data path. (A looker of tun.Tap.)
func (q *Queue) See(sent bool, bufs [][]byte, n int) {
	var first [headBytes]byte
	p, ok := Parse(first[:gather(first[:], bufs, n)])
	if !ok || !q.want(p) {
		return
	}
	size := min(n, q.snap)
	q.mu.Lock()
	if q.bytes+size+overhead > q.limit {
		q.dropped++
		q.mu.Unlock()
		return
	}
	q.bytes += size + overhead
	q.mu.Unlock()
	c := Captured{At: time.Now(), Sent: sent, Data: make([]byte, size), Length: n, Packet: p}
	gather(c.Data, bufs, n)
	q.mu.Lock()
	q.list = append(q.list, c)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// overhead is what a packet costs beside its bytes.
const overhead = 160

// gather copies the first bytes of a packet of n bytes to dst.
func gather(dst []byte, bufs [][]byte, n int) (copied int) {
	for _, b := range bufs {
		if copied >= min(n, len(dst)) {
			break
		}
		copied += copy(dst[copied:min(n, len(dst))], b)
	}
	return copied
}

// Wake is readable when there may be something to Take.
func (q *Queue) Wake() <-chan struct{} { return q.wake }

// Take returns what has come, in order, nil if nothing has.
func (q *Queue) Take() []Captured {
	q.mu.Lock()
	defer q.mu.Unlock()
	list := q.list
	q.list = nil
	return list
}

// Give returns the room of a packet that was taken.
func (q *Queue) Give(c *Captured) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.bytes -= len(c.Data) + overhead
}

// Dropped is how many packets did not fit.
func (q *Queue) Dropped() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped
}
