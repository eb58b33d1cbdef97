package sandwich

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"ztun/tun/rtnl"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func (s Sysctl) ensure(_ *world, p *place) (changed bool, err error) {
	path := filepath.Join("/proc/sys", s.Path)
	err = p.ns.Do(func() error {
		old, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if string(bytes.TrimSpace(old)) == s.Value {
			return nil
		}
		changed = true
		if p.look {
			return nil
		}
		return os.WriteFile(path, []byte(s.Value), 0)
	})
	switch {
	case s.Try && (err != nil || p.look): // it may be one that the kernel refuses
		return false, nil
	case errors.Is(err, os.ErrNotExist):
		return changed, fmt.Errorf("%w: %w", unix.ENODEV, err)
	}
	return changed, err
}

func (u Up) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := p.need(u.Dev)
	if err != nil {
		return false, err
	}
	mtu, up := u.MTU != 0 && l.Attrs().MTU != u.MTU, l.Attrs().Flags&net.FlagUp == 0
	if !mtu && !up || p.look {
		return mtu || up, nil
	}
	if mtu {
		err = p.h.LinkSetMTU(l, u.MTU)
	}
	if up && err == nil {
		err = p.h.LinkSetUp(l)
	}
	return true, err
}

func (a Pair) ensure(w *world, p *place) (changed bool, err error) {
	if l, err := rtnl.Link(p.h, a.Dev); l != nil || err != nil || p.look {
		return l == nil, err
	}
	mac, err := net.ParseMAC(a.MAC)
	if err != nil {
		return false, err
	}
	peer, err := net.ParseMAC(a.PeerMAC)
	if err != nil {
		return false, err
	}
	at := netlink.NewLinkAttrs()
	at.Name, at.HardwareAddr, at.MTU = a.Dev, mac, a.MTU
	err = w.other(p).ns.Fd(func(fd int) error {
		v := netlink.NewVeth(at)
		v.PeerName, v.PeerHardwareAddr, v.PeerNamespace, v.PeerMTU = a.Peer, peer, netlink.NsFd(fd), uint32(a.MTU)
		return p.h.LinkAdd(v)
	})
	return true, err
}

func (a Absent) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := rtnl.Link(p.h, a.Dev)
	if l == nil || err != nil || p.look {
		return l != nil, err
	}
	if err := p.h.LinkDel(l); err != nil && !rtnl.Gone(err) {
		return false, err
	}
	return true, nil
}

// iflaNewIfindex is the number that a device gets in the namespace that it is moved to (linux/if_link.h; Linux 5.13).
const iflaNewIfindex = 49

func (m Move) ensure(w *world, p *place) (changed bool, err error) {
	to := w.other(p)
	l, err := rtnl.Link(p.h, m.Dev)
	if err != nil || l == nil {
		return false, err
	}
	if there, err := rtnl.Link(to.h, m.Dev); err != nil || there != nil {
		// After a move the name is taken by ours in the pod, and by the CNI's in S.
		if p.where == Pod {
			return false, err
		}
		return false, fmt.Errorf("the other namespace has a device %s: %w", m.Dev, unix.EEXIST)
	}
	if p.look {
		return true, nil
	}
	err = to.ns.Fd(func(fd int) error {
		if m.Index == 0 {
			return p.h.LinkSetNsFd(l, fd)
		}
		err := p.ns.Do(func() error { return moveAs(l.Attrs().Index, fd, m.Index) })
		if err != nil { // an older kernel, or the number is somebody else's by now: any will do
			err = p.h.LinkSetNsFd(l, fd)
		}
		return err
	})
	return true, err
}

// moveAs moves a device of the thread's namespace into another, where it is to have the number index.
func moveAs(from, fd, index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(from)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(fd))))
	req.AddData(nl.NewRtAttr(iflaNewIfindex, nl.Uint32Attr(uint32(index))))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func (r Rename) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := rtnl.Link(p.h, r.From)
	if err != nil {
		return false, err
	}
	if l == nil {
		_, err := p.need(r.To)
		return false, err
	}
	if p.look {
		return true, nil
	}
	return true, p.h.LinkSetName(l, r.To)
}

