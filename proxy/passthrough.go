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
	src, dst := canonical(f.Src()), canonical(f.Dst())
	refuse := func(err error) {
		p.deny(false, src, dst, err)
		f.Refuse(RefuseReset)
		v.leave()
	}
	view, local, err := p.localWorkload(p.ctx)
	if err != nil {
		refuse(err)
		return
	}
	in, err := route.Passthrough(view, route.PassthroughQuestion{Local: local, Dst: dst, Illegal: p.illegal})
	if err != nil {
		refuse(err)
		return
	}
	source := p.peer(p.ctx, view, src.Addr())
	ctx, stop := context.WithCancel(p.ctx)
	defer stop()
	l := &live{
		inbound: true, src: src, originalDst: dst, actualDst: dst, protocol: route.TCP.String(), stop: stop,
		policy: rbac.Conn{Src: src.Addr(), Dst: dst},
	}
	v.register(l)
	failed := p.admit(ctx, p.policyLog(src, ""), local, l)
	c := p.open(connectionInput{
		src: src, dst: dst, derived: &derived{},
		source:  source,
		dest:    local,
		service: in.Service,
		start:   start,
	})
	var up Conn
	if failed == nil {
		up, failed = p.reach(ctx, l, appDial{src: netip.AddrPortFrom(src.Addr(), 0), dst: dst})
	}
	if failed != nil {
		f.Refuse(failed.Refusal())
		c.record(failed)
		v.leave()
		return
	}
	v.accept(c, f, up)
}
