package netstack

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"ztun/proxy/fair"
	"ztun/proxy/refusal"
)

// ErrDecided is what Accept returns on a flow that was accepted or refused before.
var ErrDecided = errors.New("netstack: flow already decided")

// errEvicted is what Accept returns on a flow that has lost its place.
var errEvicted = errors.New("too many connections await their answer")

// handshakePatience is how long a client may take for its part of the handshake: the SYN-ACK is sent three times (at
// once, after 1 s and after 3 s). gVisor alone would go on for 127 s.
const handshakePatience = 5 * time.Second

// Flow is a SYN that awaits a verdict: the client sees nothing until Accept or
// Refuse. Exactly one of them, once, before OnFlow returns.
type Flow struct {
	f        *forwarder
	req      *tcp.ForwarderRequest
	src, dst netip.AddrPort
	syn      []byte
	key      flowKey
	seq      uint32 // of the SYN
	start    time.Time
	inbound  bool
	again    bool
	decided  atomic.Bool

	places *places
	party  netip.AddrPort // who is charged with the place
	place  *fair.Place[netip.AddrPort]

	mu        sync.Mutex
	gone      bool   // the place was lost to somebody else
	onGone    func() // called once when it is
	accepting bool   // the SYN was answered, the client's acknowledgement is awaited
	tired     bool   // handshakePatience has passed
	closing   bool   // the stack is about to go
}

// Src is the client's address and port.
func (fl *Flow) Src() netip.AddrPort { return fl.src }

// Dst is what the client asked for.
func (fl *Flow) Dst() netip.AddrPort { return fl.dst }

// Inbound reports whether Dst is one of the pod's own addresses.
func (fl *Flow) Inbound() bool { return fl.inbound }

// Again reports whether this is a retransmission of a SYN that was refused with Silent: the same attempt of the same
// client.
func (fl *Flow) Again() bool { return fl.again }

// OnGone has f called, once and without waiting for anything, when the flow loses its place to others before it is
// accepted or refused, at once if it has. Whatever is under way for it should end then; its verdict does not count
// any more. A later f takes the place of an earlier one.
func (fl *Flow) OnGone(f func()) {
	fl.mu.Lock()
	gone := fl.gone
	if !gone {
		fl.onGone = f
	}
	fl.mu.Unlock()
	if gone {
		f()
	}
}

// evict is called when the flow has lost its place. The client tries again by itself.
func (fl *Flow) evict() {
	fl.mu.Lock()
	f := fl.onGone
	fl.gone, fl.onGone = true, nil
	fl.cutHandshake()
	fl.mu.Unlock()
	if f != nil {
		f()
	}
}

// tire ends a handshake that takes too long.
func (fl *Flow) tire() {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.tired = true
	fl.cutHandshake()
}

// close ends a handshake under way, and those that begin later.
func (fl *Flow) close() {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.closing = true
	fl.cutHandshake()
}

// cutHandshake wakes an Accept that waits for the client. fl.mu is held, so that it cannot be over, and the ports
// another flow's.
func (fl *Flow) cutHandshake() {
	if !fl.accepting {
		return
	}
	if ep := fl.key.h.endpoint(fl.key.id); ep != nil && ep.EndpointState() == tcp.StateSynRecv {
		ep.Abort()
		return
	}
	// The endpoint is about to be registered, or has just done its part.
	time.AfterFunc(time.Millisecond, fl.f.s.cfg.Panics.Func("a handshake's end", func() {
		fl.mu.Lock()
		defer fl.mu.Unlock()
		fl.cutHandshake()
	}, fl.f.s.crash))
}

// decide takes the right to decide.
func (fl *Flow) decide() bool { return !fl.decided.Swap(true) }

// Accept answers the SYN and waits for the handshake to end, which takes one
// round trip to the client, or fails: when the client does not answer
// (ETIMEDOUT after handshakePatience), is gone (ECONNREFUSED at once), when the
// flow has lost its place meanwhile, or the stack closes.
func (fl *Flow) Accept() (*Conn, error) {
	if !fl.decide() {
		return nil, ErrDecided
	}
	// Not before the handshake: until then a second SYN would be a second flow. And not before the connection is
	// counted and on the list that Close ends.
	defer fl.f.forget(fl)
	fl.syn = nil // a relay keeps its Flow, as long as the connection lasts
	c := newConn(fl.key.h, fl.dst, fl.src)
	ep, terr := fl.handshake(c)
	fl.req.Complete(false)
	if terr != nil {
		fl.f.failed.Add(1)
		err := toError(terr, "accept")
		fl.mu.Lock()
		defer fl.mu.Unlock()
		switch {
		case fl.gone:
			err = errEvicted
		case fl.tired:
			err = os.NewSyscallError("accept", syscall.ETIMEDOUT)
		}
		return nil, c.opError("accept", err)
	}
	if fl.inbound || time.Since(fl.start) < promptly {
		fl.places.answers(fl.party)
	}
	if err := c.start(ep.(*tcp.Endpoint)); err != nil {
		return nil, err
	}
	fl.f.accepted.Add(1)
	return c, nil
}

// handshake answers the SYN and waits for the client, within bounds.
func (fl *Flow) handshake(c *Conn) (tcpip.Endpoint, tcpip.Error) {
	fl.mu.Lock()
	late := fl.gone || fl.closing
	fl.accepting, fl.onGone = !late, nil
	fl.mu.Unlock()
	if late {
		return nil, &tcpip.ErrAborted{}
	}
	patience := fl.f.s.timers.after(fl.f.s.handshakePatience, fl.tire)
	ep, terr := fl.req.CreateEndpoint(&c.wq)
	patience.Stop()
	fl.mu.Lock()
	fl.accepting = false
	fl.mu.Unlock()
	return ep, terr
}

// Refuse turns the flow down. On a decided flow it does nothing.
func (fl *Flow) Refuse(r refusal.Way) {
	if fl.decide() {
		fl.refuse(r)
	}
}

func (fl *Flow) refuse(r refusal.Way) {
	defer fl.f.forget(fl)
	fl.mu.Lock()
	if fl.gone || fl.f.silent.Load() {
		r = refusal.Silent // said by whoever could not finish: the client is to try again
	}
	fl.mu.Unlock()
	switch {
	case r == refusal.Silent:
		fl.f.unansweredBy(fl)
	case !fl.inbound && time.Since(fl.start) < promptly:
		fl.places.answers(fl.party)
	}
	fl.f.refused.Add(1) // before the client can know
	fl.req.Complete(r == refusal.Reset)
	if r == refusal.Reset || r == refusal.Silent {
		return
	}
	if b := icmpError(fl.syn, r); b != nil {
		fl.key.h.port.pump.send(rawPacket(b))
	}
}
