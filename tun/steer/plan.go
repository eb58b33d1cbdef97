package steer

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"ztun/tun/netns"
)

// Protocol marks our routes and rules (RTA_PROTOCOL, FRA_PROTOCOL), so that they are told from others'. The number is
// free in /etc/iproute2/rt_protos; `ip route` shows "proto 158".
const Protocol = 158

// Where names the namespace that a step belongs to.
type Where uint8

const (
	Node Where = iota + 1 // the namespace in which the node's traffic is routed: the daemon's own
	Pod                   // the pod's namespace
)

// String returns "node" or "pod".
func (w Where) String() string {
	switch w {
	case Node:
		return "node"
	case Pod:
		return "pod"
	}
	return fmt.Sprintf("Where(%d)", uint8(w))
}

// Plan is what shall be true in the namespaces, in the order in which it must become so. Undo goes through it
// backwards.
type Plan struct {
	Steps []Step
}

// Step is one thing that shall be true in one namespace.
type Step struct {
	Where Where
	Do    Action
}

// Action is one of Sysctl, Link, Addr, Route, Rule. String returns the command that a person would type.
type Action interface {
	fmt.Stringer
	action()
}

// Sysctl is a kernel setting, by its path below /proc/sys. Undo leaves it.
type Sysctl struct {
	Path     string // net/ipv4/ip_forward: slashes, since names of devices may have dots
	Value    string
	IfExists bool // a kernel without the setting is good as well
}

// Link sets a device up. Undo leaves it: the TUN devices go away with their files, and lo is not ours.
type Link struct {
	Dev string
	MTU int // 0 leaves it
}

// Addr puts an address on a device.
type Addr struct {
	Dev    string
	Prefix netip.Prefix
}

// RouteType is the kind of a Route.
type RouteType uint8

const (
	Unicast     RouteType = unix.RTN_UNICAST
	Local       RouteType = unix.RTN_LOCAL
	Unreachable RouteType = unix.RTN_UNREACHABLE
)

// Route is a route by a device, or an unreachable one.
type Route struct {
	Type   RouteType
	Dst    netip.Prefix
	Dev    string // "" for Unreachable
	Table  int    // TableMain, or another
	Metric int    // 0 is the kernel's default: 0 for IPv4, 1024 for IPv6
}

// Rule sends some traffic of one protocol to a table.
type Rule struct {
	V6           bool
	Pref         int
	Unbound      bool   // IPv4: only the question of a socket that has no source address yet, "from 0.0.0.0/32"
	Iif          string // the device that it comes from, "" is any; "lo" is what this host sends itself
	Proto        uint8  // unix.IPPROTO_TCP, IPPROTO_ICMP, IPPROTO_ICMPV6
	TOS          uint8  // the DS field, 0 is any; bits of 0x1c only
	Sport, Dport Ports  // TCP only
	Table        int
}

// Ports is a range of ports, both ends included. The zero value is any port.
type Ports struct{ Min, Max uint16 }

// port is the range of one port.
func port(p uint16) Ports { return Ports{p, p} }

// String returns "PORT" or "MIN-MAX", as ip(8) takes it.
func (p Ports) String() string {
	if p.Min == p.Max {
		return fmt.Sprint(p.Min)
	}
	return fmt.Sprintf("%d-%d", p.Min, p.Max)
}

func (Sysctl) action() {}
func (Link) action()   {}
func (Addr) action()   {}
func (Route) action()  {}
func (Rule) action()   {}

// String implements Action.
func (s Sysctl) String() string {
	ignore := ""
	if s.IfExists {
		ignore = "-e "
	}
	return "sysctl " + ignore + "-w " + s.Path + "=" + s.Value
}

// String implements Action.
func (l Link) String() string {
	if l.MTU == 0 {
		return fmt.Sprintf("ip link set %s up", l.Dev)
	}
	return fmt.Sprintf("ip link set %s mtu %d up", l.Dev, l.MTU)
}

// String implements Action.
func (a Addr) String() string {
	s := fmt.Sprintf("ip addr add %s dev %s", a.Prefix, a.Dev)
	if a.Prefix.Addr().Is6() {
		s += " nodad"
	}
	return s
}

// String implements Action.
func (r Route) String() string {
	var b strings.Builder
	b.WriteString("ip ")
	if r.Dst.Addr().Is6() {
		b.WriteString("-6 ")
	}
	b.WriteString("route add ")
	switch r.Type {
	case Local:
		b.WriteString("local ")
	case Unreachable:
		b.WriteString("unreachable ")
	}
	if r.Dst.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(r.Dst.String())
	}
	if r.Dev != "" {
		b.WriteString(" dev " + r.Dev)
	}
	if r.Table != TableMain {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	fmt.Fprintf(&b, " proto %d", Protocol)
	return b.String()
}

// String implements Action.
func (r Rule) String() string {
	var b strings.Builder
	b.WriteString("ip ")
	if r.V6 {
		b.WriteString("-6 ")
	}
	fmt.Fprintf(&b, "rule add pref %d", r.Pref)
	if r.Unbound {
		fmt.Fprintf(&b, " from %s", host(netip.IPv4Unspecified()))
	}
	if r.Iif != "" {
		b.WriteString(" iif " + r.Iif)
	}
	if r.TOS != 0 {
		fmt.Fprintf(&b, " tos %#02x", r.TOS)
	}
	switch r.Proto {
	case unix.IPPROTO_TCP:
		b.WriteString(" ipproto tcp")
	case unix.IPPROTO_ICMP:
		b.WriteString(" ipproto icmp")
	case unix.IPPROTO_ICMPV6:
		b.WriteString(" ipproto ipv6-icmp")
	default:
		fmt.Fprintf(&b, " ipproto %d", r.Proto)
	}
	if r.Sport != (Ports{}) {
		fmt.Fprintf(&b, " sport %s", r.Sport)
	}
	if r.Dport != (Ports{}) {
		fmt.Fprintf(&b, " dport %s", r.Dport)
	}
	table := fmt.Sprint(r.Table)
	if r.Table == TableMain {
		table = "main"
	}
	fmt.Fprintf(&b, " lookup %s protocol %d", table, Protocol)
	return b.String()
}

// String returns one line per step: the namespace and the command.
func (p Plan) String() string {
	var b strings.Builder
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "%-4s  %s\n", s.Where, s.Do)
	}
	return b.String()
}

// Namespaces says where a plan's steps are carried out. A nil one is a namespace that is gone: Apply refuses steps
// for it, Undo takes them for undone. For the daemon's own use netns.Current.
type Namespaces struct {
	Node, Pod *netns.NS
}

func (n Namespaces) get(w Where) *netns.NS {
	switch w {
	case Node:
		return n.Node
	case Pod:
		return n.Pod
	}
	return nil
}
