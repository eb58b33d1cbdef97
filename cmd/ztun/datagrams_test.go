package main

import (
	"net/netip"
	"testing"

	"ztun/proxy/state"
)

// ZTUN_UDP and ZTUN_MAX_UDP_FLOWS decide whether datagrams are carried, whether policy is asked, and how many flows
// there may be.
func TestDatagramModes(t *testing.T) {
	know := newKnowledge(func() *state.View { return nil })
	src, dst := netip.MustParseAddrPort("10.1.0.2:4000"), netip.MustParseAddrPort("192.0.2.1:443")
	for _, tt := range []struct {
		mode    string
		carried bool
		allowed bool // before anything is known
	}{{"policy", true, false}, {"all", true, true}, {"off", false, false}} {
		c := load(t, "ZTUN_UDP", tt.mode, "ZTUN_MAX_UDP_FLOWS", "77")
		d := c.datagrams(know)
		if (d != nil) != tt.carried || d != nil && d.MaxFlows != 77 {
			t.Errorf("%s: %+v", tt.mode, d)
		}
		p := &pod{udp: c.UDP.Mode, built: make(chan struct{})}
		if got := p.AllowDatagram(false, src, dst); got != tt.allowed {
			t.Errorf("%s, being attached: allowed %v", tt.mode, got)
		}
		close(p.built)
		if got := p.AllowDatagram(true, dst, src); got != tt.allowed {
			t.Errorf("%s, not attached after all: allowed %v", tt.mode, got)
		}
	}
	if c := load(t); c.UDP.Mode != udpPolicy || c.UDP.MaxFlows != 16384 {
		t.Errorf("by default %v, %d", c.UDP.Mode, c.UDP.MaxFlows)
	}
	if _, err := loadConfig(env("ZTUN_UDP", "yes")); err == nil {
		t.Error("ZTUN_UDP=yes is taken")
	}
}
