package netstack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/refusal"
	"ztun/tun"
	"ztun/tun/tuntest/nslab"
)

// shortcutLab is two pods of one process: what the first one opens to service:port passes to the second one's port.
type shortcutLab struct {
	pods  [2]*lab
	watch *counts
	made  chan *Shortcut // those that stand, one is kept
	fail  atomic.Int64   // flows without a Shortcut
}

// counts is what a watcher is told.
type counts struct{ forth, back, ended atomic.Int64 }

func (c *counts) carried(forth bool, n int) {
	if forth {
		c.forth.Add(int64(n))
	} else {
		c.back.Add(int64(n))
	}
}

var podAddrs = [2][2]netip.Addr{
	{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")},
	{netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("fd00:1::3")},
}

func newShortcutLab(t testing.TB, mods ...func(*Config)) *shortcutLab {
	t.Helper()
	l := &shortcutLab{watch: &counts{}, made: make(chan *Shortcut, 1)}
	for i := 1; i >= 0; i-- {
		l.pods[i] = l.pod(t, i, mods)
	}
	return l
}

func (l *shortcutLab) pod(t testing.TB, i int, mods []func(*Config)) *lab {
	p := &lab{ns: nslab.New(t)}
	dev, err := tun.Open(tun.Options{Name: "ztun0", NetNS: p.ns.NS})
	if err != nil {
		t.Fatal(err)
	}
	v4, v6 := podAddrs[i][0], podAddrs[i][1]
	for _, a := range [][]string{
		{"addr", "add", v4.String() + "/32", "dev", "ztun0"},
		{"addr", "add", v6.String() + "/128", "dev", "ztun0", "nodad"},
		{"link", "set", "ztun0", "up"},
		{"route", "add", "default", "dev", "ztun0", "src", v4.String()},
		{"-6", "route", "add", "default", "dev", "ztun0", "src", v6.String()},
	} {
		p.ns.IP(t, a...)
	}
	cfg := Config{Addrs: []netip.Addr{v4, v6}, App: dev, Shortcuts: true}
	cfg.OnFlow = func(f *Flow) {
		if i == 1 {
			f.Refuse(refusal.Reset)
			return
		}
		l.serve(f)
	}
	for _, m := range mods {
		m(&cfg)
	}
	p.s = startStack(t, cfg)
	return p
}

// serve is what a proxy does: a service's address is translated to the second pod's, port 80 to 8080.
func (l *shortcutLab) serve(f *Flow) {
	dst := netip.AddrPortFrom(podAddrs[1][0], f.Dst().Port())
	if f.Dst().Addr().Is6() {
		dst = netip.AddrPortFrom(podAddrs[1][1], f.Dst().Port())
	}
	if dst.Port() == 80 {
		dst = netip.AddrPortFrom(dst.Addr(), 8080)
	}
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	s, err := f.Shortcut(ctx, l.pods[1].s, dst)
	if err != nil {
		l.fail.Add(1)
		way := refusal.Reset
		if errors.Is(err, syscall.EHOSTUNREACH) {
			way = refusal.HostUnreachable
		}
		f.Refuse(way)
		return
	}
	if err := s.Accept(); err != nil {
		s.Reset()
		return
	}
	s.Watch(l.watch.carried, func(error) { l.watch.ended.Add(1) })
	select {
	case l.made <- s:
	default:
	}
}

// none waits until no connection is left on either side.
func (l *shortcutLab) none(t testing.TB) {
	t.Helper()
	eventually(t, "shortcuts that end", func() bool {
		for _, p := range l.pods {
			if s := p.s.Stats(); s.Shortcuts != 0 || s.InFlight != 0 || s.Conns != 0 {
				return false
			}
		}
		return true
	})
}

// TestShortcutCarries: bytes pass whole both ways, by both families, to the pod's own address and by a service's,
// with a half-close; and they are counted once.
func TestShortcutCarries(t *testing.T) {
	l := newShortcutLab(t)
	const size = 32 << 20
	for _, dst := range []string{"10.1.0.3:8080", "10.96.0.1:80", "[fd00:1::3]:8080", "[fd00:96::1]:80"} {
		t.Run(dst, func(t *testing.T) {
			l.watch.forth.Store(0)
			l.watch.back.Store(0)
			l.watch.ended.Store(0)
			ln := l.pods[1].listen(t, "[::]:8080")
			peer := make(chan net.Addr, 1)
			go func() {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				peer <- c.RemoteAddr()
				h := sha256.New()
				n, _ := io.Copy(h, c)
				fmt.Fprintf(c, "%x %d", h.Sum(nil), n)
				c.Write(make([]byte, size))
			}()
			c, err := l.pods[0].dial(dst)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Minute))
			h := sha256.New()
			block := bytes.Repeat([]byte("ztun"), 1<<14)
			for range size / len(block) {
				h.Write(block)
				if _, err := c.Write(block); err != nil {
					t.Fatal(err)
				}
			}
			c.CloseWrite()
			b, err := io.ReadAll(c)
			want := fmt.Sprintf("%x %d", h.Sum(nil), size)
			if err != nil || len(b) != len(want)+size || string(b[:len(want)]) != want {
				t.Errorf("%d bytes, %v", len(b), err)
			}
			if got := (<-peer).String(); got != c.LocalAddr().String() {
				t.Errorf("the application saw %s, the client is %s", got, c.LocalAddr())
			}
			ln.Close()
			l.none(t)
			eventually(t, "word of its end", func() bool { return l.watch.ended.Load() > 0 })
			if f, b := l.watch.forth.Load(), l.watch.back.Load(); f != size || b != int64(len(want)+size) {
				t.Errorf("counted %d and %d bytes", f, b)
			}
			if n := l.watch.ended.Load(); n != 1 {
				t.Errorf("told %d times that it ended", n)
			}
		})
	}
	if n := l.pods[0].s.Stats().ShortcutsBegun; n != 4 || l.fail.Load() != 0 {
		t.Errorf("%d shortcuts, %d failed", n, l.fail.Load())
	}
}

