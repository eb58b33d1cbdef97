package sandwich

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// Where names the namespace of a step.
type Where uint8

const (
	S   Where = iota + 1 // ours, between pod and network
	Pod                  // the pod's
)

// String returns "S" or "pod".
func (w Where) String() string {
	if w == S {
		return "S"
	}
	return "pod"
}

// Plan is what shall be true, in the order in which it must become so.
type Plan struct{ Steps []Step }

// Step is one thing that shall be true in one namespace.
type Step struct {
	Where Where
	Do    Action
}

// Action is one kind of step. String returns the command that a person would type.
type Action interface {
	fmt.Stringer
	// ensure makes it true in p, if it is not: changed.
	ensure(w *world, p *place) (changed bool, err error)
}

// String returns one line per step.
func (p Plan) String() string {
	var b strings.Builder
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "%-3s  %s\n", s.Where, s.Do)
	}
	return b.String()
}

// Sysctl is a setting, by its path below /proc/sys.
type Sysctl struct {
	Path  string `json:"path"`
	Value string `json:"value"`
	// Try: a kernel that has no such setting or refuses the value is good as well.
	Try bool `json:"try,omitempty"`
}

// Up sets a device up.
type Up struct {
	Dev string
	MTU int // 0 leaves it
}

// Pair makes the veth whose end Dev is here and whose end Peer is in the pod.
type Pair struct {
	Dev, MAC, Peer, PeerMAC string
	MTU                     int
}

// Absent deletes a device, with the other end of a pair.
type Absent struct{ Dev string }

// Move moves Dev from where the step is to the other namespace. It is true where Dev is not here (any more).
type Move struct {
	Dev   string
	Index int // that it shall have there; 0: any
}

// Rename renames a device that is down; true when there is none of the old name.
type Rename struct{ From, To string }

// Addr is an address of a device.
type Addr struct {
	Dev       string       `json:"dev"`
	Prefix    netip.Prefix `json:"prefix"`
	Peer      netip.Prefix `json:"peer,omitzero"`
	Broadcast netip.Addr   `json:"broadcast,omitzero"`
	Flags     int          `json:"flags,omitempty"` // IFA_F_NODAD, IFA_F_NOPREFIXROUTE
	Scope     int          `json:"scope,omitempty"`
}

// Route is a route by a device, or a blackhole.
type Route struct {
	Dst    netip.Prefix `json:"dst"`
	Type   int          `json:"type"` // unix.RTN_...
	Dev    string       `json:"dev,omitempty"`
	Via    netip.Addr   `json:"via,omitzero"`
	Onlink bool         `json:"onlink,omitempty"`
	Src    netip.Addr   `json:"src,omitzero"`
	Scope  int          `json:"scope,omitempty"`
	Table  int          `json:"table"`
	Metric int          `json:"metric,omitempty"`
	Proto  int          `json:"proto"`
	MTU    int          `json:"mtu,omitempty"`
	TOS    int          `json:"tos,omitempty"`
}

// Neigh is a permanent neighbour, or an address that the device answers for.
type Neigh struct {
	Dev   string     `json:"dev"`
	Addr  netip.Addr `json:"addr"`
	MAC   string     `json:"mac,omitempty"`
	Proxy bool       `json:"proxy,omitempty"`
}

// Rule sends what it selects to a table, or nowhere (Table 0).
type Rule struct {
	V6           bool
	Pref         int
	Iif          string
	Oif          string     // only the question of a socket that is bound to it
	From, To     netip.Addr // invalid: any
	Proto        uint8
	Sport, Dport Ports
	Table        int // 0: blackhole
}

// Ports is a range, both ends included; zero is any.
type Ports struct{ Min, Max uint16 }

// OnlyRules removes every rule of a family that the plan does not have.
type OnlyRules struct {
	V6    bool
	Below int // of a lower preference than this; 0: of any
}

// NoRules removes every rule of ours of a family, and gives the kernel's for the local table its place back.
type NoRules struct{ V6 bool }

// NoRoutes removes every route of ours of a family.
type NoRoutes struct{ V6 bool }

// NoProxy has a device answer for an address no more.
type NoProxy struct {
	Dev  string
	Addr netip.Addr
}

// NoCopies removes every Copy from a device, and what these hang on where nothing else does.
type NoCopies struct{ Dev string }

// Copy has what comes in by From, is of an ICMP type and for Dst copied to a device. Types of zero length: all.
type Copy struct {
	From  string
	Dst   netip.Addr
	Types []Type
	To    string
	Pref  uint16
}

// Type is one ICMP type, or with a mask several.
type Type struct{ Value, Mask uint8 }

func (s Sysctl) String() string {
	if s.Try {
		return "sysctl -e -w " + s.Path + "=" + s.Value
	}
	return "sysctl -w " + s.Path + "=" + s.Value
}

func (u Up) String() string {
	if u.MTU == 0 {
		return "ip link set " + u.Dev + " up"
	}
	return fmt.Sprintf("ip link set %s mtu %d up", u.Dev, u.MTU)
}

func (p Pair) String() string {
	return fmt.Sprintf("ip link add %s address %s mtu %d type veth peer name %s address %s netns POD", p.Dev, p.MAC,
		p.MTU, p.Peer, p.PeerMAC)
}

func (a Absent) String() string { return "ip link del " + a.Dev }

func (m Move) String() string {
	if m.Index != 0 {
		return fmt.Sprintf("ip link set %s netns OTHER # as number %d", m.Dev, m.Index)
	}
	return "ip link set " + m.Dev + " netns OTHER"
}

