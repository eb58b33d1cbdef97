package hbone

import (
	"context"
	"net"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Request is one CONNECT. Baggage, Forwarded and Traceparent are always sent, even empty.
type Request struct {
	Authority                       string
	Baggage, Forwarded, Traceparent string
	// ForwardedNetwork is sent (even empty) if SendForwardedNetwork is set: the inner CONNECT of a double tunnel.
	ForwardedNetwork     string
	SendForwardedNetwork bool
}

// Response is the answer to a CONNECT.
type Response struct {
	Status int
	// Baggage is sent or was received if HasBaggage is set.
	Baggage    string
	HasBaggage bool
	// Reason is why a request is refused (x-ztun-reason, cleaned by CleanReason both ways); "" if nobody says, or it is
	// not.
	Reason string
}

// ClientConn is the client's end of a connection: it opens streams. All methods may be called at the same time.
type ClientConn struct{ c *conn }

// NewClientConn takes c over, which is a TLS connection from Client (or any other net.Conn), and sends the preface.
// It does not wait for the server: a failure shows at the first Open. Close it, or the goroutine that reads stays.
func NewClientConn(c net.Conn, cfg Config) (*ClientConn, error) {
	cc := newClientConn(c, cfg)
	cc.c.start()
	return cc, nil
}

func newClientConn(c net.Conn, cfg Config) *ClientConn {
	return &ClientConn{newConn(c, cfg, true)}
}

// Open sends a CONNECT and waits for its answer. 200 gives a Stream; any other status a *StatusError (and the
// Response). Nothing was sent if the error is ErrGoAway or ErrSaturated; a *StreamError with Unprocessed was
// not acted upon. When ctx ends first, the stream is reset with CANCEL and the error is ctx's.
func (cc *ClientConn) Open(ctx context.Context, req *Request) (*Stream, *Response, error) {
	return cc.open(ctx, req, nil)
}

// open calls onGone (with locks held) when the stream is over; not if it returns before there was a stream.
func (cc *ClientConn) open(ctx context.Context, req *Request, onGone func()) (*Stream, *Response, error) {
	s, err := cc.request(ctx, req, onGone)
	if err != nil {
		return nil, nil, err
	}
	return s.answer(ctx)
}

// request sends a CONNECT; its error is a *notOpened.
func (cc *ClientConn) request(ctx context.Context, req *Request, onGone func()) (*Stream, error) {
	c := cc.c
	if err := ctx.Err(); err != nil {
		return nil, &notOpened{err}
	}
	c.mu.Lock()
	if err := c.openable(); err != nil {
		c.mu.Unlock()
		return nil, &notOpened{err}
	}
	s := newStream(c, c.nextID)
	s.onGone = onGone
	s.opened = make(chan struct{})
	c.nextID += 2
	c.streams[s.id] = s
	c.writeRequest(s.id, req)
	c.flushHere()
	return s, nil
}

// answer waits for that of a stream's CONNECT.
func (s *Stream) answer(ctx context.Context) (*Stream, *Response, error) {
	select {
	case <-s.opened:
	case <-ctx.Done():
		s.Reset(http2.ErrCodeCancel)
		return nil, nil, ctx.Err()
	}
	switch s.openErr {
	case nil:
	case errSilent:
		s.Reset(http2.ErrCodeCancel)
		return nil, nil, errSilent
	default:
		s.Close()
		return nil, nil, s.openErr
	}
	resp := s.response
	if resp.Status != 200 {
		s.Close()
		return nil, &resp, &StatusError{resp.Status, resp.Reason}
	}
	return s, &resp, nil
}

// notOpened marks an error of open after which onGone will not be called.
type notOpened struct{ err error }

func (e *notOpened) Error() string { return e.err.Error() }
func (e *notOpened) Unwrap() error { return e.err }

// openable is nil or why no stream can be opened now. mu is held.
func (c *conn) openable() error {
	switch {
	case c.err != nil:
		return &ConnError{c.err}
	case c.goneAway || c.leaving || c.nextID > 1<<31-3:
		return ErrGoAway
	case len(c.streams) >= c.maxStreams(), c.ownResets > maxQueuedReplies/2: // or the server does not read our resets
		return ErrSaturated
	}
	return nil
}

// maxStreams is how many streams may be open at a time. mu is held.
func (c *conn) maxStreams() int {
	n := c.peerMaxStream
	if c.client && c.cfg.MaxStreams > 0 {
		n = min(n, c.cfg.MaxStreams)
	}
	return int(min(n, 1<<30))
}

// CanTakeStream reports whether Open would send something now.
func (cc *ClientConn) CanTakeStream() bool {
	cc.c.mu.Lock()
	defer cc.c.mu.Unlock()
	return cc.c.openable() == nil
}

// Streams is how many are open.
func (cc *ClientConn) Streams() int {
	cc.c.mu.Lock()
	defer cc.c.mu.Unlock()
	return len(cc.c.streams)
}

// Done is closed when the connection has ended.
func (cc *ClientConn) Done() <-chan struct{} { return cc.c.done }

// Err is why it ended, or nil.
func (cc *ClientConn) Err() error { return cc.c.reason() }

// Close ends the connection with GOAWAY; its streams fail. It returns when nothing of it runs any more.
func (cc *ClientConn) Close() error { return cc.c.close() }

// Abort ends the connection at once; its streams fail with a *ConnError of err.
func (cc *ClientConn) Abort(err error) { cc.c.fail(err) }

// Leave takes no new streams: the connection ends with the last of those that are open, at once if there is none. It
// does not wait; Close does.
func (cc *ClientConn) Leave() { cc.c.drain() }

// Shutdown takes no new streams, waits for those that are open, then closes. When ctx ends first it closes at once
// and returns ctx's error.
func (cc *ClientConn) Shutdown(ctx context.Context) error { return cc.c.shutdown(ctx) }

// writeRequest encodes HEADERS into ctrl: exactly ztunnel's fields in ztunnel's order. mu is held.
func (c *conn) writeRequest(id uint32, req *Request) {
	c.hbuf.Reset()
	c.field(":method", "CONNECT")
	c.field(":authority", req.Authority)
	c.field("baggage", req.Baggage)
	c.field("forwarded", req.Forwarded)
	c.field("traceparent", req.Traceparent)
	if req.SendForwardedNetwork {
		c.field("x-forwarded-network", req.ForwardedNetwork)
	}
	c.writeHeaders(id, false)
}

// writeResponse encodes HEADERS into ctrl. mu is held.
func (c *conn) writeResponse(id uint32, resp *Response, end bool) {
	c.hbuf.Reset()
	c.field(":status", strconv.Itoa(resp.Status))
	if resp.HasBaggage {
		c.field("baggage", resp.Baggage)
	}
	if reason := CleanReason(resp.Reason); end && reason != "" {
		// Never indexed: it would only push from the table what comes again.
		c.henc.WriteField(hpack.HeaderField{Name: reasonHeader, Value: reason, Sensitive: true})
	}
	c.writeHeaders(id, end)
}

func (c *conn) field(name, value string) {
	c.henc.WriteField(hpack.HeaderField{Name: name, Value: value})
}

// writeHeaders puts hbuf into HEADERS and, if the peer's frame size calls for it, CONTINUATION. mu is held.
func (c *conn) writeHeaders(id uint32, end bool) {
	block := c.hbuf.Bytes()
	for first := true; first || len(block) > 0; first = false {
		n := min(len(block), c.peerMaxFrame)
		if first {
			c.framer.WriteHeaders(http2.HeadersFrameParam{
				StreamID: id, BlockFragment: block[:n], EndStream: end, EndHeaders: n == len(block),
			})
		} else {
			c.framer.WriteContinuation(id, n == len(block), block[:n])
		}
		block = block[n:]
	}
}

// takeAnswer is a header block from the server.
func (c *conn) takeAnswer(f *http2.MetaHeadersFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[f.StreamID]
	if s == nil { // reset by us meanwhile, or so it should be
		return c.overdue(f.StreamID, http2.FrameHeaders, int(listSize(f)))
	}
	if s.gotEnd {
		c.rejectLocked(s, http2.ErrCodeStreamClosed)
		return nil
	}
	if s.answered { // trailers: they end the stream (CONNECT has none to speak of)
		if !f.StreamEnded() || len(f.PseudoFields()) > 0 {
			c.rejectLocked(s, http2.ErrCodeProtocol)
			return nil
		}
		c.peerEnded(s)
		return nil
	}
	text := f.PseudoValue("status")
	status, err := strconv.Atoi(text)
	if len(text) != 3 || err != nil || status < 100 || status == 101 || f.Truncated || listSize(f) > c.cfg.MaxHeaderList ||
		f.PseudoValue("method") != "" {
		c.rejectLocked(s, http2.ErrCodeProtocol)
		return nil
	}
	if status < 200 { // informational: the answer is still to come
		if f.StreamEnded() {
			c.rejectLocked(s, http2.ErrCodeProtocol)
			return nil
		}
		return c.nuisance("informational HEADERS")
	}
	resp := Response{Status: status}
	for _, h := range f.RegularFields() {
		if h.Name == "baggage" {
			if resp.HasBaggage {
				resp.Baggage += ","
			}
			resp.Baggage += h.Value
			resp.HasBaggage = true
		}
		if h.Name == reasonHeader && status != 200 && resp.Reason == "" {
			resp.Reason = CleanReason(h.Value) // a peer's words
		}
	}
	s.answerLocked(resp, nil)
	if f.StreamEnded() {
		c.peerEnded(s)
	}
	return nil
}
