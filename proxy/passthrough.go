package proxy

import (
	"context"
	"net/netip"
	"time"

	"ztun/proxy/rbac"
	"ztun/proxy/route"
)

// ServePassthrough takes a plaintext connection from the network to the pod's application (ztunnel's
// port 15006). It returns when the flow is refused, or accepted and being copied.
func (p *Proxy) ServePassthrough(f Flow) {
	start := time.Now()
	v := p.enter(passthrough)
	if v == nil {
		f.Refuse(RefuseReset)
		return
	}
	var c *connection
	defer v.settle(&c)
	src, dst := canonical(f.Src()), canonical(f.Dst())
	fault("passthrough", dst)
	ctx, stop := context.WithCancel(p.ctx)
	defer stop()
	f.OnGone(stop)
	refuse := func(err error) {
		if ctx.Err() == nil || p.ctx.Err() != nil { // not turned away by a bound, which is said elsewhere
			p.deny(passthrough, src, dst, err)
		}
		f.Refuse(RefuseReset)
	}
	view, local, err := p.localWorkload(ctx)
	if err != nil {
		refuse(err)
		return
	}
	in, err := route.Passthrough(view, route.PassthroughQuestion{Local: local, Dst: dst, Illegal: p.illegal})
	if err != nil {
		refuse(err)
		return
	}
	ci := connectionInput{
		src: src, dst: dst, derived: &derived{},
		source:  p.peer(ctx, view, src.Addr()),
		dest:    local,
		service: in.Service,
		start:   start,
	}
	l := &live{
		inbound: true, start: start, src: src, originalDst: dst, actualDst: dst, protocol: route.TCP.String(), stop: stop,
		policy: rbac.Conn{Src: src.Addr(), Dst: dst},
	}
	v.register(l)
	f.OnGone(func() { l.sever(fail(kindCrowded, nil)) })
	failed := p.admit(ctx, p.policyLog(src, ""), local, l)
	if failed == nil {
		if err := p.probeApp(ctx, src.Addr(), dst); err != nil {
			failed = l.instead(fail(kindApp, err))
		}
	}
	if failed != nil {
		v.turnDown(ci, f, failed)
		return
	}
	// Anybody can send a SYN in anybody's name: only whoever has ended the handshake is a client, which is counted and which the
	// application sees. From here on a failure is a reset of what the client takes for connected.
	down, err := f.Accept()
	if err != nil {
		v.leave()
		return
	}
	c = p.open(ci)
	up, failed := p.reach(ctx, l, appDial{src: netip.AddrPortFrom(src.Addr(), 0), dst: dst})
	if failed != nil {
		abort(down)
		c.record(failed)
		return
	}
	v.carry(c, down, up)
}
