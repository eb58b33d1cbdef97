package istiod

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"ztun/test/pki"
)

func TestStranded(t *testing.T) {
	host := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("fe80::7")}
	for from, want := range map[string]bool{"192.0.2.7": false, "192.0.2.8": true, "2001:db8::7": false, "2001:db8::8": true,
		"127.0.0.1": false, "127.0.0.9": false, "::1": false, "::ffff:192.0.2.7": false, "fe80::7%eth0": false,
		"fe80::8%eth0": true} {
		a := netip.MustParseAddr(from)
		if got := stranded(net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 40000)), host); got != want {
			t.Errorf("from %s: %v", from, got)
		}
	}
	if stranded(&net.UnixAddr{Name: "x"}, nil) {
		t.Error("a Unix socket has no address to lose")
	}
}

// TestMoved: a call under way ends when the host has lost the address that its connection comes from, and not before;
// the channel's next call has a connection of its own; and what is closed is forgotten.
func TestMoved(t *testing.T) {
	ca := pki.New(t)
	s := serve(t, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, time.Hour, "127.0.0.1")}})
	c, err := New(Options{Address: s.addr, Roots: Roots{PEM: ca.PEM()}})
	if err != nil {
		t.Fatal(err)
	}
	away, here := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 40000}, netip.MustParseAddr("192.0.2.7")
	ours, theirs := net.Pipe()
	defer theirs.Close()
	c.open.add(from{ours, away})
	ended := make(chan error, 1)
	go func() {
		_, err := ours.Read(make([]byte, 1))
		ended <- err
	}()
	if got, err := callOn(t, c); err != nil || got != "fine" { // beside it, from loopback
		t.Fatal(got, err)
	}
	if n := c.Moved([]netip.Addr{here}); n != 0 {
		t.Errorf("%d connections are closed whose address is there", n)
	}
	select {
	case err := <-ended:
		t.Fatal("it has ended: ", err)
	default:
	}
	if n := c.Moved([]netip.Addr{netip.MustParseAddr("192.0.2.8")}); n != 1 {
		t.Errorf("%d connections are closed, want the one that comes from %s", n, here)
	}
	if err := <-ended; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if got, err := callOn(t, c); err != nil || got != "fine" {
		t.Error(got, err)
	}
	if n := c.Moved(nil); n != 0 {
		t.Errorf("%d connections were closed again", n)
	}
	if n := len(c.open.conns); n != 0 {
		t.Errorf("%d connections are not forgotten", n)
	}
}

// from is a connection from another address.
type from struct {
	net.Conn
	local net.Addr
}

func (f from) LocalAddr() net.Addr { return f.local }
