package sandwich

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// Read takes the facts about the device dev of a pod's namespace. ErrUnfit: there is something that this way of
// capturing cannot deal with.
func Read(ns *netns.NS, dev string) (Facts, error) {
	f := Facts{Dev: dev}
	p, err := openPlace(Pod, ns)
	if err != nil {
		return f, err
	}
	defer p.h.Close()
	link, err := rtnl.Link(p.h, dev)
	if err != nil {
		return f, err
	}
	if link == nil {
		return f, fmt.Errorf("%w: network namespace %s has no %s", ErrUnfit, ns, dev)
	}
	at := link.Attrs()
	if len(at.HardwareAddr) != 6 {
		return f, fmt.Errorf("%w: %s (%s) is no Ethernet device", ErrUnfit, dev, link.Type())
	}
	f.Index, f.MAC, f.MTU = at.Index, at.HardwareAddr.String(), at.MTU
	addrs, err := rtnl.Retry(func() ([]netlink.Addr, error) { return p.h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return f, fmt.Errorf("cannot list addresses: %w", err)
	}
	for _, a := range addrs {
		f.Addrs = append(f.Addrs, addrOf(a, dev))
	}
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := p.routes(fam)
		if err != nil {
			return f, err
		}
		for _, r := range routes {
			switch {
			case r.Table == unix.RT_TABLE_LOCAL || r.Flags&unix.RTM_F_CLONED != 0:
			case len(r.MultiPath) > 0:
				return f, fmt.Errorf("%w: a route of several ways (%s)", ErrUnfit, r)
			case r.LinkIndex == at.Index:
				f.Routes = append(f.Routes, routeOf(r, dev))
			case r.Type == unix.RTN_UNICAST && rtnl.Dst(r).Bits() == 0:
				return f, fmt.Errorf("%w: a default route by another device, a way around the mesh (%s)", ErrUnfit, r)
			}
		}
		neighs, err := rtnl.Retry(func() ([]netlink.Neigh, error) { return p.h.NeighList(at.Index, fam) })
		if err != nil {
			return f, fmt.Errorf("cannot list neighbours: %w", err)
		}
		for _, n := range neighs {
			if a, ok := netip.AddrFromSlice(n.IP); ok && n.State&netlink.NUD_PERMANENT != 0 {
				f.Neighs = append(f.Neighs, Neigh{Dev: dev, Addr: a.Unmap(), MAC: n.HardwareAddr.String()})
			}
		}
	}
	if f.Settings, err = settings(ns, dev); err != nil {
		return f, err
	}
	if err := f.wide(p); err != nil {
		return f, err
	}
	return f, f.check()
}

// wide takes the facts that matter where the device stays.
func (f *Facts) wide(p *place) error {
	links, err := rtnl.Retry(p.h.LinkList)
	if err != nil {
		return fmt.Errorf("cannot list devices: %w", err)
	}
	for _, l := range links {
		if at := l.Attrs(); at.Name != f.Dev && at.Flags&net.FlagUp != 0 && at.Flags&net.FlagLoopback == 0 {
			f.Others = append(f.Others, at.Name)
		}
	}
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := p.rules(fam)
		if err != nil {
			return err
		}
		for _, r := range rules {
			if !kernels(r) {
				f.Rules = append(f.Rules, r.String())
			}
		}
	}
	return p.ns.Do(func() error {
		for _, path := range []string{"net/ipv4/tcp_early_demux", "net/ipv4/udp_early_demux", "net/ipv4/conf/all/rp_filter",
			"net/ipv6/conf/all/forwarding", "net/ipv4/neigh/" + f.Dev + "/proxy_delay"} {
			if b, err := os.ReadFile(filepath.Join("/proc/sys", path)); err == nil {
				f.Wide = append(f.Wide, Sysctl{path, string(bytes.TrimSpace(b)), true})
			}
		}
		return nil
	})
}

// kernels says that a rule is one that every namespace has.
func kernels(r netlink.Rule) bool {
	return r.Priority == 0 && r.Table == unix.RT_TABLE_LOCAL || r.Priority == below && r.Table == unix.RT_TABLE_MAIN ||
		r.Priority == below+1 && r.Table == unix.RT_TABLE_DEFAULT
}

// settings reads what the kernel lets be set of a device.
func settings(ns *netns.NS, dev string) (out []Sysctl, err error) {
	err = ns.Do(func() error {
		for _, fam := range []string{"ipv4", "ipv6"} {
			dir := filepath.Join("net", fam, "conf", dev)
			files, err := os.ReadDir(filepath.Join("/proc/sys", dir))
			if errors.Is(err, os.ErrNotExist) {
				continue // a kernel without IPv6
			}
			if err != nil {
				return err
			}
			for _, file := range files {
				path := filepath.Join(dir, file.Name())
				// What cannot be read (a stable_secret that is not set) or written cannot have been set.
				st, err := file.Info()
				if err != nil || st.Mode()&0o200 == 0 {
					continue
				}
				if b, err := os.ReadFile(filepath.Join("/proc/sys", path)); err == nil {
					out = append(out, Sysctl{path, string(bytes.TrimSpace(b)), true})
				}
			}
		}
		return nil
	})
	return out, err
}

func addrOf(a netlink.Addr, dev string) Addr {
	out := Addr{Dev: dev, Prefix: rtnl.Prefix(a.IPNet), Scope: a.Scope,
		Flags: a.Flags & (unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE)}
	if a.Peer != nil {
		out.Peer = rtnl.Prefix(a.Peer)
	}
	if b, ok := netip.AddrFromSlice(a.Broadcast); ok {
		out.Broadcast = b.Unmap()
	}
	return out
}

func routeOf(r netlink.Route, dev string) Route {
	out := Route{Dst: rtnl.Dst(r), Type: r.Type, Dev: dev, Onlink: r.Flags&unix.RTNH_F_ONLINK != 0,
		Scope: int(r.Scope), Table: r.Table, Metric: r.Priority, Proto: int(r.Protocol), MTU: r.MTU, TOS: r.Tos}
	if r.LinkIndex == 0 {
		out.Dev = ""
	}
	if a, ok := netip.AddrFromSlice(r.Gw); ok {
		out.Via = a.Unmap()
	}
	if a, ok := netip.AddrFromSlice(r.Src); ok {
		out.Src = a.Unmap()
	}
	return out
}

// Connections are those of the table of connections that New lets go on; a pod with more keeps the first.
const maxKeep = 256

// Keep chooses which of a pod's connections go on natively: from its own addresses to others'. left is how many there
// are beyond the bound: every packet of the pod passes their rules.
func Keep(f Facts, all []Conn) (keep []Conn, left int) {
	own := f.Own()
	for _, c := range all {
		if !slices.Contains(own, c.Local.Addr()) || slices.Contains(own, c.Remote.Addr()) {
			continue
		}
		if len(keep) == maxKeep {
			left++
			continue
		}
		keep = append(keep, c)
	}
	return keep, left
}
