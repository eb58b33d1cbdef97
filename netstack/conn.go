package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"ztun/proxy/grow"
)

// MaxWrite is the most bytes that leave in one super-packet. A Write of up to
// MaxWrite bytes makes one packet on a device with segmentation offload; longer
// ones are cut into equal parts.
const MaxWrite = 65024 // below gsoMaxSize less what gVisor sets aside for headers (161)

// moderateEvery is how many bytes are read between two looks at the size of the
// receive buffer.
const moderateEvery = 32 << 10

// Conn is an established TCP connection of a Stack: a net.Conn that can be
// half-closed, reset, and waited for without a buffer in hand. It has no
// goroutine and no buffer of its own. All methods may be called concurrently;
// reads are serialised among themselves, and so are writes.
type Conn struct {
	ep            *tcp.Endpoint
	h             *hop
	wq            waiter.Queue
	entry         waiter.Entry
	local, remote netip.AddrPort

	rd, wr half
	rest   atomic.Pointer[sleeper] // Rest's, until the wait for which it was meant
	in     sliceWriter             // of Read, guarded by rd.mu
	out    payload                 // of Write, guarded by wr.mu
	unseen int                     // bytes read since ModerateRecvBuf, guarded by rd.mu

	// failed is the errno that ended the connection, zero if none: gVisor
	// reports it once and then says end of file, which a relay must not take
	// for a clean end.
	failed atomic.Uint32
	closed atomic.Bool
	// onReset is OnReset's; nil when it was called.
	onReset atomic.Pointer[func(error)]
	// ended is set by CloseWrite.
	ended atomic.Bool

	mu     sync.Mutex
	pinned bool // WriteTo is handing out memory of the receive queue
	// purge is set if Close came while pinned: who pins frees the endpoint.
	purge bool

	prev, next *Conn // in connList
	// Of memory.go, guarded by connList.mu: its buffers were made small; how large the send buffer was while somebody
	// waits for room.
	squeezed bool
	full     int64
}

var (
	_ net.Conn             = (*Conn)(nil)
	_ io.WriterTo          = (*Conn)(nil)
	_ BufferWriter         = (*Conn)(nil)
	_ waiter.EventListener = (*listener)(nil)
)

// Keepalive towards the pod's kernel; the configured one goes for the network, and for this when it is shorter.
const (
	localKeepaliveIdle     = tcpip.KeepaliveIdleOption(30 * time.Second)
	localKeepaliveInterval = tcpip.KeepaliveIntervalOption(5 * time.Second)
	localKeepaliveCount    = 3
)

func newConn(h *hop, local, remote netip.AddrPort) *Conn {
	return &Conn{h: h, local: local, remote: remote}
}

// start takes over an established endpoint whose wait queue is c.wq.
func (c *Conn) start(ep *tcp.Endpoint) error {
	c.ep = ep
	so := ep.SocketOptions()
	idle, interval, count := tcpip.KeepaliveIdleOption(c.h.s.cfg.KeepaliveIdle),
		tcpip.KeepaliveIntervalOption(c.h.s.cfg.KeepaliveInterval), c.h.s.cfg.KeepaliveCount
	if !c.h.network {
		// The pod's kernel answers within microseconds or not at all, and it says RST once: when its queue towards
		// us drops that (a burst of closes), only a keepalive finds out that the connection is gone.
		idle, interval, count = min(idle, localKeepaliveIdle), min(interval, localKeepaliveInterval),
			min(count, localKeepaliveCount)
	}
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, count)
	so.SetKeepAlive(!c.h.network || !c.h.s.cfg.KeepaliveOff)
	if t := tcpip.TCPUserTimeoutOption(c.h.s.cfg.UserTimeout); c.h.network && t > 0 {
		ep.SetSockOpt(&t)
	}
	// One entry for the life of the connection: registering per wait would take
	// the queue's lock twice each time.
	c.entry.Init((*listener)(c), waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr|
		waiter.EventRdHUp)
	c.wq.EventRegister(&c.entry)
	if !c.h.s.conns.add(c) {
		c.closed.Store(true)
		ep.Abort()
		ep.Close()
		return c.opError("accept", net.ErrClosed)
	}
	c.h.fit(c.h.s.conns.len())
	return nil
}

