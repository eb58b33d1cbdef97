package steer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// Apply makes every step of the plan true, in order. Before it changes anything it looks for what stands in the way:
// a foreign route, rule or address in our place, a missing device. If a step fails, or ctx ends, what this call has
// changed is taken back (but for sysctls of single devices). A plan that is already true is left alone.
//
// Errors name the step, the namespace and the likely cause, and keep the errno: unix.EADDRINUSE for an address, route
// or rule that somebody else has, unix.EPERM without CAP_NET_ADMIN, unix.ENODEV for a missing device.
func Apply(ctx context.Context, p Plan, ns Namespaces) error {
	w, err := openWorld(p, ns)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.check(p); err != nil {
		return err
	}
	var undo []func() error
	fail := func(err error) error {
		for _, back := range slices.Backward(undo) {
			if uerr := back(); uerr != nil && !rtnl.Gone(uerr) {
				err = fmt.Errorf("%w; and while taking back what was done: %w", err, uerr)
			}
		}
		return err
	}
	for _, s := range p.Steps {
		if err := ctx.Err(); err != nil {
			return fail(stepError(s, err))
		}
		back, err := w.at(s.Where).do(s.Do)
		if back != nil {
			undo = append(undo, back)
		}
		if err != nil {
			return fail(stepError(s, err))
		}
	}
	for _, pl := range w.places {
		if err := pl.dropStale(p); err != nil {
			return fail(fmt.Errorf("in the %s's namespace: %w", pl.where, err))
		}
	}
	return nil
}

// Check is the part of Apply that changes nothing: it looks for what stands in the way. Its errors are Apply's.
func Check(p Plan, ns Namespaces) error {
	w, err := openWorld(p, ns)
	if err != nil {
		return err
	}
	defer w.close()
	return w.check(p)
}

func (w *world) check(p Plan) error {
	for _, s := range p.Steps {
		if err := w.at(s.Where).check(s.Do); err != nil {
			return stepError(s, err)
		}
	}
	return nil
}

// Undo takes back the routes, rules and addresses of the plan, last first. What is not there any more, device and
// namespace included, is fine. It goes on after an error and returns all of them. Sysctls and the state of links stay
// as they are (see the package comment).
func Undo(p Plan, ns Namespaces) error {
	steps := slices.DeleteFunc(slices.Clone(p.Steps), func(s Step) bool { return ns.get(s.Where) == nil })
	w, err := openWorld(Plan{steps}, ns)
	if err != nil {
		return err
	}
	defer w.close()
	var errs []error
	for _, s := range slices.Backward(steps) {
		if err := w.at(s.Where).remove(s.Do); err != nil && !rtnl.Gone(err) {
			errs = append(errs, fmt.Errorf("cannot undo %q in the %s's namespace: %w", s.Do, s.Where, err))
		}
	}
	return errors.Join(errs...)
}

// stepError says which step failed.
func stepError(s Step, err error) error {
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w (CAP_NET_ADMIN in that namespace is needed)", err)
	}
	return fmt.Errorf("%q in the %s's namespace: %w", s.Do, s.Where, err)
}

// world is the namespaces of a plan, opened for work.
type world struct {
	places map[Where]*place
}

// place is one namespace: netlink sockets stay in the namespace in which they were opened, so only sysctls need to
// enter it again.
type place struct {
	where Where
	ns    *netns.NS
	h     *netlink.Handle
}

func openWorld(p Plan, ns Namespaces) (*world, error) {
	w := &world{places: map[Where]*place{}}
	for _, s := range p.Steps {
		if w.places[s.Where] != nil {
			continue
		}
		pl, err := openPlace(s.Where, ns.get(s.Where))
		if err != nil {
			w.close()
			return nil, err
		}
		w.places[s.Where] = pl
	}
	if n, q := w.places[Node], w.places[Pod]; n != nil && q != nil && n.ns.Same(q.ns) {
		w.close()
		return nil, fmt.Errorf("the pod's network namespace %s is the node's own: %w", q.ns, unix.EINVAL)
	}
	return w, nil
}

func openPlace(where Where, ns *netns.NS) (*place, error) {
	if ns == nil {
		return nil, fmt.Errorf("the %s's network namespace is not there: %w", where, os.ErrNotExist)
	}
	h, err := rtnl.Open(ns)
	if err != nil {
		return nil, fmt.Errorf("cannot talk to the kernel in the %s's network namespace %s: %w", where, ns, err)
	}
	return &place{where: where, ns: ns, h: h}, nil
}

func (w *world) at(where Where) *place { return w.places[where] }

func (w *world) close() {
	for _, p := range w.places {
		p.h.Close()
	}
}

// check looks, without changing anything, for what would make a step wrong rather than fail.
func (p *place) check(a Action) error {
	switch a := a.(type) {
	case Link:
		_, err := p.link(a.Dev)
		return err
	case Addr:
		return p.addressFree(a.Prefix.Addr(), a.Dev)
	case Route:
		return p.routeFree(a)
	case Rule:
		return p.ruleFree(a)
	}
	return nil
}

// do makes a step true. If that changed something, back changes it back.
func (p *place) do(a Action) (back func() error, err error) {
	switch a := a.(type) {
	case Sysctl:
		return p.doSysctl(a)
	case Link:
		return p.doLink(a)
	case Addr:
		return p.doAddr(a)
	case Route:
		return p.doRoute(a)
	case Rule:
		return p.doRule(a)
	}
	return nil, fmt.Errorf("unknown kind of step %T", a)
}

// remove takes a step back.
func (p *place) remove(a Action) error {
	switch a := a.(type) {
	case Addr:
		return p.delAddr(a)
	case Route:
		return p.delRoute(a)
	case Rule:
		return p.h.RuleDel(a.netlink())
	}
	return nil
}

// link finds a device.
func (p *place) link(name string) (netlink.Link, error) {
	l, err := rtnl.Link(p.h, name)
	if l == nil && err == nil {
		return nil, fmt.Errorf("there is no device %s (is its TUN open?): %w", name, unix.ENODEV)
	}
	return l, err
}
