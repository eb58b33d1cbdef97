package hbone

import (
	"errors"
	"fmt"
	"net/http"
	"syscall"

	"golang.org/x/net/http2"
)

// Errors of connections and pools.
var (
	// ErrGoAway says that the peer (or we) said GOAWAY: no new streams here. Nothing was sent.
	ErrGoAway = errors.New("hbone: connection is going away")
	// ErrSaturated says that the connection carries as many streams as it may.
	ErrSaturated = errors.New("hbone: connection has no free stream")
	// ErrPingTimeout ends a connection whose peer left a PING unanswered and sent nothing else either.
	ErrPingTimeout = errors.New("hbone: peer did not answer PING in time")
	// ErrClosed is the end of a connection that we closed ourselves.
	ErrClosed = errors.New("hbone: connection closed")
	// ErrPoolClosed says that the pool is draining or closed (ztunnel: "pool draining").
	ErrPoolClosed = errors.New("hbone: pool is closed")
)

// errAnswered is a second answer to one request: the caller's mistake.
var errAnswered = errors.New("hbone: request was answered already")

// StatusError is an answer to CONNECT other than 200.
type StatusError struct {
	Status int
	Reason string // what the peer says, if it is a ztun: cleaned, but its words
}

// Error is ztunnel's text, "http status: 503 Service Unavailable", and the peer's reason behind it.
func (e *StatusError) Error() string {
	if e.Reason != "" {
		return (&StatusError{Status: e.Status}).Error() + ": " + e.Reason
	}
	if text := http.StatusText(e.Status); text != "" {
		return fmt.Sprintf("http status: %d %s", e.Status, text)
	}
	return fmt.Sprintf("http status: %d <unknown status code>", e.Status)
}

// StreamError is the end of a stream by RST_STREAM.
type StreamError struct {
	Code http2.ErrCode
	// Remote says that the peer reset the stream; otherwise we did.
	Remote bool
	// Unprocessed says that the peer has certainly not acted on the request (REFUSED_STREAM, or a GOAWAY that left
	// the stream out), so that it may be sent again elsewhere.
	Unprocessed bool
	// Ended says that the peer had ended its direction in good order before (END_STREAM).
	Ended bool
}

func (e *StreamError) Error() string {
	who := "reset"
	if e.Remote {
		who = "reset by peer"
	}
	return fmt.Sprintf("hbone: stream %s: %s", who, e.Code)
}

// Is lets callers classify: a stream that the peer ended in good order is a broken pipe to the writer
// (ztunnel's copy loop ignores that), any other reset of the peer's is a connection reset.
func (e *StreamError) Is(target error) bool {
	switch target {
	case syscall.EPIPE:
		return e.orderly()
	case syscall.ECONNRESET:
		return e.Remote && !e.orderly()
	}
	return false
}

// orderly: after its END_STREAM the peer, whatever the code, only says that it wants no more of ours: what it had to
// say is there. Before it, whatever the code, the stream was cut (doc.go, 2026-11-28 and 2026-11-29).
func (e *StreamError) orderly() bool { return e.Remote && e.Ended }

// ConnError is the end of a whole connection, as its streams see it.
type ConnError struct{ Err error }

func (e *ConnError) Error() string { return "hbone: connection lost: " + e.Err.Error() }
func (e *ConnError) Unwrap() error { return e.Err }

// Is makes a lost connection look like a reset one, whatever it was lost to.
func (e *ConnError) Is(target error) bool { return target == syscall.ECONNRESET }

// protocolError is a violation by the peer: the connection ends with GOAWAY of this code.
type protocolError struct {
	code http2.ErrCode
	why  string
}

func (e *protocolError) Error() string { return fmt.Sprintf("hbone: %s: %s", e.code, e.why) }

// SourceError is a failure to read what was to be sent, in ReadFrom: the stream itself is sound.
type SourceError struct{ Err error }

func (e *SourceError) Error() string { return e.Err.Error() }
func (e *SourceError) Unwrap() error { return e.Err }

// SinkError is a failure to write what was received, in WriteTo: the stream itself is sound.
type SinkError struct{ Err error }

func (e *SinkError) Error() string { return e.Err.Error() }
func (e *SinkError) Unwrap() error { return e.Err }
