package proxy

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"runtime/pprof"
	"slices"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/ports"
	"ztun/proxy/rescue"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// localPeer is the proxy that serves the endpoint of a decision, if that is a pod of this daemon that can be reached
// in memory; nil: by the wire. A waypoint terminates the tunnel itself, so there is only the wire to it. So it is for a
// source address that is not the pod's in the family of the endpoint's: over the wire its kernel chooses one.
func (p *Proxy) localPeer(local *state.Workload, src netip.AddrPort, d *route.Decision) *Proxy {
	if p.o.Local == nil || d.Protocol != route.HBONE || d.Waypoint || d.Workload == nil ||
		d.Actual.Port() != ports.HBONE || src.Addr().Is4() != d.Actual.Addr().Is4() ||
		!slices.Contains(local.Addresses, src.Addr()) {
		return nil
	}
	peer := p.o.Local(d.Actual.Addr())
	if peer == nil {
		return nil
	}
	// By address alone it might be a pod that has taken the address over from one whose record is still here.
	at := peer.o.Knowledge.View().WorkloadByInfo(peer.o.Info)
	if at == nil || at.UID != d.Workload.UID {
		return nil
	}
	return peer
}

// connectLocal opens the upstream side through the peer's proxy in memory: each side proves by its certificate who it
// is, and then the peer serves the CONNECT as if a tunnel had brought it. taken is false if the peer takes nothing new,
// or a certificate does not do: it is the wire that refuses then, so that both sides say and count what it says.
func (c *connection) connectLocal(ctx context.Context, peer *Proxy, local *state.Workload, src netip.AddrPort,
	d route.Decision) (up Conn, failed *Error, taken bool) {
	if !peer.begin() {
		return nil, nil, false
	}
	defer peer.work.Done()
	ctx, cancel := context.WithTimeout(ctx, connectTimeout+handshakeTimeout+responseTimeout)
	defer cancel()
	ours, err := c.p.o.Certs.Certificate(ctx, local.Identity())
	if err != nil {
		return nil, fail(kindIdentity, err), true
	}
	theirs, err := peer.ownCertificate(ctx)
	if err != nil {
		return nil, nil, false
	}
	met, err := identity.Meet(ours, theirs, d.SANs(), c.p.o.Config.TLS)
	if err != nil {
		return nil, nil, false
	}
	if c.forget != nil {
		c.forget() // of an endpoint that was tried before
	}
	if c.forget, err = c.p.track(identity.ClientSide, proof{ours, met.Server}, c.revoked); err != nil {
		c.forget = nil
		return nil, nil, false // revoked this very moment
	}
	t := &tunnel{src: src, dst: d.Actual}
	t.peer, t.hasPeer = identity.PeerID(met.Client)
	req := request(c.p.baggage(local), src, d)
	call := &localCall{ctx: ctx, req: &req, panics: peer.o.Panics, from: c.asks}
	// Profiles show whose work it is.
	pprof.SetGoroutineLabels(peer.labels[inbound])
	defer pprof.SetGoroutineLabels(c.p.labels[outbound])
	peer.serveCall(t, call, func(theirEnd *connection) error {
		theirEnd.forget, err = peer.track(identity.ServerSide, proof{theirs, met.Client}, theirEnd.revoked)
		return err
	})
	if call.up == nil && call.shortcut == nil {
		return nil, tunnelError(call.failure()), true
	}
	c.shortcut = call.shortcut
	return call.up, nil, true
}

// revoked cuts a connection in memory whose peer's certificate was revoked.
func (c *connection) revoked(error) { c.sever(fail(kindRevoked, nil)) }

// ownCertificate is the certificate that the pod shows on its port 15008.
func (p *Proxy) ownCertificate(ctx context.Context) (*identity.Certificate, error) {
	_, local, err := p.localWorkload(ctx)
	if err != nil {
		return nil, err
	}
	return p.o.Certs.Certificate(ctx, local.Identity())
}

// call is a CONNECT that awaits its answer: a tunnel's stream, or a pod of this daemon in memory.
type call interface {
	Method() string
	Authority() string
	Baggage() []string
	Forwarded() string
	Traceparent() string
	ForwardedNetwork() (string, bool)
	// Context is parent until the caller gives up; stop ends it.
	Context(parent context.Context) (ctx context.Context, stop func())
	// Shortcut has the caller's packets go to an application, if they can; neither result, if not. It is the answer, too.
	Shortcut(context.Context, Network, appDial) (Shortcut, error)
	// Grant answers 200: the bytes follow.
	Grant(*hbone.Response) (Conn, error)
	RefuseWith(*hbone.Response) error
	// Detach leaves what Grant returned to whoever has it.
	Detach()
}

// streamCall is a CONNECT that a tunnel has brought.
type streamCall struct{ *hbone.ServerStream }

func (s streamCall) Shortcut(context.Context, Network, appDial) (Shortcut, error) { return nil, nil }

func (s streamCall) Grant(r *hbone.Response) (Conn, error) {
	stream, err := s.Accept(r)
	if err != nil {
		return nil, err
	}
	return stream, nil
}

// localCall is a CONNECT in memory. It belongs to the goroutine that sets the connection up.
type localCall struct {
	ctx    context.Context // of the caller: it gives up with it
	req    *hbone.Request
	panics *rescue.Panics
	from   shortcutFlow    // the caller's; nil: its bytes have to be copied
	answer *hbone.Response // the refusal

	// granted: one of these
	up       Conn // the caller's end
	shortcut Shortcut
}

func (l *localCall) Method() string                   { return http.MethodConnect }
func (l *localCall) Authority() string                { return l.req.Authority }
func (l *localCall) Baggage() []string                { return []string{l.req.Baggage} }
func (l *localCall) Forwarded() string                { return l.req.Forwarded }
func (l *localCall) Traceparent() string              { return l.req.Traceparent }
func (l *localCall) ForwardedNetwork() (string, bool) { return "", false }
func (l *localCall) Detach()                          {}

func (l *localCall) Context(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(parent)
	unhook := context.AfterFunc(l.ctx, l.panics.Func("the end of a request", cancel, nil))
	return ctx, func() { unhook(); cancel() }
}

func (l *localCall) Shortcut(ctx context.Context, to Network, a appDial) (s Shortcut, err error) {
	if l.from == nil || len(a.header) > 0 || a.src.Addr() != l.from.Src().Addr().Unmap() {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	s, err = l.from.Shortcut(ctx, to, a.dst)
	if err == nil {
		l.shortcut = s
	}
	return s, err
}

func (l *localCall) Grant(*hbone.Response) (Conn, error) {
	if err := l.ctx.Err(); err != nil {
		return nil, err
	}
	up, down := newSplice()
	l.up = up
	return down, nil
}

func (l *localCall) RefuseWith(r *hbone.Response) error {
	l.answer = r
	return nil
}

// failure is why nothing came of it.
func (l *localCall) failure() error {
	switch {
	case l.answer != nil:
		return &hbone.StatusError{Status: l.answer.Status, Reason: l.answer.Reason}
	case l.ctx.Err() != nil:
		return l.ctx.Err()
	}
	return errors.New("the destination's proxy gave no answer")
}
