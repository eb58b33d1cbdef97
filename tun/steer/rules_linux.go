package steer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/rtnl"
)

// Rules.

// ruleFree says whether nobody else steers the rule's traffic elsewhere, or keeps routes in the table that it leads to.
func (p *place) ruleFree(r Rule) error {
	have, err := p.rules(r)
	if err != nil {
		return err
	}
	for _, h := range have {
		if h.Protocol != Protocol && h.Table != r.Table {
			return fmt.Errorf("a rule that ztun did not make sends that traffic to table %d already (pref %d): %w", h.Table,
				h.Priority, unix.EADDRINUSE)
		}
	}
	if r.Table == TableMain {
		return nil // everybody's
	}
	routes, err := p.table(r.family(), r.Table)
	if err != nil {
		return err
	}
	for _, h := range routes {
		if h.Protocol != Protocol {
			return fmt.Errorf("routing table %d is in use by others (%s): %w", r.Table, p.describe(h), unix.EADDRINUSE)
		}
	}
	return nil
}

func (p *place) doRule(r Rule) (back func() error, err error) {
	have, err := p.rules(r)
	if err != nil {
		return nil, err
	}
	for _, h := range have {
		if h.Table == r.Table && h.Priority == r.Pref && h.IifName == r.Iif {
			return nil, nil
		}
		if h.Protocol == Protocol {
			if err := p.h.RuleDel(&h); err != nil && !rtnl.Gone(err) {
				return nil, fmt.Errorf("cannot replace a rule of an earlier ztun: %w", err)
			}
		}
	}
	want := r.netlink()
	switch err := p.h.RuleAdd(want); {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return nil, fmt.Errorf("%w (rules by protocol and port need Linux 4.17 and IP_MULTIPLE_TABLES)", err)
	case err != nil:
		return nil, err
	}
	return func() error { return p.h.RuleDel(want) }, nil
}

// rules lists the rules that select the same traffic as r, whatever they do with it, and ours that select it from
// another device (the node's TUN had another name).
func (p *place) rules(r Rule) ([]netlink.Rule, error) {
	want := r.netlink()
	have, err := rtnl.Retry(func() ([]netlink.Rule, error) { return p.h.RuleList(want.Family) })
	if err != nil {
		return nil, fmt.Errorf("cannot list rules: %w", err)
	}
	var out []netlink.Rule
	for _, h := range have {
		sameIif := h.IifName == r.Iif || (r.Iif != "" && h.IifName != "" && h.Protocol == Protocol)
		if sameIif && h.IPProto == int(r.Proto) && h.Tos == uint(r.TOS) && samePorts(h.Sport, r.Sport) &&
			samePorts(h.Dport, r.Dport) &&
			samePrefix(h.Src, want.Src) && h.Dst == nil && h.OifName == "" && h.Mark == 0 && !h.Invert {
			h.Family = want.Family
			out = append(out, h)
		}
	}
	return out, nil
}

// dropStale removes our rules that select what none of the plan's does: an earlier version of ours took other ports,
// or an earlier configuration another family. Rules are the node's alone and a plan that has any has all of them.
func (p *place) dropStale(plan Plan) error {
	var keep []Rule
	for _, s := range plan.Steps {
		if r, ok := s.Do.(Rule); ok && s.Where == p.where {
			keep = append(keep, r)
		}
	}
	if len(keep) == 0 {
		return nil
	}
	// What a removal does not mention is any to the kernel: it may take one of the plan's with the same preference,
	// which is put back then.
	for range 3 {
		stale, err := p.staleRules(keep)
		if err != nil || len(stale) == 0 {
			return err
		}
		for _, h := range stale {
			if err := p.h.RuleDel(&h); err != nil && !rtnl.Gone(err) {
				return fmt.Errorf("cannot remove a rule of an earlier ztun (pref %d): %w", h.Priority, err)
			}
		}
		for _, r := range keep {
			if _, err := p.doRule(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// staleRules lists our rules but those of keep.
func (p *place) staleRules(keep []Rule) (stale []netlink.Rule, err error) {
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		have, err := rtnl.Retry(func() ([]netlink.Rule, error) { return p.h.RuleList(fam) })
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("cannot list rules: %w", err)
		}
		for _, h := range have {
			h.Family = fam
			if h.Protocol == Protocol && !slices.ContainsFunc(keep, func(r Rule) bool { return r.is(h) }) {
				stale = append(stale, h)
			}
		}
	}
	return stale, nil
}

// is says that a rule of the kernel's is this one.
func (r Rule) is(h netlink.Rule) bool {
	want := r.netlink()
	return h.Family == want.Family && h.Priority == want.Priority && h.Table == want.Table && h.IifName == want.IifName &&
		h.IPProto == want.IPProto && h.Tos == want.Tos && samePorts(h.Sport, r.Sport) && samePorts(h.Dport, r.Dport) &&
		samePrefix(h.Src, want.Src)
}

func samePorts(r *netlink.RulePortRange, p Ports) bool {
	if r == nil {
		return p == Ports{}
	}
	return p == Ports{r.Start, r.End}
}

func samePrefix(a, b *net.IPNet) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.String() == b.String()
}

func (r Rule) family() int { return rtnl.FamilyOf(r.V6) }

func (r Rule) netlink() *netlink.Rule {
	nr := netlink.NewRule()
	nr.Family = r.family()
	nr.Priority, nr.Table, nr.IPProto, nr.Protocol = r.Pref, r.Table, int(r.Proto), Protocol
	nr.IifName, nr.Tos = r.Iif, uint(r.TOS)
	if r.Unbound {
		nr.Src = rtnl.IPNet(host(netip.IPv4Unspecified()))
	}
	if r.Sport != (Ports{}) {
		nr.Sport = netlink.NewRulePortRange(r.Sport.Min, r.Sport.Max)
	}
	if r.Dport != (Ports{}) {
		nr.Dport = netlink.NewRulePortRange(r.Dport.Min, r.Dport.Max)
	}
	return nr
}
