package netns_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

const patience = 20 * time.Second

// anyIP makes a namespace in which packets for 10.55.0.0/24 and fd55::/64, addresses that no device has, are the
// host's own.
func anyIP(t *testing.T) *nslab.NS {
	ns := nslab.New(t)
	ns.IP(t, "route", "add", "local", "10.55.0.0/24", "dev", "lo")
	ns.IP(t, "-6", "route", "add", "local", "fd55::/64", "dev", "lo")
	return ns
}

func listen(t *testing.T, ns *netns.NS, port uint16, v6 bool, o netns.SocketOptions) *net.TCPListener {
	t.Helper()
	l, err := netns.ListenTransparent(t.Context(), ns, port, v6, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.SetDeadline(time.Now().Add(patience))
	return l
}

// option reads a socket option of a connection.
func option(t *testing.T, c syscall.Conn, level, name int) int {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var v int
	var inner error
	if err := rc.Control(func(fd uintptr) {
		v, inner = unix.GetsockoptInt(int(fd), level, name)
	}); err != nil || inner != nil {
		t.Fatal(err, inner)
	}
	return v
}

func TestTransparent(t *testing.T) {
	ns := anyIP(t)
	o := netns.SocketOptions{UserTimeout: 7 * time.Second, NotSentLowat: 65536, Mark: 77}
	l := listen(t, ns.NS, 15008, true, o)
	for _, c := range []struct{ src, dst string }{
		{"10.55.0.1", "10.55.0.2"}, {"fd55::1", "fd55::2"}, {"::ffff:10.55.0.3", "10.55.0.4"}, {"10.55.0.5", "10.55.0.5"},
	} {
		src, dst := netip.MustParseAddr(c.src), netip.AddrPortFrom(netip.MustParseAddr(c.dst), 15008)
		out, err := netns.DialTransparent(t.Context(), ns.NS, src, dst, o)
		if err != nil {
			t.Fatal(c, err)
		}
		defer out.Close()
		in, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		remote, local := in.RemoteAddr().(*net.TCPAddr).AddrPort(), in.LocalAddr().(*net.TCPAddr).AddrPort()
		if remote.Addr().Unmap() != src.Unmap() || local.Addr().Unmap() != dst.Addr() || local.Port() != 15008 {
			t.Errorf("accepted %s from %s", local, remote)
		}
		if got := out.LocalAddr().(*net.TCPAddr).AddrPort(); got.Addr().Unmap() != src.Unmap() ||
			got.Port() != remote.Port() {
			t.Errorf("dialed from %s, seen as %s", got, remote)
		}
		for name, conn := range map[string]*net.TCPConn{"dialed": out, "accepted": in} {
			for _, want := range []struct {
				what        string
				level, name int
				value       int
			}{
				{"TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1},
				{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{"TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE, 180},
				{"TCP_KEEPINTVL", unix.SOL_TCP, unix.TCP_KEEPINTVL, 180},
				{"TCP_KEEPCNT", unix.SOL_TCP, unix.TCP_KEEPCNT, 9},
				{"TCP_USER_TIMEOUT", unix.SOL_TCP, unix.TCP_USER_TIMEOUT, 7000},
				{"TCP_NOTSENT_LOWAT", unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT, 65536},
				{"IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1},
			} {
				if got := option(t, conn, want.level, want.name); got != want.value {
					t.Errorf("%s %s: %s is %d, not %d", c.src, name, want.what, got, want.value)
				}
			}
		}
		if got := option(t, out, unix.SOL_SOCKET, unix.SO_MARK); got != 77 {
			t.Errorf("SO_MARK is %d", got)
		}
		go func() { out.Write([]byte("hello")); out.CloseWrite() }()
		in.SetDeadline(time.Now().Add(patience))
		if b, err := io.ReadAll(in); string(b) != "hello" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
	}
}

func TestKeepAliveOption(t *testing.T) {
	ns := anyIP(t)
	o := netns.SocketOptions{KeepAlive: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 6 * time.Second,
		Count: 7}}
	l := listen(t, ns.NS, 15008, false, o)
	out, err := netns.DialTransparent(t.Context(), ns.NS, netip.MustParseAddr("10.55.0.1"),
		netip.MustParseAddrPort("10.55.0.2:15008"), o)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for _, c := range []*net.TCPConn{out, in} {
		if a, b, n := option(t, c, unix.SOL_TCP, unix.TCP_KEEPIDLE), option(t, c, unix.SOL_TCP, unix.TCP_KEEPINTVL),
			option(t, c, unix.SOL_TCP, unix.TCP_KEEPCNT); a != 5 || b != 6 || n != 7 {
			t.Errorf("keepalive %d/%d/%d", a, b, n)
		}
	}
	if network := l.Addr().String(); network != "0.0.0.0:15008" {
		t.Errorf("an IPv4 listener on %s", network)
	}
}

// TestManySourcePorts: the source port is drawn at connect, so one source address can have more connections than
// there are ports, to different destinations. The namespace has only four ports.
func TestManySourcePorts(t *testing.T) {
	ns := anyIP(t)
	if err := ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40003"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	l := listen(t, ns.NS, 15008, true, netns.SocketOptions{})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	for i := range 12 {
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 55, 0, byte(100 + i)}), 15008)
		c, err := netns.DialTransparent(t.Context(), ns.NS, netip.MustParseAddr("10.55.0.1"), dst, netns.SocketOptions{})
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer c.Close()
	}
}

