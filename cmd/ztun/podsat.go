package main

import (
	"net/netip"

	"ztun/proxy"
)

// enlist has connections within the process find an attached pod by its addresses.
func (m *podManager) enlist(p *pod) {
	for _, a := range p.spec.IPs {
		m.at.Store(a, p)
	}
}

// delist undoes enlist. Where pods may share an address (attach.Kind), it may be a successor's by now, and stays so.
func (m *podManager) delist(p *pod) {
	for _, a := range p.spec.IPs {
		m.at.CompareAndDelete(a, p)
	}
}

// proxyAt is the proxy of the attached pod of an address, for connections within the process; nil if there is none, or
// it is on its way out: the wire has the answers then.
func (m *podManager) proxyAt(a netip.Addr) *proxy.Proxy {
	found, ok := m.at.Load(a)
	if !ok {
		return nil
	}
	p := found.(*pod)
	if p.stopping.Load() {
		return nil
	}
	return p.proxy
}
