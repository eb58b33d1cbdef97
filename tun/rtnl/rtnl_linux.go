package rtnl

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
)

// patience bounds each exchange with the kernel, which normally takes microseconds, but may wait for the routing lock.
const patience = 10 * time.Second

// Open opens a route netlink socket in a namespace, in which it stays.
func Open(ns *netns.NS) (h *netlink.Handle, err error) {
	err = ns.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := h.SetSocketTimeout(patience); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Retry repeats a question whose answer was torn by a change at the same time.
func Retry[T any](ask func() (T, error)) (v T, err error) {
	for range 5 {
		if v, err = ask(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return v, err
}

// Link finds a device; nil: there is none.
func Link(h *netlink.Handle, name string) (netlink.Link, error) {
	l, err := Retry(func() (netlink.Link, error) { return h.LinkByName(name) })
	var not netlink.LinkNotFoundError
	if errors.As(err, &not) {
		return nil, nil
	}
	return l, err
}

// Gone says that an error of a removal means that there was nothing to remove.
func Gone(err error) bool {
	var not netlink.LinkNotFoundError
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, unix.EADDRNOTAVAIL) || errors.As(err, &not)
}

// Family is an address's, as netlink has it.
func Family(a netip.Addr) int { return FamilyOf(!a.Is4()) }

// FamilyOf is IPv6's or IPv4's, as netlink has it.
func FamilyOf(v6 bool) int {
	if v6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// IPNet is a prefix as the library has it; nil for the zero Prefix.
func IPNet(p netip.Prefix) *net.IPNet {
	if !p.IsValid() {
		return nil
	}
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Prefix is the other way round; zero for what is none.
func Prefix(n *net.IPNet) netip.Prefix {
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	if len(n.Mask) == 4 {
		a = a.Unmap()
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a, ones)
}

// Dst is a route's destination; a default route's may be absent.
func Dst(r netlink.Route) netip.Prefix {
	switch {
	case r.Dst != nil:
		return Prefix(r.Dst)
	case r.Family == netlink.FAMILY_V6:
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}
