package isolated

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun/steer"
	"ztun/tun/tuntest/nslab"
)

// Between two lives of the daemon nobody who calls a pod is refused, and a life that has come to nothing leaves it so.
// The last pod's end takes the device along.
func TestBetweenLives(t *testing.T) {
	node, ns := nslab.New(t), nslab.New(t)
	devices := func(n *Node, want string) {
		t.Helper()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		var have []string
		for _, dev := range []string{"ztun-node", steer.LiveTUN} {
			if strings.Contains(node.IP(t, "link"), dev) {
				have = append(have, dev)
			}
		}
		if got := strings.Join(have, " "); got != want {
			t.Errorf("devices %q, want %q", got, want)
		}
	}
	silent := func(to ...string) {
		t.Helper()
		for _, to := range to {
			err := node.Do(func() error {
				c, err := net.DialTimeout("tcp", to, 100*time.Millisecond)
				if err == nil {
					c.Close()
				}
				return err
			})
			var ne net.Error
			if !errors.As(err, &ne) || !ne.Timeout() {
				t.Errorf("%s: %v", to, err)
			}
		}
	}

	devices(openNodeIn(t, node), "")

	n := openNodeIn(t, node)
	ip := netip.MustParseAddr
	at, err := n.Attach(t.Context(), attach.Pod{PodSpec: admin.PodSpec{NetNS: ns.Path(),
		IPs: []netip.Addr{ip("10.91.1.2"), ip("fd91:0:0:1::2")}}}, nobody{})
	if err != nil {
		t.Fatal(err)
	}
	if err := at.Capture(t.Context()); err != nil {
		t.Fatal(err)
	}
	node.IP(t, "addr", "add", "10.91.1.1/32", "dev", "lo")
	node.IP(t, "addr", "add", "fd91:0:0:1::1/128", "dev", "lo")
	at.Silence()
	n.Leave()
	at.Stop()
	all := []string{"10.91.1.2:9000", "10.91.1.2:15008", "[fd91:0:0:1::2]:9000", "[fd91:0:0:1::2]:15008"}
	silent(all...)
	devices(n, "ztun-node")
	silent(all...)

	n = openNodeIn(t, node) // which never comes to the pod
	silent(all...)
	devices(n, "ztun-node")
	silent(all...)

	n = openNodeIn(t, node)
	if err := n.Sweep(nil); err != nil {
		t.Error(err)
	}
	devices(n, "")
}
