package steer

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
	"ztun/proxy/ports"
)

// What NodePlan and PodPlan use in the node's namespace (design.md section 2).
const (
	TableMain  = unix.RT_TABLE_MAIN
	TableHBONE = 15008 // one local route per attached pod; the rules below lead to it
	PrefSource = 8     // rule: which source a process of the node's own gets towards the HBONE port
	PrefReturn = 9     // rule: ICMP errors that the node's TUN gives back
	PrefDport  = 10    // rule: to the HBONE port
	PrefSport  = 11    // rule: from the HBONE port

	// LiveTUN is a TUN device of the daemon's that carries nothing. The routes to the node's sockets go by it, so that
	// they end with the daemon however it ends: what calls the mesh's port then falls through to the node's TUN, which
	// stays and which nobody reads, and has no answer until the next daemon. The node's kernel, without a listener, would
	// refuse it.
	LiveTUN = "ztun-live"

	// FallbackMetric is the metric of a pod's `unreachable` route in the node's main table, larger than that of the
	// route to the node's TUN.
	FallbackMetric = 4000

	// ReturnTOS is the DS field by which the rule of PrefReturn knows the ICMP errors about HBONE that netstack writes
	// back for the kernel's sockets (netstack.ReturnTOS, which has the reasons).
	ReturnTOS = 0x0c

	// MeshPortMin and MeshPortMax are the local ports of the mesh's own calls (netns.SocketOptions.Ports). What comes
	// from the HBONE port to one of them is an answer to the node's sockets; what comes from it to any other port is a
	// packet like others, for the pod's stack, which calls from other ports (netstack.Config.PortMax). Above Linux'
	// default ip_local_port_range, so that no listener of the node gets one by chance; no kernel takes a rule whose
	// range ends at 65535.
	MeshPortMin, MeshPortMax = ports.MeshMin, ports.MeshMax
)

// MeshPorts is the range from MeshPortMin to MeshPortMax.
func MeshPorts() Ports { return Ports{MeshPortMin, MeshPortMax} }

// NodeConfig describes the namespace of an isolated node.
type NodeConfig struct {
	TUN  string // the name of the node's TUN device
	MTU  int    // in bytes, 0 leaves the device's
	IPv6 bool   // plan IPv6 too
}

// PodConfig describes an isolated pod.
type PodConfig struct {
	Name    string       // for messages: namespace/name
	Addrs   []netip.Addr // the pod's own addresses, at most one per family
	TUN     string       // the name of the TUN device in the pod's namespace
	NodeTUN string       // the name of the TUN device in the node's namespace
	MTU     int          // in bytes, 0 leaves the device's
}

// NodePlan is what an isolated node needs once: forwarding (packets for the pods arrive by the node's own devices and
// go to its TUN), a quiet TUN, and the rules that bring the mesh's port, and ICMP errors about it, to the table of
// captured pods.
//
// Which ICMP errors are about the mesh's port no rule can tell: they come out of the node's TUN, and netstack writes
// these back, marked and with the last hop of their TTL, so that what finds no local route in the table (a pod just
// removed) ends instead of coming out of the TUN once more.
//
// A process of the node's own that calls a pod's mesh port asks the routes for a source address first. A local route
// offers the destination itself, with which IPv4 then refuses to send (ENETUNREACH; IPv6 looks for a better one), so
// that question is answered by the main table: the source is the one that any other port of the pod would see. The
// packets, which have a source, go by the table of captured pods like all others.
func NodePlan(c NodeConfig) Plan {
	var p Plan
	add := func(a Action) { p.Steps = append(p.Steps, Step{Node, a}) }
	add(Link{Dev: "lo"})
	add(Sysctl{Path: "net/ipv4/ip_forward", Value: "1"})
	if c.IPv6 {
		add(Sysctl{Path: "net/ipv6/conf/all/forwarding", Value: "1"})
	}
	// The pods' packets to each other come and go by the same device, which the kernel would comment with redirects; and
	// a source behind the TUN need not be routed to it (a pod just removed).
	for _, key := range []string{"rp_filter", "send_redirects", "accept_redirects"} {
		add(Sysctl{Path: "net/ipv4/conf/" + c.TUN + "/" + key, Value: "0"})
	}
	for _, s := range quietIPv6(c.TUN, c.IPv6) {
		add(s)
	}
	add(Link{Dev: c.TUN, MTU: c.MTU})
	for _, s := range quietIPv6(LiveTUN, c.IPv6) {
		add(s)
	}
	add(Link{Dev: LiveTUN})
	add(Rule{Pref: PrefSource, Unbound: true, Iif: "lo", Proto: unix.IPPROTO_TCP, Dport: port(ports.HBONE),
		Table: TableMain})
	for _, v6 := range families(c.IPv6) {
		icmp := uint8(unix.IPPROTO_ICMP)
		if v6 {
			icmp = unix.IPPROTO_ICMPV6
		}
		add(Rule{V6: v6, Pref: PrefReturn, Iif: c.TUN, TOS: ReturnTOS, Proto: icmp, Table: TableHBONE})
		add(Rule{V6: v6, Pref: PrefDport, Proto: unix.IPPROTO_TCP, Dport: port(ports.HBONE), Table: TableHBONE})
		add(Rule{V6: v6, Pref: PrefSport, Proto: unix.IPPROTO_TCP, Sport: port(ports.HBONE), Dport: MeshPorts(),
			Table: TableHBONE})
	}
	return p
}

