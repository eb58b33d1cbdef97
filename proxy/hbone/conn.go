package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"ztun/proxy/fair"
	"ztun/proxy/rescue"
)

// maxQueuedReplies bounds what a peer can make us queue (acknowledgements, RST_STREAMs) without reading it.
const maxQueuedReplies = 1000

// conn is one HTTP/2 connection, of either side. Three parties work on it:
//   - the reader goroutine (read.go) takes frames in and never writes to the socket;
//   - whoever has something to send becomes the flusher for a while if there is none (write.go);
//   - streams' users, who consume what the reader queued (recv.go) and give credit back.
//
// mu guards everything of the connection and the sending sides of its streams; it is never held during I/O.
type conn struct {
	cfg     Config
	client  bool
	nc      net.Conn    // what is closed in the end
	raw     net.Conn    // the socket beneath TLS
	sock    io.Writer   // writes to raw
	brief   *sockWriter // sock, if it can write without waiting; else nil
	tr      transport
	inline  bool // stream users may write to the socket themselves (a write can be interrupted without harm)
	bufs    *Buffers
	log     *slog.Logger
	done    chan struct{}  // closed when the connection has ended
	work    sync.WaitGroup // the reader, flushers, handlers
	handler func(*Stream, *request)
	onEnd   func() // the connection takes no streams any more; called with mu held (the pool listens)

	pinned   atomic.Int64  // large blocks in use
	unread   fair.Account  // payload bytes received and not consumed
	withheld atomic.Int64  // of unread: bytes for which the connection's window is given back when they are consumed
	uncredit atomic.Int64  // consumed bytes whose credit was not given back yet
	arrived  atomic.Uint64 // counts reads from the socket; PING looks whether anything came at all

	mu      sync.Mutex
	started bool
	err     error // why the connection ended or is ending
	ended   bool  // done is closed
	streams map[uint32]*Stream
	nextID  uint32 // client: of the next stream
	lastID  uint32 // server: highest id that the peer opened
	// flushAlone is the goroutine that flushes where no user does; made once.
	flushAlone func()
	// flushBriefly and crashes are flushRound and crash; made once.
	flushBriefly func()
	crashes      func(error)
	running      atomic.Int64 // server: handlers under way

	// Sending (write.go).
	ctrl       []byte // encoded control frames, in order, not flushed yet
	spareCtrl  []byte
	framer     *http2.Framer // writes to ctrl
	henc       *hpack.Encoder
	hbuf       bytes.Buffer
	replies    int // of ctrl: frames that the peer provoked
	ownResets  int // client, of ctrl: RST_STREAMs of streams that our users gave up
	flushing   bool
	flusher    *Stream // whose goroutine flushes, if it is a stream's user
	light      streamList
	bulk       streamList
	starved    streamList // have data and stream window, but the connection's window is used up
	plan       []emission
	scratch    []byte
	carry      []byte  // sealed bytes that an interrupted write left
	carryBuf   *[]byte // the pooled buffer of carry
	sendWin    int64
	sendTop    int64        // the largest sendWin so far
	lowSince   atomic.Int64 // since when less than half of sendTop is left; 0: it is not. Unix ns
	last       bool         // close the socket when everything is flushed
	said       bool         // that was done
	readerGone bool
	parting    parting // how long the reader still listens after our last byte
	broken     error   // a write to the socket failed with this

	// What the peer told us.
	peerInitial   int64
	peerMaxFrame  int
	peerMaxStream uint32
	gotSettings   bool
	acked         bool   // the peer knows our SETTINGS
	goneAway      bool   // the peer said GOAWAY
	goneWell      bool   // with NO_ERROR
	goAwayLast    uint32 // and this was the last stream that it deals with
	leaving       bool   // we said GOAWAY, or are about to
	leftAt        uint32 // server: streams above this are refused
	drainPing     bool   // the PING of a graceful GOAWAY is under way
	drainTimer    *time.Timer
	drainWanted   bool // GoAway came before Serve

	// Receiving (window.go).
	recvWin int64 // what the peer may still send on the connection
	grown   int64 // by how much streams' windows exceed the least one, together
	first   int64 // of new streams
	crowded bool  // the peer was told so
	acks    int   // of our SETTINGS

	ping   pinger
	probed time.Time // when probe last asked
	// What the peer may send that serves nothing (limits.go). nuisances is the reader's alone.
	refusals  bucket
	resets    bucket
	nuisances bucket
	updates   int
	late      int64
	gone      goneStreams

	rd reader
}

