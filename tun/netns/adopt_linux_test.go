package netns_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

// file is a copy of a socket, as a store hands it on.
func file(t *testing.T, s interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// A listener that is taken over serves who has waited in its queue, with its options; another socket than the one that
// is wanted is not taken.
func TestAdoptTransparent(t *testing.T) {
	lab, other := anyIP(t), nslab.New(t)
	ns, err := netns.OpenName(lab.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	elsewhere, err := netns.OpenName(other.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	o := netns.SocketOptions{Mark: 0x539, ReusePort: true, NotSentLowat: 128 << 10}
	first := listen(t, ns, 15008, true, o)
	f := file(t, first)
	first.Close()
	dial := func(to string) net.Conn {
		t.Helper()
		var c net.Conn
		if err := lab.Do(func() (err error) {
			c, err = net.DialTimeout("tcp", to, patience)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		return c
	}
	waiting := dial("10.55.0.7:15008")
	fmt.Fprint(waiting, "a")

	plain := netns.SocketOptions{Mark: 0x539}
	for what, adopt := range map[string]func() error{
		"another port":      func() error { _, err := netns.AdoptTransparent(f, ns, 15001, true, o); return err },
		"IPv4 alone":        func() error { _, err := netns.AdoptTransparent(f, ns, 15008, false, o); return err },
		"another namespace": func() error { _, err := netns.AdoptTransparent(f, elsewhere, 15008, true, o); return err },
		"our own namespace": func() error { _, err := netns.AdoptTransparent(f, nil, 15008, true, o); return err },
		"no SO_REUSEPORT":   func() error { _, err := netns.AdoptTransparent(f, ns, 15008, true, plain); return err },
		"another mark": func() error {
			_, err := netns.AdoptTransparent(f, ns, 15008, true, netns.SocketOptions{ReusePort: true})
			return err
		},
		"UDP": func() error {
			_, err := netns.AdoptPacket(f, ns, netip.MustParseAddrPort("[::]:15008"), o)
			return err
		},
		"no socket": func() error {
			file, err := os.Open("/dev/null")
			if err != nil {
				return err
			}
			defer file.Close()
			_, err = netns.AdoptTransparent(file, ns, 15008, true, o)
			return err
		},
	} {
		if err := adopt(); !errors.Is(err, netns.ErrUnfit) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var opaque *net.TCPListener
	if err := lab.Do(func() error {
		l, err := net.Listen("tcp", "[::]:15009")
		if err == nil {
			opaque = l.(*net.TCPListener)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer opaque.Close()
	bad := file(t, opaque)
	if _, err := netns.AdoptTransparent(bad, ns, 15009, true, netns.SocketOptions{}); !errors.Is(err, netns.ErrUnfit) {
		t.Errorf("without IP_TRANSPARENT: %v", err)
	}

	l, err := netns.AdoptTransparent(f, ns, 15008, true, o)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.SetDeadline(time.Now().Add(patience))
	for i, c := range []net.Conn{waiting, dial("[fd55::7]:15008")} {
		if i > 0 {
			fmt.Fprint(c, "a")
		}
		got, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer got.Close()
		got.SetDeadline(time.Now().Add(patience))
		b := make([]byte, 1)
		if _, err := io.ReadFull(got, b); err != nil || got.LocalAddr().String() != c.RemoteAddr().String() {
			t.Errorf("%s accepted at %s: %v", c.RemoteAddr(), got.LocalAddr(), err)
		}
		if mark := option(t, got, unix.SOL_SOCKET, unix.SO_MARK); mark != 0x539 {
			t.Errorf("mark %#x", mark)
		}
	}
}

// Datagrams that came meanwhile are there for the next owner.
func TestAdoptPacket(t *testing.T) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(c.LocalAddr().String())
	f := file(t, c.(*net.UDPConn))
	c.Close()
	from, err := net.Dial("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	fmt.Fprint(from, "question")
	if _, err := netns.AdoptListener(f, nil, at, netns.SocketOptions{}); !errors.Is(err, netns.ErrUnfit) {
		t.Errorf("as TCP: %v", err)
	}
	again, err := netns.AdoptPacket(f, nil, at, netns.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	again.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 100)
	if n, _, err := again.ReadFrom(b); err != nil || string(b[:n]) != "question" {
		t.Errorf("%q, %v", b[:n], err)
	}
}

// One that a life which was about to end has made deaf hears again.
func TestAdoptDeaf(t *testing.T) {
	lab := anyIP(t)
	ns, err := netns.OpenName(lab.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	first := listen(t, ns, 15008, true, netns.SocketOptions{})
	if err := netns.Deafen(first); err != nil {
		t.Fatal(err)
	}
	l, err := netns.AdoptTransparent(file(t, first), ns, 15008, true, netns.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := lab.Do(func() error {
		c, err := net.DialTimeout("tcp", "10.55.0.7:15008", patience)
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
