package sandwich

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// Namespaces are where a plan is carried out.
type Namespaces struct{ S, Pod *netns.NS }

// world is both, opened for work.
type world struct {
	places map[Where]*place
	plan   Plan
}

// place is one namespace.
type place struct {
	where Where
	ns    *netns.NS
	h     *netlink.Handle
	seen  seen
	look  bool // what is not true is told, and left as it is
}

// seen is what was listed since the last change, by family: most steps ask for the same lists, and a look at a pod
// whose plan is true changes nothing.
type seen struct {
	routes map[int][]netlink.Route
	rules  map[int][]netlink.Rule
}

func nothingSeen() seen { return seen{map[int][]netlink.Route{}, map[int][]netlink.Rule{}} }

func openPlace(where Where, ns *netns.NS) (*place, error) {
	h, err := rtnl.Open(ns)
	if err != nil {
		return nil, fmt.Errorf("cannot talk to the kernel in network namespace %s: %w", ns, err)
	}
	return &place{where: where, ns: ns, h: h, seen: nothingSeen()}, nil
}

func open(p Plan, ns Namespaces) (*world, error) {
	w := &world{places: map[Where]*place{}, plan: p}
	for where, n := range map[Where]*netns.NS{S: ns.S, Pod: ns.Pod} {
		pl, err := openPlace(where, n)
		if err != nil {
			w.close()
			return nil, err
		}
		w.places[where] = pl
	}
	return w, nil
}

func (w *world) close() {
	for _, p := range w.places {
		p.h.Close()
	}
}

func (w *world) other(p *place) *place { return w.places[S+Pod-p.where] }

// Apply makes every step true, in order; what is true is left alone. It stops at the first error, which names the
// step: the caller applies Undo then, from whatever was reached. changed are the steps that were not true.
func Apply(ctx context.Context, p Plan, ns Namespaces) (changed []Step, err error) {
	w, err := open(p, ns)
	if err != nil {
		return nil, err
	}
	defer w.close()
	for _, s := range p.Steps {
		if err := ctx.Err(); err != nil {
			return changed, fmt.Errorf("before %q in %s: %w", s.Do, s.Where, err)
		}
		did, err := s.Do.ensure(w, w.places[s.Where])
		switch {
		case errors.Is(err, unix.EPERM):
			return changed, fmt.Errorf("%q in %s: %w (CAP_NET_ADMIN and CAP_SYS_ADMIN are needed)", s.Do, s.Where, err)
		case err != nil:
			return changed, fmt.Errorf("%q in %s: %w", s.Do, s.Where, err)
		}
		if did {
			changed = append(changed, s)
			for _, p := range w.places { // a device has an end in both
				p.seen = nothingSeen()
			}
		}
	}
	return changed, nil
}

// Missing are the steps that are not true. Nothing is changed.
func Missing(p Plan, ns Namespaces) (missing []Step, err error) {
	w, err := open(p, ns)
	if err != nil {
		return nil, err
	}
	defer w.close()
	for _, pl := range w.places {
		pl.look = true
	}
	for _, s := range p.Steps {
		not, err := s.Do.ensure(w, w.places[s.Where])
		switch {
		case not, errors.Is(err, unix.ENODEV):
			missing = append(missing, s)
		case err != nil:
			return nil, fmt.Errorf("%q in %s: %w", s.Do, s.Where, err)
		}
	}
	return missing, nil
}

// need finds a device that has to be there.
func (p *place) need(name string) (netlink.Link, error) {
	l, err := rtnl.Link(p.h, name)
	if err == nil && l == nil {
		err = fmt.Errorf("there is no device %s: %w", name, unix.ENODEV)
	}
	return l, err
}

// routes lists a family's, of all tables.
func (p *place) routes(fam int) ([]netlink.Route, error) {
	if all, ok := p.seen.routes[fam]; ok {
		return all, nil
	}
	all, err := rtnl.Retry(func() ([]netlink.Route, error) {
		return p.h.RouteListFiltered(fam, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if fam == netlink.FAMILY_V6 && noIPv6(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list routes: %w", err)
	}
	for i := range all {
		all[i].Family = fam
	}
	p.seen.routes[fam] = all
	return all, nil
}

// noIPv6 says that the kernel has none.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func (p *place) rules(fam int) ([]netlink.Rule, error) {
	if all, ok := p.seen.rules[fam]; ok {
		return all, nil
	}
	all, err := rtnl.Retry(func() ([]netlink.Rule, error) { return p.h.RuleList(fam) })
	if fam == netlink.FAMILY_V6 && noIPv6(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for i := range all {
		all[i].Family = fam
	}
	p.seen.rules[fam] = all
	return all, nil
}

// keeps says that the plan has a rule of the kernel's in a namespace.
func (w *world) keeps(where Where, h netlink.Rule) bool {
	return slices.ContainsFunc(w.plan.Steps, func(s Step) bool {
		r, ok := s.Do.(Rule)
		return ok && s.Where == where && r.is(h)
	})
}
