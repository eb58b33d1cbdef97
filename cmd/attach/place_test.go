package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"ztun/admin"
	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

func TestChooseAddrs(t *testing.T) {
	at := func(dev, prefix string) netns.Addr {
		return netns.Addr{Device: dev, Prefix: netip.MustParsePrefix(prefix)}
	}
	for _, c := range []struct {
		have []netns.Addr
		want string
	}{
		{nil, "[]"},
		{[]netns.Addr{at("eth0", "10.0.0.1/24")}, "[10.0.0.1]"},
		{[]netns.Addr{at("eth0", "fd00::1/64"), at("eth0", "10.0.0.1/24"), at("eth0", "10.0.0.2/24")}, "[10.0.0.1 fd00::1]"},
		{[]netns.Addr{at("a", "10.1.0.1/24"), at("eth0", "10.0.0.1/24"), at("a", "fd01::1/64")}, "[10.0.0.1]"},
		{[]netns.Addr{at("a", "10.1.0.1/24"), at("b", "fd01::1/64")}, "[10.1.0.1]"},
	} {
		if got := fmt.Sprint(chooseAddrs(c.have)); got != c.want {
			t.Errorf("%v: %s, want %s", c.have, got, c.want)
		}
	}
}

// A namespace that comes as a descriptor tells its pod's addresses, unless they are given; one without says so, and
// that it may be tried again.
func TestLocateAddrs(t *testing.T) {
	ns := nslab.New(t)
	f, err := os.Open("/var/run/netns/" + ns.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := Pod{File: f}
	if err := LocateAddrs(&p); !errors.Is(err, admin.ErrPodUnavailable) {
		t.Errorf("no address: %v", err)
	}
	ns.IP(t, "link", "add", "eth0", "type", "veth", "peer", "name", "far")
	ns.IP(t, "link", "set", "eth0", "up")
	ns.IP(t, "addr", "add", "10.6.0.1/24", "dev", "eth0")
	ns.IP(t, "addr", "add", "fd06::1/64", "dev", "eth0", "nodad")
	if err := LocateAddrs(&p); err != nil || fmt.Sprint(p.IPs) != "[10.6.0.1 fd06::1]" || p.Place.Ino == 0 {
		t.Errorf("%v at %+v, %v", p.IPs, p.Place, err)
	}
	given := Pod{File: f}
	given.IPs = []netip.Addr{netip.MustParseAddr("10.7.0.1")}
	if err := LocateAddrs(&given); err != nil || fmt.Sprint(given.IPs) != "[10.7.0.1]" {
		t.Errorf("given ones became %v, %v", given.IPs, err)
	}
}
