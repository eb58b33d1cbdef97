package hbone

import (
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/grow"
)

// ServerConn is the server's end of a connection: it takes streams. All methods may be called at the same time.
type ServerConn struct{ c *conn }

// NewServerConn takes c over, which is a TLS connection from Server (or any other net.Conn). h is called for every
// request in a goroutine of its own and must answer it (Accept or Refuse); a stream that it leaves unfinished is
// closed when it returns, unless it was detached. Nothing happens before Serve.
func NewServerConn(c net.Conn, cfg Config, h func(*ServerStream)) *ServerConn {
	sc := &ServerConn{newConn(c, cfg, false)}
	sc.c.handler = func(s *Stream, req *request) {
		ss := &ServerStream{s: s, req: req}
		h(ss)
		if !ss.detached {
			s.Close()
		}
	}
	return sc
}

// Serve returns when the connection has ended and all handlers have returned: nil after an orderly end. When ctx
// ends, the connection is closed with GOAWAY and streams fail.
func (sc *ServerConn) Serve(ctx context.Context) error {
	c := sc.c
	stop := context.AfterFunc(ctx, c.cfg.Panics.Func("an HBONE connection's end", c.hasten, c.crash))
	c.start()
	<-c.done
	c.cfg.Panics.Wait(&c.work)
	stop()
	if err := c.reason(); err != ErrClosed && err != ErrGoAway {
		return err
	}
	return nil
}

// GoAway starts a graceful end: GOAWAY with the highest stream id, a PING, and after its answer (or a second)
// GOAWAY with the last stream taken. Streams go on; the connection ends with the last of them.
func (sc *ServerConn) GoAway() { sc.c.drain() }

// Abort ends the connection at once; its streams fail with a *ConnError of err.
func (sc *ServerConn) Abort(err error) { sc.c.fail(err) }

// Shutdown is GoAway and waits for the end. When ctx ends first it closes at once and returns ctx's error.
func (sc *ServerConn) Shutdown(ctx context.Context) error { return sc.c.shutdown(ctx) }

// Close ends the connection with GOAWAY; its streams fail. It does not wait for handlers: Serve does.
func (sc *ServerConn) Close() error {
	sc.c.hasten()
	<-sc.c.done
	return nil
}

// Streams is how many are open.
func (sc *ServerConn) Streams() int {
	sc.c.mu.Lock()
	defer sc.c.mu.Unlock()
	return len(sc.c.streams)
}

// Done is closed when the connection has ended.
func (sc *ServerConn) Done() <-chan struct{} { return sc.c.done }

// Err is why it ended, or nil.
func (sc *ServerConn) Err() error { return sc.c.reason() }

// request is what a header block said.
type request struct {
	method, authority      string
	baggage                []string
	forwarded, traceparent string
	network                string
	hasForwarded           bool
	hasTraceparent         bool
	hasNetwork             bool
}

// ServerStream is a request that awaits its answer: exactly one of Accept and Refuse, once.
type ServerStream struct {
	detached bool
	s        *Stream
	req      *request
}

// Method is CONNECT for what belongs here; anything else is to be refused (400).
func (ss *ServerStream) Method() string { return ss.req.method }

// Authority is the :authority, of a syntax that URIs allow but otherwise unchecked; empty if there was none.
func (ss *ServerStream) Authority() string { return ss.req.authority }

// Baggage is the values of all baggage header lines, in order.
func (ss *ServerStream) Baggage() []string { return ss.req.baggage }

// Forwarded is the first forwarded header, "" if there was none.
func (ss *ServerStream) Forwarded() string { return ss.req.forwarded }

// Traceparent is the first traceparent header, "" if there was none.
func (ss *ServerStream) Traceparent() string { return ss.req.traceparent }

// ForwardedNetwork is the first x-forwarded-network header and whether there was one.
func (ss *ServerStream) ForwardedNetwork() (string, bool) { return ss.req.network, ss.req.hasNetwork }

// Detach keeps the accepted stream open beyond the handler's return: whoever it was handed to closes it. An idle
// stream then needs no goroutine with a handler's deep stack. Only for the handler itself to call.
func (ss *ServerStream) Detach() { ss.detached = true }

// Done is closed when the stream's connection has ended: a handler that still looks for an answer may stop.
func (ss *ServerStream) Done() <-chan struct{} { return ss.s.c.done }

