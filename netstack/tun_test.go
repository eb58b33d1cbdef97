package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/proxy/refusal"
	"ztun/tun"
	"ztun/tun/tuntest/nslab"
)

// lab is a pod as the kernel sees it: a namespace whose only way out is a TUN,
// and our stack behind it.
type lab struct {
	ns *nslab.NS
	s  *Stack
}

func newLab(t testing.TB, plain bool, onFlow func(*Flow)) *lab {
	t.Helper()
	return newLabWith(t, plain, onFlow, func(*Config) {})
}

func newLabWith(t testing.TB, plain bool, onFlow func(*Flow), mod func(*Config)) *lab {
	t.Helper()
	l := &lab{ns: nslab.New(t)}
	dev, err := tun.Open(tun.Options{Name: "ztun0", NetNS: l.ns.NS, Plain: plain})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range [][]string{
		{"addr", "add", "10.1.0.2/32", "dev", "ztun0"},
		{"addr", "add", "fd00:1::2/128", "dev", "ztun0", "nodad"},
		{"link", "set", "ztun0", "up"},
		{"route", "add", "default", "dev", "ztun0", "src", "10.1.0.2"},
		{"-6", "route", "add", "default", "dev", "ztun0", "src", "fd00:1::2"},
	} {
		l.ns.IP(t, a...)
	}
	cfg := Config{Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")}, App: dev,
		OnFlow: onFlow}
	mod(&cfg)
	l.s = startStack(t, cfg)
	if off := l.s.Stats().App.Offload; off == plain {
		t.Errorf("offload %v, plain %v: %s", off, plain, dev.Offload().Why)
	}
	return l
}

// dial connects as the application does.
func (l *lab) dial(dst string) (c *net.TCPConn, err error) {
	err = l.ns.Do(func() error {
		d := net.Dialer{Timeout: 20 * time.Second, KeepAlive: -1}
		nc, err := d.Dial("tcp", dst)
		if err == nil {
			c = nc.(*net.TCPConn)
		}
		return err
	})
	return c, err
}

func (l *lab) listen(t *testing.T, addr string) (ln net.Listener) {
	t.Helper()
	if err := l.ns.Do(func() (err error) { ln, err = net.Listen("tcp", addr); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// What the application's connect says to each refusal, at once.
func TestTUNRefuse(t *testing.T) {
	var how refusal.Way
	l := newLab(t, false, func(f *Flow) { f.Refuse(how) })
	for _, tc := range []struct {
		how    refusal.Way
		v4, v6 syscall.Errno
	}{
		{refusal.Reset, syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{refusal.HostUnreachable, syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{refusal.NetUnreachable, syscall.ENETUNREACH, syscall.ENETUNREACH},
		{refusal.AdminProhibited, syscall.EHOSTUNREACH, syscall.EACCES},
	} {
		how = tc.how
		for dst, want := range map[string]syscall.Errno{"10.2.0.3:80": tc.v4, "[fd00:2::3]:80": tc.v6} {
			before, start := l.s.Stats().Flows, time.Now()
			if c, err := l.dial(dst); !errors.Is(err, want) {
				t.Errorf("%v, %s: got %v, want %v", how, dst, err, want)
				if err == nil {
					c.Close()
				}
			}
			// At once means: the first SYN was answered, unless the machine stood still until the second.
			if n := l.s.Stats().Flows - before; n != 1 && time.Since(start) < time.Second {
				t.Errorf("%v, %s: %d flows", how, dst, n)
			}
		}
	}
}

// The application sends and receives through the kernel's own TCP, with
// super-packets and without, and both ways end cleanly.
func TestTUNEcho(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			ended := make(chan error, 16)
			l := newLab(t, plain, func(f *Flow) {
				c, err := f.Accept()
				if err != nil {
					ended <- err
					return
				}
				defer c.Close()
				_, err = c.WriteTo(onlyWriter{c})
				ended <- errors.Join(err, c.CloseWrite())
			})
			data := make([]byte, 8<<20+123)
			rand.Read(data)
			for _, dst := range []string{"10.2.0.3:80", "[fd00:2::3]:80"} {
				c, err := l.dial(dst)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					c.Write(data)
					c.CloseWrite()
				}()
				got := readAll(t, c)
				if !bytes.Equal(got, data) {
					t.Fatalf("%s: %d bytes came back of %d, or other ones", dst, len(got), len(data))
				}
				if err := <-ended; err != nil {
					t.Errorf("%s: %v", dst, err)
				}
				c.Close()
			}
			st := l.s.Stats()
			if avg := st.App.RxBytes / st.App.RxPackets; !plain && avg < 10000 {
				t.Errorf("%d bytes per packet received: no super-packets", avg)
			}
			if st.App.RxMalformed+st.App.RxBadChecksum+st.App.TxDropped > 0 {
				t.Errorf("stats: %+v", st)
			}
		})
	}
}

// onlyWriter hides everything but Write.
type onlyWriter struct{ io.Writer }

// The application sees the client that we say, and its refusal is ours.
func TestTUNDialApp(t *testing.T) {
	l := newLab(t, false, func(f *Flow) { f.Refuse(refusal.Reset) })
	for _, tc := range []struct{ listen, dst, src string }{
		{"10.1.0.2:8080", "10.1.0.2:8080", "192.0.2.7:0"},
		{"[fd00:1::2]:8080", "[fd00:1::2]:8080", "[2001:db8::7]:40000"},
	} {
		ln := l.listen(t, tc.listen)
		src, dst := netip.MustParseAddrPort(tc.src), netip.MustParseAddrPort(tc.dst)
		c, err := l.s.DialApp(context.Background(), src, dst)
		if err != nil {
			t.Fatal(err)
		}
		k, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		peer := k.RemoteAddr().(*net.TCPAddr).AddrPort()
		if peer != c.LocalAddrPort() || peer.Addr() != src.Addr() || (src.Port() != 0 && peer != src) {
			t.Errorf("the application sees %v; we are %v, asked for %v", peer, c.LocalAddrPort(), src)
		}
		// A kernel's reset is told from its end of file.
		k.(*net.TCPConn).SetLinger(0)
		k.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
		c.Close()

		closed := netip.AddrPortFrom(dst.Addr(), 9)
		if _, err := l.s.DialApp(context.Background(), src, closed); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("closed port: %v", err)
		}
	}
}