// TestPortRange: local ports come from the range, one serves several destinations, a port on which somebody listens
// is passed over, and only when all are taken towards a destination is there an error, which says so.
func TestPortRange(t *testing.T) {
	ns := anyIP(t)
	l := listen(t, ns.NS, 15008, true, netns.SocketOptions{})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	listen(t, ns.NS, 61002, true, netns.SocketOptions{})
	o := netns.SocketOptions{Ports: netns.PortRange{Min: 61000, Max: 61003}}
	for _, dst := range []string{"10.55.0.101", "10.55.0.102", "fd55::101"} {
		src, dst := netip.MustParseAddr("10.55.0.1"), netip.AddrPortFrom(netip.MustParseAddr(dst), 15008)
		if dst.Addr().Is6() {
			src = netip.MustParseAddr("fd55::1")
		}
		seen := map[int]bool{}
		for i := range 3 {
			c, err := netns.DialTransparent(t.Context(), ns.NS, src, dst, o)
			if err != nil {
				t.Fatalf("connection %d to %s: %v", i, dst, err)
			}
			defer c.Close()
			p := c.LocalAddr().(*net.TCPAddr).Port
			if p < 61000 || p > 61003 || p == 61002 || seen[p] {
				t.Errorf("connection %d to %s from port %d", i, dst, p)
			}
			seen[p] = true
		}
		c, err := netns.DialTransparent(t.Context(), ns.NS, src, dst, o)
		if !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), "61000-61003") {
			t.Errorf("one more to %s: %v", dst, err)
		}
		if err == nil {
			c.Close()
		}
	}
	// No other error is taken for a port in use.
	if _, err := netns.DialTransparent(t.Context(), ns.NS, netip.MustParseAddr("10.55.0.1"),
		netip.MustParseAddrPort("10.55.0.103:1"), o); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a closed port: %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	ns := anyIP(t)
	ns.IP(t, "route", "add", "unreachable", "10.66.0.0/24")
	ns.IP(t, "route", "add", "blackhole", "10.67.0.0/24")
	ns.IP(t, "route", "add", "prohibit", "10.68.0.0/24")
	src4, src6 := netip.MustParseAddr("10.55.0.1"), netip.MustParseAddr("fd55::1")
	for _, c := range []struct {
		src  netip.Addr
		dst  string
		want error
	}{
		{src4, "10.55.0.2:1", unix.ECONNREFUSED},
		{src6, "[fd55::2]:1", unix.ECONNREFUSED},
		{src4, "10.66.0.1:1", unix.EHOSTUNREACH},
		{src4, "10.67.0.1:1", unix.EINVAL},
		{src4, "10.68.0.1:1", unix.EACCES},
		{src4, "192.0.2.1:1", unix.ENETUNREACH},
		{src6, "[2001:db8::1]:1", unix.ENETUNREACH},
		{src4, "[fd55::2]:1", unix.EAFNOSUPPORT},
		{src6, "10.55.0.2:1", unix.EAFNOSUPPORT},
		{netip.Addr{}, "10.55.0.2:1", unix.EAFNOSUPPORT},
	} {
		conn, err := netns.DialTransparent(t.Context(), ns.NS, c.src, netip.MustParseAddrPort(c.dst), netns.SocketOptions{})
		if err == nil {
			conn.Close()
			t.Errorf("%s from %s connected", c.dst, c.src)
			continue
		}
		var op *net.OpError
		if !errors.Is(err, c.want) || !errors.As(err, &op) || op.Op != "dial" {
			t.Errorf("%s from %s: %v, want %v", c.dst, c.src, err, c.want)
		}
	}
}

