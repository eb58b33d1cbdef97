package sandwich

import (
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ztun/proxy/ports"
)

// Devices of ours.
const (
	In  = "in0"      // in S, the other end of the pod's eth0
	App = "ztun-app" // in S, the TUN towards the application
	Net = "ztun-up"  // in S, the TUN towards the network
	// Live, in S, is a TUN that carries nothing and, unlike the others, ends with the daemon, and with it the routes by
	// which the mesh's packets come to S's sockets. What calls HBONE's port then ends in Net, which nobody reads, and has
	// no answer until the next daemon; S's kernel, without a listener, would refuse it.
	Live = "ztun-live"

	peer = "ztun-pod" // in the pod, what is going to be eth0 in the last moment
)

// The tables of S.
const (
	tableApp   = 15001 // to ztun-app
	tableOut   = 15005 // to the network, for what S forwards
	tableNet   = 15006 // to ztun-up
	tablePod   = 15007 // to in0
	tableLocal = 15008 // to S's own sockets: ICMP
	tableMesh  = 15010 // to S's own sockets as long as the daemon lives: HBONE

	fallbackMetric = 4000 // of the blackholes below the devices' routes
	protocol       = 158  // of our routes and rules, as steer's
)

// The pod's gateway, which is in0; no packet on the network ever has these.
const gatewayMAC = "02:00:00:00:00:01"

var gateway4, gateway6 = netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")

// Config is what is to be captured how.
type Config struct {
	DNS bool // the pod's UDP to port 53 goes to netstack
	// Native has UDP and ICMP forwarded by the kernel, which needs tc to copy ICMP. Else all goes to netstack.
	Native bool
	// Keep are the connections that go on natively.
	Keep []Conn
}

// New is the plan that captures a pod of these facts. The TUNs must be there. The order closes gaps: S's rules stand
// before the network's device comes into it, the pod's own device comes last.
func New(f Facts, c Config) (Plan, error) {
	if err := f.check(); err != nil {
		return Plan{}, err
	}
	var p Plan
	p.add(S, inside(f, c)...)
	p.add(Pod, Move{Dev: f.Dev})
	p.add(S, outside(f)...)
	if c.Native {
		p.add(S, copies(f.Dev, f.sorted())...)
	}
	p.add(Pod, Rename{peer, f.Dev})
	if f.v6() {
		p.add(Pod, Sysctl{"net/ipv6/conf/" + f.Dev + "/disable_ipv6", "0", true},
			Sysctl{"net/ipv6/conf/" + f.Dev + "/accept_dad", "0", true})
	}
	p.add(Pod, Up{f.Dev, f.MTU})
	for _, a := range f.sorted() {
		ad, gw := Addr{Dev: f.Dev, Prefix: host(a)}, gateway(a)
		if a.Is6() {
			ad.Flags = unix.IFA_F_NODAD
		}
		p.add(Pod, ad, Neigh{Dev: f.Dev, Addr: gw, MAC: gatewayMAC})
		if a.Is4() {
			p.add(Pod, route(host(gw), f.Dev, unix.RT_TABLE_MAIN))
		}
		r := route(netip.PrefixFrom(unspecified(a), 0), f.Dev, unix.RT_TABLE_MAIN)
		r.Via, r.Src, r.Scope = gw, a, 0
		p.add(Pod, r)
	}
	return p, nil
}

func (p *Plan) add(where Where, all ...Action) {
	for _, a := range all {
		p.Steps = append(p.Steps, Step{where, a})
	}
}