// Context is a child of parent that ends when the stream does, too: when the peer resets it or the connection is
// lost, a handler that still looks for an answer may stop. Release it before the stream is answered or handed on; one
// at a time. A parent that has Begin() makes it itself (package brief).
func (ss *ServerStream) Context(parent context.Context) (context.Context, func()) {
	var ctx context.Context
	var cancel context.CancelFunc
	if p, ok := parent.(interface {
		Begin() (context.Context, context.CancelFunc)
	}); ok {
		ctx, cancel = p.Begin()
	} else {
		ctx, cancel = context.WithCancel(parent)
	}
	s, c := ss.s, ss.s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.gone {
		cancel()
	} else {
		s.onGone = cancel
	}
	return ctx, func() {
		c.mu.Lock()
		s.onGone = nil
		c.mu.Unlock()
		cancel()
	}
}

// Accept answers 200 (or resp.Status) and opens the tunnel. It fails if the peer has given up meanwhile.
func (ss *ServerStream) Accept(resp *Response) (*Stream, error) {
	if err := ss.answer(resp, false); err != nil {
		return nil, err
	}
	return ss.s, nil
}

// Refuse answers with a status and ends the stream: HEADERS with END_STREAM, then, as the client has not ended its
// side, RST_STREAM with NO_ERROR (RFC 9113, 8.1). It waits where a connection has too many requests refused.
func (ss *ServerStream) Refuse(status int) error { return ss.RefuseWith(&Response{Status: status}) }

// RefuseWith is Refuse with a reason.
func (ss *ServerStream) RefuseWith(resp *Response) error {
	ss.s.c.pace()
	err := ss.answer(resp, true)
	ss.s.Close()
	return err
}

func (ss *ServerStream) answer(resp *Response, end bool) error {
	s, c := ss.s, ss.s.c
	c.mu.Lock()
	if err := s.answerable(); err != nil {
		c.mu.Unlock()
		return err
	}
	s.answered = true
	c.writeResponse(s.id, resp, end)
	c.reply()
	if end {
		s.wantEnd, s.sentEnd = true, true
		if s.gotEnd {
			c.forgetLocked(s)
		} else {
			c.resetLocked(s, http2.ErrCodeNo)
		}
	}
	c.flushHere()
	return nil
}

// answerable is nil or why a request can have no answer. c.mu is held.
func (s *Stream) answerable() error {
	switch {
	case s.answered:
		return errAnswered
	case s.werr != nil:
		return s.werr
	case s.gone:
		return net.ErrClosed
	}
	return nil
}

// takeRequest is a header block from the client.
func (c *conn) takeRequest(f *http2.MetaHeadersFrame, fresh bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !fresh {
		request := len(f.PseudoFields()) > 0
		switch s := c.streams[f.StreamID]; {
		case s == nil && request: // RFC 9113, 5.1.1: who asks here waits for an answer that nobody gives
			return violation(http2.ErrCodeProtocol, "request on stream %d after stream %d", f.StreamID, c.lastID)
		case s == nil: // trailers of a stream that is over
			return c.overdue(f.StreamID, http2.FrameHeaders, int(listSize(f)))
		case s.gotEnd:
			c.rejectLocked(s, http2.ErrCodeStreamClosed)
		case request || !f.StreamEnded():
			c.rejectLocked(s, http2.ErrCodeProtocol)
		default:
			c.peerEnded(s)
		}
		return nil
	}
	if c.isOver() {
		return nil
	}
	if f.StreamID > c.leftAt || len(c.streams) >= int(c.cfg.MaxStreams) || c.running.Load() >= 2*int64(c.cfg.MaxStreams) {
		c.refuseLocked(f.StreamID, http2.ErrCodeRefusedStream)
		return nil
	}
	if f.Truncated || listSize(f) > c.cfg.MaxHeaderList {
		return c.tooLarge(f)
	}
	req, ok := parseRequest(f)
	if !ok {
		c.refuseLocked(f.StreamID, http2.ErrCodeProtocol)
		return nil
	}
	s := newStream(c, f.StreamID)
	c.streams[s.id] = s
	if f.StreamEnded() {
		c.peerEnded(s)
	}
	if c.stuck() && !c.leaving {
		c.cfg.Stats.Rotated.Add(1)
		c.drainLocked() // the client's next streams get a connection that has a window
	}
	c.running.Add(1)
	c.work.Add(1)
	c.cfg.Go(func() { c.handle(s, req) })
	return nil
}

// handle runs the handler of a request on a goroutine of its own.
func (c *conn) handle(s *Stream, req *request) {
	grow.Stack()
	c.cfg.Panics.Run("an HBONE request", func() {
		defer c.work.Done()
		defer c.running.Add(-1)
		c.handler(s, req)
	}, s.Crashed)
}

