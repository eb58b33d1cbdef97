package hbone

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// maxContinuations bounds the frames of one header block; together with its encoded size (maxBlock) that is what
	// is left of a CONTINUATION flood.
	maxContinuations = 32
	// maxControlLen bounds a control frame other than HEADERS and CONTINUATION, in bytes.
	maxControlLen = 4 << 10
)

// What the bytes after a frame header are.
const (
	atHeader   = iota
	atPadLen   // the length of a DATA frame's padding
	atData     // payload for a stream
	atSkip     // padding, frames of no interest
	atControl  // a frame that is collected for the Framer
	atPreface  // a client's first bytes
	afterError // everything is thrown away
)

// reader turns plaintext into frames: DATA by itself, from the block into which it was decrypted straight to the
// stream; everything else is collected and parsed by http2.Framer. One goroutine.
type reader struct {
	c     *conn
	k     *block
	used  int
	owed  []*Stream // whose users are to be woken for what was pushed
	state int

	head    [headLen]byte
	nhead   int
	left    int // bytes of the current state
	pad     int
	stream  *Stream // that the DATA is for; nil: thrown away
	end     bool    // END_STREAM
	preface int     // bytes of it matched

	ctl     []byte
	fr      *http2.Framer
	src     bytes.Reader
	blockOf uint32 // stream of an unfinished header block
	pieces  int
	fresh   bool // the header block opens a stream
}

func (r *reader) init(c *conn) {
	r.c = c
	r.fr = http2.NewFramer(nil, &r.src)
	r.fr.SetMaxReadFrameSize(c.cfg.FrameSize)
	// The Framer's bound ends the connection. Ours is below it, and costs the stream alone.
	r.fr.MaxHeaderListSize = uint32(c.maxBlock())
	r.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if !c.client {
		r.state = atPreface
	}
}

// readLoop is the connection's reader goroutine.
func (c *conn) readLoop() {
	defer c.work.Done()
	r := &c.rd
	err := r.run()
	r.release()
	c.finish(err)
}

func (r *reader) release() {
	if r.k != nil {
		r.k.release()
		r.k = nil
	}
}

func (r *reader) run() error {
	c := r.c
	for {
		if err := c.tr.wait(); err != nil {
			if isTimeout(err) && c.listenOn() {
				continue
			}
			return err
		}
		if c.parting.on.Load() {
			r.state = afterError
		}
		c.arrived.Add(1)
		for more := true; more; more = c.tr.pending() {
			if r.k == nil || len(r.k.b)-r.used < fillRoom {
				r.release()
				r.k, r.used = c.bufs.block(blockLarge), 0
				r.k.pinned = &c.pinned
				c.pinned.Add(1)
			}
			n, err := c.tr.fill(r.k.b[r.used:])
			off := r.used
			r.used += n
			if r.state == afterError {
				r.used = off
			} else if perr := r.parse(off, r.used); perr != nil {
				r.violated(perr)
			}
			if err != nil {
				r.wakeOwed()
				return err
			}
			if c.tr.urgent() {
				c.mu.Lock()
				c.wantFlush()
				c.mu.Unlock()
			}
		}
		r.wakeOwed()
		// Nothing is held while we sleep; streams keep what they need of the block.
		r.release()
	}
}

// violated answers a protocol violation with GOAWAY.
func (r *reader) violated(err error) {
	code := http2.ErrCodeProtocol
	var pe *protocolError
	if errors.As(err, &pe) {
		code = pe.code
	}
	r.state = afterError
	r.release() // streams may hold parts of this block; the next one is ours alone
	r.c.log.Debug("HTTP/2 violation by peer", "peer", r.c.nc.RemoteAddr(), "error", err)
	r.c.leave(code, err)
}

func violation(code http2.ErrCode, format string, args ...any) error {
	return &protocolError{code, fmt.Sprintf(format, args...)}
}