// listener is a Conn as gVisor's wait queue sees it.
type listener Conn

// NotifyEvent is called with gVisor's locks held and only wakes.
func (l *listener) NotifyEvent(m waiter.EventMask) {
	if m&waiter.EventErr != 0 {
		(*Conn)(l).lost()
	}
	if m&^waiter.WritableEvents != 0 {
		l.rd.wake()
	}
	if m&^waiter.ReadableEvents != 0 {
		l.wr.wake()
	}
}

// OnReset has f called, at most once, when the connection is lost: by the peer's reset, an error of the network, or
// because nobody answers any more. A user who waits in a Write elsewhere would not learn of it otherwise. It is not
// called for what Close and Reset do. f must neither wait nor call the connection: locks are held.
func (c *Conn) OnReset(f func(error)) {
	c.onReset.Store(&f)
	c.lost() // perhaps already
}

// lost calls OnReset's function if the connection has failed.
func (c *Conn) lost() {
	switch state := c.ep.EndpointState(); {
	case c.closed.Load():
		return
	case state == tcp.StateError:
	case state == tcp.StateClose && !c.ended.Load():
		// A reset after the peer's FIN. With our own FIN before, it is what every connection comes to.
	default:
		return
	}
	if f := c.onReset.Swap(nil); f != nil {
		// What gVisor calls the failure can only be read with the locks that are held; Read or Write says it.
		(*f)(c.opError("read", os.NewSyscallError("read", syscall.ECONNRESET)))
	}
}

// readable waits until there is something to read: data, end of file or an
// error of the connection. rd.mu is held.
func (c *Conn) readable() error {
	if ok, err := c.readState(); ok || err != nil {
		return err
	}
	c.rd.arm()
	for {
		if ok, err := c.readState(); ok || err != nil {
			c.rd.disarm()
			return err
		}
		if r := c.rest.Swap(nil); r != nil {
			return c.leave(r)
		}
		c.rd.sleep()
	}
}

// leave ends a wait with r in its place. rd.mu is held.
func (c *Conn) leave(r *sleeper) error {
	c.rd.own = nil
	c.rd.armed.Store(r)
	// Look once more, lest the wake-up was before it.
	if ok, err := c.readState(); ok || err != nil {
		c.rd.wake()
	}
	return syscall.EAGAIN
}

// Rest sends the reader away: the wait for something to read that is under way, or the next one, ends with EAGAIN, and
// again is called once when there is something to read or a reason to read no more; now and then for nothing, by what
// is told late of bytes that were read. Nobody else may read until then. A wait that finds something does not end so.
// again must neither wait nor call the connection: locks are held.
func (c *Conn) Rest(again func()) {
	c.rest.Store(&sleeper{again: again})
	c.rd.wake()
}

func (c *Conn) readState() (ready bool, err error) {
	switch {
	case c.closed.Load():
		return false, net.ErrClosed
	case c.rd.expired():
		return false, os.ErrDeadlineExceeded
	}
	return c.ep.Readiness(waiter.ReadableEvents) != 0, nil
}

// WaitRead returns nil as soon as Read would not block: there is data, or end
// of file, or an error for Read to return. Its own errors are those of a closed
// connection and of the read deadline.
func (c *Conn) WaitRead() error {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	if err := c.readable(); err != nil {
		return c.opError("read", err)
	}
	return nil
}

// Readable reports whether Read would return at once: there is data, end of file, or an error.
func (c *Conn) Readable() bool {
	ready, err := c.readState()
	return ready || err != nil
}

// Buffered is how many bytes Read would return without waiting, 0 also at the end and after an error.
func (c *Conn) Buffered() int {
	n, terr := c.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return 0
	}
	return n
}

// Read implements net.Conn. io.EOF means that the peer has sent FIN; a reset is
// ECONNRESET, however often one asks.
func (c *Conn) Read(b []byte) (int, error) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	for {
		if err := c.readable(); err != nil {
			return 0, c.opError("read", err)
		}
		if len(b) == 0 {
			return 0, nil
		}
		c.in.b, c.in.n = b, 0
		terr := c.take(&c.in)
		c.in.b = nil
		if n := c.in.n; n > 0 {
			return n, nil
		}
		if err := c.readError(terr); err != nil {
			return 0, err
		}
	}
}

