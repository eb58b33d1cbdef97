package main

import (
	"net/netip"
	"testing"
)

// TestRunServers: a run has no server that nobody has asked for; those asked for are on loopback unless told otherwise;
// the daemon of a node has all.
func TestRunServers(t *testing.T) {
	for _, test := range []struct {
		flag, want string // want is where it listens, or the error
	}{
		{"", "invalid AddrPort"}, {"9000", "127.0.0.1:9000"}, {"[::1]:9000", "[::1]:9000"}, {"0.0.0.0:9", "0.0.0.0:9"},
		{"[::]:9000", "[::]:9000"},
		{"0", `--metrics 0: "0": want a port from 1 to 65535`},
		{"host:1", "--metrics host:1: want an IP address and a port, ADDR:PORT, an IPv6 address as [ADDR]:PORT"},
	} {
		o := ownServers{metricsAt: test.flag}
		err := o.resolve()
		c := adminConfig{Own: &o, Port: 15000, StatsPort: 15020, ReadinessPort: 15021}
		at, port, wanted := c.stats()
		got := at.String()
		if err != nil {
			got = err.Error()
		}
		if got != test.want || port != 0 || wanted != at.IsValid() {
			t.Errorf("--metrics %q: %s %d %v, want %s", test.flag, got, port, wanted, test.want)
		}
		if at, _, wanted := c.readiness(); at.IsValid() || wanted {
			t.Errorf("readiness at %v", at)
		}
		if _, wanted := c.page(); wanted {
			t.Error("there is a page")
		}
	}
	o := ownServers{adminPort: "15900", readyAt: "15901"}
	if err := o.resolve(); err != nil {
		t.Fatal(err)
	}
	c := adminConfig{Own: &o}
	if port, wanted := c.page(); port != 15900 || !wanted {
		t.Error(port, wanted)
	}
	if at, _, wanted := c.readiness(); at != netip.MustParseAddrPort("127.0.0.1:15901") || !wanted {
		t.Error(at, wanted)
	}
	c = adminConfig{StatsPort: 15020}
	if at, port, wanted := c.stats(); at.IsValid() || port != 15020 || !wanted {
		t.Error(at, port, wanted)
	}
}
