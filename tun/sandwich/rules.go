package sandwich

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// Devices of ours where eth0 stays in the pod.
const (
	Out     = "out0"     // in S, in the place of the CNI's device
	peerOut = "ztun-net" // in the pod, its other end
)

// tableBound is where, in the pod, what is bound to its eth0 ends.
const tableBound = 15009

// below are the rules that are ours alone in a pod; main's and default's of the kernel's stay as they are.
const below = 32766

// Rules is the plan that captures a pod whose eth0 stays where it is, by rules in its namespace. S stands beside the
// pod rather than between it and the network, with two veths to it: peer is the application's way into S, peerOut is
// S's way to the network and back. What S consists of is what New has, with Out as its device towards the network; UDP
// and ICMP do not come there, but what of UDP is to go by netstack, and copies of ICMP errors. The order closes gaps:
// before the local table loses its place the rules for what comes in stand, and what leaves is captured last.
func Rules(f Facts, c Config) (Plan, error) {
	if err := f.check(); err != nil {
		return Plan{}, err
	}
	if err := f.stays(); err != nil {
		return Plan{}, err
	}
	s := Facts{Dev: Out, MAC: f.MAC, MTU: f.MTU}
	for _, a := range f.sorted() {
		r := route(netip.PrefixFrom(unspecified(a), 0), Out, unix.RT_TABLE_MAIN)
		r.Via, r.Scope = gateway(a), 0
		s.Addrs = append(s.Addrs, Addr{Prefix: host(a)})
		s.Routes = append(s.Routes, r)
		s.Neighs = append(s.Neighs, Neigh{Dev: Out, Addr: gateway(a), MAC: gatewayMAC})
	}
	var p Plan
	p.add(S, inside(s, Config{DNS: c.DNS})...)
	p.add(S, Pair{Dev: Out, MAC: f.MAC, Peer: peerOut, PeerMAC: gatewayMAC, MTU: f.MTU})
	p.add(S, outside(s)...)
	for _, dev := range []string{peer, peerOut} {
		p.add(Pod, ours(dev)...)
		if f.v6() {
			p.add(Pod, Sysctl{"net/ipv6/conf/" + dev + "/disable_ipv6", "0", true})
		}
	}
	// What comes for a connection of S's may look like one of the pod's own; forwarding drops what has a socket.
	p.add(Pod, sysctl("net/ipv4/tcp_early_demux=0"), sysctl("net/ipv4/udp_early_demux=0"),
		sysctl("net/ipv4/conf/all/rp_filter=0"))
	for _, dev := range []string{f.Dev, peerOut} {
		p.add(Pod, sysctl("net/ipv4/conf/"+dev+"/forwarding=1"))
	}
	p.add(Pod, sysctl("net/ipv4/conf/"+f.Dev+"/rp_filter=0"))
	if f.v6() {
		p.add(Pod, sysctl("net/ipv6/conf/all/forwarding=1"))
	}
	if a := f.own(false); a.IsValid() {
		// Who asks for the address is answered by its route, which is S's now.
		p.add(Pod, sysctl("net/ipv4/neigh/"+f.Dev+"/proxy_delay=0"), Neigh{Dev: f.Dev, Addr: a, Proxy: true})
	}
	p.add(Pod, Up{peer, f.MTU}, Up{peerOut, f.MTU})
	for _, a := range f.sorted() {
		all, gw := netip.PrefixFrom(unspecified(a), 0), gateway(a)
		for _, by := range []struct {
			dev   string
			table int
			src   netip.Addr
			mac   string
		}{{peer, tableApp, a, gatewayMAC}, {peerOut, tableNet, netip.Addr{}, f.MAC}} {
			r := route(all, by.dev, by.table)
			r.Via, r.Src, r.Scope, r.Onlink = gw, by.src, 0, a.Is4()
			p.add(Pod, Neigh{Dev: by.dev, Addr: gw, MAC: by.mac},
				Route{Dst: all, Type: unix.RTN_BLACKHOLE, Table: by.table, Metric: fallbackMetric, Proto: protocol}, r)
		}
		if a.Is4() {
			p.add(Pod, Route{Dst: all, Type: unix.RTN_LOCAL, Dev: f.Dev, Table: tableBound, Scope: unix.RT_SCOPE_HOST,
				Proto: protocol})
		}
	}
	for _, r := range f.outside() {
		r.Table = tableOut
		p.add(Pod, r)
	}
	p.add(Pod, copiesTo(f.Dev, f.sorted(), peerOut)...)
	for _, v6 := range []bool{false, true} {
		p.add(Pod, podRules(f, c, v6)...)
	}
	return p, nil
}