// take moves bytes out of the receive queue into w, and lets the receive window
// follow the reader's speed.
func (c *Conn) take(w io.Writer) tcpip.Error {
	r, terr := c.ep.Read(w, tcpip.ReadOptions{})
	if c.unseen += r.Count; c.unseen >= moderateEvery {
		c.ep.ModerateRecvBuf(c.unseen)
		c.unseen = 0
	}
	return terr
}

// readError translates the outcome of a read that brought nothing; nil means
// that it would block.
func (c *Conn) readError(terr tcpip.Error) error {
	switch terr.(type) {
	case nil, *tcpip.ErrWouldBlock, *tcpip.ErrBadBuffer:
		return nil
	}
	if c.closed.Load() {
		return c.opError("read", net.ErrClosed)
	}
	if _, ok := terr.(*tcpip.ErrClosedForReceive); ok {
		if e := syscall.Errno(c.failed.Load()); e != 0 {
			return c.opError("read", os.NewSyscallError("read", e))
		}
		if c.ep.EndpointState() != tcp.StateError {
			return io.EOF
		}
		terr = &tcpip.ErrConnectionReset{}
	}
	return c.fail("read", terr)
}

// fail remembers what ended the connection.
func (c *Conn) fail(op string, terr tcpip.Error) error {
	e := errnoOf(terr)
	if e != syscall.EPIPE {
		c.failed.CompareAndSwap(0, uint32(e))
	}
	return c.opError(op, os.NewSyscallError(op, e))
}

// Write implements net.Conn. It returns when everything is in the send queue,
// which holds Config.SendBuffer bytes or more.
func (c *Conn) Write(b []byte) (int, error) {
	grow.Stack()
	return c.write(b, nil, len(b))
}

// WriteBuffers implements BufferWriter: as one Write of all the pieces, whatever their sizes.
func (c *Conn) WriteBuffers(pieces [][]byte) (int64, error) {
	grow.Stack()
	if len(pieces) == 0 {
		return 0, nil
	}
	total := 0
	for _, p := range pieces {
		total += len(p)
	}
	n, err := c.write(pieces[0], pieces[1:], total)
	return int64(n), err
}

// write writes b and what follows it, total bytes.
func (c *Conn) write(b []byte, more [][]byte, total int) (int, error) {
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	if total == 0 {
		return 0, nil
	}
	parts := (total + MaxWrite - 1) / MaxWrite
	part := (total + parts - 1) / parts
	left := payload{b: b, more: more}
	done, armed := 0, false
	var err error
	for done < total {
		if c.closed.Load() {
			err = c.opError("write", net.ErrClosed)
			break
		}
		if c.wr.expired() {
			err = c.opError("write", os.ErrDeadlineExceeded)
			break
		}
		left.n = min(part, total-done)
		n, wait, terr := c.writeSome(left, armed)
		done += n
		left.skip(n)
		if terr != nil {
			err = c.writeError(terr)
			break
		}
		switch {
		case !wait:
		case armed:
			c.wr.sleep()
		default:
			// Look once more after arming, lest the wake-up was before it.
			c.wr.arm()
			armed = true
		}
	}
	if armed {
		c.wr.disarm()
	}
	return done, err
}

// writeSome writes what fits, and says whether to wait for room.
func (c *Conn) writeSome(p payload, armed bool) (n int, wait bool, terr tcpip.Error) {
	if tx := &c.h.port.pump.tx; tx.full.Load() {
		if !armed || tx.waitRoom(&c.wr) {
			return 0, true, nil
		}
	}
	c.out = p
	m, terr := c.ep.Write(&c.out, tcpip.WriteOptions{})
	c.out = payload{}
	if _, ok := terr.(*tcpip.ErrWouldBlock); ok {
		return int(m), true, nil
	}
	return int(m), false, terr
}

func (c *Conn) writeError(terr tcpip.Error) error {
	if c.closed.Load() {
		return c.opError("write", net.ErrClosed)
	}
	if _, ok := terr.(*tcpip.ErrClosedForSend); ok {
		if e := syscall.Errno(c.failed.Load()); e != 0 {
			return c.opError("write", os.NewSyscallError("write", e))
		}
	}
	return c.fail("write", terr)
}