// inside is what S consists of before it has a device towards the network.
func inside(f Facts, c Config) (out []Action) {
	s := func(a ...Action) { out = append(out, a...) }
	s(Up{Dev: "lo"})
	for _, key := range []string{"net/ipv4/ip_forward=1", "net/ipv4/conf/all/rp_filter=0",
		"net/ipv4/conf/default/rp_filter=0", "net/ipv4/conf/all/send_redirects=0",
		"net/ipv4/conf/default/send_redirects=0"} {
		s(sysctl(key))
	}
	for _, key := range []string{"net/ipv6/conf/all/forwarding=1", "net/ipv6/conf/all/accept_dad=0",
		"net/ipv6/conf/default/accept_dad=0", "net/ipv6/conf/default/accept_ra=0"} {
		a := sysctl(key)
		a.Try = true
		s(a)
	}
	if c.Native { // the pod answers
		s(sysctl("net/ipv4/icmp_echo_ignore_all=1"), Sysctl{"net/ipv6/icmp/echo_ignore_all", "1", true})
	}
	s(Pair{Dev: In, MAC: gatewayMAC, Peer: peer, PeerMAC: f.MAC, MTU: f.MTU})
	for _, dev := range []string{In, App, Net, Live} {
		s(ours(dev)...)
	}
	for _, v6 := range []bool{false, true} {
		s(rules(f, c, v6)...)
	}
	for _, dev := range []string{In, App, Net, Live} {
		s(Up{dev, f.MTU})
	}
	if f.v6() {
		s(Addr{Dev: In, Prefix: netip.PrefixFrom(gateway6, 64), Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_LINK})
	}
	for _, a := range f.sorted() {
		all := netip.PrefixFrom(unspecified(a), 0)
		s(route(all, App, tableApp), route(all, Net, tableNet), route(host(a), In, tablePod),
			Route{Dst: host(a), Type: unix.RTN_LOCAL, Dev: Live, Table: tableMesh, Proto: protocol, Scope: scopeHost(a.Is6())},
			Neigh{Dev: In, Addr: a, MAC: f.MAC})
	}
	return out
}

// ours are the settings of a device of ours: what comes by it may have any source, the pod's own among them.
func ours(dev string) []Action {
	return []Action{sysctl("net/ipv4/conf/" + dev + "/accept_local=1"), sysctl("net/ipv4/conf/" + dev + "/rp_filter=0"),
		Sysctl{"net/ipv6/conf/" + dev + "/addr_gen_mode", "1", true}}
}

// outside is what S has of the device towards the network.
func outside(f Facts) (out []Action) {
	s := func(a ...Action) { out = append(out, a...) }
	if f.v6() {
		for _, key := range []string{"conf/DEV/proxy_ndp=1", "neigh/DEV/proxy_delay=0", "conf/DEV/accept_ra=0"} {
			s(sysctl("net/ipv6/" + strings.Replace(key, "DEV", f.Dev, 1)))
		}
	}
	s(Up{f.Dev, f.MTU})
	for _, a := range f.sorted() {
		if a.Is4() {
			s(Addr{Dev: In, Prefix: host(a)})
		} else {
			s(Neigh{Dev: f.Dev, Addr: a, Proxy: true})
		}
	}
	for _, table := range []int{unix.RT_TABLE_MAIN, tableOut} {
		for _, r := range f.outside() {
			r.Table = table
			s(r)
		}
	}
	for _, n := range f.Neighs {
		s(n)
	}
	return out
}

// sorted are the pod's own addresses, IPv4's first.
func (f Facts) sorted() []netip.Addr {
	own := f.Own()
	slices.SortFunc(own, netip.Addr.Compare)
	return own
}

func (f Facts) v6() bool { return slices.ContainsFunc(f.Own(), netip.Addr.Is6) }

// own is the pod's address of a family; invalid: it has none.
func (f Facts) own(v6 bool) (a netip.Addr) {
	for _, o := range f.Own() {
		if o.Is6() == v6 {
			a = o
		}
	}
	return a
}

// gateway is the pod's of a's family.
func gateway(a netip.Addr) netip.Addr {
	if a.Is4() {
		return gateway4
	}
	return gateway6
}

