package rootless

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/cmd/attach"
	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/tun/netns"
)

// The application sees its client's address, or what stands for it where its namespace could not answer that.
func TestSeenAs(t *testing.T) {
	for _, test := range []struct{ src, dst, want string }{
		{"192.0.2.9", "10.0.0.7", "192.0.2.9"}, {"2001:db8::9", "fd00::7", "2001:db8::9"},
		{"192.0.2.9", "fd00::7", "64:ff9b::c000:209"}, {"2001:db8::9", "10.0.0.7", "192.0.0.8"},
		{"127.0.0.1", "10.0.0.7", "192.0.0.8"}, {"::1", "10.0.0.7", "192.0.0.8"}, {"127.0.0.1", "fd00::7", "64:ff9b::c000:8"},
		{"::1", "fd00::7", "64:ff9b::c000:8"}, {"::ffff:192.0.2.9", "10.0.0.7", "192.0.2.9"},
		{"10.0.0.7", "10.0.0.7", "10.0.0.7"}, {"127.0.0.1", "127.0.0.1", "127.0.0.1"}, {"::1", "::1", "::1"},
	} {
		if got := seenAs(netip.MustParseAddr(test.src), netip.MustParseAddr(test.dst)); got.String() != test.want {
			t.Errorf("%s to %s: %s, want %s", test.src, test.dst, got, test.want)
		}
	}
}

// Where the record says that HBONE arrives is where it is listened for, and nowhere else; while nobody is attached
// connections are reset. What is none of the host's addresses is listened for on all of them.
func TestAnnounce(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	k := New(attach.Options{Logger: func(string) *slog.Logger { return log }, Panics: rescue.New(log),
		Descriptors: attach.NewDescriptors(1024, fair.NewReport(log)), IPv6: true}, Inbound{})
	defer k.Close()
	listens := func(at netip.AddrPort) bool {
		c, err := net.DialTimeout("tcp", at.String(), 10*time.Second)
		if err == nil {
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		return errors.Is(err, syscall.ECONNRESET) // which may come before connect has returned
	}
	var last netip.AddrPort
	for _, host := range []string{"127.0.0.1:0", "192.0.2.1:0"} {
		where := netip.MustParseAddrPort(host)
		if err := k.Announce(t.Context(), []netip.AddrPort{where}); err != nil {
			t.Fatal(err)
		}
		if len(k.open.mesh) != 1 || k.open.mesh[where] == nil {
			t.Fatalf("%s announced: listening for %v", host, k.open.mesh)
		}
		port := k.open.mesh[where].Addr().(*net.TCPAddr).AddrPort().Port()
		at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
		if !listens(at) {
			t.Errorf("nobody listens for %s", host)
		}
		if last.IsValid() && last != at && listens(last) {
			t.Errorf("%s is listened at, which is announced no more", last)
		}
		last = at
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	err = k.Announce(t.Context(), []netip.AddrPort{netip.MustParseAddrPort(taken.Addr().String())})
	if err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Error(err)
	}
}

// What connections are given up by holds without root, too: USER_TIMEOUT_ENABLED, of calls and of accepted ones.
func TestUserTimeout(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	k := New(attach.Options{Logger: func(string) *slog.Logger { return log }, Panics: rescue.New(log),
		Descriptors: attach.NewDescriptors(1024, fair.NewReport(log)),
		Socket:      netns.SocketOptions{UserTimeout: 7 * time.Second, NotSentLowat: 1 << 10, Mark: 1337}}, Inbound{})
	defer k.Close()
	ln, err := k.listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"), false)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	called, err := k.dial.DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer called.Close()
	accepted, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	for what, c := range map[string]net.Conn{"called": called, "accepted": accepted} {
		rc, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		rc.Control(func(fd uintptr) {
			if ms, err := unix.GetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_USER_TIMEOUT); err != nil || ms != 7000 {
				t.Errorf("%s: %d ms, %v", what, ms, err)
			}
		})
	}
	if udp, err := k.dial.DialContext(t.Context(), "udp", ln.Addr().String()); err != nil {
		t.Error("UDP by the same dialer: ", err)
	} else {
		udp.Close()
	}
}
