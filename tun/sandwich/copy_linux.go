package sandwich

import (
	"encoding/binary"
	"errors"

	"ztun/tun/rtnl"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ensure has the qdisc that filters hang on, and one filter for each type.
func (c Copy) ensure(_ *world, p *place) (changed bool, err error) {
	from, err := p.need(c.From)
	if err != nil {
		return false, err
	}
	to, err := p.need(c.To)
	if err != nil {
		return false, err
	}
	have, err := p.h.FilterList(from, netlink.HANDLE_MIN_INGRESS)
	if err != nil && !rtnl.Gone(err) && !errors.Is(err, unix.EINVAL) { // EINVAL: there is no such qdisc
		return false, err
	}
	want := c.types()
	n := 0
	for _, f := range have {
		u, ok := f.(*netlink.U32)
		if !ok || u.Priority != c.Pref || u.Sel == nil || len(u.Actions) != 1 {
			continue
		}
		m, ok := u.Actions[0].(*netlink.MirredAction)
		if ok && m.Ifindex == to.Attrs().Index {
			n++
		}
	}
	if n == len(want) || p.look {
		return n != len(want), nil
	}
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: from.Attrs().Index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := p.h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, err
	}
	// Half of them is as good as none.
	for _, f := range have {
		if u, ok := f.(*netlink.U32); ok && u.Priority == c.Pref && u.Sel != nil {
			if err := p.h.FilterDel(f); err != nil && !rtnl.Gone(err) {
				return false, err
			}
		}
	}
	for i, t := range want {
		if err := p.h.FilterAdd(c.filter(t, from.Attrs().Index, to.Attrs().Index, i)); err != nil {
			return true, err
		}
	}
	return true, nil
}

// types are c's, one that is any where it has none.
func (c Copy) types() []Type {
	if len(c.Types) == 0 {
		return []Type{{}}
	}
	return c.Types
}

// filter is one for tc: offsets are from the beginning of the IP header. An IPv4 header with options has its ICMP
// type elsewhere; such a packet is not copied, or too often, which does no harm.
func (c Copy) filter(t Type, from, to, i int) *netlink.U32 {
	var keys []netlink.TcU32Key
	word := func(off int32, val, mask uint32) {
		keys = append(keys, netlink.TcU32Key{Off: off, Val: val & mask, Mask: mask})
	}
	proto, dst, at := uint16(unix.ETH_P_IP), int32(16), int32(20)
	if c.Dst.Is6() {
		proto, dst, at = unix.ETH_P_IPV6, 24, 40
		word(4, unix.IPPROTO_ICMPV6<<8, 0xff00)
	} else {
		word(8, unix.IPPROTO_ICMP<<16, 0xff0000)
	}
	for b := c.Dst.AsSlice(); len(b) > 0; b = b[4:] {
		word(dst, binary.BigEndian.Uint32(b), 0xffffffff)
		dst += 4
	}
	if t.Mask != 0 {
		word(at, uint32(t.Value)<<24, uint32(t.Mask)<<24)
	}
	mirror := netlink.NewMirredAction(to)
	mirror.MirredAction = netlink.TCA_EGRESS_MIRROR
	mirror.Action = netlink.TC_ACT_UNSPEC // on to the next filter
	return &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from, Parent: netlink.HANDLE_MIN_INGRESS, Priority: c.Pref,
			Protocol: proto},
		Sel:     &netlink.TcU32Sel{Flags: 1 /* TC_U32_TERMINAL */, Nkeys: uint8(len(keys)), Keys: keys},
		Actions: []netlink.Action{mirror},
	}
}
