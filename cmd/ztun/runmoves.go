package main

import (
	"context"
	"net/netip"
	"slices"

	"ztun/tun/netns"
)

// follows tells whether this process is one workload's on a host that may move: a laptop, a VM. A node of a cluster
// keeps its addresses.
func (c *Config) follows() bool { return c.Mode.Rootless || c.Mode.Dedicated }

// followHost has control plane and CA called anew when the host has lost the address from which they are called, and
// waits for them ended when it has got one: at once, where HTTP/2's PING would take 40 s and more. Connections of the
// workload's are those of its applications, which see what they would see without us.
func (d *daemon) followHost(ctx context.Context) error {
	log := d.log.Logger("run")
	var host []netip.Addr // nil: not looked at yet
	err := netns.WatchAddrs(ctx, func() {
		now, err := hostAddrs()
		if err != nil {
			log.Debug("this host's addresses are not known", "error", err)
			return
		}
		gone, come := moves(host, now)
		changed := host != nil && len(gone)+len(come) > 0
		host = now
		closed := 0
		for _, conn := range d.upstreams {
			closed += conn.Moved(now)
		}
		if closed > 0 {
			log.Info("this host has other addresses: the control plane is called anew", "lost", gone, "new", come)
		}
		if !changed {
			return
		}
		if client := d.xds.Load(); client != nil {
			client.Retry()
		}
		d.certs.Retry()
		d.know.poke() // what the record announces may be ours now, or no longer
	})
	if err != nil {
		log.Warn("that this host gets another address is noticed late", "error", err)
	}
	return nil
}

// moves are the addresses that a host has lost and got. Those of loopback and of a link alone are no way to anybody.
func moves(before, now []netip.Addr) (gone, come []netip.Addr) {
	without := func(a, b []netip.Addr) (out []netip.Addr) {
		for _, x := range a {
			if x.IsGlobalUnicast() && !slices.Contains(b, x) && !slices.Contains(out, x) {
				out = append(out, x)
			}
		}
		return out
	}
	return without(before, now), without(now, before)
}
