package sandwich

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/rtnl"
)

func (n NoRules) ensure(_ *world, p *place) (changed bool, err error) {
	have, err := p.rules(rtnl.FamilyOf(n.V6))
	if err != nil {
		return false, err
	}
	// The kernel's first: without one no address is the pod's own.
	first := true
	for _, h := range have {
		first = first && !(h.Priority == 0 && h.Table == unix.RT_TABLE_LOCAL)
	}
	if first && len(have) > 0 {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.Protocol = rtnl.FamilyOf(n.V6), 0, unix.RT_TABLE_LOCAL, unix.RTPROT_KERNEL
		if err := p.h.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return false, err
		}
		changed = true
	}
	for _, h := range have {
		if h.Protocol != protocol {
			continue
		}
		changed = true
		if err := p.h.RuleDel(&h); err != nil && !rtnl.Gone(err) {
			return true, fmt.Errorf("cannot remove %s: %w", h, err)
		}
	}
	return changed, nil
}

func (n NoRoutes) ensure(_ *world, p *place) (changed bool, err error) {
	have, err := p.routes(rtnl.FamilyOf(n.V6))
	if err != nil {
		return false, err
	}
	for _, h := range have {
		if h.Protocol != protocol {
			continue
		}
		changed = true
		if err := p.h.RouteDel(&h); err != nil && !rtnl.Gone(err) {
			return true, fmt.Errorf("cannot remove %s: %w", h, err)
		}
	}
	return changed, nil
}

func (n NoProxy) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := rtnl.Link(p.h, n.Dev)
	if l == nil || err != nil {
		return false, err
	}
	have, err := rtnl.Retry(func() ([]netlink.Neigh, error) {
		return p.h.NeighProxyList(l.Attrs().Index, rtnl.Family(n.Addr))
	})
	if err != nil {
		return false, err
	}
	for _, h := range have {
		if h.IP.Equal(n.Addr.AsSlice()) && h.LinkIndex == l.Attrs().Index {
			h.Family = rtnl.Family(n.Addr)
			if err := p.h.NeighDel(&h); err != nil && !rtnl.Gone(err) {
				return false, err
			}
			changed = true
		}
	}
	return changed, nil
}

func (n NoCopies) ensure(_ *world, p *place) (changed bool, err error) {
	l, err := rtnl.Link(p.h, n.Dev)
	if l == nil || err != nil {
		return false, err
	}
	have, err := p.h.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	if err != nil && !rtnl.Gone(err) && !errors.Is(err, unix.EINVAL) { // EINVAL: there is no such qdisc
		return false, err
	}
	others := false
	for _, f := range have {
		at := f.Attrs()
		u, ok := f.(*netlink.U32)
		if !ok || at.Priority == 0 || at.Priority > lastCopy {
			others = true
			continue
		}
		if u.Sel == nil {
			continue // the table of the others
		}
		changed = true
		if err := p.h.FilterDel(f); err != nil && !rtnl.Gone(err) {
			return true, err
		}
	}
	if !changed || others {
		return changed, nil
	}
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0),
		Parent: netlink.HANDLE_CLSACT}}
	if err := p.h.QdiscDel(q); err != nil && !rtnl.Gone(err) {
		return true, err
	}
	return true, nil
}
