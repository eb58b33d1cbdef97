package main

import (
	"iter"

	"ztun/admin"
	"ztun/proxy"
)

// connections are those of all pods, and of the daemon's own where it has one, for the socket and for 15000.
func (d *daemon) connections() admin.ConnectionSource {
	all := func(of func(*proxy.Proxy) iter.Seq[proxy.ConnectionInfo]) iter.Seq[admin.Connection] {
		return func(yield func(admin.Connection) bool) {
			each := func(pod string, p *proxy.Proxy) bool {
				for i := range of(p) {
					if !yield(shown(pod, &i)) {
						return false
					}
				}
				return true
			}
			for _, p := range d.pods.all() {
				if !each(p.label, p.proxy) {
					return
				}
			}
			if self := d.pods.self.Load(); self != nil {
				i := self.info()
				each(i.Namespace+"/"+i.Name, self.proxy)
			}
		}
	}
	return admin.ConnectionSource{Live: all((*proxy.Proxy).Live), Ended: all((*proxy.Proxy).Ended)}
}

// shown is a connection in the words of the admin interface.
func shown(pod string, i *proxy.ConnectionInfo) admin.Connection {
	side := func(p *proxy.Party) admin.Side {
		return admin.Side{Address: p.Addr, Workload: p.Workload, Namespace: p.Namespace, Identity: p.Identity,
			Cluster: p.Cluster}
	}
	return admin.Connection{
		Pod: pod, Direction: i.Direction, Protocol: i.Protocol, State: i.State, Source: side(&i.Source),
		Destination: side(&i.Destination),
		Called:      i.Called, Service: i.Service, Authority: i.Authority,
		Tunnel: admin.Tunnel{Local: i.TunnelLocal, Remote: i.TunnelRemote}, Memory: i.Memory,
		Sent: i.Sent, Received: i.Received, Start: i.Start, End: i.End, Outcome: i.Outcome, Reason: i.Reason, Flag: i.Flag,
	}
}
