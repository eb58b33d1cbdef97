package proxy

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// ServeOutbound takes a connection that the pod's application opens (ztunnel's port 15001). It returns
// when the flow is refused, or accepted and being copied.
func (p *Proxy) ServeOutbound(f Flow) {
	start := time.Now()
	v := p.enter(outbound)
	if v == nil {
		f.Refuse(RefuseReset)
		return
	}
	src, dst := canonical(f.Src()), canonical(f.Dst())
	d, local, err := p.decide(src, dst)
	if err != nil {
		p.deny(true, src, dst, err)
		f.Refuse(RefuseReset)
		v.leave()
		return
	}

	ctx, stop := context.WithCancel(p.ctx)
	defer stop()
	l := &live{src: src, originalDst: dst, actualDst: d.Actual, protocol: d.Protocol.String(), stop: stop}
	v.register(l)

	in := connectionInput{outbound: true, src: src, dst: d.Actual, source: local, dest: d.Workload, service: d.Service, start: start}
	if d.Protocol != route.TCP {
		in.mtls = true
		in.hbone = d.Authority
		in.derived = &derived{id: local.Identity(), hasID: true}
	}
	c := p.open(in)
	up, failed := p.connect(ctx, local, src, d)
	if failed != nil {
		failed = l.instead(failed)
		f.Refuse(failed.Refusal())
		c.record(failed)
		v.leave()
		return
	}
	v.accept(c, f, up)
}

// decide finds the way of an outbound connection. An error is an early denial: nothing is counted.
func (p *Proxy) decide(src, dst netip.AddrPort) (d route.Decision, local *state.Workload, err error) {
	if err := route.CheckOutbound(dst, p.illegal); err != nil {
		return d, nil, err
	}
	view, local, err := p.localWorkload(p.ctx)
	if err != nil {
		return d, nil, err
	}
	d, err = route.Decide(view, route.Question{
		Network: p.o.Config.NetworkName, Source: local, SrcIP: src.Addr(), Dst: dst, Rand: p.o.Random,
	})
	if err == nil {
		d, err = p.resolve(d)
	}
	return d, local, err
}

// connect opens the upstream side: a stream of a pooled tunnel whose CONNECT was answered with 200, or
// a plain connection.
func (p *Proxy) connect(ctx context.Context, local *state.Workload, src netip.AddrPort, d route.Decision) (Conn, *Error) {
	switch d.Protocol {
	case route.HBONE:
		return p.connectHBONE(ctx, local, src, d)
	case route.TCP:
		dctx, cancel := context.WithTimeout(ctx, connectTimeout)
		defer cancel()
		up, err := p.o.Network.DialPlain(dctx, d.Actual)
		if err != nil {
			return nil, fail(kindIO, err)
		}
		return up, nil
	}
	return nil, fail(kindRoute, errors.New("destinations in other networks (double HBONE) are not supported yet"))
}

func (p *Proxy) connectHBONE(ctx context.Context, local *state.Workload, src netip.AddrPort, d route.Decision) (Conn, *Error) {
	rctx, cancel := context.WithTimeout(ctx, connectTimeout+handshakeTimeout+responseTimeout)
	defer cancel()
	host := ""
	if d.Service != nil {
		host = d.Service.Hostname
	}
	stream, _, err := p.pool.Open(rctx, hbone.Key{
		Source: local.Identity(), Dest: identity.Join(d.SANs), Addr: d.Actual, SrcIP: src.Addr(),
	}, &hbone.Request{
		Authority:   d.Authority,
		Baggage:     baggageOf(local).Format(),
		Forwarded:   hbone.FormatForwarded(src, host),
		Traceparent: hbone.NewTraceparent(),
	})
	if err != nil {
		var e *Error
		var answer *hbone.StatusError
		switch {
		case errors.As(err, &e):
			return nil, e
		case errors.As(err, &answer): // its text is ztunnel's already
			return nil, fail(kindStatus, answer)
		}
		return nil, fail(kindH2, err)
	}
	return stream, nil
}

// resolve fills in the address of a destination that is known by hostname only (spec 2.6).
func (p *Proxy) resolve(d route.Decision) (route.Decision, error) {
	if d.Hostname == "" {
		return d, nil
	}
	ctx, cancel := context.WithTimeout(p.ctx, connectTimeout)
	defer cancel()
	addrs, err := p.o.Resolver.LookupNetIP(ctx, "ip", d.Hostname)
	if err != nil {
		return d, d.ResolveFailed()
	}
	return d.Resolved(addrs, p.o.Random)
}

func baggageOf(w *state.Workload) hbone.Baggage {
	return hbone.Baggage{
		Cluster: w.ClusterID, Namespace: w.Namespace, WorkloadType: w.WorkloadType, Workload: w.WorkloadName,
		Canonical: w.CanonicalName, Revision: w.CanonicalRevision, Region: w.Locality.Region, Zone: w.Locality.Zone,
	}
}