// open opens a connection and returns both applications' ends.
func (l *shortcutLab) open(t testing.TB, ln net.Listener, dst string) (client, server *net.TCPConn) {
	t.Helper()
	type accepted struct {
		c   net.Conn
		err error
	}
	got := make(chan accepted, 1)
	go func() {
		c, err := ln.Accept()
		got <- accepted{c, err}
	}()
	client, err := l.pods[0].dial(dst)
	if err != nil {
		t.Fatal(err)
	}
	a := <-got
	if a.err != nil {
		t.Fatal(a.err)
	}
	t.Cleanup(func() { client.Close(); a.c.Close() })
	for _, c := range []net.Conn{client, a.c} {
		c.SetDeadline(time.Now().Add(patience))
	}
	return client, a.c.(*net.TCPConn)
}

// roundTrip has a byte pass each way.
func roundTrip(t testing.TB, ends ...*net.TCPConn) {
	t.Helper()
	for i := range ends {
		b := []byte{byte(i)}
		if _, err := ends[i].Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(ends[1-i], b); err != nil || b[0] != byte(i) {
			t.Fatalf("%v, %v", b, err)
		}
	}
}

// TestShortcutKernels: refusals, resets and cuts are what both applications see, and an idle connection stands.
func TestShortcutKernels(t *testing.T) {
	l := newShortcutLab(t, func(c *Config) {
		c.KeepaliveIdle, c.KeepaliveInterval, c.KeepaliveCount = 10*time.Millisecond, 5*time.Millisecond, 1<<20
	})
	for _, p := range l.pods {
		p.s.shortcuts.tick = 5 * time.Millisecond
	}
	for _, dst := range []string{"10.96.0.1:81", "[fd00:96::1]:81"} {
		before, start := l.pods[0].s.Stats().Flows, time.Now()
		if _, err := l.pods[0].dial(dst); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a closed port: %v", err)
		}
		if n := l.pods[0].s.Stats().Flows - before; n != 1 && time.Since(start) < time.Second { // else there was another SYN
			t.Errorf("a closed port took %d flows", n)
		}
	}
	for _, dst := range []string{"10.96.0.1:80", "[fd00:1::3]:8080"} {
		ln := l.pods[1].listen(t, "[::]:8080")
		client, server := l.open(t, ln, dst)
		s := <-l.made
		asked := l.pods[0].s.shortcuts.probed.Load()
		eventually(t, "probes", func() bool { return l.pods[0].s.shortcuts.probed.Load() > asked+20 })
		roundTrip(t, client, server)
		s.Reset()
		for _, c := range []*net.TCPConn{client, server} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s, a cut: %v", dst, err)
			}
		}
		for i := range 2 {
			client, server := l.open(t, ln, dst)
			<-l.made
			ends := []*net.TCPConn{client, server}
			roundTrip(t, ends...)
			ends[i].SetLinger(0)
			ends[i].Close()
			if _, err := ends[1-i].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s, a reset: %v", dst, err)
			}
		}
		l.none(t)
		ln.Close()
	}
}

// TestShortcutMany: connections by the hundred, whose server closes first, so that its kernel has their ports in
// TIME_WAIT when a client takes them again.
func TestShortcutMany(t *testing.T) {
	l := newShortcutLab(t)
	if err := l.pods[0].ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40099"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	ln := l.pods[1].listen(t, "10.1.0.3:8080")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Write([]byte{7})
			c.Close()
		}
	}()
	const workers, each = 8, 100
	errs := make(chan error, workers)
	for range workers {
		go func() {
			for range each {
				c, err := l.pods[0].dial("10.96.0.1:80")
				if err != nil {
					errs <- err
					return
				}
				c.SetDeadline(time.Now().Add(patience))
				b, err := io.ReadAll(c)
				c.Close()
				if err != nil || len(b) != 1 {
					errs <- fmt.Errorf("%v, %w", b, err)
					return
				}
			}
			errs <- nil
		}()
	}
	for range workers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	l.none(t)
	if n := l.pods[0].s.Stats().ShortcutsBegun; n != workers*each {
		t.Errorf("%d shortcuts", n)
	}
	if n := l.watch.back.Load(); n != workers*each {
		t.Errorf("%d bytes", n)
	}
}