func (a Addr) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := p.need(a.Dev)
	if err != nil {
		return false, err
	}
	have, err := rtnl.Retry(func() ([]netlink.Addr, error) { return p.h.AddrList(l, rtnl.Family(a.Prefix.Addr())) })
	if err != nil {
		return false, err
	}
	is := slices.ContainsFunc(have, func(h netlink.Addr) bool { return rtnl.Prefix(h.IPNet) == a.Prefix })
	if is || p.look {
		return !is, nil
	}
	// The library makes up a broadcast address where there is none.
	n := &netlink.Addr{IPNet: rtnl.IPNet(a.Prefix), Peer: rtnl.IPNet(a.Peer), Flags: a.Flags, Scope: a.Scope,
		Broadcast: net.IPv4zero}
	if a.Broadcast.IsValid() {
		n.Broadcast = a.Broadcast.AsSlice()
	}
	if a.Prefix.Addr().Is4() || a.Flags&unix.IFA_F_NODAD != 0 {
		return true, p.h.AddrAdd(l, n)
	}
	// Until the kernel has heard that the link is up an address is tentative, and no route may have it as its source.
	n.Flags |= unix.IFA_F_NODAD
	if err := p.h.AddrAdd(l, n); err != nil {
		return true, err
	}
	n.Flags = a.Flags
	return true, p.h.AddrReplace(l, n)
}

func (r Route) ensure(_ *world, p *place) (changed bool, err error) {
	fam, want := rtnl.Family(r.Dst.Addr()), r
	if fam == netlink.FAMILY_V6 {
		if r.Metric == 0 {
			want.Metric = 1024 // the kernel's default
		}
		if r.Type == unix.RTN_BLACKHOLE {
			want.Dev = "lo" // as the kernel tells it
		}
	}
	n := &netlink.Route{Family: fam, Dst: rtnl.IPNet(r.Dst), Type: r.Type, Scope: netlink.Scope(r.Scope), Table: r.Table,
		Priority: want.Metric, Protocol: netlink.RouteProtocol(r.Proto), MTU: r.MTU, Tos: r.TOS}
	if r.Via.IsValid() {
		n.Gw = r.Via.AsSlice()
	}
	if r.Src.IsValid() {
		n.Src = r.Src.AsSlice()
	}
	if r.Onlink {
		n.Flags = unix.RTNH_F_ONLINK
	}
	if r.Dev != "" {
		l, err := p.need(r.Dev)
		if err != nil {
			return false, err
		}
		n.LinkIndex = l.Attrs().Index
	}
	have, err := p.routes(fam)
	if err != nil {
		return false, err
	}
	for _, h := range have {
		if rtnl.Dst(h) != r.Dst || h.Table != r.Table || h.Priority != n.Priority || h.Tos != r.TOS {
			continue
		}
		if h.Type == r.Type && (want.Dev == "lo" || h.LinkIndex == n.LinkIndex) && h.Gw.Equal(n.Gw) {
			return false, nil
		}
		if fam == netlink.FAMILY_V6 && !p.look { // more than one of these may stand side by side
			if err := p.h.RouteDel(&h); err != nil && !rtnl.Gone(err) {
				return false, err
			}
		}
	}
	if p.look {
		return true, nil
	}
	return true, p.h.RouteReplace(n)
}