// podRules are the pod's, of one family. What is let past S is named (UDP, ICMP), and all else is S's or ends: a packet
// of TCP that the kernel's dissector takes for another protocol is not UDP, and does not reach a socket.
//
// An IPv4 socket that is bound to a device leaves by it when no route is found (the kernel: "apparently, routing tables
// are wrong. Assume, that the destination is on link"), so that blackholes would not hold it. It gets a route by which
// it leads nowhere else: into the pod itself, for an address that is not there.
func podRules(f Facts, c Config, v6 bool) (out []Action) {
	const tcp, udp, local = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.RT_TABLE_LOCAL
	icmp, bound := uint8(unix.IPPROTO_ICMP), tableBound
	if v6 {
		icmp, bound = unix.IPPROTO_ICMPV6, 0
	}
	a := f.own(v6)
	if !a.IsValid() {
		bound = 0
	}
	add := func(r Rule) { r.V6 = v6; out = append(out, r) }
	for _, k := range c.Keep {
		if k.Local.Addr() != a {
			continue
		}
		l, r := Ports{k.Local.Port(), k.Local.Port()}, Ports{k.Remote.Port(), k.Remote.Port()}
		add(Rule{Pref: 5, Iif: f.Dev, From: k.Remote.Addr(), To: a, Proto: tcp, Sport: r, Dport: l, Table: local})
		add(Rule{Pref: 6, Iif: "lo", From: a, To: k.Remote.Addr(), Proto: tcp, Sport: l, Dport: r,
			Table: unix.RT_TABLE_MAIN})
	}
	dns := Ports{53, 53}
	if c.Native && c.DNS && a.IsValid() {
		// Nameservers' answers are netstack's, which asks for the pod, but for those to a nameserver in it.
		add(Rule{Pref: 8, Iif: f.Dev, To: a, Proto: udp, Sport: dns, Dport: Ports{1, 1023}, Table: local})
		add(Rule{Pref: 9, Iif: f.Dev, To: a, Proto: udp, Sport: dns, Table: tableNet})
	}
	if c.Native || !a.IsValid() {
		add(Rule{Pref: 10, Iif: f.Dev, Proto: udp, Table: local})
	}
	add(Rule{Pref: 11, Iif: f.Dev, Proto: icmp, Table: local})
	if a.IsValid() {
		add(Rule{Pref: 20, Iif: f.Dev, To: a, Table: tableNet})
	}
	add(Rule{Pref: 21, Iif: f.Dev})
	if a.IsValid() {
		add(Rule{Pref: 30, Iif: peer, To: a, Table: local})
		add(Rule{Pref: 40, Iif: peerOut, From: a, Table: tableOut})
	}
	add(Rule{Pref: 31, Iif: peer})
	add(Rule{Pref: 41, Iif: peerOut})
	add(Rule{Pref: 100, Table: local})
	out = append(out, OnlyRules{V6: v6, Below: below})
	switch {
	case !c.Native:
		add(Rule{Pref: 110, Iif: "lo", Oif: f.Dev, Proto: udp, Table: bound})
		if a.IsValid() {
			add(Rule{Pref: 111, Iif: "lo", Proto: udp, Table: tableApp})
		}
	case c.DNS:
		add(Rule{Pref: 110, Iif: "lo", Oif: f.Dev, Proto: udp, Dport: dns, Table: bound})
		if a.IsValid() {
			add(Rule{Pref: 111, Iif: "lo", Proto: udp, Dport: dns, Table: tableApp})
		}
		fallthrough
	default:
		add(Rule{Pref: 112, Iif: "lo", Proto: udp, Table: unix.RT_TABLE_MAIN})
	}
	add(Rule{Pref: 113, Iif: "lo", Proto: icmp, Table: unix.RT_TABLE_MAIN})
	add(Rule{Pref: 114, Iif: "lo", Oif: f.Dev, Table: bound})
	switch {
	case !v6 || !c.Native:
		if a.IsValid() {
			add(Rule{Pref: 115, Iif: "lo", Table: tableApp})
		}
		add(Rule{Pref: 117, Iif: "lo"})
	default:
		// The path MTU of a datagram is learnt for a route that is asked for without a protocol: it has to be main's, by
		// which datagrams leave.
		if a.IsValid() {
			add(Rule{Pref: 115, Iif: "lo", Proto: tcp, Table: tableApp})
		}
		for _, proto := range []uint8{tcp, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_UDPLITE, unix.IPPROTO_L2TP,
			unix.IPPROTO_IPIP, unix.IPPROTO_IPV6, unix.IPPROTO_GRE, unix.IPPROTO_ESP, unix.IPPROTO_AH, unix.IPPROTO_RAW} {
			add(Rule{Pref: 116, Iif: "lo", Proto: proto})
		}
	}
	return out
}

// copiesTo have ICMP errors reach a device as well as the pod.
func copiesTo(dev string, own []netip.Addr, to string) (out []Action) {
	for _, c := range copies(dev, own) {
		if c := c.(Copy); c.To == Net {
			c.To = to
			out = append(out, c)
		}
	}
	return out
}

// stays says why a pod whose eth0 stays where it is cannot be captured.
func (f Facts) stays() error {
	switch {
	case len(f.Others) > 0:
		return fmt.Errorf("%w by rules: beside %s it has %s, and its connections there would be captured, too", ErrUnfit,
			f.Dev, strings.Join(f.Others, ", "))
	case len(f.Rules) > 0:
		return fmt.Errorf("%w by rules: it has rules of its own (%s), which may lead past ours", ErrUnfit,
			strings.Join(f.Rules, "; "))
	}
	for _, r := range f.Routes {
		if r.Proto == unix.RTPROT_RA {
			return fmt.Errorf("%w by rules: the route to %s is from a router advertisement, and the kernel forgets it where "+
				"IPv6 is forwarded", ErrUnfit, r.Dst)
		}
	}
	return nil
}

// UndoRules is the plan that takes all of Rules' plan out of the pod's namespace, from whatever state it was left in.
// It needs no S.
func UndoRules(f Facts) Plan {
	var p Plan
	p.add(Pod, NoRules{}, NoRules{V6: true}, Absent{peer}, Absent{peerOut}, NoRoutes{}, NoRoutes{V6: true},
		NoCopies{f.Dev})
	if a := f.own(false); a.IsValid() {
		p.add(Pod, NoProxy{f.Dev, a})
	}
	for _, s := range append(f.Wide[:len(f.Wide):len(f.Wide)], f.Settings...) {
		p.add(Pod, s)
	}
	return p
}
