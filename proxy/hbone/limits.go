package hbone

import (
	"time"

	"golang.org/x/net/http2"
)

// What a peer may send that serves nothing. Each such frame costs us time, an answer, or both, and the peer next to
// nothing, so that a single connection could keep a core busy. Three accounts, each per connection, say how much is
// still honest; whoever overdraws them is told ENHANCE_YOUR_CALM:
//   - nuisances (a bucket): PING, SETTINGS, PRIORITY, GOAWAY, frames that we do not know, DATA without data, header
//     lists that are too large; and what the other two accounts do not cover;
//   - updates: WINDOW_UPDATEs. They are earned by what we send, for that is what they answer;
//   - late: frames on streams that are over. What the peer had on its way when a stream ended is within that stream's
//     window.
//
// A fourth, resets, is for streams that were refused, malformed or reset before their answer (Config.Resets).
const (
	// updatesPerStream is how many WINDOW_UPDATEs a new stream is good for: peers that do not like the initial window
	// send one or two.
	updatesPerStream = 8
	// updatesPerFrame and bytesPerUpdate: how many a DATA frame is good for. The greediest honest peers return 4 KiB at a
	// time, for the stream and for the connection.
	updatesPerFrame = 2
	bytesPerUpdate  = 512
	// maxUpdates bounds what can be saved up. It covers 512 MiB on its way, more than any window in use.
	maxUpdates = 1 << 20

	// lateFrame is what a frame counts at least, in bytes; a stream that is over leaves room for its window and for
	// lateFrames without payload (RST_STREAM, WINDOW_UPDATE, trailers).
	lateFrame  = 128
	lateFrames = 8
	// maxLate bounds what can be saved up, in bytes: 256 full windows.
	maxLate = 1 << 30

	// refusalBurst is how many requests a connection has refused at once, refusalsPerSecond how many in the long run;
	// further ones wait for their answer.
	refusalBurst      = 1000
	refusalsPerSecond = 500

	// maxSettings bounds the entries of one SETTINGS frame: each may touch every stream. There are nine kinds.
	maxSettings = 64
	// maxGone is how many streams are remembered that did not end by the peer's END_STREAM.
	maxGone = 1024
)

// How a stream that is not in the table has ended.
const (
	goneLongAgo = iota // forgotten
	goneByUs           // reset or refused by us: what the peer sent before it knew is in order
	goneByReset        // by the peer's RST_STREAM
	goneByEnd          // by the peer's END_STREAM, or it never was (a higher id came first)
)

// goneStreams remembers the last streams that did not end by END_STREAM, in a ring that grows as needed.
type goneStreams struct {
	ring  []uint32 // twice the id, plus one if the peer reset it
	next  int
	floor uint32 // the highest id that was pushed out
}

func (g *goneStreams) add(id uint32, byPeer bool) {
	v := id << 1
	if byPeer {
		v |= 1
	}
	if len(g.ring) < maxGone {
		g.ring = append(g.ring, v)
		return
	}
	g.floor = max(g.floor, g.ring[g.next]>>1)
	g.ring[g.next] = v
	g.next = (g.next + 1) % maxGone
}

// how tells the end of a stream that is over. The newest are looked at first.
func (g *goneStreams) how(id uint32) int {
	for i := range g.ring {
		v := g.ring[(g.next+2*len(g.ring)-1-i)%len(g.ring)]
		if v>>1 == id {
			return goneByUs + int(v&1)
		}
	}
	if id <= g.floor {
		return goneLongAgo
	}
	return goneByEnd
}

// remember keeps what has to be known of a stream that is over. mu is held.
func (c *conn) remember(s *Stream) {
	if c.isOver() {
		return
	}
	room := int64(lateFrames * lateFrame)
	if !s.peerEnd {
		c.gone.add(s.id, s.peerReset)
		if !s.peerReset {
			room += max(s.recvWin, 0)
		}
	}
	c.late = min(c.late+room, maxLate)
}

// rememberRefused is the same for a stream that never was in the table. mu is held.
func (c *conn) rememberRefused(id uint32) {
	c.gone.add(id, false)
	c.late = min(c.late+lateFrames*lateFrame+max(int64(c.cfg.StreamWindow), 65535), maxLate)
}

// overdue judges a frame with n bytes of payload on a stream that is over (RFC 9113, 5.1). After END_STREAM only
// RST_STREAM, WINDOW_UPDATE and PRIORITY may still come. mu is held.
func (c *conn) overdue(id uint32, typ http2.FrameType, n int) error {
	if c.isOver() {
		return nil
	}
	if typ == http2.FrameData || typ == http2.FrameHeaders {
		switch c.gone.how(id) {
		case goneByEnd:
			return violation(http2.ErrCodeStreamClosed, "%v on stream %d, which has ended", typ, id)
		case goneByReset:
			c.framer.WriteRSTStream(id, http2.ErrCodeStreamClosed)
			c.blame()
			c.reply()
			c.wantFlush()
			return nil
		}
	}
	if cost := int64(max(n, lateFrame)); c.late >= cost {
		c.late -= cost
		return nil
	}
	for range 1 + n/recordLen {
		if !c.nuisances.take() {
			return violation(http2.ErrCodeEnhanceYourCalm, "too many frames on streams that are over")
		}
	}
	return nil
}

// pace holds a refusal back while the connection has more of them than are honest: refusing costs a goroutine, a look
// at the policies and an answer. The streams that wait fill up the table, so a client that heeds the limit slows down,
// and one that does not is refused by the reader, and blamed.
func (c *conn) pace() {
	c.mu.Lock()
	wait := c.refusals.reserve()
	c.mu.Unlock()
	if wait <= 0 {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.done:
	}
}

// nuisance takes from the account of frames that serve nothing.
func (c *conn) nuisance(what any) error {
	if !c.nuisances.take() {
		return violation(http2.ErrCodeEnhanceYourCalm, "too many %v frames", what)
	}
	return nil
}

// updated takes a WINDOW_UPDATE from its account. mu is held.
func (c *conn) updated() error {
	if c.updates > 0 {
		c.updates--
		return nil
	}
	return c.nuisance(http2.FrameWindowUpdate)
}

// earn is for n bytes of DATA that go out in one frame. mu is held.
func (c *conn) earn(n int) {
	c.updates = min(c.updates+updatesPerFrame+n/bytesPerUpdate, maxUpdates)
}

// listSize is the size of a header list by RFC 9113, 6.5.2.
func listSize(f *http2.MetaHeadersFrame) (n uint32) {
	for _, h := range f.Fields {
		n += h.Size()
	}
	return n
}

// maxReplies bounds what a peer can make us queue without reading it. A client that does not read yet opens no more
// than the streams that it may, and each of these is worth an answer and a reset.
func (c *conn) maxReplies() int { return maxQueuedReplies + 2*int(min(c.cfg.MaxStreams, 1<<20)) }
