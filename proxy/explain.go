package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/ports"
	"ztun/proxy/rbac"
	"ztun/proxy/refusal"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// ExplainQuestion is a connection to be explained.
type ExplainQuestion struct {
	Src netip.Addr     // who connects
	Dst netip.AddrPort // what is called; inbound: the pod's own address and the application's port
	// ID is what an inbound connection's tunnel proves; without HasID it is plaintext.
	ID    identity.ID
	HasID bool
	Probe bool // really connect
	// Certificate says what there is for an identity.
	Certificate func(identity.ID) (text string, ok bool)
}

// outcomeText is what refuses a connection, as the one who connects sees it.
func outcomeText(err error) string {
	r := refusal.Reset
	var e *Error
	if errors.As(err, &e) {
		r = e.Refusal()
	}
	return [...]string{
		refusal.Reset:           "connect fails: Connection refused (ECONNREFUSED)",
		refusal.HostUnreachable: "connect fails: No route to host (EHOSTUNREACH)",
		refusal.NetUnreachable:  "connect fails: Network is unreachable (ENETUNREACH)",
		refusal.AdminProhibited: "connect fails: the network forbids it (EHOSTUNREACH, EACCES with IPv6)",
		refusal.Silent:          "connect has no answer and ends by its own timeout (ETIMEDOUT)",
	}[r]
}

const connects = "connect succeeds if the application listens"

// ExplainOutbound says what would happen to a connection that the pod opens. The way is found by what finds it for
// real connections, and a look-up on demand is really made.
func (p *Proxy) ExplainOutbound(ctx context.Context, q ExplainQuestion) *Explanation {
	x := &Explanation{Direction: directions[outbound], Pod: p.o.Info.Namespace + "/" + p.o.Info.Name,
		Called: canonical(q.Dst)}
	src := netip.AddrPortFrom(q.Src, 0)
	var trace route.Trace
	d, local, err := p.decide(ctx, src, x.Called, nil, &trace)
	if local != nil {
		x.add("source", true, workloadText(local))
	}
	for i := range trace.Steps {
		p.explainStep(x, &trace.Steps[i])
	}
	if err != nil {
		step := "route"
		if local == nil && errors.Is(err, &route.Error{Code: route.SelfCall}) {
			step = "called"
		} else if local == nil {
			step = "source"
		}
		x.refuse(step, err)
		return x
	}
	x.Decision = decisionOf(&d)
	x.add("route", true, routeText(&d))
	x.Outcome = connects
	if d.Protocol != route.TCP {
		p.explainTunnel(x, q, local, &d)
		p.predict(x, q.Src, local, &d)
	}
	if q.Probe {
		x.Probe = p.probe(ctx, local, src, d)
	}
	return x
}

// explainStep puts a step of the decision into words.
func (p *Proxy) explainStep(x *Explanation, s *route.Step) {
	switch s.Kind {
	case route.StepCalled:
		switch {
		case s.Service != nil:
			x.add("called", true, fmt.Sprintf("%s is service %s", s.Target, s.Service.Key()))
		case s.Workload != nil:
			x.add("called", true, fmt.Sprintf("%s is workload %s", s.Target, workloadText(s.Workload)))
		default:
			x.add("called", true, fmt.Sprintf("%s is nothing that the mesh knows", s.Target))
		}
	case route.StepServiceWaypoint:
		x.add("waypoint", true, fmt.Sprintf("service %s is reached through the waypoint %s", s.Service.Key(),
			gatewayText(s.Gateway)))
	case route.StepWorkloadWaypoint:
		x.add("waypoint", true, fmt.Sprintf("workload %s is reached through the waypoint %s", s.Workload.UID,
			gatewayText(s.Gateway)))
	case route.StepFromWaypoint:
		x.add("waypoint", true,
			fmt.Sprintf("workload %s has the waypoint %s, which is the caller itself", s.Workload.UID, gatewayText(s.Gateway)))
	case route.StepNetworkGateway:
		x.add("gateway", true,
			fmt.Sprintf("workload %s is in network %q, whose gateway is %s", s.Workload.UID, s.Workload.Network,
				gatewayText(s.Gateway)))
	case route.StepNoPort:
		x.add("endpoints", false, fmt.Sprintf("service %s has no port %d", s.Service.Key(), s.Target.Port()))
	case route.StepPassthrough:
		x.add("endpoints", true, fmt.Sprintf("service %s is passed through to the address that was called", s.Service.Key()))
	case route.StepBalance:
		p.explainBalance(x, s)
	}
}

