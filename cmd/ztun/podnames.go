package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"ztun/cmd/attach"
	"ztun/proxy/dns"
	"ztun/proxy/ports"
)

// The listeners that a pod finds on its own loopback, in its own namespace: the DNS proxy (ISTIO_META_DNS_PROXY_ADDR,
// 15053) and SOCKS5 (15080). They are kernel sockets, as loopback never reaches the TUN.

// loopback are the addresses to listen on in a pod's namespace.
func loopback(port uint16, ipv6 bool) []netip.AddrPort {
	all := []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)}
	if ipv6 {
		all = append(all, netip.AddrPortFrom(netip.IPv6Loopback(), port))
	}
	return all
}

// listen opens the sockets of what in the pod's namespace; all or none. A pod without IPv6 on its loopback has only the
// other. without is the setting that turns it off.
func (p *pod) listen(what, without string, at []netip.AddrPort, packets bool) (ls []net.Listener, ps []net.PacketConn,
	err error) {
	for _, a := range at {
		var l net.Listener
		if l, err = p.att.Listen("tcp", a.String()); err == nil {
			ls = append(ls, l)
			if packets {
				var c net.PacketConn
				if c, err = p.att.ListenPacket("udp", a.String()); err == nil {
					ps = append(ps, c)
				}
			}
		}
		noIPv6 := a.Addr() == netip.IPv6Loopback() && errors.Is(err, syscall.EADDRNOTAVAIL)
		if noIPv6 || errors.Is(err, syscall.EAFNOSUPPORT) { // a namespace that we cannot enter says so of both families
			err = nil
		}
		if err != nil {
			break
		}
	}
	if err != nil {
		closeAll(ls, ps)
		err = fmt.Errorf("%s: in the pod's namespace: %w", what, err)
		if errors.Is(err, syscall.EADDRINUSE) {
			// As ztunnel: a pod whose names or proxy silently are another program's would be worse.
			err = fmt.Errorf("%w: the pod's application has the port; let it use another one, or run ztun with %s", err, without)
		}
		return nil, nil, err
	}
	return ls, ps, nil
}

func closeAll(ls []net.Listener, ps []net.PacketConn) {
	for _, l := range ls {
		l.Close()
	}
	for _, c := range ps {
		c.Close()
	}
}

// serveNames starts the pod's DNS proxy.
func (p *pod) serveNames(parts *podParts) error {
	c := parts.c
	host, port, _ := net.SplitHostPort(c.DNS.Addr) // checked by the configuration
	at, err := netip.ParseAddrPort(c.DNS.Addr)
	where := []netip.AddrPort{at}
	if err != nil && host == "localhost" {
		n, err := net.LookupPort("udp", port)
		if err != nil {
			return err
		}
		where = loopback(uint16(n), c.Net.IPv6)
	}
	ls, ps, err := p.listen("DNS proxy", "ISTIO_META_DNS_CAPTURE=false or another ISTIO_META_DNS_PROXY_ADDR", where, true)
	if err != nil {
		return err
	}
	own := netip.Addr{}
	if c.Mode.Rootless {
		own = capturedServer(p.spec.IPs)
	}
	p.dns, err = dns.New(dns.Config{
		Client: p.info(), Knowledge: parts.know, Upstream: podUpstream{p.att}, Nameservers: parts.nameservers,
		Own: own,
		Options: dns.Options{ClusterDomain: c.Node.ClusterDomain, PreferredNamespace: c.DNS.PreferredNamespace,
			IPv6:        c.Net.IPv6,
			ExtraSearch: parts.search},
		Packets: ps, Listeners: ls, Rate: c.Stack.DNSRate, Panics: parts.panics, Metrics: parts.dnsMetrics,
		Logger: parts.dnsLog,
	})
	if err != nil {
		closeAll(ls, ps)
		return err
	}
	p.running.Go(parts.panics.Func("a DNS proxy", func() { p.dns.Run(context.Background()) }, nil))
	return nil
}

// ServeDNS implements attach.Handler.
func (p *pod) ServeDNS(q attach.Query) {
	<-p.built
	if p.dns == nil {
		return
	}
	if answer := p.dns.Query(q.Payload(), q.Dst()); answer != nil {
		q.Reply(answer) // a failed reply is a lost packet
	}
}

// serveSOCKS starts the pod's SOCKS5 server.
func (p *pod) serveSOCKS(parts *podParts) error {
	ls, _, err := p.listen("SOCKS5", "UNSTABLE_ENABLE_SOCKS5=false", loopback(ports.SOCKS, parts.c.Net.IPv6), false)
	if err != nil {
		return err
	}
	p.socks = ls
	for _, l := range ls {
		p.running.Go(parts.panics.Func("a SOCKS5 listener", func() {
			for {
				conn, err := l.Accept()
				switch {
				case errors.Is(err, net.ErrClosed):
					return
				case err != nil: // out of descriptors, or the like
					time.Sleep(100 * time.Millisecond)
				default:
					p.running.Go(parts.panics.Func("a SOCKS5 connection", func() { p.proxy.ServeSOCKS(conn) }, nil))
				}
			}
		}, nil))
	}
	return nil
}

// closeLoopback takes nothing new from the pod's loopback and lets queries end until ctx does.
func (p *pod) closeLoopback(ctx context.Context) {
	closeAll(p.socks, nil)
	if p.dns != nil {
		p.dns.Shutdown(ctx)
	}
}

// podUpstream is how what the mesh does not know is asked for: from the pod's own address.
type podUpstream struct{ attach.Ways }

func (u podUpstream) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	return u.DialPlain(ctx, dst)
}
