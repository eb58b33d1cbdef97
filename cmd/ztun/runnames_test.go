package main

import (
	"net/netip"
	"testing"
)

// A command's nameserver is of a family that the command has.
func TestCapturedServer(t *testing.T) {
	four, six := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2")
	for _, c := range []struct {
		ips  []netip.Addr
		want string
	}{{[]netip.Addr{four}, "192.0.2.53"}, {[]netip.Addr{six, four}, "192.0.2.53"}, {[]netip.Addr{six}, "2001:db8::53"}} {
		if got := capturedServer(c.ips); got.String() != c.want {
			t.Errorf("for %v: %s, want %s", c.ips, got, c.want)
		}
	}
}