// TestDialContext: an address that swallows packets is given up when ctx says so, at any time, and the descriptor
// with it.
func TestDialContext(t *testing.T) {
	ns := nslab.New(t)
	ns.IP(t, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
	ns.IP(t, "link", "set", "v0", "up")
	ns.IP(t, "link", "set", "v1", "up")
	ns.IP(t, "addr", "add", "10.77.0.1/24", "dev", "v0")
	ns.IP(t, "neigh", "add", "10.77.0.2", "lladdr", "02:00:00:00:00:99", "dev", "v0")
	src, dst := netip.MustParseAddr("10.77.0.1"), netip.MustParseAddrPort("10.77.0.2:80")

	dead, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := netns.DialTransparent(dead, ns.NS, src, dst, netns.SocketOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a dead context: %v", err)
	}
	timed, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := netns.DialTransparent(timed, ns.NS, src, dst, netns.SocketOptions{})
	var ne net.Error
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("a deadline: %v", err)
	}
	for i := range 10 {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Duration(i)*5*time.Millisecond, cancel)
		if _, err := netns.DialTransparent(ctx, ns.NS, src, dst, netns.SocketOptions{}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	}
}

func TestListenErrors(t *testing.T) {
	ns := nslab.New(t)
	l := listen(t, ns.NS, 15008, true, netns.SocketOptions{})
	if _, err := netns.ListenTransparent(t.Context(), ns.NS, 15008, true, netns.SocketOptions{}); !errors.Is(err,
		unix.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	other := nslab.New(t)
	listen(t, other.NS, 15008, true, netns.SocketOptions{}) // another namespace is another port
	l.Close()
	listen(t, ns.NS, 15008, true, netns.SocketOptions{})
}

// A listener that is deaf answers no SYN, neither by letting in nor by a reset; who stood in its queue is accepted, and
// connections go on.
func TestDeafen(t *testing.T) {
	ns := anyIP(t)
	l := listen(t, ns.NS, 15008, true, netns.SocketOptions{})
	dial := func(to string, limit time.Duration) (c net.Conn, err error) {
		err = ns.Do(func() error {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			c, err = (&net.Dialer{}).DialContext(ctx, "tcp", to)
			return err
		})
		return c, err
	}
	for _, to := range []string{"10.55.0.1:15008", "[fd55::1]:15008"} {
		c, err := dial(to, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if err := netns.Deafen(l); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c, err := l.Accept()
		if err != nil {
			t.Fatal("who waits in the queue is not accepted:", err)
		}
		defer c.Close()
		go io.Copy(c, c)
	}
	for _, to := range []string{"10.55.0.2:15008", "[fd55::2]:15008"} {
		var ne net.Error
		if c, err := dial(to, 100*time.Millisecond); !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%s: %v, %v; want no answer", to, c, err)
		}
	}
}
