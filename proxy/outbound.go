package proxy

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"ztun/proxy/brief"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/refusal"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// ServeOutbound takes a connection that the pod's application opens (ztunnel's port 15001). It returns
// when the flow is refused, or accepted and being copied.
func (p *Proxy) ServeOutbound(f Flow) {
	start := time.Now()
	c := p.enter(outbound)
	if c == nil {
		f.Refuse(refusal.Reset)
		return
	}
	c.outbound(f, start)
}

// outbound is the rest of an outbound connection, captured or asked for by SOCKS5.
func (c *connection) outbound(f Flow, start time.Time) {
	defer c.settle()
	p := c.p
	src, dst := canonical(f.Src()), canonical(f.Dst())
	fault("outbound", dst)
	ctx, stop := c.await(f)
	defer stop()
	c.asks, _ = f.(shortcutFlow)
	d, local, err := p.decide(ctx, src, dst, nil, nil)
	if err != nil {
		if ctx.Err() == nil || p.ctx.Err() != nil { // not turned away by a bound, which is said elsewhere
			p.deny(outbound, src, dst, err)
		}
		refuse(f, err)
		return
	}

	a := attempts{c: c, local: local, src: src, dst: dst}
	for {
		c.register(path{start: start, src: src, originalDst: dst, actualDst: d.Actual, protocol: d.Protocol.String()})
		e := entry{outbound: true, src: src, called: dst, dst: d.Actual, protocol: d.Protocol, source: local,
			dest: d.Workload, service: d.Service, start: start}
		if d.Protocol != route.TCP {
			e.mtls = true
			e.hbone = d.Authority()
			e.derived = &derived{id: local.Identity(), hasID: true}
		}
		tctx, cancel := a.context(ctx, &d)
		up, far, failed := c.connect(tctx, local, src, d)
		e.farEnd = far
		cancel()
		if failed != nil {
			if c.reason() == nil {
				if next, ok := a.another(ctx, d, failed); ok {
					d = next
					continue
				}
			}
			c.turnDown(e, f, c.instead(failed))
			return
		}
		// Counted only now, when it is known where it goes: one connect of the application is one connection, however
		// many endpoints were tried for it, and however often its kernel sends the SYN. And a far end beyond a gateway
		// says itself who it is (spec 10.3).
		c.open(e)
		if c.shortcut != nil {
			c.acceptShortcut()
			return
		}
		c.accept(f, up)
		return
	}
}

// turnDown refuses the flow of a failed connection and keeps its books, unless it fails by silence once more: then it
// was counted.
func (c *connection) turnDown(e entry, f Flow, failed *Error) {
	refuse(f, failed)
	if !f.Again() || failed.Refusal() != refusal.Silent {
		c.open(e)
		c.books.record(failed)
	}
	c.leave()
}

// refuse turns a flow down. One that can tell its client more than a SYN's answer can is given the reason.
func refuse(f Flow, err error) {
	var e *Error
	if x, ok := f.(interface{ RefuseFor(error) }); ok {
		x.RefuseFor(err)
	} else if errors.As(err, &e) {
		f.Refuse(e.Refusal())
	} else {
		f.Refuse(refusal.Reset)
	}
}

// decide finds the way of an outbound connection, past endpoints that were tried. An error is an early denial:
// nothing is counted. A trace, if there is one, is told why (`ztun explain`).
func (p *Proxy) decide(ctx context.Context, src, dst netip.AddrPort, tried []*state.Workload, trace *route.Trace) (
	d route.Decision, local *state.Workload, err error) {
	if err := route.CheckOutbound(dst, p.illegal); err != nil {
		return d, nil, err
	}
	view, local, err := p.localWorkload(ctx)
	if err != nil {
		return d, nil, err
	}
	q := route.Question{Network: p.o.Config.NetworkName, Source: local, SrcIP: src.Addr(), Dst: dst, Rand: p.o.Random,
		Trace: trace}
	if unknown := p.asking(ctx, demandWait, view, func(view *state.View, missed *string) {
		q.Missed = missed
		d, err = p.choose(view, q, tried)
	}); unknown != nil {
		return d, local, unknown
	}
	if err == nil {
		d, err = p.resolve(local, d, trace == nil)
	}
	return d, local, err
}