func (r Rename) String() string { return "ip link set " + r.From + " name " + r.To }

func (a Addr) String() string {
	s := "ip addr add " + a.Prefix.String()
	if a.Peer.IsValid() {
		s += " peer " + a.Peer.String()
	}
	if a.Broadcast.IsValid() {
		s += " broadcast " + a.Broadcast.String()
	}
	s += " dev " + a.Dev
	if a.Scope != 0 {
		s += fmt.Sprintf(" scope %d", a.Scope)
	}
	if a.Flags&unix.IFA_F_NODAD != 0 {
		s += " nodad"
	}
	if a.Flags&unix.IFA_F_NOPREFIXROUTE != 0 {
		s += " noprefixroute"
	}
	return s
}

func ip(v6 bool) string {
	if v6 {
		return "ip -6 "
	}
	return "ip "
}

func (r Route) String() string {
	var b strings.Builder
	b.WriteString(ip(r.Dst.Addr().Is6()) + "route add ")
	switch r.Type {
	case unix.RTN_LOCAL:
		b.WriteString("local ")
	case unix.RTN_BLACKHOLE:
		b.WriteString("blackhole ")
	}
	if r.Dst.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(r.Dst.String())
	}
	if r.TOS != 0 {
		fmt.Fprintf(&b, " tos %#x", r.TOS)
	}
	if r.Via.IsValid() {
		b.WriteString(" via " + r.Via.String())
	}
	if r.Dev != "" {
		b.WriteString(" dev " + r.Dev)
	}
	if r.Src.IsValid() {
		b.WriteString(" src " + r.Src.String())
	}
	if r.Scope == unix.RT_SCOPE_LINK {
		b.WriteString(" scope link")
	}
	if r.Table != unix.RT_TABLE_MAIN {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.MTU != 0 {
		fmt.Fprintf(&b, " mtu %d", r.MTU)
	}
	fmt.Fprintf(&b, " proto %d", r.Proto)
	if r.Onlink {
		b.WriteString(" onlink")
	}
	return b.String()
}

func (n Neigh) String() string {
	if n.Proxy {
		return ip(n.Addr.Is6()) + "neigh add proxy " + n.Addr.String() + " dev " + n.Dev
	}
	return fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", n.Addr, n.MAC, n.Dev)
}

func (r Rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%srule add pref %d", ip(r.V6), r.Pref)
	if r.From.IsValid() {
		b.WriteString(" from " + r.From.String())
	}
	if r.To.IsValid() {
		b.WriteString(" to " + r.To.String())
	}
	if r.Iif != "" {
		b.WriteString(" iif " + r.Iif)
	}
	if r.Oif != "" {
		b.WriteString(" oif " + r.Oif)
	}
	if name, ok := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp",
		unix.IPPROTO_ICMPV6: "ipv6-icmp"}[r.Proto]; ok {
		b.WriteString(" ipproto " + name)
	} else if r.Proto != 0 {
		fmt.Fprintf(&b, " ipproto %d", r.Proto)
	}
	for _, p := range []struct {
		name string
		r    Ports
	}{{"sport", r.Sport}, {"dport", r.Dport}} {
		switch {
		case p.r == Ports{}:
		case p.r.Min == p.r.Max:
			fmt.Fprintf(&b, " %s %d", p.name, p.r.Min)
		default:
			fmt.Fprintf(&b, " %s %d-%d", p.name, p.r.Min, p.r.Max)
		}
	}
	switch r.Table {
	case 0:
		b.WriteString(" blackhole")
	case unix.RT_TABLE_MAIN:
		b.WriteString(" lookup main")
	case unix.RT_TABLE_LOCAL:
		b.WriteString(" lookup local")
	default:
		fmt.Fprintf(&b, " lookup %d", r.Table)
	}
	return b.String()
}

func (o OnlyRules) String() string {
	s := ip(o.V6) + "rule del # whatever is not in this plan"
	if o.Below != 0 {
		s += fmt.Sprintf(", below pref %d", o.Below)
	}
	return s
}

func (n NoRules) String() string {
	return fmt.Sprintf("%[1]srule add pref 0 lookup local; %[1]srule flush protocol %d", ip(n.V6), protocol)
}

func (n NoRoutes) String() string {
	return fmt.Sprintf("%sroute flush table all proto %d", ip(n.V6), protocol)
}

func (n NoProxy) String() string {
	return ip(n.Addr.Is6()) + "neigh del proxy " + n.Addr.String() + " dev " + n.Dev
}

func (n NoCopies) String() string {
	return "tc qdisc del dev " + n.Dev + " clsact # if nothing but ours is there"
}

func (c Copy) String() string {
	var b strings.Builder
	proto, sel := "ip", "match ip protocol 1 0xff match ip dst "
	if c.Dst.Is6() {
		proto, sel = "ipv6", "match ip6 protocol 58 0xff match ip6 dst "
	}
	sel += netip.PrefixFrom(c.Dst, c.Dst.BitLen()).String()
	types := c.Types
	if len(types) == 0 {
		types = []Type{{}}
	}
	for i, t := range types {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "tc filter add dev %s ingress protocol %s pref %d u32 %s", c.From, proto, c.Pref, sel)
		if t.Mask != 0 {
			at := 20
			if c.Dst.Is6() {
				at = 40
			}
			fmt.Fprintf(&b, " match u8 %d %#x at %d", t.Value, t.Mask, at)
		}
		fmt.Fprintf(&b, " action mirred egress mirror dev %s", c.To)
	}
	return b.String()
}