// tooLarge refuses a request for its header list: 431, and the tunnel's other streams go on. mu is held.
func (c *conn) tooLarge(f *http2.MetaHeadersFrame) error {
	c.cfg.Stats.StreamsRejected.Add(1)
	c.writeResponse(f.StreamID, &Response{Status: http.StatusRequestHeaderFieldsTooLarge}, true)
	if !f.StreamEnded() {
		c.framer.WriteRSTStream(f.StreamID, http2.ErrCodeNo)
		c.rememberRefused(f.StreamID)
	}
	c.reply()
	c.wantFlush()
	return c.nuisance("too large HEADERS")
}

// parseRequest checks the pseudo-headers (RFC 9113, 8.3.1 and 8.5; the h2 library's rules) and picks out what we
// know of the rest.
func parseRequest(f *http2.MetaHeadersFrame) (*request, bool) {
	req := &request{}
	var scheme, path, authority, hasAuthority bool
	for _, h := range f.PseudoFields() {
		switch h.Name {
		case ":method":
			req.method = h.Value
		case ":authority":
			req.authority, authority, hasAuthority = h.Value, validAuthority(h.Value), true
		case ":scheme":
			scheme = true
			if h.Value == "" {
				return nil, false
			}
		case ":path":
			path = true
			if h.Value == "" {
				return nil, false
			}
		default: // :protocol: extended CONNECT was not offered; :status is no request's
			return nil, false
		}
	}
	if !validLength(f) {
		return nil, false
	}
	isConnect := req.method == "CONNECT"
	if req.method == "" || hasAuthority && !authority || isConnect == scheme || isConnect && path || !isConnect && !path {
		return nil, false
	}
	for _, h := range f.RegularFields() {
		switch h.Name {
		case "baggage":
			req.baggage = append(req.baggage, h.Value)
		case "forwarded":
			if !req.hasForwarded {
				req.forwarded, req.hasForwarded = h.Value, true
			}
		case "traceparent":
			if !req.hasTraceparent {
				req.traceparent, req.hasTraceparent = h.Value, true
			}
		case "x-forwarded-network":
			if !req.hasNetwork {
				req.network, req.hasNetwork = h.Value, true
			}
		case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
			return nil, false // RFC 9113, 8.2.2
		case "te":
			if h.Value != "trailers" {
				return nil, false
			}
		}
	}
	return req, true
}

// validLength reports whether content-length, if there is one, is one number (RFC 9110, 8.6: a list of the same is,
// too). What it says does not matter: a tunnel has no content (RFC 9110, 9.3.6).
func validLength(f *http2.MetaHeadersFrame) bool {
	first := ""
	for _, h := range f.RegularFields() {
		if h.Name != "content-length" {
			continue
		}
		for v := range strings.SplitSeq(h.Value, ",") {
			v = strings.Trim(v, " \t")
			if _, err := strconv.ParseUint(v, 10, 63); err != nil || v[0] == '+' || first != "" && v != first {
				return false
			}
			first = v
		}
	}
	return true
}

// validAuthority reports whether a is made of what RFC 3986 allows in an authority; not whether it makes sense.
func validAuthority(a string) bool {
	for i := 0; i < len(a); i++ {
		b := a[i]
		if !('a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' ||
			strings.IndexByte("-._~!$&'()*+,;=:@[]%", b) >= 0) {
			return false
		}
	}
	return a != ""
}

// drain begins a graceful end.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.started {
		c.drainWanted = true // SETTINGS come first
		return
	}
	c.drainLocked()
}

func (c *conn) drainLocked() {
	if c.leaving || c.isOver() {
		return
	}
	c.leaving = true
	c.unavailable()
	if c.client {
		if len(c.streams) == 0 {
			c.leaveLocked(http2.ErrCodeNo, ErrClosed)
		}
		return
	}
	c.drainPing = true
	c.framer.WriteGoAway(1<<31-1, http2.ErrCodeNo, nil)
	c.framer.WritePing(false, drainData)
	c.wantFlush()
	c.drainTimer = time.AfterFunc(time.Second, c.cfg.Panics.Func("an HBONE drain", func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.drained()
	}, c.crash))
}

// drained is the answer to drain's PING: every stream that the client opened before it knew is here. mu is held.
func (c *conn) drained() {
	if !c.drainPing || c.isOver() {
		return
	}
	c.drainPing = false
	c.drainTimer.Stop()
	c.leftAt = c.lastID
	if len(c.streams) == 0 {
		c.leaveLocked(http2.ErrCodeNo, ErrClosed)
		return
	}
	c.framer.WriteGoAway(c.lastID, http2.ErrCodeNo, nil)
	c.wantFlush()
}
