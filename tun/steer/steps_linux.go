package steer

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/rtnl"
)

// One section per kind of step: what must not be there before, how it becomes true, how it is taken back.

// Sysctls. /proc/sys/net shows the namespace of the thread that opens the file.

func (p *place) doSysctl(s Sysctl) (back func() error, err error) {
	path := filepath.Join("/proc/sys", s.Path)
	var old string
	err = p.ns.Do(func() error {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) && s.IfExists {
			old = s.Value
			return nil
		}
		if err != nil {
			return err
		}
		if old = string(bytes.TrimSpace(b)); old == s.Value {
			return nil
		}
		return os.WriteFile(path, []byte(s.Value), 0)
	})
	switch {
	case errors.Is(err, unix.EROFS), errors.Is(err, os.ErrPermission):
		return nil,
			fmt.Errorf("cannot set it: %w (it is %q; is /proc/sys read-only in this container? set it from outside then)",
				err, old)
	case errors.Is(err, os.ErrNotExist) && strings.HasPrefix(s.Path, "net/ipv6/"):
		return nil, fmt.Errorf("cannot set it: %w (the device is gone, or the kernel is without IPv6)", err)
	case err != nil:
		return nil, fmt.Errorf("cannot set it: %w", err)
	case old == s.Value, s.ofDevice():
		// A device's settings are left: the device is ours and goes away, and to give it back its link-local address would
		// make one.
		return nil, nil
	}
	return func() error {
		return p.ns.Do(func() error { return os.WriteFile(path, []byte(old), 0) })
	}, nil
}

// ofDevice says that the setting belongs to one device, not to the namespace.
func (s Sysctl) ofDevice() bool {
	_, dev, ok := strings.Cut(s.Path, "/conf/")
	return ok && !strings.HasPrefix(dev, "all/") && !strings.HasPrefix(dev, "default/")
}

// Links.

func (p *place) doLink(l Link) (back func() error, err error) {
	link, err := p.link(l.Dev)
	if err != nil {
		return nil, err
	}
	attrs := link.Attrs()
	oldMTU, wasUp := attrs.MTU, attrs.Flags&net.FlagUp != 0
	setMTU := l.MTU != 0 && oldMTU != l.MTU
	if setMTU {
		if err := p.h.LinkSetMTU(link, l.MTU); err != nil {
			return nil, fmt.Errorf("cannot set the MTU: %w", err)
		}
	}
	back = func() error {
		var errs []error
		if !wasUp {
			errs = append(errs, p.h.LinkSetDown(link))
		}
		if setMTU {
			errs = append(errs, p.h.LinkSetMTU(link, oldMTU))
		}
		return errors.Join(errs...)
	}
	if wasUp {
		if !setMTU {
			back = nil
		}
		return back, nil
	}
	return back, p.h.LinkSetUp(link)
}

// Addresses.

// addressFree says whether no device other than except has the address.
func (p *place) addressFree(a netip.Addr, except string) error {
	addrs, err := rtnl.Retry(func() ([]netlink.Addr, error) { return p.h.AddrList(nil, rtnl.Family(a)) })
	if err != nil {
		return fmt.Errorf("cannot list addresses: %w", err)
	}
	for _, have := range addrs {
		if ip, ok := netip.AddrFromSlice(have.IP); !ok || ip.Unmap() != a {
			continue
		}
		name := fmt.Sprintf("number %d", have.LinkIndex)
		if l, err := p.h.LinkByIndex(have.LinkIndex); err == nil {
			name = l.Attrs().Name
		}
		if name != except {
			return fmt.Errorf("address %s is in use in the %s's namespace, on device %s: %w", a, p.where, name, unix.EADDRINUSE)
		}
	}
	return nil
}

func (p *place) doAddr(a Addr) (back func() error, err error) {
	link, err := p.link(a.Dev)
	if err != nil {
		return nil, err
	}
	switch err := p.h.AddrAdd(link, a.netlink()); {
	case errors.Is(err, unix.EEXIST):
		return nil, nil
	case errors.Is(err, unix.EACCES) && a.Prefix.Addr().Is6():
		return nil, fmt.Errorf("%w (IPv6 is turned off there)", err)
	case err != nil:
		return nil, err
	}
	return func() error { return p.delAddr(a) }, nil
}

func (p *place) delAddr(a Addr) error {
	link, err := p.link(a.Dev)
	if err != nil {
		return err
	}
	return p.h.AddrDel(link, a.netlink())
}

func (a Addr) netlink() *netlink.Addr {
	na := &netlink.Addr{IPNet: rtnl.IPNet(a.Prefix)}
	if a.Prefix.Addr().Is6() {
		na.Flags = unix.IFA_F_NODAD
	}
	return na
}

// Routes.