// rules are what S consists of, of one family; a family that the pod has no address of ends.
func rules(f Facts, c Config, v6 bool) (out []Action) {
	icmp := uint8(unix.IPPROTO_ICMP)
	if v6 {
		icmp = unix.IPPROTO_ICMPV6
	}
	a := f.own(v6)
	add := func(r Rule) { r.V6 = v6; out = append(out, r) }
	const tcp, udp = unix.IPPROTO_TCP, unix.IPPROTO_UDP
	mesh, answers := Ports{ports.HBONE, ports.HBONE}, Ports{ports.MeshMin, ports.MeshMax}
	unspec := netip.IPv4Unspecified()
	if v6 {
		unspec = netip.IPv6Unspecified()
	}
	for _, t := range []int{tableApp, tableNet, tablePod} {
		out = append(out, Route{Dst: netip.PrefixFrom(unspec, 0), Type: unix.RTN_BLACKHOLE, Table: t,
			Metric: fallbackMetric, Proto: protocol})
	}
	if a.IsValid() {
		out = append(out, Route{Dst: host(a), Type: unix.RTN_LOCAL, Dev: "lo", Table: tableLocal, Proto: protocol,
			Scope: scopeHost(v6)})
		for _, k := range c.Keep {
			if k.Local.Addr() != a {
				continue
			}
			l, r := Ports{k.Local.Port(), k.Local.Port()}, Ports{k.Remote.Port(), k.Remote.Port()}
			add(Rule{Pref: 5, Iif: f.Dev, From: k.Remote.Addr(), To: a, Proto: tcp, Sport: r, Dport: l, Table: tablePod})
			add(Rule{Pref: 6, Iif: In, From: a, To: k.Remote.Addr(), Proto: tcp, Sport: l, Dport: r,
				Table: tableOut})
		}
		add(Rule{Pref: 10, Iif: f.Dev, Proto: tcp, Dport: mesh, Table: tableMesh})
		add(Rule{Pref: 11, Iif: f.Dev, Proto: tcp, Sport: mesh, Dport: answers, Table: tableMesh})
		add(Rule{Pref: 20, Iif: f.Dev, To: a, Proto: tcp, Table: tableNet})
		if c.Native {
			if c.DNS { // nameservers' answers are netstack's, which asks for the pod, but for those to a nameserver in it
				add(Rule{Pref: 18, Iif: f.Dev, To: a, Proto: udp, Sport: Ports{53, 53}, Dport: Ports{1, 1023}, Table: tablePod})
				add(Rule{Pref: 19, Iif: f.Dev, To: a, Proto: udp, Sport: Ports{53, 53}, Table: tableNet})
			}
			add(Rule{Pref: 21, Iif: f.Dev, To: a, Proto: udp, Table: tablePod})
			add(Rule{Pref: 22, Iif: f.Dev, To: a, Proto: icmp, Table: tableLocal})
		} else {
			add(Rule{Pref: 21, Iif: f.Dev, To: a, Proto: udp, Table: tableNet})
			add(Rule{Pref: 22, Iif: f.Dev, To: a, Proto: icmp, Table: tableNet})
		}
		// ICMP errors about the mesh's connections that netstack gives back.
		add(Rule{Pref: 23, Iif: Net, To: a, Proto: icmp, Table: tableLocal})
		add(Rule{Pref: 24, Iif: Net, To: a})
		add(Rule{Pref: 25, Iif: Net, Table: tableOut})
		add(Rule{Pref: 30, Iif: In, From: a, Proto: tcp, Table: tableApp})
		if c.Native {
			if c.DNS {
				add(Rule{Pref: 31, Iif: In, From: a, Proto: udp, Dport: Ports{53, 53}, Table: tableApp})
			}
			add(Rule{Pref: 32, Iif: In, From: a, Proto: udp, Table: tableOut})
			add(Rule{Pref: 33, Iif: In, From: a, Proto: icmp, Table: tableOut})
		} else {
			add(Rule{Pref: 32, Iif: In, From: a, Proto: udp, Table: tableApp})
			add(Rule{Pref: 33, Iif: In, From: a, Proto: icmp, Table: tableApp})
		}
	}
	if v6 { // neighbour discovery of the pod's gateway
		add(Rule{Pref: 29, Iif: In, To: gateway6, Proto: icmp, Table: unix.RT_TABLE_LOCAL})
	}
	add(Rule{Pref: 34, Iif: In})
	if a.IsValid() {
		add(Rule{Pref: 40, Iif: App, To: a, Table: tablePod})
	}
	add(Rule{Pref: 41, Iif: App})
	add(Rule{Pref: 200, Table: unix.RT_TABLE_LOCAL})
	add(Rule{Pref: 201, Iif: f.Dev})
	add(Rule{Pref: 32766, Table: unix.RT_TABLE_MAIN})
	return append(out, OnlyRules{V6: v6})
}

