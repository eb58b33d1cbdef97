package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestMoves(t *testing.T) {
	addrs := func(s string) (out []netip.Addr) {
		for _, a := range strings.Fields(s) {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	for _, test := range []struct{ before, now, gone, come string }{
		{"127.0.0.1 192.0.2.7 fe80::1", "192.0.2.7 127.0.0.1 fe80::2", "", ""},
		{"192.0.2.7 2001:db8::7", "192.0.2.8 2001:db8::7", "192.0.2.7", "192.0.2.8"},
		{"192.0.2.7 192.0.2.7", "192.0.2.7", "", ""}, // two devices have had it
		{"192.0.2.7", "", "192.0.2.7", ""},
		{"", "2001:db8::7 ::1", "", "2001:db8::7"},
	} {
		gone, come := moves(addrs(test.before), addrs(test.now))
		if fmt.Sprint(gone, come) != fmt.Sprint(addrs(test.gone), addrs(test.come)) {
			t.Errorf("%q to %q: gone %v, come %v", test.before, test.now, gone, come)
		}
	}
}
