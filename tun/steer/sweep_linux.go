package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// Sweep removes from the node's namespace our routes of pods whose address is not in keep: what a killed daemon left
// of pods that went away before the next one started. It returns the addresses swept, sorted, also along with an
// error.
func Sweep(node *netns.NS, keep []netip.Addr) ([]netip.Addr, error) {
	p, err := openPlace(Node, node)
	if err != nil {
		return nil, err
	}
	defer p.h.Close()
	var swept []netip.Addr
	var errs []error
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		var all []netlink.Route
		for _, table := range []int{TableMain, TableHBONE} {
			routes, err := p.table(fam, table)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			all = append(all, routes...)
		}
		for _, r := range leftovers(all, keep) {
			if err := p.h.RouteDel(&r); err != nil && !rtnl.Gone(err) {
				errs = append(errs, fmt.Errorf("cannot remove %s: %w", p.describe(r), err))
				continue
			}
			swept = append(swept, rtnl.Dst(r).Addr())
		}
	}
	slices.SortFunc(swept, netip.Addr.Compare)
	return slices.Compact(swept), errors.Join(errs...)
}

// leftovers picks our routes to addresses not in keep, in the order in which they are to go: the table of captured
// traffic first and the `unreachable` routes, which have the largest metric, last (see PodPlan).
func leftovers(all []netlink.Route, keep []netip.Addr) []netlink.Route {
	mine := slices.DeleteFunc(slices.Clone(all), func(r netlink.Route) bool {
		dst := rtnl.Dst(r)
		return r.Protocol != Protocol || !dst.IsSingleIP() || slices.Contains(keep, dst.Addr())
	})
	slices.SortStableFunc(mine, func(a, b netlink.Route) int {
		switch ours, theirs := a.Table == TableHBONE, b.Table == TableHBONE; {
		case ours && !theirs:
			return -1
		case theirs && !ours:
			return 1
		}
		return a.Priority - b.Priority
	})
	return mine
}
