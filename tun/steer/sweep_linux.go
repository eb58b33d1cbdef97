package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"ztun/tun/netns"
)

// Sweep removes from the node's namespace our routes of pods whose address is not in keep: what a killed daemon left of pods that went away before the
// next one started. It returns the addresses swept, sorted, also along with an error.
func Sweep(node *netns.NS, keep []netip.Addr) ([]netip.Addr, error) {
	p, err := openPlace(Node, node)
	if err != nil {
		return nil, err
	}
	defer p.h.Close()
	var swept []netip.Addr
	var errs []error
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// The table of captured traffic first, and the `unreachable` routes last: see PodPlan.
		var mine []netlink.Route
		for _, table := range []int{TableHBONE, TableMain} {
			routes, err := p.table(fam, table)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			slices.SortFunc(routes, func(a, b netlink.Route) int { return a.Priority - b.Priority })
			mine = append(mine, routes...)
		}
		for _, r := range mine {
			dst := prefix(r)
			if r.Protocol != Protocol || !dst.IsSingleIP() || slices.Contains(keep, dst.Addr()) {
				continue
			}
			if err := p.h.RouteDel(&r); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("cannot remove %s: %w", p.describe(r), err))
				continue
			}
			swept = append(swept, dst.Addr())
		}
	}
	slices.SortFunc(swept, netip.Addr.Compare)
	return slices.Compact(swept), errors.Join(errs...)
}
