package steer_test

import (
	"net/netip"
	"strings"
	"testing"

	"ztun/tun"
	"ztun/tun/steer"
)

// TestLinkMTU: a device gets the MTU and is set up; when a later step fails, it is as it was before, up or down.
func TestLinkMTU(t *testing.T) {
	p := newPod(t, newNode(t), "10.1.0.2")
	dev, err := tun.Open(tun.Options{Name: "ztun0", NetNS: p.NS.NS})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	is := func(when string, want ...string) {
		t.Helper()
		got := p.IP(t, "-o", "link", "show", "ztun0")
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %q in %s", when, w, got)
			}
		}
	}
	link := steer.Step{Where: steer.Pod, Do: steer.Link{Dev: "ztun0", MTU: 1400}}
	broken := steer.Step{Where: steer.Pod,
		Do: steer.Addr{Dev: "nosuchdevice", Prefix: netip.MustParsePrefix("10.1.0.9/32")}}
	for _, before := range []string{"down", "up"} {
		p.IP(t, "link", "set", "ztun0", "mtu", "1500", before)
		if err := steer.Apply(t.Context(), steer.Plan{Steps: []steer.Step{link, broken}}, p.namespaces()); err == nil {
			t.Fatal("applied to a device that is not there")
		}
		want := ",UP"
		if is("after the failure, "+before, "mtu 1500 "); before == "up" {
			is("after the failure", want)
		} else if got := p.IP(t, "-o", "link", "show", "ztun0"); strings.Contains(got, want) {
			t.Errorf("still up after the failure: %s", got)
		}
		if err := steer.Apply(t.Context(), steer.Plan{Steps: []steer.Step{link}}, p.namespaces()); err != nil {
			t.Fatal(err)
		}
		is("applied, "+before, "mtu 1400 ", want)
	}
}
