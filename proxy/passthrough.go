package proxy

import (
	"net/netip"
	"time"

	"ztun/proxy/rbac"
	"ztun/proxy/refusal"
	"ztun/proxy/route"
)

// ServePassthrough takes a plaintext connection from the network to the pod's application (ztunnel's
// port 15006). It returns when the flow is refused, or accepted and being copied.
func (p *Proxy) ServePassthrough(f Flow) { p.passthrough(f, true) }

// ServeProbe is ServePassthrough for a connection that a socket of the node's own opens: policy is not asked, as the
// kubelet has no identity and restarts what does not answer it. Whoever calls it has made sure of that.
func (p *Proxy) ServeProbe(f Flow) { p.passthrough(f, false) }

// passthrough serves a plaintext connection; judged: if policy lets it pass.
func (p *Proxy) passthrough(f Flow, judged bool) {
	start := time.Now()
	c := p.enter(passthrough)
	if c == nil {
		f.Refuse(refusal.Reset)
		return
	}
	defer c.settle()
	src, dst := canonical(f.Src()), canonical(f.Dst())
	fault("passthrough", dst)
	ctx, stop := c.await(f)
	defer stop()
	refuse := func(err error) {
		if ctx.Err() == nil || p.ctx.Err() != nil { // not turned away by a bound, which is said elsewhere
			p.deny(passthrough, src, dst, err)
		}
		f.Refuse(refusal.Reset)
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
	e := entry{
		src: src, dst: dst, derived: &derived{},
		source:  p.peer(ctx, view, src.Addr()),
		dest:    local,
		service: in.Service,
		start:   start,
	}
	q := rbac.Question{Src: src.Addr(), Dst: dst}
	c.register(path{inbound: true, start: start, src: src, originalDst: dst, actualDst: dst, protocol: route.TCP.String(),
		policy: q, exempt: !judged})
	var failed *Error
	if judged {
		failed = c.admit(ctx, p.policyLog(src, ""), local)
	}
	if failed == nil {
		if err := p.probeApp(ctx, src.Addr(), dst); err != nil {
			failed = c.instead(fail(kindApp, err))
		}
	}
	if failed != nil {
		c.turnDown(e, f, failed)
		return
	}
	// Anybody can send a SYN in anybody's name: only whoever has ended the handshake is a client, which is counted and
	// which the application sees. From here on a failure is a reset of what the client takes for connected.
	down, err := f.Accept()
	if err != nil {
		c.leave()
		return
	}
	c.open(e)
	up, failed := c.reach(ctx, appDial{src: netip.AddrPortFrom(src.Addr(), 0), dst: dst})
	if failed != nil {
		abort(down)
		c.books.record(failed)
		return
	}
	c.carry(down, up)
}