func newConn(nc net.Conn, cfg Config, client bool) *conn {
	cfg = cfg.withDefaults(client)
	c := &conn{
		cfg: cfg, client: client, nc: nc, raw: nc, bufs: cfg.Buffers, log: cfg.Logger,
		done:    make(chan struct{}),
		streams: make(map[uint32]*Stream), nextID: 1,
		sendWin: 65535, sendTop: 65535, peerInitial: 65535, peerMaxFrame: 16384, peerMaxStream: 1<<32 - 1,
		recvWin: int64(cfg.ConnWindow), first: int64(cfg.StreamWindow), leftAt: 1<<32 - 1,
		refusals:  newBucket(refusalBurst, refusalsPerSecond),
		resets:    newBucket(cfg.Resets, float64(cfg.Resets)/4),
		nuisances: newBucket(cfg.ControlFrames, float64(cfg.ControlFrames)/10),
	}
	if t, ok := nc.(*tlsConn); ok && t.rec != nil {
		t.rec.adopt(c.bufs)
		c.tr, c.raw, c.inline = t.rec, t.raw, true
	} else {
		c.tr = plain{newWire(nc, c.bufs)}
		_, c.inline = nc.(*net.TCPConn)
	}
	c.flushAlone = cfg.Panics.Func("an HBONE writer", func() {
		defer c.work.Done()
		c.mu.Lock()
		c.flush(nil)
	}, c.crash)
	c.flushBriefly, c.crashes = c.flushRound, c.crash
	setNotSentLowat(c.raw, cfg.NotSentLowat)
	c.sock = c.raw
	if w := newSockWriter(c.raw); w != nil {
		c.sock = w
		if c.inline {
			c.brief = w
		}
	}
	c.unread.Open(cfg.Memory)
	c.framer = http2.NewFramer((*ctrlWriter)(c), nil)
	c.henc = hpack.NewEncoder(&c.hbuf)
	c.rd.init(c)
	return c
}

// ctrlWriter lets the Framer append to conn.ctrl.
type ctrlWriter conn

func (w *ctrlWriter) Write(p []byte) (int, error) {
	w.ctrl = append(w.ctrl, p...)
	return len(p), nil
}

// start sends what opens the connection and starts the reader.
func (c *conn) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.started || c.ended {
		return
	}
	c.started = true
	if c.client {
		c.ctrl = append(c.ctrl, http2.ClientPreface...)
		c.framer.WriteSettings(
			http2.Setting{ID: http2.SettingEnablePush, Val: 0},
			http2.Setting{ID: http2.SettingInitialWindowSize, Val: c.cfg.StreamWindow},
			http2.Setting{ID: http2.SettingMaxFrameSize, Val: c.cfg.FrameSize},
			http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: c.cfg.MaxHeaderList})
	} else {
		c.framer.WriteSettings(
			http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: c.cfg.MaxStreams},
			http2.Setting{ID: http2.SettingInitialWindowSize, Val: c.cfg.StreamWindow},
			http2.Setting{ID: http2.SettingMaxFrameSize, Val: c.cfg.FrameSize},
			http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: c.cfg.MaxHeaderList})
	}
	if inc := c.cfg.ConnWindow - 65535; inc > 0 {
		c.framer.WriteWindowUpdate(0, inc)
	}
	// The peer's preface and SETTINGS have to come in time; the reader lifts the deadline when they did.
	c.raw.SetReadDeadline(time.Now().Add(c.cfg.PrefaceTimeout))
	c.work.Add(1)
	go c.cfg.Panics.Func("an HBONE reader", c.readLoop, c.readerCrashed)()
	c.ping.start(c)
	if c.drainWanted {
		c.drainLocked()
	}
	c.wantFlush()
}

// fail ends the connection at once: nothing more is sent.
func (c *conn) fail(err error) {
	c.mu.Lock()
	c.endLocked(err)
	c.mu.Unlock()
}

// endLocked is the end of everything: streams see err, the socket is closed.
func (c *conn) endLocked(err error) {
	if c.err == nil {
		c.err = err
	}
	if c.ended {
		return
	}
	c.ended = true
	c.ping.stop()
	if c.drainTimer != nil {
		c.drainTimer.Stop()
	}
	c.unavailable()
	c.abandonLocked()
	close(c.done)
	c.nc.Close()
}

// abandonLocked gives all streams the connection's error.
func (c *conn) abandonLocked() {
	var err error = &ConnError{c.err}
	if !c.client && c.goneWell {
		// curl and its like end a tunnel by GOAWAY and the end of the connection, without ending its streams: that
		// stands for their END_STREAM.
		err = &StreamError{Code: http2.ErrCodeCancel, Remote: true, Ended: true}
	}
	for _, s := range c.streams {
		s.detachLocked(err)
		c.forgetLocked(s)
	}
}

// leave ends the connection with GOAWAY: streams see err at once, and what is queued for sending still goes out.
func (c *conn) leave(code http2.ErrCode, err error) {
	c.mu.Lock()
	c.leaveLocked(code, err)
	c.mu.Unlock()
}

