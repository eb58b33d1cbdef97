package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/pprof"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"ztun/proxy/fair"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/rbac"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// tunnel is what is known of one accepted HBONE connection.
type tunnel struct {
	src, dst netip.AddrPort // TCP peer; our address and port 15008, or the pod's for which we were reached elsewhere
	anyOwn   bool           // reached elsewhere: that stands for each of the pod's addresses
	peer     identity.ID
	hasPeer  bool
	// place is the connection's among those that have carried nothing yet. The first CONNECT that is granted gives it
	// back.
	place *fair.Place[netip.Addr]
}

// ServeMesh carries one TCP connection accepted on the pod's port 15008. It returns when the
// connection and all its streams have ended. at is for a connection that was accepted at an address that is not the
// pod's (MeshAddresses of its record): the pod's own that it stands for; not valid: raw's local address.
func (p *Proxy) ServeMesh(raw net.Conn, at netip.AddrPort) {
	defer raw.Close()
	c := p.enter(inbound)
	if c == nil {
		return
	}
	defer c.leave()

	t := &tunnel{src: addrPort(raw.RemoteAddr()), dst: at, anyOwn: at.IsValid()}
	if !t.anyOwn {
		t.dst = addrPort(raw.LocalAddr())
	}
	var evicted atomic.Bool
	evict := func() {
		evicted.Store(true)
		abort(raw)
	}
	source := fair.Group(t.src.Addr())
	if t.place = p.bounds.newcomers.Take(source, 1, evict); t.place == nil {
		abort(raw)
		return
	}
	defer t.place.Release()
	conn, shown, err := p.meet(raw, t, source, evict)
	if err != nil {
		if !evicted.Load() { // the report says that it was, once for many
			p.denyMesh(t, "", err)
		}
		return
	}
	server := hbone.NewServerConn(conn, p.o.Config.HBONE, func(s *hbone.ServerStream) {
		pprof.SetGoroutineLabels(p.labels[inbound])
		p.serveStream(t, streamCall{s})
	})
	forget, err := p.track(identity.ServerSide, shown, server.Abort)
	if err != nil {
		server.Close()
		p.denyMesh(t, "", fmt.Errorf("tls handshake error: %w", err))
		return
	}
	defer forget()
	p.mu.Lock()
	p.mesh[server] = struct{}{}
	draining := p.draining
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.mesh, server)
	}()
	if draining {
		server.GoAway()
	}
	if err := server.Serve(p.ctx); err != nil {
		p.o.Log.Debug("HBONE connection ended", "target", "inbound", "peer", t.src, "error", err)
	}
}

// meet waits for the peer's first byte and has both sides prove who they are.
func (p *Proxy) meet(raw net.Conn, t *tunnel, source netip.Addr, evict func()) (net.Conn, proof, error) {
	if err := p.awaitByte(raw); err != nil {
		return nil, proof{}, fmt.Errorf("tls handshake error: %w", err)
	}
	place := p.bounds.handshakes.Take(source, 1, evict)
	if place == nil {
		return nil, proof{}, fmt.Errorf("tls handshake error: too many handshakes under way")
	}
	defer place.Release()
	return p.handshake(raw, t)
}