// CloseWrite sends FIN after what is queued; reading goes on.
func (c *Conn) CloseWrite() error {
	grow.Stack()
	if c.closed.Load() {
		return c.opError("close", net.ErrClosed)
	}
	c.ended.Store(true)
	if terr := c.ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
		return c.opError("close", os.NewSyscallError("shutdown", errnoOf(terr)))
	}
	return nil
}

// SentEnd reports whether the peer has acknowledged all that was written, and our FIN, and has not ended its direction.
func (c *Conn) SentEnd() bool { return c.ep.EndpointState() == tcp.StateFinWait2 }

// Close ends the connection as a kernel socket does: with FIN after what is
// queued, but with RST if there is data that nobody has read.
func (c *Conn) Close() error { return c.close(false) }

// Reset aborts the connection: the peer gets a RST, what is queued is dropped.
func (c *Conn) Reset() error { return c.close(true) }

func (c *Conn) close(reset bool) error {
	grow.Stack()
	if c.closed.Swap(true) {
		return c.opError("close", net.ErrClosed)
	}
	c.h.s.conns.remove(c)
	c.h.fit(c.h.s.conns.len())
	c.mu.Lock()
	pinned := c.pinned
	c.purge = pinned
	for _, h := range []*half{&c.rd, &c.wr} {
		if h.timer != nil {
			h.timer.Stop()
		}
	}
	c.mu.Unlock()
	switch {
	case pinned:
		// Data lies unread, so this sends a RST and takes the endpoint out of
		// the stack, but leaves the receive queue alone, which is being read.
		c.ep.Shutdown(tcpip.ShutdownRead | tcpip.ShutdownWrite)
	case reset:
		c.ep.Abort()
		c.ep.Close()
	default:
		c.ep.Close()
	}
	c.rd.wake()
	c.wr.wake()
	return nil
}

// pin keeps the receive queue's memory alive until unpin.
func (c *Conn) pin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Load() {
		return false
	}
	c.pinned = true
	return true
}

func (c *Conn) unpin() {
	c.mu.Lock()
	c.pinned = false
	purge := c.purge
	c.mu.Unlock()
	if purge {
		c.ep.Close()
	}
}

// LocalAddr implements net.Conn: for an accepted flow what the client asked
// for, for DialApp the client's address.
func (c *Conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// LocalAddrPort is LocalAddr without an allocation.
func (c *Conn) LocalAddrPort() netip.AddrPort { return c.local }

// RemoteAddrPort is RemoteAddr without an allocation.
func (c *Conn) RemoteAddrPort() netip.AddrPort { return c.remote }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadline(t, &c.rd, &c.wr) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(t, &c.rd) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, &c.wr) }

func (c *Conn) setDeadline(t time.Time, hs ...*half) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Load() {
		return c.opError("set", net.ErrClosed)
	}
	for _, h := range hs {
		h.setDeadline(t)
	}
	return nil
}

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

var errShort = errors.New("buffer full")

// sliceWriter takes what fits.
type sliceWriter struct {
	b []byte
	n int
}

func (w *sliceWriter) Write(p []byte) (int, error) {
	n := copy(w.b[w.n:], p)
	w.n += n
	if n < len(p) {
		return n, errShort
	}
	return n, nil
}

// payload is a tcpip.Payloader over the next bytes of a write.
type payload struct {
	b    []byte
	more [][]byte // what follows b
	n    int      // at most so much
}

func (p *payload) Len() int { return p.n }

func (p *payload) Read(b []byte) (int, error) {
	if p.n == 0 {
		return 0, io.EOF
	}
	done := 0
	for done < len(b) && p.n > 0 {
		n := copy(b[done:], p.b[:min(p.n, len(p.b))])
		done += n
		p.n -= n
		p.skip(n)
	}
	return done, nil
}

// skip leaves n bytes out. What gVisor has taken may be less than it has read.
func (p *payload) skip(n int) {
	for n >= len(p.b) && len(p.more) > 0 {
		n -= len(p.b)
		p.b, p.more = p.more[0], p.more[1:]
	}
	p.b = p.b[n:]
}