// Our ends as the kernel sees them: half-close, reset, close with unread data.
func TestTUNEnds(t *testing.T) {
	flows := make(chan *Conn, 1)
	l := newLab(t, false, func(f *Flow) {
		if c, err := f.Accept(); err == nil {
			flows <- c
		}
	})
	open := func() (*net.TCPConn, *Conn) {
		k, err := l.dial("10.2.0.3:80")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.Close() })
		return k, <-flows
	}
	one := make([]byte, 1)

	k, c := open()
	c.Write([]byte("bye"))
	c.CloseWrite()
	if got := readAll(t, k); string(got) != "bye" {
		t.Errorf("got %q", got)
	}
	k.Write([]byte("late"))
	k.CloseWrite()
	if got := readAll(t, c); string(got) != "late" {
		t.Errorf("got %q", got)
	}
	c.Close()

	k, c = open()
	c.Reset()
	if _, err := k.Read(one); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after Reset: %v", err)
	}

	k, c = open()
	k.Write([]byte("unread"))
	c.WaitRead()
	c.Close()
	if _, err := k.Read(one); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after Close with unread data: %v", err)
	}

	// The stack goes: nobody is left hanging.
	k, _ = open()
	l.s.Close()
	if _, err := k.Read(one); err == nil || err == io.EOF {
		t.Errorf("after the stack's Close: %v", err)
	}
}

// The same client port again, right after we closed first: no TIME_WAIT of ours
// may delay the application.
func TestTUNPortReuse(t *testing.T) {
	l := newLab(t, false, func(f *Flow) {
		if c, err := f.Accept(); err == nil {
			c.Write([]byte("x"))
			c.Close()
		}
	})
	for range 5 {
		err := l.ns.Do(func() error {
			d := net.Dialer{Timeout: 20 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 1, 0, 2), Port: 45678},
				Control: reuse}
			c, err := d.Dial("tcp", "10.2.0.3:80")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.ReadAll(c)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Millisecond)
	}
}

func reuse(_, _ string, rc syscall.RawConn) (err error) {
	rc.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
	return err
}

// retransmissions is how many segments the kernel has sent again on c.
func retransmissions(t *testing.T, c net.Conn) (n uint32) {
	t.Helper()
	rc, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	if cerr := rc.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return info.Total_retrans
}

// One source port, ended by a reset and taken again at once: a database client, a load generator. Every connect
// stands, and none of them waits for the kernel to send its SYN again.
func TestTUNSamePort(t *testing.T) {
	l := newLab(t, false, func(f *Flow) {
		if c, err := f.Accept(); err == nil {
			c.WriteTo(c)
			c.Close()
		}
	})
	for _, dst := range []string{"10.2.0.3:80", "[fd00:2::3]:80"} {
		for _, pause := range []time.Duration{0, 2 * time.Millisecond} {
			failed, sentAgain := 0, 0
			for range 200 {
				err := l.ns.Do(func() error {
					d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{Port: 45679}, Control: reuse}
					c, err := d.Dial("tcp", dst)
					if err != nil {
						return err
					}
					defer c.Close()
					c.(*net.TCPConn).SetLinger(0)
					if retransmissions(t, c) > 0 {
						sentAgain++
					}
					if _, err = c.Write([]byte("x")); err == nil {
						_, err = io.ReadFull(c, make([]byte, 1))
					}
					return err
				})
				if err != nil {
					failed++
				}
				time.Sleep(pause)
			}
			if failed > 0 || sentAgain > 10 { // the machine may stand still for a second
				t.Errorf("%s, pause %v: of 200 connects %d failed, and %d sent their SYN again", dst, pause, failed,
					sentAgain)
			}
		}
	}
	t.Logf("%d SYNs met an older connection", l.s.Stats().Delayed)
}