// connect opens the upstream side: a stream of a pooled tunnel whose CONNECT was answered with 200, one of a tunnel
// within such a stream, a plain connection, or one in memory where the endpoint is a pod of this daemon. far is what
// the end beyond a gateway says of itself; nil elsewhere.
func (c *connection) connect(ctx context.Context, local *state.Workload, src netip.AddrPort, d route.Decision) (
	up Conn, far *derived, failed *Error) {
	switch d.Protocol {
	case route.DoubleHBONE:
		return c.connectDouble(ctx, local, src, d)
	case route.HBONE:
		taken := false
		if peer := c.p.localPeer(local, src, &d); peer != nil {
			up, failed, taken = c.connectLocal(ctx, peer, local, src, d)
		}
		if !taken {
			up, failed = c.p.connectHBONE(ctx, local, src, d, request(c.p.baggage(local), src, d))
		}
	default:
		up, failed = c.connectPlain(ctx, d)
	}
	return up, nil, failed
}

// connectPlain finds a way without a tunnel: c.shortcut, or what it returns.
func (c *connection) connectPlain(ctx context.Context, d route.Decision) (Conn, *Error) {
	dctx, cancel := brief.Within(ctx, connectTimeout)
	defer cancel()
	var up Conn
	var err error
	if a := d.Actual.Addr(); d.Passthrough() && a.IsLoopback() {
		// Asked for by SOCKS5: the pod's own loopback, which the network is no way to.
		up, err = c.p.o.Network.DialApp(dctx, netip.AddrPortFrom(a, 0), d.Actual)
	} else {
		if c.asks != nil {
			c.shortcut, err = c.asks.ShortcutPlain(dctx, d.Actual)
		}
		if c.shortcut == nil && err == nil {
			up, err = c.p.o.Network.DialPlain(dctx, d.Actual)
		}
	}
	if err != nil {
		return nil, fail(kindIO, err)
	}
	return up, nil
}

// request is the CONNECT of a connection; both of them, where there are two (spec 2.7).
func request(baggage string, src netip.AddrPort, d route.Decision) hbone.Request {
	host := ""
	if d.Service != nil {
		host = d.Service.Hostname
	}
	return hbone.Request{
		Authority:   d.Authority(),
		Baggage:     baggage,
		Forwarded:   hbone.FormatForwarded(src, host),
		Traceparent: hbone.NewTraceparent(),
	}
}

func (p *Proxy) connectHBONE(ctx context.Context, local *state.Workload, src netip.AddrPort, d route.Decision,
	req hbone.Request) (Conn, *Error) {
	rctx, cancel := brief.Within(ctx, connectTimeout+handshakeTimeout+responseTimeout)
	defer cancel()
	stream, _, err := p.pool.Open(rctx, hbone.Key{
		Source: local.Identity(), Dest: identity.Join(d.SANs()), Addr: d.Actual,
	}, &req)
	if err != nil {
		return nil, tunnelError(err)
	}
	return stream, nil
}

// tunnelError says why a CONNECT came to nothing.
func tunnelError(err error) *Error {
	var e *Error
	var answer *hbone.StatusError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &answer): // its text is ztunnel's already
		return fail(kindStatus, answer)
	}
	return fail(kindH2, err)
}

// said is what a workload's record says of it, formatted.
type said struct {
	of   *state.Workload
	text string
}

// baggage is the pod's own, made anew when its record is another one. Records do not change.
func (p *Proxy) baggage(local *state.Workload) string {
	s := p.said.Load()
	if s == nil || s.of != local {
		s = &said{local, baggageOf(local).Format()}
		p.said.Store(s)
	}
	return s.text
}

func baggageOf(w *state.Workload) hbone.Baggage {
	return hbone.Baggage{
		Cluster: w.ClusterID, Namespace: w.Namespace, WorkloadType: w.WorkloadType, Workload: w.WorkloadName,
		Canonical: w.CanonicalName, Revision: w.CanonicalRevision, Region: w.Locality.Region, Zone: w.Locality.Zone,
	}
}
