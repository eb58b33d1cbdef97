package netstack

import (
	"errors"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Refusal is the way in which a flow is turned down.
type Refusal uint8

const (
	// Reset answers with a RST: connect fails with ECONNREFUSED.
	Reset Refusal = iota
	// HostUnreachable answers with ICMP type 3 code 1 or ICMPv6 type 1 code 3:
	// connect fails with EHOSTUNREACH.
	HostUnreachable
	// NetUnreachable answers with ICMP type 3 code 0 or ICMPv6 type 1 code 0:
	// connect fails with ENETUNREACH.
	NetUnreachable
	// AdminProhibited answers with ICMP type 3 code 13 (EHOSTUNREACH) or ICMPv6
	// type 1 code 1 (EACCES).
	AdminProhibited
	// Silent drops the SYN. The client's next one is a new flow.
	Silent
)

func (r Refusal) String() string {
	switch r {
	case Reset:
		return "reset"
	case HostUnreachable:
		return "host unreachable"
	case NetUnreachable:
		return "network unreachable"
	case AdminProhibited:
		return "administratively prohibited"
	case Silent:
		return "silent"
	}
	return "unknown"
}

// ErrDecided is what Accept returns on a flow that was accepted or refused before.
var ErrDecided = errors.New("netstack: flow already decided")

// Flow is a SYN that awaits a verdict: the client sees nothing until Accept or
// Refuse. Exactly one of them, once, before OnFlow returns.
type Flow struct {
	f        *forwarder
	req      *tcp.ForwarderRequest
	src, dst netip.AddrPort
	syn      []byte
	key      flowKey
	inbound  bool
	decided  atomic.Bool
}

// Src is the client's address and port.
func (fl *Flow) Src() netip.AddrPort { return fl.src }

// Dst is what the client asked for.
func (fl *Flow) Dst() netip.AddrPort { return fl.dst }

// Inbound reports whether Dst is one of the pod's own addresses.
func (fl *Flow) Inbound() bool { return fl.inbound }

// decide takes the right to decide.
func (fl *Flow) decide() bool { return !fl.decided.Swap(true) }

// Accept answers the SYN and waits for the handshake to end, which takes one
// round trip to the client, or fails when the client is gone (ETIMEDOUT after
// 15 s at most, ECONNRESET at once) or the stack closes.
func (fl *Flow) Accept() (*Conn, error) {
	if !fl.decide() {
		return nil, ErrDecided
	}
	fl.syn = nil // a relay keeps its Flow, as long as the connection lasts
	c := newConn(fl.key.h, fl.dst, fl.src)
	ep, terr := fl.req.CreateEndpoint(&c.wq)
	// Not before CreateEndpoint: until then a second SYN would be a second flow.
	fl.req.Complete(false)
	fl.f.forget(fl)
	if terr != nil {
		fl.f.failed.Add(1)
		return nil, c.opError("accept", toError(terr, "accept"))
	}
	if err := c.start(ep.(*tcp.Endpoint)); err != nil {
		return nil, err
	}
	fl.f.accepted.Add(1)
	return c, nil
}

// Refuse turns the flow down. On a decided flow it does nothing.
func (fl *Flow) Refuse(r Refusal) {
	if fl.decide() {
		fl.refuse(r)
	}
}

func (fl *Flow) refuse(r Refusal) {
	fl.req.Complete(r == Reset)
	fl.f.forget(fl)
	fl.f.refused.Add(1)
	if r == Reset || r == Silent {
		return
	}
	if b := icmpError(fl.syn, r); b != nil {
		fl.key.h.port.pump.send(rawPacket(b))
	}
}