func (n Neigh) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := p.need(n.Dev)
	if err != nil {
		return false, err
	}
	fam := rtnl.Family(n.Addr)
	want := &netlink.Neigh{LinkIndex: l.Attrs().Index, Family: fam, IP: n.Addr.AsSlice()}
	list := p.h.NeighList
	if n.Proxy {
		want.Flags, list = netlink.NTF_PROXY, p.h.NeighProxyList
	} else {
		want.State = netlink.NUD_PERMANENT
		if want.HardwareAddr, err = net.ParseMAC(n.MAC); err != nil {
			return false, err
		}
	}
	have, err := rtnl.Retry(func() ([]netlink.Neigh, error) { return list(l.Attrs().Index, fam) })
	if err != nil {
		return false, err
	}
	is := slices.ContainsFunc(have, func(h netlink.Neigh) bool {
		return h.IP.Equal(want.IP) && h.LinkIndex == want.LinkIndex && (n.Proxy || h.State&netlink.NUD_PERMANENT != 0 &&
			bytes.Equal(h.HardwareAddr, want.HardwareAddr))
	})
	if is || p.look {
		return !is, nil
	}
	return true, p.h.NeighSet(want)
}

func (r Rule) netlink() *netlink.Rule {
	n := netlink.NewRule()
	n.Family, n.Priority, n.Table, n.IifName, n.IPProto, n.Protocol = rtnl.FamilyOf(r.V6), r.Pref, r.Table, r.Iif,
		int(r.Proto), protocol
	if r.Proto == 0 {
		n.IPProto = -1
	}
	if r.Table == 0 {
		n.Table, n.Type = unix.RT_TABLE_UNSPEC, unix.FR_ACT_BLACKHOLE
	}
	n.OifName = r.Oif
	if r.From.IsValid() {
		n.Src = rtnl.IPNet(host(r.From))
	}
	if r.To.IsValid() {
		n.Dst = rtnl.IPNet(host(r.To))
	}
	if r.Sport != (Ports{}) {
		n.Sport = netlink.NewRulePortRange(r.Sport.Min, r.Sport.Max)
	}
	if r.Dport != (Ports{}) {
		n.Dport = netlink.NewRulePortRange(r.Dport.Min, r.Dport.Max)
	}
	return n
}

// is says that a rule of the kernel's is this one. The library does not tell its type: without a table none leads
// anywhere.
func (r Rule) is(h netlink.Rule) bool {
	w := r.netlink()
	ports := func(a, b *netlink.RulePortRange) bool { return a == b || a != nil && b != nil && *a == *b }
	nets := func(a, b *net.IPNet) bool { return a == b || a != nil && b != nil && a.String() == b.String() }
	return h.Family == w.Family && h.Priority == w.Priority && max(h.Table, 0) == max(w.Table, 0) &&
		h.IifName == w.IifName && max(h.IPProto, 0) == max(w.IPProto, 0) && h.Protocol == protocol &&
		ports(h.Sport, w.Sport) && ports(h.Dport, w.Dport) && nets(h.Src, w.Src) && nets(h.Dst, w.Dst) &&
		h.Mark == 0 && h.OifName == w.OifName && h.Tos == 0 && !h.Invert && h.Goto < 1
}

func (r Rule) ensure(_ *world, p *place) (changed bool, err error) {
	n := r.netlink()
	have, err := p.rules(n.Family)
	if err != nil {
		return false, err
	}
	if is := slices.ContainsFunc(have, r.is); is || p.look {
		return !is, nil
	}
	err = p.h.RuleAdd(n)
	if r.V6 && noIPv6(err) {
		return false, nil
	}
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w (rules by protocol and port need Linux 4.17 and IP_MULTIPLE_TABLES)", err)
	}
	return true, err
}

func (o OnlyRules) ensure(w *world, p *place) (changed bool, err error) {
	have, err := p.rules(rtnl.FamilyOf(o.V6))
	if err != nil {
		return false, err
	}
	for _, h := range have {
		if w.keeps(p.where, h) || o.Below != 0 && h.Priority >= o.Below {
			continue
		}
		changed = true
		if p.look {
			return true, nil
		}
		if h.Priority == 0 && h.Table == unix.RT_TABLE_LOCAL {
			h.Priority = -1 // as the library wants it unsaid; the kernel finds it by its table and who made it
		}
		if err := p.h.RuleDel(&h); err != nil && !rtnl.Gone(err) {
			return true, fmt.Errorf("cannot remove %s: %w", h, err)
		}
	}
	return changed, nil
}