// parse takes in r.k.b[off:end].
func (r *reader) parse(off, end int) error {
	for off < end {
		b := r.k.b[off:end]
		switch r.state {
		case atPreface:
			n := min(len(b), len(http2.ClientPreface)-r.preface)
			if string(b[:n]) != http2.ClientPreface[r.preface:r.preface+n] {
				return violation(http2.ErrCodeProtocol, "not an HTTP/2 preface")
			}
			off += n
			if r.preface += n; r.preface == len(http2.ClientPreface) {
				r.state = atHeader
			}
		case atHeader:
			n := copy(r.head[r.nhead:], b)
			off += n
			if r.nhead += n; r.nhead == headLen {
				r.nhead = 0
				if err := r.begin(); err != nil {
					return err
				}
			}
		case atPadLen:
			off++
			r.pad = int(b[0])
			if r.pad > r.left-1 {
				return violation(http2.ErrCodeProtocol, "padding longer than the frame")
			}
			r.credit(1 + r.pad)
			r.left -= 1 + r.pad
			r.state = atData
			if r.left == 0 {
				if !r.end {
					if err := r.c.nuisance("empty DATA"); err != nil {
						return err
					}
				}
				r.endData()
			}
		case atData:
			n := min(len(b), r.left)
			if r.stream == nil || !r.stream.push(r.k, off, off+n) {
				r.c.creditConn(n)
			} else {
				r.c.received(n)
			}
			off += n
			if r.left -= n; r.left == 0 {
				r.endData()
			}
		case atSkip:
			n := min(len(b), r.left)
			off += n
			if r.left -= n; r.left == 0 {
				r.state = atHeader
			}
		case atControl:
			n := min(len(b), r.left)
			r.ctl = append(r.ctl, b[:n]...)
			off += n
			if r.left -= n; r.left == 0 {
				if err := r.control(); err != nil {
					return err
				}
			}
		default:
			return nil
		}
		if r.state == afterError {
			return nil
		}
	}
	return nil
}

// begin looks at a complete frame header.
func (r *reader) begin() error {
	c := r.c
	n := int(r.head[0])<<16 | int(r.head[1])<<8 | int(r.head[2])
	typ, flags := http2.FrameType(r.head[3]), http2.Flags(r.head[4])
	id := binary.BigEndian.Uint32(r.head[5:]) & (1<<31 - 1)
	if n > int(c.cfg.FrameSize) {
		return violation(http2.ErrCodeFrameSize, "frame of %d bytes", n)
	}
	if r.blockOf != 0 && (typ != http2.FrameContinuation || id != r.blockOf) {
		return violation(http2.ErrCodeProtocol, "%v in the middle of a header block", typ)
	}
	if !c.gotSettings && (typ != http2.FrameSettings || flags.Has(http2.FlagSettingsAck)) {
		return violation(http2.ErrCodeProtocol, "first frame is %v, not SETTINGS", typ)
	}
	r.left, r.fresh = n, r.fresh && typ == http2.FrameContinuation
	limit := maxControlLen
	switch typ {
	case http2.FrameData:
		return r.beginData(n, flags, id)
	case http2.FrameHeaders:
		if err := r.beginHeaders(id); err != nil {
			return err
		}
		r.pieces = 0
		limit = c.maxBlock()
		if !flags.Has(http2.FlagHeadersEndHeaders) {
			r.blockOf = id
		}
	case http2.FrameContinuation:
		if r.blockOf == 0 {
			return violation(http2.ErrCodeProtocol, "CONTINUATION without HEADERS")
		}
		if r.pieces++; r.pieces > maxContinuations {
			return violation(http2.ErrCodeEnhanceYourCalm, "more than %d CONTINUATION frames", maxContinuations)
		}
		limit = c.maxBlock() - len(r.ctl)
		if flags.Has(http2.FlagContinuationEndHeaders) {
			r.blockOf = 0
		}
	case http2.FrameSettings, http2.FramePing, http2.FrameGoAway:
		if err := c.nuisance(typ); err != nil {
			return err
		}
	case http2.FrameRSTStream, http2.FrameWindowUpdate: // see their accounts
	case http2.FramePushPromise:
		return violation(http2.ErrCodeProtocol, "PUSH_PROMISE")
	default: // PRIORITY and what we do not know
		if err := c.nuisance(typ); err != nil {
			return err
		}
		if typ == http2.FramePriority {
			if err := c.checkPriority(id, n); err != nil {
				return err
			}
		}
		if n > 0 {
			r.state = atSkip
		}
		return nil
	}
	if n > limit {
		return violation(http2.ErrCodeEnhanceYourCalm, "%v of %d bytes", typ, n)
	}
	r.ctl = append(r.ctl, r.head[:]...)
	r.state = atControl
	if n == 0 {
		return r.control()
	}
	return nil
}

