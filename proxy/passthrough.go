package proxy

import (
	"context"
	"time"

	"ztun/proxy/rbac"
	"ztun/proxy/route"
)

// ServePassthrough carries a plaintext connection from the network to the pod's application
// (ztunnel's port 15006). It returns when the connection has ended.
func (p *Proxy) ServePassthrough(f Flow) {
	start := time.Now()
	if !p.enter(passthrough) {
		f.Refuse(RefuseReset)
		return
	}
	defer p.work.Done()
	p.o.Metrics.socket(reporterDestination, 1)
	defer p.o.Metrics.socket(reporterDestination, -1)

	src, dst := canonical(f.Src()), canonical(f.Dst())
	refuse := func(err error) {
		p.deny(false, src, dst, err)
		f.Refuse(RefuseReset)
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
	c := p.open(connectionInput{
		src: src, dst: dst, derived: &derived{},
		source:  view.WorkloadByAddr(p.o.Config.NetworkName, src.Addr()),
		dest:    local,
		service: in.Service,
		start:   start,
	})

	ctx, stop := context.WithCancel(p.ctx)
	defer stop()
	l := &live{
		inbound: true, src: src, originalDst: dst, actualDst: dst, protocol: route.TCP.String(), stop: stop,
		policy: rbac.Conn{Src: src.Addr(), Dst: dst},
	}
	p.conns.add(l)
	defer p.conns.remove(l)
	failed := p.authorise(local, l)
	var up Conn
	if failed == nil {
		up, failed = p.dialApp(ctx, src, dst)
	}
	if failed != nil {
		if cut := l.reason(); cut != nil {
			failed = cut
		}
		f.Refuse(failed.Refusal())
		c.record(failed)
		return
	}
	down, err := f.Accept()
	if err != nil {
		abort(up)
		c.record(nil)
		return
	}
	p.carry(c, l, down, up)
}
