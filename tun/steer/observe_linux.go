package steer

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// Looking without changing: what a plan's state is, and what is in a namespace beside it.

// Missing returns the steps of the plan that are not true, in its order. A step whose namespace or device is not
// there is not true.
func Missing(p Plan, ns Namespaces) ([]Step, error) {
	w := &world{places: map[Where]*place{}}
	defer w.close()
	var missing []Step
	for _, s := range p.Steps {
		at := ns.get(s.Where)
		if at == nil {
			missing = append(missing, s)
			continue
		}
		if w.places[s.Where] == nil {
			pl, err := openPlace(s.Where, at)
			if err != nil {
				return nil, err
			}
			w.places[s.Where] = pl
		}
		switch is, err := w.places[s.Where].is(s.Do); {
		case errors.Is(err, unix.ENODEV):
			missing = append(missing, s)
		case err != nil:
			return nil, stepError(s, err)
		case !is:
			missing = append(missing, s)
		}
	}
	return missing, nil
}

// is reports whether a step is true.
func (p *place) is(a Action) (bool, error) {
	switch a := a.(type) {
	case Sysctl:
		var b []byte
		err := p.ns.Do(func() (err error) {
			b, err = os.ReadFile(filepath.Join("/proc/sys", a.Path))
			return err
		})
		if errors.Is(err, os.ErrNotExist) {
			return a.IfExists, nil
		}
		return string(bytes.TrimSpace(b)) == a.Value, err
	case Link:
		l, err := p.link(a.Dev)
		if err != nil {
			return false, err
		}
		return l.Attrs().Flags&net.FlagUp != 0 && (a.MTU == 0 || l.Attrs().MTU == a.MTU), nil
	case Addr:
		l, err := p.link(a.Dev)
		if err != nil {
			return false, err
		}
		have, err := rtnl.Retry(func() ([]netlink.Addr, error) { return p.h.AddrList(l, rtnl.Family(a.Prefix.Addr())) })
		return slices.ContainsFunc(have, func(h netlink.Addr) bool {
			ip, _ := netip.AddrFromSlice(h.IP)
			return ip.Unmap() == a.Prefix.Addr()
		}), err
	case Route:
		want, err := p.netlinkRoute(a)
		if err != nil {
			return false, err
		}
		have, err := p.routes(a.Dst, a.Table)
		return slices.ContainsFunc(have, func(h netlink.Route) bool {
			return h.Protocol == Protocol && h.Type == want.Type && h.Priority == want.Priority &&
				(a.Dev == "" || h.LinkIndex == want.LinkIndex)
		}), err
	case Rule:
		have, err := p.rules(a)
		return slices.ContainsFunc(have, func(h netlink.Rule) bool {
			return h.Protocol == Protocol && h.Table == a.Table && h.Priority == a.Pref && h.IifName == a.Iif
		}), err
	}
	return false, fmt.Errorf("unknown kind of step %T", a)
}

// Seen is what there is in a namespace: ours, and what of others may stand in our way.
type Seen struct {
	Links  []SeenLink
	Rules  []SeenRule
	Routes []string     // ours, as `ip route` says them
	Pods   []netip.Addr // the addresses that our routes capture, sorted
}

// ruleText is a rule as `ip rule` says it; of one that is not ours what the library tells.
func ruleText(r netlink.Rule, fam int) string {
	if r.Protocol != Protocol {
		return r.String()
	}
	ours := Rule{V6: fam == netlink.FAMILY_V6, Pref: r.Priority, Unbound: r.Src != nil, Iif: r.IifName, TOS: uint8(r.Tos),
		Proto: uint8(r.IPProto), Table: r.Table}
	if r.Sport != nil {
		ours.Sport = Ports{r.Sport.Start, r.Sport.End}
	}
	if r.Dport != nil {
		ours.Dport = Ports{r.Dport.Start, r.Dport.End}
	}
	return strings.Replace(ours.String(), " rule add ", " rule ", 1)
}

// SeenLink is a device.
type SeenLink struct {
	Name    string
	TUN, Up bool
	MTU     int
	Default bool // a default route goes by it
}

// SeenRule is a routing rule.
type SeenRule struct {
	V6, Ours bool
	Pref     int
	Table    int
	Text     string
}

// Observe looks at a namespace. Tables other than ours and main are not looked at.
func Observe(ns *netns.NS) (Seen, error) {
	var s Seen
	p, err := openPlace(Node, ns)
	if err != nil {
		return s, err
	}
	defer p.h.Close()
	links, err := rtnl.Retry(p.h.LinkList)
	if err != nil {
		return s, fmt.Errorf("cannot list devices: %w", err)
	}
	defaults := map[int]bool{}
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := rtnl.Retry(func() ([]netlink.Rule, error) { return p.h.RuleList(fam) })
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return s, fmt.Errorf("cannot list rules: %w", err)
		}
		for _, r := range rules {
			s.Rules = append(s.Rules, SeenRule{V6: fam == netlink.FAMILY_V6, Ours: r.Protocol == Protocol, Pref: r.Priority,
				Table: r.Table, Text: ruleText(r, fam)})
		}
		for _, table := range []int{TableMain, TableHBONE} {
			routes, err := p.table(fam, table)
			if err != nil {
				return s, err
			}
			for _, r := range routes {
				dst := rtnl.Dst(r)
				if r.Table == TableMain && (!dst.IsValid() || dst.Bits() == 0) {
					defaults[r.LinkIndex] = true
				}
				if r.Protocol == Protocol {
					s.Routes = append(s.Routes, fmt.Sprintf("table %d: %s", table, p.describe(r)))
					if dst.IsSingleIP() {
						s.Pods = append(s.Pods, dst.Addr())
					}
				}
			}
		}
	}
	for _, l := range links {
		a := l.Attrs()
		s.Links = append(s.Links, SeenLink{Name: a.Name, TUN: l.Type() == "tuntap" || l.Type() == "tun",
			Up: a.Flags&net.FlagUp != 0, MTU: a.MTU, Default: defaults[a.Index]})
	}
	slices.SortFunc(s.Pods, netip.Addr.Compare)
	s.Pods = slices.Compact(s.Pods)
	return s, nil
}