// awaitByte waits for the first byte without taking it: connections that say nothing have no part in the
// bound on handshakes, which cost more.
func (p *Proxy) awaitByte(raw net.Conn) error {
	sc, ok := raw.(syscall.Conn)
	if !ok {
		return nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	raw.SetReadDeadline(time.Now().Add(handshakeTimeout))
	defer raw.SetReadDeadline(time.Time{})
	defer context.AfterFunc(p.ctx, p.o.Panics.Func("the end of a handshake", func() {
		raw.SetReadDeadline(time.Unix(1, 0))
	}, nil))()
	var b [1]byte
	var n int
	var rerr error
	if err := rc.Read(func(fd uintptr) bool {
		n, _, rerr = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return rerr != syscall.EAGAIN && rerr != syscall.EINTR
	}); err != nil {
		return err
	}
	if rerr == nil && n == 0 {
		return io.EOF
	}
	return rerr
}

// handshake proves both sides' identities. It is bounded in time.
func (p *Proxy) handshake(raw net.Conn, t *tunnel) (net.Conn, proof, error) {
	ctx, cancel := context.WithTimeout(p.ctx, handshakeTimeout)
	defer cancel()
	_, local, err := p.localWorkload(ctx)
	if err != nil {
		return nil, proof{}, err
	}
	cert, err := p.o.Certs.Certificate(ctx, local.Identity())
	if err != nil {
		return nil, proof{}, fmt.Errorf("signing error: %w", err)
	}
	conn, cs, err := hbone.Server(ctx, raw, identity.ServerTLS(cert, p.o.Config.TLS), p.turn(fair.Group(t.src.Addr())))
	if err != nil {
		return nil, proof{}, fmt.Errorf("tls handshake error: %w", err)
	}
	t.peer, t.hasPeer = identity.PeerID(cs)
	return conn, proof{cert, cs}, nil
}

// serveStream answers one CONNECT (spec 4.3 and 4.4). It returns when the request is refused, or
// accepted and being copied.
func (p *Proxy) serveStream(t *tunnel, s call) { p.serveCall(t, s, nil) }

// serveCall is serveStream. watch, if there is one, is told of the connection when it is known to be one: its error
// refuses it.
func (p *Proxy) serveCall(t *tunnel, s call, watch func(*connection) error) {
	start := time.Now()
	// Until there is an answer, the peer's giving up ends what is under way for it.
	ctx, stop := s.Context(p.brief)
	place := p.bounds.requests.Take(fair.Group(t.src.Addr()), 1, stop)
	defer place.Release()
	var view *state.View
	var local *state.Workload
	var in route.InboundDecision
	var err error
	if place != nil {
		view, local, in, err = p.receive(ctx, t, s)
	}
	if place == nil || err != nil {
		if gone := ctx.Err() != nil && p.ctx.Err() == nil; place != nil && !gone {
			p.denyMesh(t, s.Authority(), err)
		}
		stop()
		if place == nil {
			err = errCrowded
		}
		p.refuseStream(t, s, statusOf(err), err)
		return
	}
	fault("stream", in.App)
	var source *state.Workload
	if network, ok := s.ForwardedNetwork(); !ok || strings.EqualFold(network, p.o.Config.NetworkName) {
		source = p.caller(ctx, view, t)
	}
	c := p.enterStream(stop)
	defer c.settle()
	q := rbac.Question{Src: t.src.Addr(), Dst: in.App, ID: t.peer, HasID: t.hasPeer, SrcUnknown: p.rewritten(t, source)}
	c.register(path{inbound: true, start: start, src: t.src, originalDst: t.dst, actualDst: in.App,
		protocol: route.HBONE.String(), policy: q})
	failed := c.admit(ctx, p.policyLog(t.src, s.Traceparent()), local)
	if watch != nil && failed == nil {
		if err := watch(c); err != nil {
			failed = fail(kindTLS, err)
		}
	}
	der := &derived{id: t.peer, hasID: t.hasPeer}
	if p.o.Config.ResponseBaggage && failed == nil {
		der.baggage = hbone.ParseBaggage(s.Baggage()) // what a peer that policy refuses says of itself is not listened to
	}
	c.open(entry{
		src: t.src, dst: t.dst, hbone: s.Authority(), mtls: true, protocol: route.HBONE, derived: der,
		source: source, dest: local, service: in.Service, start: start,
	})
	var up Conn
	if failed == nil {
		up, failed = c.serve(ctx, s, p.appDial(t, in))
	}
	gone := errors.Is(ctx.Err(), context.Canceled) && c.reason() == nil // and not at dialApp's deadline
	stop()
	if failed != nil {
		p.refuseStream(t, s, reasons[failed.kind].status, failed)
		if gone && failed.kind == kindApp {
			c.books.record(nil) // the peer gave its stream up before we could answer
		} else {
			c.books.record(failed)
		}
		return
	}
	if c.shortcut != nil {
		c.pass()
		return
	}
	resp := &hbone.Response{Status: http.StatusOK}
	if p.o.Config.ResponseBaggage {
		resp.Baggage, resp.HasBaggage = p.baggage(local), true
	}
	t.place.Release() // before the peer knows: what it opens next must not cost it this tunnel
	down, err := s.Grant(resp)
	if err != nil {
		abort(up)
		c.books.record(nil) // the peer gave its stream up before we could answer
		return
	}
	s.Detach()
	c.carry(down, up)
}

// refuseStream answers a request that is turned down. A peer who has proven who it is learns why, which its operator
// would have to look up in our log otherwise (ZTUN_SEND_REASON).
func (p *Proxy) refuseStream(t *tunnel, s call, status int, why error) {
	resp := &hbone.Response{Status: status}
	if p.o.Config.SendReason && t.hasPeer {
		resp.Reason = why.Error()
	}
	s.RefuseWith(resp)
}

// caller is the record of who calls: the peer's, where that says that its connections arrive, and so begin, at this
// address (a workload without root, on its user's host); else that of who has the address.
func (p *Proxy) caller(ctx context.Context, view *state.View, t *tunnel) *state.Workload {
	src := t.src.Addr()
	if t.hasPeer {
		c := state.Caller{Host: src, Namespace: t.peer.Namespace, ServiceAccount: t.peer.ServiceAccount}
		if w := view.WorkloadByCaller(c); w != nil {
			return w
		}
	}
	return p.peer(ctx, view, src)
}

var errCrowded = errors.New("too many requests await their answer")

// rewritten reports whether the tunnel's source address is surely not its peer's, and says so: the mesh knows it as
// somebody else's (at is caller's, nil if there is none), or nobody can have it beyond a link. istio-cni does
// that to node-side sockets on the same node (SNAT to 169.254.7.127), and masquerading does. Policy must not go by it.
func (p *Proxy) rewritten(t *tunnel, at *state.Workload) bool {
	src := t.src.Addr()
	switch {
	case !t.hasPeer:
		return false
	case src.IsLinkLocalUnicast():
	case at == nil, at.NetworkMode == state.HostNetwork, // whose address several share
		at.Namespace == t.peer.Namespace && at.ServiceAccount == t.peer.ServiceAccount:
		return false
	}
	p.foreign.Add(1)
	owner := "nobody"
	if at != nil {
		owner = at.UID
	}
	p.bounds.warnings.Log(context.Background(), slog.LevelWarn, src.String(),
		"the source address of a mesh connection is not its peer's: something on the way rewrites it, and policies about "+
			"source addresses cannot be decided (a workload of `ztun run` has its host's: its record's meshAddresses say so)",
		slog.Any("src", t.src), slog.String("peer", t.peer.String()), slog.String("address_of", owner))
	return true
}

// receive validates a CONNECT and finds its next hop. An error is an early denial: nothing is counted.
func (p *Proxy) receive(ctx context.Context, t *tunnel, s call) (*state.View, *state.Workload,
	route.InboundDecision, error) {
	var none route.InboundDecision
	if s.Method() != http.MethodConnect {
		return nil, nil, none, &route.Error{Code: route.BadMethod, Subject: s.Method()}
	}
	view, local, err := p.localWorkload(ctx)
	if err != nil {
		return nil, nil, none, err
	}
	q := route.InboundQuestion{
		Network: p.o.Config.NetworkName, Local: local, LocalAddr: t.dst.Addr(), AnyOwn: t.anyOwn,
		Authority:     s.Authority(),
		ForwardedHost: hbone.ParseForwardedHost(s.Forwarded()), Illegal: p.illegal,
	}
	var in route.InboundDecision
	if unknown := p.asking(ctx, demandWait, view, func(newest *state.View, missed *string) {
		view, q.Missed = newest, missed
		in, err = route.Inbound(view, q)
	}); unknown != nil {
		err = unknown
	}
	return view, local, in, err
}

// statusOf is what an early denial answers the peer.
func statusOf(err error) int {
	var re *route.Error
	if errors.As(err, &re) {
		return re.Status()
	}
	return http.StatusServiceUnavailable
}

// admit checks the newest policies for a registered connection. Registered first, checked then: a policy change
// in between finds the connection.
func (c *connection) admit(ctx context.Context, log policyLog, local *state.Workload) *Error {
	v, err := c.p.judge(ctx, local, c.where().policy)
	if err != nil {
		return c.instead(fail(kindApp, err))
	}
	log.verdict(v)
	if !v.Allowed {
		return fail(kindDenied, v.Err())
	}
	return nil
}

// serve finds a way to the application for a CONNECT that was admitted: c.shortcut, or what it returns.
func (c *connection) serve(ctx context.Context, s call, a appDial) (_ Conn, failed *Error) {
	short, err := s.Shortcut(ctx, c.p.o.Network, a)
	switch {
	case err != nil:
		return nil, c.instead(fail(kindApp, err))
	case short != nil:
		c.shortcut = short
		return nil, nil
	}
	return c.reach(ctx, a)
}

// reach dials the application for a connection that was admitted.
func (c *connection) reach(ctx context.Context, a appDial) (Conn, *Error) {
	up, err := c.p.dialApp(ctx, a)
	if err != nil {
		return nil, c.instead(fail(kindApp, err))
	}
	return up, nil
}
