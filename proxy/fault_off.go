//go:build !ztun_faults

package proxy

import "net/netip"

// fault is where a test's build (tag ztun_faults) panics, to see what a panic ends; see fault_on.go. Here it is
// nothing.
func fault(string, netip.AddrPort) {}