// halfLab is a lab of which one pod has a kernel and the other is the test: what a pod with raw sockets can do.
type halfLab struct {
	*lab
	far   wire
	made  chan *Shortcut
	flows atomic.Int32
}

func newHalf(t *testing.T, client bool) *halfLab {
	h := &halfLab{made: make(chan *Shortcut, 4)}
	dev, far := memPair(1500, true)
	h.far = wire{t, far}
	var server *Stack
	serve := func(c *Config) {
		c.OnFlow = func(f *Flow) {
			h.flows.Add(1)
			s, err := f.Shortcut(context.Background(), server, netip.AddrPortFrom(podAddrs[1][0], 8080))
			if err != nil || s.Accept() != nil {
				f.Refuse(refusal.Reset)
				return
			}
			s.Watch(func(bool, int) {}, func(error) {})
			h.made <- s
		}
	}
	l := &shortcutLab{}
	if client {
		server = startStack(t, Config{App: dev, Addrs: []netip.Addr{podAddrs[1][0]}, Shortcuts: true})
		h.lab = l.pod(t, 0, []func(*Config){serve})
		return h
	}
	h.lab = l.pod(t, 1, nil)
	server = h.lab.s
	c := Config{App: dev, Addrs: []netip.Addr{podAddrs[0][0]}, Shortcuts: true}
	serve(&c)
	startStack(t, c)
	return h
}

// TestShortcutOpensOne: under one verdict there is one connection. An application that does not end its side keeps the
// entry of one whose client has gone, but cannot use it to open another to the client's pod.
func TestShortcutOpensOne(t *testing.T) {
	h := newHalf(t, true)
	if err := h.ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/tcp_fin_timeout", []byte("1"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	app, client := netip.MustParseAddrPort("10.1.0.3:8080"), netip.MustParseAddrPort("10.1.0.2:40000")
	dialed := make(chan net.Conn, 1)
	go h.ns.Do(func() error {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(client), Timeout: patience}
		c, err := d.Dial("tcp", "10.96.0.1:80")
		if err != nil {
			t.Error(err)
		}
		dialed <- c
		return nil
	})
	_, _, th := h.far.next(patience)
	seq := th.SequenceNumber() + 1
	h.far.send(app, client, fSYN|fACK, 900, seq)
	c := <-dialed
	if c == nil {
		t.FailNow()
	}
	h.far.next(patience)
	c.Close()
	h.far.next(patience)
	h.far.send(app, client, fACK, 901, seq+1)
	eventually(t, "the client's socket to go", func() bool {
		var b []byte
		if err := h.ns.Do(func() (err error) { b, err = os.ReadFile("/proc/thread-self/net/tcp"); return err }); err != nil {
			t.Fatal(err)
		}
		return !bytes.Contains(b, []byte(":9C40 ")) // 40000
	})
	ln := h.listen(t, "0.0.0.0:40000")
	if n := h.s.Stats().Shortcuts; n != 1 {
		t.Errorf("%d shortcuts", n)
	}
	for _, flags := range []header.TCPFlags{fSYN, fSYN | fACK} {
		h.far.send(app, client, flags, 70000, seq+1)
	}
	if _, _, th := h.far.next(500 * time.Millisecond); th != nil {
		t.Errorf("the client's kernel has answered: %v", th.Flags())
	}
	ln.(*net.TCPListener).SetDeadline(time.Now())
	if c, err := ln.Accept(); err == nil {
		t.Errorf("a connection that nobody has judged, from %v", c.RemoteAddr())
	}
}

// TestShortcutCutIsBelieved: a client that lies about its numbers does not keep the application's end from a cut.
func TestShortcutCutIsBelieved(t *testing.T) {
	h := newHalf(t, false)
	ln := h.listen(t, "[::]:8080")
	service := netip.MustParseAddrPort("10.96.0.1:80")
	for i, x := range []struct {
		name  string
		flags header.TCPFlags
		ahead uint32
	}{{"honest", fACK, 0}, {"a number that was never sent", fACK, 1<<24 - 5}, {"a far one", fACK, 1 << 28},
		{"a reset that nobody believes", fRST, 0}} {
		client := netip.AddrPortFrom(podAddrs[0][0], uint16(40000+i))
		h.far.send(client, service, fSYN, 100, 0)
		_, _, th := h.far.next(patience)
		seq := th.SequenceNumber() + 1
		h.far.send(client, service, fACK, 101, seq)
		s := <-h.made
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.(*net.TCPConn).SetKeepAlive(false) // which would find out
		if x.flags == fRST {
			h.far.send(client, service, fACK, 101+1<<23, seq)
			x.ahead = 1 << 23
		}
		h.far.send(client, service, x.flags, 101+x.ahead, seq)
		time.Sleep(50 * time.Millisecond)
		s.Reset()
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the application's end after the cut: %v", x.name, err)
		}
		c.Close()
		for { // what the stack says to the test's client is nobody's
			if _, _, th := h.far.next(20 * time.Millisecond); th == nil {
				break
			}
		}
	}
}