// maxBlock bounds a header block, encoded and decoded, in bytes: a list that is larger than accepted is still taken in,
// for the compression's sake, to be refused on its stream alone. Beyond that the connection ends.
func (c *conn) maxBlock() int { return 4 * int(min(c.cfg.MaxHeaderList, 1<<24)) }

// checkPriority looks at the head of a PRIORITY frame; its content is of no interest (RFC 9113, 5.3.2 and 6.3).
func (c *conn) checkPriority(id uint32, n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case id == 0:
		return violation(http2.ErrCodeProtocol, "PRIORITY on stream 0")
	case n == 5:
	case c.streams[id] != nil:
		c.rejectLocked(c.streams[id], http2.ErrCodeFrameSize)
	default: // a stream that does not exist cannot be reset
		return violation(http2.ErrCodeFrameSize, "PRIORITY of %d bytes", n)
	}
	return nil
}

// beginHeaders checks the stream of a header block, before its content is known.
func (r *reader) beginHeaders(id uint32) error {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	r.fresh = false
	if c.client {
		if id == 0 || id%2 == 0 || id >= c.nextID {
			return violation(http2.ErrCodeProtocol, "HEADERS on stream %d, which we did not open", id)
		}
		return nil
	}
	if id%2 == 0 {
		return violation(http2.ErrCodeProtocol, "HEADERS on stream %d", id)
	}
	if id > c.lastID {
		c.lastID, r.fresh = id, true
	}
	return nil
}

// isIdle reports whether a stream was never opened. mu is held.
func (c *conn) isIdle(id uint32) bool {
	if c.client {
		return id%2 == 0 || id >= c.nextID
	}
	return id%2 == 0 || id > c.lastID
}

// beginData accounts for a DATA frame as a whole, padding included.
func (r *reader) beginData(n int, flags http2.Flags, id uint32) error {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	r.end = flags.Has(http2.FlagDataEndStream)
	if n == 0 && !r.end {
		if err := c.nuisance("empty DATA"); err != nil {
			return err
		}
	}
	if c.isIdle(id) {
		return violation(http2.ErrCodeProtocol, "DATA on stream %d, which is idle", id)
	}
	if c.recvWin -= int64(n); c.recvWin < 0 {
		return violation(http2.ErrCodeFlowControl, "more DATA than the connection's window allows")
	}
	s := c.streams[id]
	switch {
	case s == nil: // finished or reset by us a moment ago, or so it should be
		if err := c.overdue(id, http2.FrameData, n); err != nil {
			return err
		}
	case s.gotEnd:
		c.rejectLocked(s, http2.ErrCodeStreamClosed)
		s = nil
	case c.client && !s.answered:
		c.rejectLocked(s, http2.ErrCodeProtocol)
		s = nil
	default:
		// A window that SETTINGS have made negative forbids bytes, not the end of the stream (RFC 9113, 6.9.1 and 6.9.2).
		if s.recvWin -= int64(n); s.recvWin < 0 && n > 0 {
			if s.late -= min(int64(n), -s.recvWin); s.late < 0 {
				c.rejectLocked(s, http2.ErrCodeFlowControl)
				s = nil
			}
		}
		c.crowd()
	}
	r.stream = s
	switch {
	case flags.Has(http2.FlagDataPadded):
		if n == 0 {
			return violation(http2.ErrCodeFrameSize, "padded DATA frame without padding length")
		}
		r.pad, r.state = 0, atPadLen
	case n == 0:
		r.pad = 0
		r.endDataLocked()
	default:
		r.pad, r.state = 0, atData
	}
	return nil
}