func (p *Proxy) explainBalance(x *Explanation, s *route.Step) {
	usable, best := 0, -1
	var list []ExplanationCandidate
	for _, c := range s.Candidates {
		e := candidateOf(c.UID, c.Workload)
		e.Rank, e.Weight, e.Excluded, e.Chosen = c.Rank, c.Weight, c.Excluded.String(), c.Chosen
		if c.Excluded == route.NotExcluded {
			usable, best = usable+1, max(best, c.Rank)
		}
		list = append(list, e)
	}
	// The view leaves out whom it says is not well.
	for _, w := range p.o.Knowledge.View().WorkloadsPausing(func() { time.Sleep(100 * time.Microsecond) }) {
		_, backs := w.PortsFor(s.Service.Key())
		if backs && w.Status != state.Healthy && s.Service.Endpoint(w.UID) == nil && len(list) < route.MaxCandidates {
			e := candidateOf(w.UID, w)
			e.Rank, e.Excluded = -1, "it is not healthy"
			list = append(list, e)
		}
	}
	text := fmt.Sprintf("service %s has %d endpoints, %d usable", s.Service.Key(), len(list), usable)
	if s.Workload != nil {
		text += fmt.Sprintf("; %s was drawn", s.Workload.UID)
	}
	step := x.add("endpoints", s.Workload != nil, text)
	step.Candidates = list
}

// explainTunnel says what there is for the tunnel: certificate, and tunnel, or that none is needed.
func (p *Proxy) explainTunnel(x *Explanation, q ExplainQuestion, local *state.Workload, d *route.Decision) {
	if q.Certificate != nil {
		text, ok := q.Certificate(local.Identity())
		x.add("certificate", ok, local.Identity().String()+": "+text)
	}
	if peer := p.localPeer(local, netip.AddrPortFrom(q.Src, 0), d); peer != nil {
		x.add("memory", true, fmt.Sprintf("%s/%s is a pod of this daemon: no tunnel, unless one of the two certificates does "+
			"not do (ZTUN_LOCAL_RELAY)", peer.o.Info.Namespace, peer.o.Info.Name))
		return
	}
	n, streams := p.pool.Has(hbone.Key{Source: local.Identity(), Dest: identity.Join(d.SANs()), Addr: d.Actual})
	text := "none to " + d.Actual.String() + " yet: one is made"
	if n > 0 {
		text = fmt.Sprintf("%d to %s, with %d streams", n, d.Actual, streams)
	}
	x.add("tunnel", true, text)
}

// predict says what the other node's policies would say, as far as this one knows them: by the same decisions, made
// here.
func (p *Proxy) predict(x *Explanation, src netip.Addr, local *state.Workload, d *route.Decision) {
	switch {
	case d.Protocol == route.DoubleHBONE:
		x.add("policies", true, "those of the other network are not known here")
		return
	case d.Waypoint:
		x.add("policies", true, "the waypoint decides by its own")
		return
	}
	view := p.o.Knowledge.View()
	host := ""
	if d.Service != nil {
		host = d.Service.Hostname
	}
	in, err := route.Inbound(view, route.InboundQuestion{Network: p.o.Config.NetworkName, Local: d.Workload,
		LocalAddr: d.Actual.Addr(),
		Authority: d.Authority(), ForwardedHost: host, Illegal: p.illegal})
	if err != nil {
		x.answer("request", statusOf(err), err)
		return
	}
	v, hits := rbac.Explain(view.PoliciesFor(d.Workload), rbac.Question{Src: src, Dst: in.App, ID: local.Identity(),
		HasID: true})
	v = p.o.Policies.missing(v)
	x.policies(v, hits, " (at the other end, as this node knows its policies)")
	if err := v.Err(); err != nil {
		x.answer("", statusUnauthorized, err)
	}
}

const statusUnauthorized = 401

// answer ends an explanation with what the peer would answer.
func (x *Explanation) answer(step string, status int, why error) {
	if step != "" {
		x.add(step, false, why.Error())
	}
	err := fail(kindStatus, &hbone.StatusError{Status: status, Reason: hbone.CleanReason(why.Error())})
	x.Refused, x.Error, x.Outcome = true, err.Error(), outcomeText(err)
}

