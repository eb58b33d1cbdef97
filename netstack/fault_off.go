//go:build !ztun_faults

package netstack

import "net/netip"

// fault is where a test's build (tag ztun_faults) panics, in the reader of a device; see fault_on.go. Here it is
// nothing.
func fault(netip.AddrPort) {}