// routeFree says whether the route's place is empty or ours.
func (p *place) routeFree(r Route) error {
	if r.Dev != "" {
		if _, err := p.link(r.Dev); err != nil {
			return err
		}
	}
	single := r.Dst.IsSingleIP()
	if p.where == Node && single {
		if err := p.addressFree(r.Dst.Addr(), ""); err != nil {
			return err
		}
	}
	have, err := p.routes(r.Dst, r.Table)
	if err != nil {
		return err
	}
	for _, h := range have {
		if h.Protocol == Protocol {
			continue
		}
		what := fmt.Sprintf("route %s", r.Dst)
		if single {
			what = fmt.Sprintf("address %s", r.Dst.Addr())
		}
		return fmt.Errorf("%s is in use in the %s's namespace: table %d has a route that ztun did not make (%s): %w",
			what, p.where, r.Table, p.describe(h), unix.EADDRINUSE)
	}
	return nil
}

func (p *place) doRoute(r Route) (back func() error, err error) {
	want, err := p.netlinkRoute(r)
	if err != nil {
		return nil, err
	}
	have, err := p.routes(r.Dst, r.Table)
	if err != nil {
		return nil, err
	}
	for _, h := range have {
		switch {
		case h.Priority != want.Priority || h.Protocol != want.Protocol:
			continue
		case h.Type == want.Type && (r.Dev == "" || h.LinkIndex == want.LinkIndex):
			return nil, nil
		}
		// Ours, with another device or type: left by a daemon with another configuration.
		if err := p.h.RouteDel(&h); err != nil && !rtnl.Gone(err) {
			return nil, fmt.Errorf("cannot replace %s: %w", p.describe(h), err)
		}
	}
	if err := p.h.RouteAdd(want); err != nil {
		switch {
		case errors.Is(err, unix.ENETDOWN):
			return nil, fmt.Errorf("%w (device %s is down)", err, r.Dev)
		case r.Dst.Addr().Is6() && (errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EACCES) ||
			errors.Is(err, unix.EINVAL)):
			return nil, fmt.Errorf("%w (is IPv6 turned off on device %s?)", err, r.Dev)
		}
		return nil, err
	}
	return func() error { return p.h.RouteDel(want) }, nil
}

func (p *place) delRoute(r Route) error {
	want, err := p.netlinkRoute(r)
	if err != nil {
		return err // no device, no route
	}
	return p.h.RouteDel(want)
}

// routes lists the routes of a table to exactly dst.
func (p *place) routes(dst netip.Prefix, table int) ([]netlink.Route, error) {
	filter := &netlink.Route{Table: table, Dst: rtnl.IPNet(dst)}
	have, err := rtnl.Retry(func() ([]netlink.Route, error) {
		return p.h.RouteListFiltered(rtnl.Family(dst.Addr()), filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list routes: %w", err)
	}
	// The library's filter is not trusted: its conditions exclude each other.
	out := have[:0]
	for _, h := range have {
		if h.Table == table && rtnl.Dst(h) == dst {
			out = append(out, h)
		}
	}
	return out, nil
}

func (p *place) netlinkRoute(r Route) (*netlink.Route, error) {
	nr := &netlink.Route{Type: int(r.Type), Dst: rtnl.IPNet(r.Dst), Table: r.Table, Priority: r.Metric, Protocol: Protocol,
		Family: rtnl.Family(r.Dst.Addr())}
	if nr.Priority == 0 && r.Dst.Addr().Is6() {
		nr.Priority = 1024 // the kernel's default, said aloud so that it compares
	}
	switch r.Type {
	case Local:
		nr.Scope = netlink.SCOPE_HOST
	case Unicast:
		nr.Scope = netlink.SCOPE_LINK
	}
	if r.Dev != "" {
		link, err := p.link(r.Dev)
		if err != nil {
			return nil, err
		}
		nr.LinkIndex = link.Attrs().Index
	}
	return nr, nil
}

// describe prints a route of the kernel's as `ip route` does, nearly.
func (p *place) describe(r netlink.Route) string {
	var b strings.Builder
	if r.Type != unix.RTN_UNICAST {
		fmt.Fprintf(&b, "%s ", map[int]string{unix.RTN_LOCAL: "local", unix.RTN_UNREACHABLE: "unreachable",
			unix.RTN_BLACKHOLE: "blackhole"}[r.Type])
	}
	b.WriteString(rtnl.Dst(r).String())
	if r.Gw != nil {
		fmt.Fprintf(&b, " via %s", r.Gw)
	}
	if r.LinkIndex != 0 {
		name := fmt.Sprintf("number %d", r.LinkIndex)
		if l, err := p.h.LinkByIndex(r.LinkIndex); err == nil {
			name = l.Attrs().Name
		}
		fmt.Fprintf(&b, " dev %s", name)
	}
	fmt.Fprintf(&b, " proto %s metric %d", r.Protocol, r.Priority)
	return b.String()
}

// table lists all routes of a table.
func (p *place) table(fam, table int) ([]netlink.Route, error) {
	routes, err := rtnl.Retry(func() ([]netlink.Route, error) {
		return p.h.RouteListFiltered(fam, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list table %d: %w", table, err)
	}
	return routes, nil
}