// ExplainInbound says what would happen to a connection that reaches the pod.
func (p *Proxy) ExplainInbound(ctx context.Context, q ExplainQuestion) *Explanation {
	x := &Explanation{Direction: directions[inbound], Pod: p.o.Info.Namespace + "/" + p.o.Info.Name,
		Called: canonical(q.Dst)}
	src := q.Src.Unmap()
	view, local, err := p.localWorkload(ctx)
	if err != nil {
		x.refuse("pod", err)
		return x
	}
	x.add("pod", true, workloadText(local))
	app, text := appDial{src: netip.AddrPortFrom(src, 0), dst: x.Called}, ""
	if q.HasID {
		var in route.InboundDecision
		in, err = route.Inbound(view, route.InboundQuestion{Network: p.o.Config.NetworkName, Local: local,
			LocalAddr: x.Called.Addr(),
			Authority: x.Called.String(), Illegal: p.illegal})
		if err == nil {
			app = p.appDial(&tunnel{src: app.src, dst: netip.AddrPortFrom(x.Called.Addr(), ports.HBONE), peer: q.ID,
				hasPeer: true}, in)
			x.Called = in.App
		}
		text = fmt.Sprintf("over a tunnel from %s, which proves to be %s, to %s", src, q.ID, x.Called)
	} else {
		x.Direction = directions[passthrough]
		_, err = route.Passthrough(view, route.PassthroughQuestion{Local: local, Dst: x.Called, Illegal: p.illegal})
		text = fmt.Sprintf("in plaintext from %s to %s: it proves no identity", src, x.Called)
	}
	if err != nil {
		x.refuse("request", err)
		return x
	}
	x.add("request", true, text)
	v, hits := rbac.Explain(view.PoliciesFor(local), rbac.Question{Src: src, Dst: x.Called, ID: q.ID, HasID: q.HasID})
	v = p.o.Policies.missing(v)
	x.policies(v, hits, "")
	if err := v.Err(); err != nil {
		e := fail(kindDenied, err)
		x.Refused, x.Error, x.Outcome = true, e.Error(), outcomeText(e)
		return x
	}
	x.Outcome = fmt.Sprintf("the application at %s sees a connection from %s, if it listens", app.dst, app.src.Addr())
	if len(app.header) > 0 {
		x.Outcome += ", and a PROXY header first"
	}
	if q.Probe {
		start := time.Now()
		err := p.probeApp(ctx, app.src.Addr(), app.dst)
		x.Probe = probeOf(start, "application", err, func(err error) *Error { return fail(kindApp, err) })
	}
	return x
}

// probe makes the connection, and ends it as soon as it stands.
func (p *Proxy) probe(ctx context.Context, local *state.Workload, src netip.AddrPort,
	d route.Decision) *ExplanationProbe {
	c := p.enter(outbound)
	if c == nil {
		return &ExplanationProbe{Step: "tunnel", Error: "the daemon is shutting down", Outcome: outcomeText(nil)}
	}
	defer c.leave()
	start := time.Now()
	up, _, failed := c.connect(ctx, local, src, d)
	if failed != nil {
		return probeOf(start, stageOf(failed), failed, nil)
	}
	cancel(up)
	return probeOf(start, "", nil, nil)
}

func probeOf(start time.Time, step string, err error, wrap func(error) *Error) *ExplanationProbe {
	r := &ExplanationProbe{OK: err == nil, Millis: float64(time.Since(start).Microseconds()) / 1000,
		Outcome: "connect succeeds"}
	if err != nil {
		if wrap != nil {
			err = wrap(err)
		}
		r.Step, r.Error, r.Outcome = step, err.Error(), outcomeText(err)
	}
	return r
}

func decisionOf(d *route.Decision) *ExplanationDecision {
	x := &ExplanationDecision{
		Protocol: d.Protocol.String(), NextHop: d.Actual, Authority: d.Authority(), Waypoint: d.Waypoint,
		Alternatives: d.Alternatives(),
	}
	texts := func(ids []identity.ID) (out []string) {
		for _, id := range ids {
			out = append(out, id.String())
		}
		return out
	}
	if d.Protocol != route.TCP {
		x.Identities, x.Inner = texts(d.SANs()), texts(d.FinalSANs)
	}
	if d.Workload != nil {
		x.Workload = d.Workload.UID
	}
	if d.Service != nil {
		x.Service = d.Service.Key().String()
	}
	return x
}

// routeText is a decision in words.
func routeText(d *route.Decision) string {
	more := ""
	if d.Alternatives() {
		more = "; others are tried if it cannot be reached"
	}
	switch {
	case d.Passthrough():
		return fmt.Sprintf("plain TCP to %s, as it was called", d.Actual)
	case d.Protocol == route.TCP:
		return fmt.Sprintf("plain TCP to %s (workload %s does not take HBONE)", d.Actual, d.Workload.UID) + more
	}
	x := decisionOf(d)
	text := fmt.Sprintf("%s to %s, CONNECT %s, expecting %s", d.Protocol, d.Actual, x.Authority,
		strings.Join(x.Identities, " or "))
	if d.Protocol == route.DoubleHBONE {
		text += ", and beyond the gateway " + strings.Join(x.Inner, " or ")
	}
	return text + more
}

func workloadText(w *state.Workload) string {
	var ips []string
	for _, a := range w.Addresses {
		ips = append(ips, a.String())
	}
	text := fmt.Sprintf("%s/%s (uid %s, %s, identity %s, node %s, %s, %s",
		w.Namespace, w.Name, w.UID, strings.Join(ips, " "), w.Identity(), w.Node, w.Protocol, w.Status)
	if w.Network != "" {
		text += ", network " + w.Network
	}
	return text + ")"
}

func gatewayText(g *state.GatewayAddress) string { return fmt.Sprintf("%s port %d", g, g.Port) }
