//go:build ztun_faults

package netstack

import "net/netip"

// fault panics for a SYN to port 6664. For the tests of package test/e2e, which build a daemon with the tag
// ztun_faults: nothing that is released has it.
func fault(dst netip.AddrPort) {
	if dst.Port() == 6664 {
		panic("a fault was asked for by port in the reader")
	}
}
