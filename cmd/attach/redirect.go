package attach

import (
	"net"
	"net/netip"

	"ztun/proxy"
	"ztun/proxy/refusal"
	"ztun/tun/netns"
)

// Redirect is a connection that came to a listener of ours, brought there by somebody's rules or published at it, as a
// flow to where it was going.
// The kernel has accepted it already: to refuse it is to reset it.
type Redirect struct {
	conn     *net.TCPConn
	src, dst netip.AddrPort
}

// Redirected makes a flow of an accepted connection, which gets place for as long as it is open. Nil: it was reset, as
// there is no place, or nobody knows where it was going.
func (o *Options) Redirected(pod string, place *Share, conn *net.TCPConn) *Redirect {
	if place == nil {
		Reset(conn)
		return nil
	}
	o.Descriptors.Opened(place, conn)
	dst, err := netns.OriginalDst(conn)
	if err != nil {
		o.Logger("pods").Warn("a redirected connection is reset", "pod", pod, "error", err)
		Reset(conn)
		return nil
	}
	return &Redirect{conn: conn, src: addrPort(conn.RemoteAddr()), dst: dst}
}

// Published makes a flow of a connection that was accepted at a port of the host's on behalf of the pod's dst. Nil: as
// Redirected's.
func (o *Options) Published(place *Share, conn *net.TCPConn, dst netip.AddrPort) *Redirect {
	if place == nil {
		Reset(conn)
		return nil
	}
	o.Descriptors.Opened(place, conn)
	return &Redirect{conn: conn, src: addrPort(conn.RemoteAddr()), dst: dst}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// Straight says that nobody has redirected the connection: it was made to the listener itself.
func (r *Redirect) Straight() bool { return r.dst == addrPort(r.conn.LocalAddr()) }

// Src implements proxy.Flow.
func (r *Redirect) Src() netip.AddrPort { return r.src }

// Dst implements proxy.Flow.
func (r *Redirect) Dst() netip.AddrPort { return r.dst }

// Accept implements proxy.Flow.
func (r *Redirect) Accept() (proxy.Conn, error) { return r.conn, nil }

// Refuse implements proxy.Flow: in one way, whichever is called for.
func (r *Redirect) Refuse(refusal.Way) { Reset(r.conn) }

// Again and OnGone implement proxy.Flow: a connection is accepted once, and whoever takes its place closes it.
func (*Redirect) Again() bool   { return false }
func (*Redirect) OnGone(func()) {}
