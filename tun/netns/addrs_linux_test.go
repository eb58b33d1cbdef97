package netns_test

import (
	"fmt"
	"testing"

	"ztun/tun/tuntest/nslab"
)

// What a namespace tells of itself: both families of what is up, and nothing that only it itself can reach.
func TestAddrs(t *testing.T) {
	ns := nslab.New(t)
	if got, err := ns.Addrs(); err != nil || len(got) != 0 {
		t.Errorf("a namespace with nothing but lo: %v, %v", got, err)
	}
	for i, dev := range []string{"eth0", "net1", "down0"} {
		ns.IP(t, "link", "add", dev, "type", "veth", "peer", "name", fmt.Sprint("far", i))
		ns.IP(t, "link", "set", dev, "mtu", fmt.Sprint(1400+i))
		if dev != "down0" {
			ns.IP(t, "link", "set", dev, "up")
		}
		ns.IP(t, "addr", "add", fmt.Sprintf("10.6.%d.1/24", i), "dev", dev)
		ns.IP(t, "addr", "add", fmt.Sprintf("10.6.%d.2/24", i), "dev", dev) // a second of the same network
		ns.IP(t, "addr", "add", fmt.Sprintf("fd06:%d::1/64", i), "dev", dev, "nodad")
	}
	ns.IP(t, "addr", "add", "169.254.3.3/16", "dev", "eth0")
	ns.IP(t, "addr", "add", "10.6.9.9/32", "dev", "lo")
	got, err := ns.Addrs()
	want := "[{eth0 1400 10.6.0.1/24} {eth0 1400 10.6.0.2/24} {eth0 1400 fd06::1/64} " +
		"{net1 1401 10.6.1.1/24} {net1 1401 10.6.1.2/24} {net1 1401 fd06:1::1/64}]"
	if err != nil || fmt.Sprint(got) != want {
		t.Errorf("got  %v, %v\nwant %s", got, err, want)
	}
}
