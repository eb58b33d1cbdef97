package hbone

import (
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How long a connection is listened to after our last byte.
const (
	partingStep  = 500 * time.Millisecond // between looks at what the peer has yet to acknowledge
	partingStall = 5 * time.Second        // without progress
	partingMax   = time.Minute            // in all
	partingHurry = time.Second            // in all, when somebody waits for the end
)

// parting is the end of a connection in good order. Closing a socket resets it when the peer sends once more, and a
// peer that takes what we wrote sends WINDOW_UPDATE: the reset would overtake the last megabytes of a stream that
// ended well, and our GOAWAY with them. So we end our side only, and throw away what comes until the peer ends its
// own, or has acknowledged everything (Linux keeps acknowledged bytes readable after a reset). conn.mu guards it.
type parting struct {
	on       atomic.Bool // our side has ended: the reader throws everything away
	hurried  bool
	brief    bool // the peer has flooded us: the first look comes early
	end      time.Time
	progress time.Time
	unacked  int
}

// start ends our side; false if that cannot be done, and the connection has to be closed.
func (p *parting) start(raw net.Conn) bool {
	w, ok := raw.(interface{ CloseWrite() error })
	if !ok || w.CloseWrite() != nil {
		return false
	}
	now := time.Now()
	p.progress, p.end = now, now.Add(partingMax)
	if p.hurried {
		p.end = now.Add(partingHurry)
	}
	p.unacked, _ = unacknowledged(raw) // 0 of what cannot tell: then there is nothing to wait for
	p.on.Store(true)
	step := partingStep
	if p.brief {
		step /= 10
	}
	raw.SetReadDeadline(now.Add(step))
	return true
}

// hurry is for an end that somebody waits for.
func (p *parting) hurry() {
	p.hurried = true
	if end := time.Now().Add(partingHurry); p.on.Load() && end.Before(p.end) {
		p.end = end
	}
}

// more decides at a deadline whether to go on listening, and for how long.
func (p *parting) more(raw net.Conn, now time.Time) bool {
	left, _ := unacknowledged(raw)
	if left < p.unacked {
		p.progress = now
	}
	p.unacked = left
	if left == 0 || now.After(p.end) || now.Sub(p.progress) > partingStall {
		return false
	}
	raw.SetReadDeadline(now.Add(partingStep))
	return true
}

// listenOn is the reader's question at its deadline.
func (c *conn) listenOn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.parting.on.Load() && !c.ended && c.parting.more(c.raw, time.Now())
}

// unacknowledged is the number of bytes that the peer's kernel has yet to acknowledge, our FIN as one of them
// (SIOCOUTQ, tcp(7)); 0 and false where that cannot be told, as of what is no socket.
func unacknowledged(c net.Conn) (n int, ok bool) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, false
	}
	cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n, cerr == nil && err == nil
}