// PodPlan is what an isolated pod needs: in its namespace the address on the TUN and everything routed into it; in
// the node's namespace the address's mesh port to the node's sockets and the rest to the node's TUN.
//
// The order closes gaps: the `unreachable` routes come first and go last; the pod's own routes come last, when the
// way back stands, and go first.
func PodPlan(c PodConfig) Plan {
	var p Plan
	node := func(a Action) { p.Steps = append(p.Steps, Step{Node, a}) }
	for _, a := range c.Addrs {
		node(Route{Type: Unreachable, Dst: host(a), Table: TableMain, Metric: FallbackMetric})
	}
	for _, a := range c.Addrs {
		node(Route{Type: Unicast, Dst: host(a), Dev: c.NodeTUN, Table: TableMain})
		node(Route{Type: Local, Dst: host(a), Dev: LiveTUN, Table: TableHBONE})
	}
	p.Steps = append(p.Steps, InsidePlan(c).Steps...)
	return p
}

// InsidePlan is the part of PodPlan in the pod's namespace, for a pod whose network is not by the node's routes.
func InsidePlan(c PodConfig) Plan {
	var p Plan
	pod := func(a Action) { p.Steps = append(p.Steps, Step{Pod, a}) }
	has6 := slices.ContainsFunc(c.Addrs, netip.Addr.Is6)
	pod(Link{Dev: "lo"})
	for _, s := range quietIPv6(c.TUN, has6) {
		pod(s)
	}
	for _, a := range c.Addrs {
		pod(Addr{Dev: c.TUN, Prefix: host(a)})
	}
	pod(Link{Dev: c.TUN, MTU: c.MTU})
	for _, a := range c.Addrs {
		any := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			any = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		pod(Route{Type: Unicast, Dst: any, Dev: c.TUN, Table: TableMain})
	}
	return p
}

// CheckPod says why pod cannot be attached beside those that already are: no address, two of a family, an unusable
// one, or one that another has. The namespaces are not consulted; Apply does that.
func CheckPod(attached []PodConfig, pod PodConfig) error {
	if len(pod.Addrs) == 0 {
		return fmt.Errorf("pod %s has no address", pod.Name)
	}
	var seen [2]bool
	for _, a := range pod.Addrs {
		switch {
		case !a.IsValid() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() ||
			a.IsLinkLocalUnicast() || a.Is4In6():
			return fmt.Errorf("pod %s: %s cannot be a pod's address", pod.Name, a)
		case a.Is4() && a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			return fmt.Errorf("pod %s: %s cannot be a pod's address", pod.Name, a)
		}
		family := 0
		if a.Is6() {
			family = 1
		}
		if seen[family] {
			return fmt.Errorf("pod %s: more than one address of a family (%s)", pod.Name, a)
		}
		seen[family] = true
		for _, o := range attached {
			if slices.Contains(o.Addrs, a) {
				return fmt.Errorf("pod %s: address %s is in use by pod %s: %w", pod.Name, a, o.Name, unix.EADDRINUSE)
			}
		}
	}
	return nil
}

// quietIPv6 keeps the kernel from talking to itself on a TUN: no link-local address, no router solicitations, no
// duplicate address detection, no router advertisements taken. Without IPv6 it is turned off altogether.
func quietIPv6(dev string, ipv6 bool) []Sysctl {
	conf := "net/ipv6/conf/" + dev + "/"
	if !ipv6 {
		return []Sysctl{{Path: conf + "disable_ipv6", Value: "1", IfExists: true}}
	}
	return []Sysctl{
		{Path: conf + "addr_gen_mode", Value: "1"},
		{Path: conf + "router_solicitations", Value: "0"},
		{Path: conf + "accept_ra", Value: "0"},
		{Path: conf + "accept_dad", Value: "0"},
		{Path: conf + "disable_ipv6", Value: "0"}, // some container runtimes turn it off for all
	}
}

func families(ipv6 bool) []bool {
	if ipv6 {
		return []bool{false, true}
	}
	return []bool{false}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
