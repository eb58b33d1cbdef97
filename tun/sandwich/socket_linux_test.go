package sandwich

import (
	"net"
	"net/netip"
	"slices"
	"testing"

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
