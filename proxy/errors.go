package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"ztun/proxy/hbone"
	"ztun/proxy/refusal"
)

// Flag is the response_flags label of a closed connection (spec 10.2).
type Flag uint8

const (
	FlagNone Flag = iota
	FlagDeny
	FlagConnect
	FlagTLSFailure
	FlagH2Handshake
	FlagNetworkPolicy
	FlagIdentity
	FlagCertRevoked
)

var flagTexts = [...]string{"-", "DENY", "CONNECT", "TLS_FAILURE", "H2_HANDSHAKE_FAILURE", "NETWORK_POLICY",
	"IDENTITY_ERROR", "CERT_REVOKED"}

func (f Flag) String() string { return flagTexts[f] }

// kind is why a connection failed. One row of reasons per kind says what each audience is told.
type kind uint8

const (
	kindIO kind = iota
	kindUnknownWorkload
	kindNothingKnown
	kindLookup
	kindRoute
	kindNetworkPolicy
	kindTLS
	kindIdentity
	kindH2
	kindStatus
	kindApp
	kindDenied
	kindPolicyChange
	kindDrain
	kindRevoked
	kindCrowded
)

type reason struct {
	prefix string      // text before the cause (spec appendix B)
	flag   Flag        // metric label of the closed connection
	status int         // what an HBONE peer is answered
	refuse refusal.Way // what the application's SYN is answered, unless the cause says better
}

var reasons = [...]reason{
	kindIO: {prefix: "io error: ", flag: FlagConnect, status: 503, refuse: refusal.Reset},
	kindUnknownWorkload: {prefix: "failed to fetch information about local workload: ", flag: FlagNone, status: 503,
		refuse: refusal.Reset},
	// The same, before the first state: the client's next SYN may find it here.
	kindNothingKnown: {prefix: "failed to fetch information about local workload: ", flag: FlagNone, status: 503,
		refuse: refusal.Silent},
	kindLookup: {prefix: "failed to look up the destination, which may be in the mesh: ", flag: FlagNone,
		status: 503, refuse: refusal.Reset},
	kindRoute: {prefix: "", flag: FlagConnect, status: 503, refuse: refusal.Reset},
	kindNetworkPolicy: {prefix: "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: ",
		flag: FlagNetworkPolicy, status: 503, refuse: refusal.Silent},
	// ztunnel reports a failed tunnel handshake as an I/O error with the flag CONNECT (spec 2.10).
	kindTLS:      {prefix: "io error: ", flag: FlagConnect, status: 503, refuse: refusal.Reset},
	kindIdentity: {prefix: "identity error: ", flag: FlagIdentity, status: 503, refuse: refusal.Reset},
	kindH2:       {prefix: "h2 failed: ", flag: FlagH2Handshake, status: 503, refuse: refusal.Reset},
	kindStatus:   {prefix: "", flag: FlagConnect, status: 503, refuse: refusal.Reset},
	kindApp:      {prefix: "connection failed: ", flag: FlagConnect, status: 503, refuse: refusal.Reset},
	kindDenied:   {prefix: "", flag: FlagDeny, status: 401, refuse: refusal.Reset},
	kindPolicyChange: {prefix: "connection closed due to policy change", flag: FlagDeny, status: 401,
		refuse: refusal.Reset},
	kindRevoked: {prefix: "connection closed: peer certificate revoked by CRL", flag: FlagCertRevoked, status: 503,
		refuse: refusal.Reset},
	kindDrain: {prefix: "connection closed due to connection drain", flag: FlagNone, status: 503,
		refuse: refusal.Reset},
	kindCrowded: {prefix: "too many connections of this pod await an answer (ZTUN_MAX_INFLIGHT)", flag: FlagConnect,
		status: 503, refuse: refusal.Silent},
}

// Error is a failed connection: a row of the table above and the cause.
type Error struct {
	kind  kind
	cause error
}

func fail(k kind, cause error) *Error { return &Error{kind: k, cause: cause} }

func (e *Error) Error() string {
	if e.cause == nil {
		return reasons[e.kind].prefix
	}
	return reasons[e.kind].prefix + osText(e.cause)
}

func (e *Error) Unwrap() error { return e.cause }

// Flag is the response_flags label that the connection is closed with.
func (e *Error) Flag() Flag { return reasons[e.kind].flag }

// Refusal is what the application is told. The cause decides where it knows better than the kind.
func (e *Error) Refusal() refusal.Way {
	switch {
	case e.cause == nil || e.kind == kindDenied || e.kind == kindStatus || e.kind == kindLookup:
	case errors.Is(e.cause, syscall.EHOSTUNREACH):
		return refusal.HostUnreachable
	// the pod has no address of that family
	case errors.Is(e.cause, syscall.ENETUNREACH), errors.Is(e.cause, syscall.EAFNOSUPPORT):
		return refusal.NetUnreachable
	case timedOut(e.cause):
		return refusal.Silent
	}
	return reasons[e.kind].refuse
}

// statusIs reports whether the peer answered the CONNECT with this status.
func (e *Error) statusIs(status int) bool {
	var answer *hbone.StatusError
	return errors.As(e.cause, &answer) && answer.Status == status
}

// timedOut reports whether err is a connect that was never answered.
func timedOut(err error) bool {
	return errors.Is(err, syscall.ETIMEDOUT) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, os.ErrDeadlineExceeded)
}

// osText renders an error as ztunnel's runtime does: "Connection refused (os error 111)", without Go's
// "dial tcp ..." in front, so that log parsers and their alerts keep working.
func osText(err error) string {
	var no syscall.Errno
	if errors.As(err, &no) {
		s := no.Error()
		return fmt.Sprintf("%s%s (os error %d)", strings.ToUpper(s[:1]), s[1:], int(no))
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return "deadline has elapsed"
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}