// outside are the routes by the CNI's device as S has them: on-link ones first, via a gateway then, default last.
// Without source addresses: our sockets bind to the pod's.
func (f Facts) outside() []Route {
	var parts [3][]Route
	for _, r := range f.Routes {
		own := slices.ContainsFunc(f.Own(), func(a netip.Addr) bool { return r.Dst == host(a) })
		if own || r.Table != unix.RT_TABLE_MAIN || r.Dst.Addr().IsLinkLocalUnicast() && r.Dst.Addr().Is6() ||
			r.Dst.Addr().IsMulticast() {
			continue
		}
		n := r
		n.Src, n.Proto, n.Onlink = netip.Addr{}, protocol, r.Via.Is4()
		i := 0
		if r.Via.IsValid() {
			i++
		}
		if r.Dst.Bits() == 0 {
			i = 2
		}
		parts[i] = append(parts[i], n)
	}
	return slices.Concat(parts[:]...)
}

// lastCopy is the highest preference of copies.
const lastCopy = 4

// copies have ICMP reach the pod as well as S: all of IPv4's, and errors and echoes of IPv6's, where the rest is
// neighbour discovery, for S alone. Errors reach netstack, too, which has connections of its own.
func copies(dev string, own []netip.Addr) (out []Action) {
	for _, a := range own {
		if a.Is4() {
			out = append(out, Copy{From: dev, Dst: a, To: In, Pref: 1},
				Copy{From: dev, Dst: a, Types: []Type{{3, 0xff}}, To: Net, Pref: 2})
			continue
		}
		errs := []Type{{1, 0xff}, {2, 0xff}, {3, 0xff}, {4, 0xff}}
		out = append(out, Copy{From: dev, Dst: a, Types: append(slices.Clone(errs), Type{128, 0xfe}), To: In, Pref: 3},
			Copy{From: dev, Dst: a, Types: errs, To: Net, Pref: 4})
	}
	return out
}

// Undo is the plan that gives a pod of these facts its device back, from whatever state New's plan was left in.
func Undo(f Facts) Plan {
	p := Plan{Steps: []Step{{S, Absent{In}}, {Pod, Absent{peer}}, {S, Move{Dev: f.Dev, Index: f.Index}}}}
	pod := func(a Action) { p.Steps = append(p.Steps, Step{Pod, a}) }
	// Some settings decide what becoming up does.
	for _, s := range f.Settings {
		if strings.HasSuffix(s.Path, "/disable_ipv6") || strings.HasSuffix(s.Path, "/addr_gen_mode") {
			pod(s)
		}
	}
	pod(Sysctl{"net/ipv6/conf/" + f.Dev + "/accept_dad", "0", true}) // the addresses are the pod's: no second test
	pod(Up{f.Dev, f.MTU})
	for _, a := range f.Addrs {
		pod(a)
	}
	for _, via := range []bool{false, true} {
		for _, r := range f.Routes {
			if r.Via.IsValid() == via {
				pod(r)
			}
		}
	}
	for _, n := range f.Neighs {
		pod(n)
	}
	for _, s := range f.Settings {
		pod(s)
	}
	return p
}

func sysctl(s string) Sysctl {
	path, value, _ := strings.Cut(s, "=")
	return Sysctl{Path: path, Value: value}
}

// route is one of ours by a device.
func route(dst netip.Prefix, dev string, table int) Route {
	r := Route{Dst: dst, Type: unix.RTN_UNICAST, Dev: dev, Table: table, Proto: protocol}
	if dst.Addr().Is4() {
		r.Scope = unix.RT_SCOPE_LINK
	}
	return r
}

func scopeHost(v6 bool) int {
	if v6 {
		return 0
	}
	return unix.RT_SCOPE_HOST
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
