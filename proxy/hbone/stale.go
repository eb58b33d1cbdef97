package hbone

import (
	"context"
	"errors"
	"time"
)

// How long a tunnel that was used before may leave a request without an answer while nothing else comes from the peer
// either: after probeAfter it is asked (PING), after probeWait more it is given up. A peer that is only slow to answer
// the request acknowledges the PING. An application waits for its connect meanwhile, often for few seconds.
const (
	probeAfter = 300 * time.Millisecond
	probeWait  = time.Second
	probeAgain = 2 * time.Second // to the next look at a tunnel that has shown life
)

// probeData is the content of that PING.
var probeData = [8]byte{'z', 't', 'u', 'n', 'a', 'l', 'i', 'v'}

// errSilent is why a request is taken back from a tunnel whose peer says nothing.
var errSilent = errors.New("hbone: the peer of a tunnel from before says nothing")

// isStale reports whether err, of a request on a tunnel that was used before, may be the tunnel's fault rather than
// an answer. What was certainly not processed is tried again anyway.
func isStale(err error) bool {
	return err != nil && !isAnswer(err)
}

// isAnswer reports whether err says that the peer, or nobody, got the request.
func isAnswer(err error) bool {
	var answer *StatusError
	var no *notOpened
	var se *StreamError
	switch {
	case errors.As(err, &answer), errors.As(err, &no):
		return true
	case errors.As(err, &se):
		return se.Unprocessed
	}
	return false
}

// open opens a stream. On a tunnel that was used before it gives up early, with errSilent, when the peer says nothing:
// then the tunnel takes no further streams, and ends with those that it has.
func (t *pooled) open(ctx context.Context, req *Request, used bool) (*Stream, *Response, error) {
	if !used {
		return t.cc.open(ctx, req, t.release)
	}
	c := t.cc.c
	w := &silence{seen: c.arrived.Load()}
	var err error
	if w.s, err = t.cc.request(ctx, req, t.release); err != nil {
		return nil, nil, err
	}
	// not yet: look uses timer
	w.timer = time.AfterFunc(time.Hour, c.cfg.Panics.Func("the watch over an HBONE tunnel", w.look, c.crash))
	w.timer.Reset(probeAfter)
	s, resp, err := w.s.answer(ctx)
	w.timer.Stop()
	if err == errSilent {
		c.drain()
	}
	return s, resp, err
}

// silence watches a connection while a request waits for its answer. It has no context of its own, which would cost
// every request four objects: it answers the request itself.
type silence struct {
	s     *Stream
	seen  uint64 // of conn.arrived
	asked bool
	timer *time.Timer
}

// look is the timer's.
func (w *silence) look() {
	c := w.s.c
	switch arrived := c.arrived.Load(); {
	case w.s.waitIsOver():
	case arrived != w.seen:
		w.seen, w.asked = arrived, false
		w.timer.Reset(probeAgain)
	case !w.asked:
		w.asked = true
		c.probe()
		w.timer.Reset(probeWait)
	default:
		c.mu.Lock()
		w.s.answerLocked(Response{}, errSilent)
		c.mu.Unlock()
	}
}

// waitIsOver reports whether nobody waits for the stream's answer any more.
func (s *Stream) waitIsOver() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.answered || s.gone
}

// probe asks the peer for a sign of life.
func (c *conn) probe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isOver() || time.Since(c.probed) < probeWait/2 {
		return
	}
	c.probed = time.Now()
	c.framer.WritePing(false, probeData)
	c.wantFlush()
}
