package proxy

import (
	"context"
	"encoding/binary"
	"net/netip"
	"time"

	"ztun/proxy/brief"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// appDial is how an admitted connection reaches the application.
type appDial struct {
	src, dst netip.AddrPort // the application sees src.Addr() as its client, with a port of ours
	header   []byte         // written first, and not counted
}

// appDial is that of a CONNECT. An application tunnel with PROXY protocol is told who calls what, and, if
// so configured, is dialled on loopback: its listener is an implementation detail of the pod (spec 4.5).
func (p *Proxy) appDial(t *tunnel, in route.InboundDecision) appDial {
	a := appDial{src: netip.AddrPortFrom(t.src.Addr(), 0), dst: in.App}
	if in.Tunnel != state.TunnelProxy {
		return a
	}
	id := ""
	if t.hasPeer {
		id = t.peer.String()
	}
	a.header = proxyHeader(t.src, in.ProxyDst, id)
	if p.o.Config.LocalhostAppTunnel {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if in.App.Addr().Is6() {
			loopback = netip.IPv6Loopback()
		}
		a.src, a.dst = netip.AddrPortFrom(loopback, 0), netip.AddrPortFrom(loopback, in.App.Port())
	}
	return a
}

// dialApp connects to the application, within the connect timeout.
func (p *Proxy) dialApp(ctx context.Context, a appDial) (Conn, error) {
	ctx, cancel := brief.Within(ctx, connectTimeout)
	defer cancel()
	up, err := p.o.Network.DialApp(ctx, a.src, a.dst)
	if err != nil || len(a.header) == 0 {
		return up, err
	}
	up.SetWriteDeadline(time.Now().Add(connectTimeout))
	defer up.SetWriteDeadline(time.Time{})
	if _, err := up.Write(a.header); err != nil {
		abort(up)
		return nil, err
	}
	return up, nil
}

// probeApp asks whether the application could be reached, within the connect timeout.
func (p *Proxy) probeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	return p.o.Network.ProbeApp(ctx, src, dst)
}

// tlvIdentity is the TLV that carries the caller's SPIFFE id. Istio's waypoints look for it.
const tlvIdentity = 0xd0

// proxyHeader is a PROXY protocol v2 header (haproxy's proxy-protocol.txt, 2.2) for TCP: command PROXY,
// both addresses, and the identity if there is one. Addresses of different families cannot be said; then
// there are none and the family is unspecified, as ztunnel has it (spec 4.6).
func proxyHeader(src, dst netip.AddrPort, id string) []byte {
	h := append(make([]byte, 0, 64+len(id)), "\r\n\r\n\x00\r\nQUIT\n"...)
	const unspec, tcp4, tcp6 = 0x01, 0x11, 0x21
	family := byte(unspec)
	switch {
	case src.Addr().Is4() && dst.Addr().Is4():
		family = tcp4
	case src.Addr().Is6() && dst.Addr().Is6():
		family = tcp6
	}
	h = append(h, 0x21, family, 0, 0) // version 2, PROXY; the length follows
	body := len(h)
	if family != unspec {
		h = append(h, src.Addr().AsSlice()...)
		h = append(h, dst.Addr().AsSlice()...)
		h = binary.BigEndian.AppendUint16(h, src.Port())
		h = binary.BigEndian.AppendUint16(h, dst.Port())
	}
	if id != "" {
		h = append(h, tlvIdentity)
		h = binary.BigEndian.AppendUint16(h, uint16(len(id)))
		h = append(h, id...)
	}
	binary.BigEndian.PutUint16(h[body-2:], uint16(len(h)-body))
	return h
}
