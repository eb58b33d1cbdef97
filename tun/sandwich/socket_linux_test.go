package sandwich

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/tuntest/nslab"
)

// Only a socket that waits for the answer to its SYN counts: not a listener, none that is connected, and none that
// has ended a moment ago, which the kernel remembers.
func TestConnecting(t *testing.T) {
	n := nslab.New(t)
	n.IP(t, "link", "set", "lo", "up")
	n.IP(t, "link", "add", "d0", "type", "veth", "peer", "name", "d1")
	n.IP(t, "addr", "add", "10.92.1.1/24", "dev", "d0")
	n.IP(t, "-6", "addr", "add", "fd92::1/64", "dev", "d0", "nodad")
	n.IP(t, "link", "set", "d1", "up", "arp", "off")
	n.IP(t, "link", "set", "d0", "up")
	n.Settle(t)
	is := func(what string, local, remote netip.AddrPort, want bool) {
		t.Helper()
		if got, err := Connecting(n.NS, local, remote); err != nil || got != want {
			t.Errorf("%s, %s to %s: %v, %v", what, local, remote, got, err)
		}
	}
	for _, own := range []string{"10.92.1.1", "fd92::1"} {
		a := netip.MustParseAddr(own)
		var at, begun, nobody netip.AddrPort
		var client, server net.Conn
		if err := n.NS.Do(func() error {
			l, err := net.Listen("tcp", netip.AddrPortFrom(a, 0).String())
			if err != nil {
				return err
			}
			defer l.Close()
			at = l.Addr().(*net.TCPAddr).AddrPort()
			if client, err = net.Dial("tcp", at.String()); err != nil {
				return err
			}
			if server, err = l.Accept(); err != nil {
				return err
			}
			// Towards a neighbour that nobody is.
			family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: 80, Addr: [4]byte{10, 92, 1, 9}})
			nobody = netip.MustParseAddrPort("10.92.1.9:80")
			if a.Is6() {
				nobody = netip.MustParseAddrPort("[fd92::9]:80")
				family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: 80, Addr: nobody.Addr().As16()}
			}
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fd) })
			if err := unix.Connect(fd, to); err != unix.EINPROGRESS {
				return err
			}
			sa, err := unix.Getsockname(fd)
			switch sa := sa.(type) {
			case *unix.SockaddrInet4:
				begun = netip.AddrPortFrom(a, uint16(sa.Port))
			case *unix.SockaddrInet6:
				begun = netip.AddrPortFrom(a, uint16(sa.Port))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		from := client.LocalAddr().(*net.TCPAddr).AddrPort()
		is("connecting", begun, nobody, true)
		is("the other way round", nobody, begun, false)
		is("another port", netip.AddrPortFrom(begun.Addr(), begun.Port()^1), nobody, false)
		is("connected", from, at, false)
		is("of a listener that was", at, from, false)
		client.Close()
		server.Close() // the client remembers
		is("ended", from, at, false)
	}
}

// What is kept of connections: those that still are, until the application has another one of the same ports.
func TestRemain(t *testing.T) {
	c := func(port uint16, socket uint64) Conn {
		return Conn{netip.AddrPortFrom(netip.MustParseAddr("10.92.1.2"), port), netip.MustParseAddrPort("10.92.2.2:80"), socket}
	}
	kept := []Conn{c(1, 11), c(2, 12), c(3, 0), c(4, 14), c(5, 15), c(6, 0)}
	open := []Conn{c(7, 17), c(2, 12), c(3, 13), c(4, 0), c(5, 99), c(6, 0)}
	want := []Conn{c(2, 12), c(3, 13), c(4, 14), c(6, 0)}
	if got := Remain(kept, open); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	// Closed, and another one after it.
	if got := Remain(Remain(kept, open), []Conn{c(4, 98)}); len(got) > 0 {
		t.Errorf("another connection is taken for the one that was kept: %v", got)
	}
}

// What S's own sockets learn of a path's MTU is not applied to what S forwards: the router tells the pod of it, as it
// would without S, whose own errors would not find the pod.
func TestForwardsByNoLearntMTU(t *testing.T) {
	node, pod, far := nslab.New(t), nslab.New(t), nslab.New(t)
	bridgePod(t, node, pod)
	node.IP(t, "link", "add", "veth2", "mtu", "1300", "type", "veth", "peer", "name", "eth0", "netns", far.Name)
	far.IP(t, "link", "set", "eth0", "mtu", "1300", "up")
	far.IP(t, "-6", "addr", "add", "fd93::2/64", "dev", "eth0", "nodad")
	far.IP(t, "-6", "route", "add", "default", "via", "fd93::1")
	node.IP(t, "-6", "addr", "add", "fd93::1/64", "dev", "veth2", "nodad")
	node.IP(t, "link", "set", "veth2", "up")
	if err := node.NS.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	ns := Namespaces{S: sandwich(t), Pod: pod.NS}
	f, err := Read(pod.NS, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(f, Config{Native: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Apply(t.Context(), p, ns); err != nil {
		t.Fatal(err)
	}
	route := func(more ...string) (out string) {
		t.Helper()
		if err := ns.S.Do(func() error {
			b, err := exec.Command("ip", append([]string{"-6", "route", "get", "fd93::2"}, more...)...).CombinedOutput()
			out = string(b)
			return err
		}); err != nil {
			t.Fatal(err, out)
		}
		return out
	}
	// As HBONE's do, a socket there has the pod's address.
	var fd int
	if err := ns.S.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet6{Port: 15008, Addr: netip.MustParseAddr("fd92::2").As16()})
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet6{Port: 9, Addr: netip.MustParseAddr("fd93::2").As16()}
	for end := time.Now().Add(20 * time.Second); !strings.Contains(route(), "mtu 1300"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("S does not learn the path's MTU: ", route())
		}
		_ = unix.Sendto(fd, make([]byte, 1350), 0, to) // an error of an earlier one is told here
	}
	for _, iif := range []string{In, Net} {
		got := route("from", "fd92::2", "iif", iif, "ipproto", "udp")
		if strings.Contains(got, "mtu 1300") || !strings.Contains(got, "dev eth0") {
			t.Errorf("from %s: %s", iif, got)
		}
	}
}
