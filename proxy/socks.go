package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"ztun/proxy/fair"
	"ztun/proxy/refusal"
	"ztun/proxy/rescue"
	"ztun/proxy/route"
	"ztun/proxy/socks"
)

// refusalRead is how long a refused SOCKS5 client may take to read why.
const refusalRead = 500 * time.Millisecond

// ServeSOCKS carries one connection accepted on the pod's SOCKS5 port (15080, loopback). It returns when
// the request is refused, or granted and being copied. raw has to be a *net.TCPConn or another Conn.
func (p *Proxy) ServeSOCKS(raw net.Conn) {
	start := time.Now()
	client, ok := raw.(Conn)
	c := p.enter(outbound)
	if c == nil || !ok {
		raw.Close()
		if c != nil {
			c.leave()
		}
		return
	}
	f := &socksFlow{conn: client, ctx: p.ctx, panics: p.o.Panics, src: addrPort(raw.RemoteAddr())}
	agreed := false
	defer func() {
		if !agreed {
			raw.Close()
			c.leave()
		}
	}()
	if err := f.negotiate(p); err != nil {
		if reply, ok := socks.ReplyOf(err); ok {
			p.bounds.warnings.Log(context.Background(), slog.LevelWarn, "socks", "SOCKS5 handshake failed",
				slog.Any("client", f.src), slog.Any("error", err))
			f.end(reply)
		}
		return
	}
	agreed = true
	c.outbound(f, start)
}

// socksFlow is a Flow whose SYN is a SOCKS5 request.
type socksFlow struct {
	conn     Conn
	ctx      context.Context // the proxy's
	panics   *rescue.Panics
	src, dst netip.AddrPort
}

// Again and OnGone: a request comes once, and has no place to lose.
func (f *socksFlow) Again() bool   { return false }
func (f *socksFlow) OnGone(func()) {}

// negotiate reads the request and finds the address that it means. It is bounded in time and in number.
func (f *socksFlow) negotiate(p *Proxy) error {
	place := p.bounds.greetings.Take(fair.Group(f.src.Addr()), 1, func() { abort(f.conn) })
	if place == nil {
		return net.ErrClosed
	}
	defer place.Release()
	f.conn.SetDeadline(time.Now().Add(handshakeTimeout))
	cut := context.AfterFunc(f.ctx, p.o.Panics.Func("the end of a SOCKS5 handshake", func() {
		f.conn.SetDeadline(time.Unix(1, 0))
	}, nil))
	req, err := socks.Negotiate(f.conn)
	if !cut() {
		return net.ErrClosed // the proxy is closing
	}
	f.conn.SetDeadline(time.Time{})
	if err != nil {
		return err
	}
	addr := req.Addr
	if req.Host != "" {
		if addr, err = p.lookupName(f.ctx, req.Host, f.src.Addr().Is6()); err != nil {
			return err
		}
	}
	f.dst = netip.AddrPortFrom(addr, req.Port)
	return nil
}

// lookupName finds the address of a name that a SOCKS5 client asked for: the first of the client's own
// family, else the first. (ztunnel asks for the client's family only.) A client's family is that of the pod's
// loopback that it came by; if the pod has no address of it, the other one counts.
func (p *Proxy) lookupName(ctx context.Context, host string, v6 bool) (netip.Addr, error) {
	if p.o.Names == nil {
		return netip.Addr{},
			&socks.Error{Reply: socks.NotSupported,
				Err: errors.New("names cannot be resolved: the DNS proxy is off (request for " + strconv.Quote(host) + ")")}
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	addrs, err := p.o.Names(ctx, host)
	if err != nil {
		return netip.Addr{}, &socks.Error{Reply: socks.HostUnreachable, Err: err}
	}
	if w := p.o.Knowledge.View().WorkloadByInfo(p.o.Info); w != nil && len(w.Addresses) > 0 &&
		!slices.ContainsFunc(w.Addresses, func(a netip.Addr) bool { return a.Is6() == v6 }) {
		v6 = !v6
	}
	var first netip.Addr
	for _, a := range addrs {
		a = a.Unmap()
		if a.Is6() == v6 {
			return a, nil
		}
		if !first.IsValid() {
			first = a
		}
	}
	if !first.IsValid() {
		return first, &socks.Error{Reply: socks.HostUnreachable, Err: errors.New("no address for " + strconv.Quote(host))}
	}
	return first, nil
}

func (f *socksFlow) Src() netip.AddrPort { return f.src }
func (f *socksFlow) Dst() netip.AddrPort { return f.dst }

// Accept tells the client that the upstream stands.
func (f *socksFlow) Accept() (Conn, error) {
	f.conn.SetWriteDeadline(time.Now().Add(handshakeTimeout))
	if err := socks.WriteReply(f.conn, socks.Succeeded); err != nil {
		f.conn.Close()
		return nil, err
	}
	f.conn.SetWriteDeadline(time.Time{})
	return f.conn, nil
}

// Refuse is for a refusal without a reason.
func (f *socksFlow) Refuse(r refusal.Way) { f.end(socksReplies[r]) }

// RefuseFor tells the client why it cannot be connected.
func (f *socksFlow) RefuseFor(err error) { f.end(socksReply(err)) }

// end answers and closes. Closing with something unread would reset the connection, and the reset might
// overtake the answer: the client gets a moment to read it.
func (f *socksFlow) end(r socks.Reply) {
	f.conn.SetDeadline(time.Now().Add(refusalRead))
	defer context.AfterFunc(f.ctx, f.panics.Func("the end of a SOCKS5 handshake", func() {
		f.conn.SetDeadline(time.Unix(1, 0))
	}, nil))()
	if socks.WriteReply(f.conn, r) == nil && f.conn.CloseWrite() == nil {
		io.Copy(io.Discard, io.LimitReader(f.conn, 64<<10))
	}
	f.conn.Close()
}

// socksReplies are the replies to what a SYN would be answered.
var socksReplies = [...]socks.Reply{
	refusal.Reset:           socks.ConnectionRefused,
	refusal.HostUnreachable: socks.HostUnreachable,
	refusal.NetUnreachable:  socks.NetworkUnreachable,
	refusal.AdminProhibited: socks.NotAllowed,
	refusal.Silent:          socks.TTLExpired,
}

// socksReply is what a client is told of an error.
func socksReply(err error) socks.Reply {
	var re *route.Error
	var e *Error
	switch {
	case errors.As(err, &re) && re.Code == route.SelfCall:
		return socks.NotAllowed
	case errors.As(err, &re) && (re.Code == route.NoResolvedAddresses || re.Code == route.EmptyResolvedAddresses):
		return socks.HostUnreachable
	case !errors.As(err, &e):
		return socks.ConnectionRefused // no route: what a SYN would get
	}
	switch e.kind {
	case kindDenied, kindPolicyChange:
		return socks.NotAllowed
	case kindUnknownWorkload, kindNothingKnown, kindIdentity, kindDrain:
		return socks.GeneralFailure
	case kindStatus:
		if e.statusIs(401) {
			return socks.NotAllowed
		}
	}
	return socksReplies[e.Refusal()]
}
