package proxy

import (
	"context"
	"net/netip"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// connectDouble reaches a workload of another network: a stream of the pooled tunnel to that network's
// gateway and, within it, a tunnel of the connection's own to whoever the gateway chooses. The inner one
// is never shared, so that each connection may end at another endpoint (spec 2.9). far is what the far
// end proves and says of itself.
func (c *connection) connectDouble(ctx context.Context, local *state.Workload, src netip.AddrPort, d route.Decision) (
	up Conn, far *derived, failed *Error) {
	p := c.p
	req := request(c.p.baggage(local), src, d)
	outer, failed := p.connectHBONE(ctx, local, src, d, req)
	if failed != nil {
		return nil, nil, failed
	}
	hctx, done := context.WithTimeout(ctx, handshakeTimeout)
	defer done()
	cert, err := p.o.Certs.Certificate(hctx, local.Identity())
	if err != nil {
		cancel(outer)
		return nil, nil, fail(kindIdentity, err)
	}
	conn, cs, err := hbone.Client(hctx, outer, identity.ClientTLS(cert, d.FinalSANs, p.o.Config.TLS), p.turn(netip.Addr{}))
	if err != nil { // outer was closed
		return nil, nil, fail(kindTLS, err)
	}
	inner, err := hbone.NewClientConn(conn, p.o.Config.HBONE)
	if err != nil {
		conn.Close()
		return nil, nil, fail(kindH2, err)
	}
	if c.forget, err = p.track(identity.ClientSide, proof{cert, cs}, inner.Abort); err != nil {
		inner.Abort(err)
		return nil, nil, fail(kindTLS, err)
	}
	c.inner = inner // ended, and waited for, when the connection leaves
	rctx, done := context.WithTimeout(ctx, responseTimeout)
	defer done()
	req.ForwardedNetwork, req.SendForwardedNetwork = p.o.Config.NetworkName, true
	stream, resp, err := inner.Open(rctx, &req)
	inner.Leave() // with this one stream
	if err != nil {
		return nil, nil, tunnelError(err)
	}
	far = &derived{baggage: hbone.ParseBaggage([]string{resp.Baggage})}
	far.id, far.hasID = identity.PeerID(cs)
	return stream, far, nil
}