func (c *conn) leaveLocked(code http2.ErrCode, err error) {
	if c.ended || c.last {
		return
	}
	if c.broken != nil {
		c.endLocked(c.broken)
		return
	}
	if !c.started {
		c.endLocked(err)
		return
	}
	if c.err == nil {
		c.err = err
	}
	c.last, c.leaving = true, true
	if code != http2.ErrCodeNo {
		c.cfg.Stats.Violations.Add(1)
	}
	if code == http2.ErrCodeEnhanceYourCalm {
		c.parting.brief = true
		c.cfg.Stats.Calmed.Add(1)
		if c.cfg.Calmed != nil {
			c.cfg.Calmed(c.nc.RemoteAddr())
		}
	}
	c.ping.stop()
	c.unavailable()
	orderly := len(c.streams) == 0
	c.abandonLocked()
	c.framer.WriteGoAway(c.lastID, code, nil)
	// A peer that reads nothing must not hold us up; but where streams have ended in good order, their last bytes may
	// be on a slow way still.
	patience := partingHurry
	if code == http2.ErrCodeNo && orderly {
		patience = partingStall
	}
	c.raw.SetWriteDeadline(time.Now().Add(patience))
	c.wantFlush()
}

// hasten is leave for an end that somebody waits for: it comes within seconds, whatever the peer does.
func (c *conn) hasten() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaveLocked(http2.ErrCodeNo, ErrClosed)
	if c.ended {
		return
	}
	c.parting.hurry()
	if c.last {
		c.raw.SetWriteDeadline(time.Now().Add(partingHurry))
	}
}

// isOver reports whether the connection takes no more part in anything. mu is held.
func (c *conn) isOver() bool { return c.ended || c.last }

// unavailable tells the pool that no stream can be opened here any more. mu is held.
func (c *conn) unavailable() {
	if c.onEnd != nil {
		c.onEnd()
		c.onEnd = nil
	}
}

// crash ends a connection one of whose goroutines has panicked, with the connection's lock held perhaps. A goroutine
// that may have held a stream's as well calls that stream's Crashed. Nothing that is deferred in such a goroutine may
// take one of these locks: it would wait for itself.
func (c *conn) crash(err error) {
	c.raw.Close() // whoever waits for the network waits no longer
	rescue.Seize(&c.mu)
	defer c.mu.Unlock()
	c.endLocked(err)
}

// Crashed is to be told by whoever has panicked while it used the stream: the tunnel ends with all its streams, since
// what it was in the middle of is not known.
func (s *Stream) Crashed(err error) {
	// First: who waits for it may hold the connection's.
	rescue.Seize(&s.rmu)
	s.rmu.Unlock()
	s.c.crash(err)
}

// readerCrashed is crash for the reader, which works on many streams.
func (c *conn) readerCrashed(err error) {
	for _, s := range append(c.rd.owed, c.rd.stream) {
		if s != nil {
			rescue.Seize(&s.rmu)
			s.rmu.Unlock()
		}
	}
	c.crash(err)
}

// reply accounts for a frame that the peer made us send; too many unread ones end the connection. mu is held.
func (c *conn) reply() {
	if c.replies++; c.replies > c.maxReplies() {
		c.leaveLocked(http2.ErrCodeEnhanceYourCalm, &protocolError{http2.ErrCodeEnhanceYourCalm,
			"peer does not read the answers that it provokes"})
	}
}

// forgetLocked takes a stream that is over out of the table.
func (c *conn) forgetLocked(s *Stream) {
	if s.gone {
		return
	}
	s.gone = true
	delete(c.streams, s.id)
	c.remember(s)
	c.narrow(s)
	if s.onGone != nil {
		s.onGone()
		s.onGone = nil
	}
	if len(c.streams) == 0 && (c.goneAway || c.leaving && !c.drainPing) && !c.isOver() {
		c.leaveLocked(http2.ErrCodeNo, ErrClosed)
	}
}

// finish is called by the reader when there is nothing more to read.
func (c *conn) finish(err error) {
	if r, ok := c.tr.(*records); ok && r.fatal.Load() != 0 {
		c.mu.Lock()
		c.readerGone = true
		if c.last { // it waits for us
			c.endLocked(err)
		} else {
			c.leaveLocked(http2.ErrCodeProtocol, err) // and tell the peer what was wrong (closeNotify)
		}
		c.mu.Unlock()
		return
	}
	c.mu.Lock()
	if c.broken != nil && (isTimeout(err) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF)) {
		err = c.broken
	}
	c.mu.Unlock()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		c.mu.Lock()
		if len(c.streams) == 0 || c.last || c.goneAway {
			err = ErrClosed // in good order
		} else {
			err = io.ErrUnexpectedEOF
		}
		c.mu.Unlock()
	case errors.Is(err, net.ErrClosed):
		err = ErrClosed
	}
	c.fail(err)
}

// reason is why the connection ended or is ending, or nil.
func (c *conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// close ends the connection and waits for its goroutines.
func (c *conn) close() error {
	c.hasten()
	<-c.done
	c.cfg.Panics.Wait(&c.work)
	return nil
}

// shutdown ends the connection when its streams have ended.
func (c *conn) shutdown(ctx context.Context) error {
	c.drain()
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		c.close()
		return ctx.Err()
	}
}
