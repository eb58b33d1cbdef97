//go:build ztun_faults

package proxy

import "net/netip"

// fault panics at the place that a destination's port names. For the tests of package test/e2e, which build a daemon
// with the tag ztun_faults: nothing that is released has it.
func fault(where string, dst netip.AddrPort) {
	if place := map[uint16]string{6661: "outbound", 6662: "stream", 6663: "passthrough"}[dst.Port()]; place == where {
		panic("a fault was asked for by port in " + where)
	}
}