// credit gives back what was only padding.
func (r *reader) credit(n int) {
	if r.stream != nil {
		r.stream.uncredit.Add(int64(n))
	}
	r.c.creditConn(n)
}

// endData is called after the payload of a DATA frame; its padding comes next.
func (r *reader) endData() {
	r.c.mu.Lock()
	r.endDataLocked()
	r.c.mu.Unlock()
}

func (r *reader) endDataLocked() {
	if r.stream != nil && r.end {
		r.c.peerEnded(r.stream)
	}
	r.stream = nil
	r.state = atHeader
	if r.pad > 0 {
		r.left, r.state = r.pad, atSkip
		r.pad = 0
	}
}

// peerEnded is the peer's END_STREAM. mu is held.
func (c *conn) peerEnded(s *Stream) {
	if s.gotEnd {
		return
	}
	s.gotEnd, s.peerEnd = true, true
	s.endReading(io.EOF)
	if s.sentEnd {
		c.forgetLocked(s)
	}
}

// rejectLocked resets a stream for a fault of the peer's. mu is held.
func (c *conn) rejectLocked(s *Stream, code http2.ErrCode) {
	c.cfg.Stats.StreamsRejected.Add(1)
	s.detachLocked(&StreamError{Code: code})
	c.framer.WriteRSTStream(s.id, code)
	c.forgetLocked(s)
	c.blame()
	c.reply()
	c.wantFlush()
}

// blame counts what a peer does only by mistake or with intent: too much of it ends the connection. mu is held.
func (c *conn) blame() {
	if !c.resets.take() {
		c.leaveLocked(http2.ErrCodeEnhanceYourCalm, &protocolError{http2.ErrCodeEnhanceYourCalm,
			"too many streams reset or refused"})
	}
}

// control parses what was collected, when it is complete.
func (r *reader) control() error {
	r.state = atHeader
	if r.blockOf != 0 {
		return nil // CONTINUATION follows
	}
	defer func() {
		if cap(r.ctl) > 16<<10 {
			r.ctl = nil
		}
		r.ctl = r.ctl[:0]
	}()
	r.src.Reset(r.ctl)
	f, err := r.fr.ReadFrame()
	var se http2.StreamError
	var ce http2.ConnectionError
	switch {
	case err == nil:
	case errors.As(err, &se):
		if http2.FrameType(r.head[3]) != http2.FrameWindowUpdate && se.Cause == nil {
			// The padding is longer than the frame (RFC 9113, 6.2), and the block was not decoded.
			return violation(http2.ErrCodeProtocol, "HEADERS with more padding than frame")
		}
		return r.malformed(se)
	case errors.As(err, &ce):
		return violation(http2.ErrCode(ce), "%v", errors.Join(err, r.fr.ErrorDetail()))
	default:
		return violation(http2.ErrCodeFrameSize, "%v", err)
	}
	switch f := f.(type) {
	case *http2.MetaHeadersFrame:
		if r.c.client {
			return r.c.takeAnswer(f)
		}
		return r.c.takeRequest(f, r.fresh)
	case *http2.SettingsFrame:
		return r.c.takeSettings(f)
	case *http2.PingFrame:
		return r.c.takePing(f)
	case *http2.WindowUpdateFrame:
		return r.c.takeWindowUpdate(f.StreamID, int64(f.Increment))
	case *http2.RSTStreamFrame:
		return r.c.takeReset(f.StreamID, f.ErrCode)
	case *http2.GoAwayFrame:
		return r.c.takeGoAway(f)
	}
	return nil
}
