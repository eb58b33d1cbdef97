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
	lingerStep  = 500 * time.Millisecond // between looks at what the peer has yet to acknowledge
	lingerStall = 5 * time.Second        // without progress
	lingerMax   = time.Minute            // in all
	lingerHurry = time.Second            // in all, when somebody waits for the end
)

// linger is the end of a connection in good order. Closing a socket resets it when the peer sends once more, and a
// peer that takes what we wrote sends WINDOW_UPDATE: the reset would overtake the last megabytes of a stream that
// ended well, and our GOAWAY with them. So we end our side only, and throw away what comes until the peer ends its
// own, or has acknowledged everything (Linux keeps acknowledged bytes readable after a reset). conn.mu guards it.
type linger struct {
	on       atomic.Bool // our side has ended: the reader throws everything away
	hurried  bool
	brief    bool // the peer has flooded us: the first look comes early
	end      time.Time
	progress time.Time
	unacked  int
}

// start ends our side; false if that cannot be done, and the connection has to be closed.
func (l *linger) start(raw net.Conn) bool {
	half, ok := raw.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return false
	}
	now := time.Now()
	l.progress, l.end = now, now.Add(lingerMax)
	if l.hurried {
		l.end = now.Add(lingerHurry)
	}
	l.unacked = unacknowledged(raw)
	l.on.Store(true)
	step := lingerStep
	if l.brief {
		step /= 10
	}
	raw.SetReadDeadline(now.Add(step))
	return true
}

// hurry is for an end that somebody waits for.
func (l *linger) hurry() {
	l.hurried = true
	if end := time.Now().Add(lingerHurry); l.on.Load() && end.Before(l.end) {
		l.end = end
	}
}

// more decides at a deadline whether to go on listening, and for how long.
func (l *linger) more(raw net.Conn, now time.Time) bool {
	left := unacknowledged(raw)
	if left < l.unacked {
		l.progress = now
	}
	l.unacked = left
	if left == 0 || now.After(l.end) || now.Sub(l.progress) > lingerStall {
		return false
	}
	raw.SetReadDeadline(now.Add(lingerStep))
	return true
}

// listenOn is the reader's question at its deadline.
func (c *conn) listenOn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.linger.on.Load() && !c.ended && c.linger.more(c.raw, time.Now())
}

// unacknowledged is the number of bytes that the peer's kernel has yet to acknowledge; 0 for what is no socket.
func unacknowledged(c net.Conn) (n int) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0
	}
	// An error leaves 0: then there is nothing to wait for.
	_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n
}
