package tun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/tuntest/nslab"
)

// The lab of these tests: a namespace with one device, the kernel at 10.9.0.1 and fd09::1, we being everything else
// on the link. The kernel's own noise (MLD reports, router solicitations) passes by and is skipped by the readers'
// filters.

const patience = 20 * time.Second

type lab struct {
	ns  *nslab.NS
	dev Device
	v6  bool
}

func openLab(t testing.TB, o Options) *lab {
	t.Helper()
	l := &lab{ns: nslab.New(t)}
	o.Name, o.NetNS = "zt0", l.ns.NS
	dev, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	l.dev = dev
	l.up(t)
	return l
}

func (l *lab) up(t testing.TB) {
	t.Helper()
	l.ns.IP(t, "addr", "replace", "10.9.0.1/24", "dev", "zt0")
	l.ns.IP(t, "addr", "replace", "fd09::1/64", "dev", "zt0", "nodad")
	l.ns.IP(t, "link", "set", "zt0", "up")
}

// got is a packet as read, in one piece.
type got struct {
	hdr  VNetHdr
	data []byte
}

// reader reads all that the device has, in odd pieces, until it is closed.
func (l *lab) reader(t testing.TB, want func(p []byte) bool) <-chan got {
	out := make(chan got, 1024)
	go func() {
		defer close(out)
		bufs := [][]byte{make([]byte, 128), nil, make([]byte, 1000), make([]byte, MaxPacket)}
		for {
			var h VNetHdr
			n, err := l.dev.ReadPacket(&h, bufs)
			if err != nil {
				if err != os.ErrClosed {
					t.Errorf("ReadPacket: %v", err)
				}
				return
			}
			p := bytes.Join(bufs, nil)[:n]
			if err := h.Validate(n); err != nil {
				t.Errorf("header %v of a packet of %d bytes: %v", &h, n, err)
			}
			if want(p) {
				out <- got{h, p}
			}
		}
	}()
	t.Cleanup(func() {
		l.dev.Close()
		for range out {
		}
	})
	return out
}

func (l *lab) addrs() (kernel, us netip.Addr) {
	if l.v6 {
		return netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::2")
	}
	return netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.2")
}

func (l *lab) ipLen() int {
	if l.v6 {
		return 40
	}
	return 20
}

// udp is a wanted: UDP packets of the lab's family.
func (l *lab) udp(p []byte) bool {
	if l.v6 {
		return p[0]>>4 == 6 && p[6] == unix.IPPROTO_UDP
	}
	return p[0]>>4 == 4 && p[9] == unix.IPPROTO_UDP
}

func next(t testing.TB, ch <-chan got) got {
	t.Helper()
	select {
	case g, ok := <-ch:
		if !ok {
			t.Fatal("the reader ended")
		}
		return g
	case <-time.After(patience):
		t.Fatal("no packet")
	}
	panic("unreachable")
}

// kernelUDP is the kernel's socket in the lab's namespace.
func (l *lab) kernelUDP(t testing.TB) *net.UDPConn {
	t.Helper()
	k, _ := l.addrs()
	var c *net.UDPConn
	err := l.ns.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(k, 5000)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// makeUDP builds a packet from us to the kernel's socket. With partial only the pseudo-header is summed, as for
// FlagNeedsCSum.
func (l *lab) makeUDP(payload []byte, partial bool) []byte {
	k, us := l.addrs()
	ip := l.ipLen()
	p := make([]byte, ip+8, ip+8+len(payload))
	p = append(p, payload...)
	u := p[ip:]
	binary.BigEndian.PutUint16(u, 6000)
	binary.BigEndian.PutUint16(u[2:], 5000)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	if l.v6 {
		p[0] = 0x60
		binary.BigEndian.PutUint16(p[4:], uint16(len(u)))
		p[6], p[7] = unix.IPPROTO_UDP, 64
		copy(p[8:], us.AsSlice())
		copy(p[24:], k.AsSlice())
	} else {
		p[0] = 0x45
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		p[8], p[9] = 64, unix.IPPROTO_UDP
		copy(p[12:], us.AsSlice())
		copy(p[16:], k.AsSlice())
		binary.BigEndian.PutUint16(p[10:], ^sum(0, p[:20]))
	}
	pseudo := sum(uint32(unix.IPPROTO_UDP)+uint32(len(u)), append(us.AsSlice(), k.AsSlice()...))
	if partial {
		binary.BigEndian.PutUint16(u[6:], pseudo)
	} else {
		binary.BigEndian.PutUint16(u[6:], ^sum(uint32(pseudo), u))
	}
	return p
}

// sum is the Internet checksum's ones' complement sum (RFC 1071), folded and not inverted.
func sum(s uint32, b []byte) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// checkUDPSum says whether a complete packet's UDP checksum is right.
func (l *lab) checkUDPSum(p []byte) bool {
	ip := l.ipLen()
	at := 12
	if l.v6 {
		at = 8
	}
	return sum(uint32(unix.IPPROTO_UDP)+uint32(len(p)-ip), append(bytes.Clone(p[at:ip]), p[ip:]...)) == 0xffff
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func eachFamily(t *testing.T, f func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "v4", true: "v6"}[v6], func(t *testing.T) { f(t, v6) })
	}
}

func eachPath(t *testing.T, f func(t *testing.T, plain, v6 bool)) {
	for _, plain := range []bool{false, true} {
		t.Run(map[bool]string{false: "fast", true: "plain"}[plain], func(t *testing.T) {
			eachFamily(t, func(t *testing.T, v6 bool) { f(t, plain, v6) })
		})
	}
}

func TestOffloadHere(t *testing.T) {
	l := openLab(t, Options{})
	off := l.dev.Offload()
	t.Logf("%+v", off)
	if !off.VNetHdr || !off.CSum || !off.TSO4 || !off.TSO6 {
		t.Skipf("this kernel has no TUN offload (%s); the plain path is tested all the same", off.Why)
	}
	if off.USO == (off.Why != "") {
		t.Errorf("USO %v, Why %q", off.USO, off.Why)
	}
	if l.dev.Name() != "zt0" || l.dev.MTU() != DefaultMTU {
		t.Errorf("name %s, MTU %d", l.dev.Name(), l.dev.MTU())
	}
	link := l.ns.IP(t, "link", "show", "zt0")
	if !strings.Contains(link, "mtu 1500") || !strings.Contains(link, fmt.Sprintf("qlen %d", DefaultTxQueueLen)) {
		t.Errorf("the link is not as asked for: %s", link)
	}
}

// TestUDPFromKernel: small packets of the kernel arrive whole; checksums are complete on the plain path, and either
// complete or declared incomplete on the fast path.
func TestUDPFromKernel(t *testing.T) {
	eachPath(t, func(t *testing.T, plain, v6 bool) {
		l := openLab(t, Options{Plain: plain})
		l.v6 = v6
		_, us := l.addrs()
		packets := l.reader(t, l.udp)
		c := l.kernelUDP(t)
		for _, size := range []int{0, 1, 99, 100, 101, 1400} {
			payload := pattern(size)
			if _, err := c.WriteToUDPAddrPort(payload, netip.AddrPortFrom(us, 6000)); err != nil {
				t.Fatal(err)
			}
			g := next(t, packets)
			if want := l.ipLen() + 8 + size; len(g.data) != want || !bytes.Equal(g.data[l.ipLen()+8:], payload) {
				t.Fatalf("payload of %d: packet of %d bytes, want %d", size, len(g.data), want)
			}
			if plain && !g.hdr.IsZero() {
				t.Errorf("a header on the plain path: %v", &g.hdr)
			}
			if g.hdr.Flags&FlagNeedsCSum == 0 && !l.checkUDPSum(g.data) {
				t.Errorf("payload of %d: bad checksum, header %v", size, &g.hdr)
			}
		}
	})
}

// TestTryRead: what is there is had at once, and where nothing is, that; the reader that waits is as before.
func TestTryRead(t *testing.T) {
	l := openLab(t, Options{})
	try, ok := l.dev.(TryReader)
	if !ok {
		t.Fatalf("a device of the plain path here: %s", l.dev.Offload().Why)
	}
	var h VNetHdr
	bufs := [][]byte{make([]byte, MaxPacket)}
	for err := error(nil); err != ErrNothing; { // what the kernel says of itself
		if _, err = try.TryReadPacket(&h, bufs); err != nil && err != ErrNothing {
			t.Fatal(err)
		}
	}
	_, us := l.addrs()
	c := l.kernelUDP(t)
	isOurs := func(n int, err error) bool {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return l.udp(bufs[0][:n])
	}
	for _, read := range []func(*VNetHdr, [][]byte) (int, error){try.TryReadPacket, l.dev.ReadPacket, try.TryReadPacket} {
		if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(us, 6000)); err != nil {
			t.Fatal(err)
		}
		for !isOurs(read(&h, bufs)) {
		}
	}
	l.dev.Close()
	if _, err := try.TryReadPacket(&h, bufs); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestUDPToKernel: what we write arrives at the kernel's socket, from buffers in pieces, checksum complete or left to
// do.
func TestUDPToKernel(t *testing.T) {
	eachPath(t, func(t *testing.T, plain, v6 bool) {
		l := openLab(t, Options{Plain: plain})
		l.v6 = v6
		c := l.kernelUDP(t)
		_, us := l.addrs()
		buf := make([]byte, MaxPacket)
		sizes := []int{0, 1, 1000, 1400}
		for i, size := range sizes {
			payload := pattern(size)
			var h VNetHdr
			partial := !plain && i%2 == 1
			if partial {
				h = VNetHdr{Flags: FlagNeedsCSum, CSumStart: uint16(l.ipLen()), CSumOffset: 6}
			}
			p := l.makeUDP(payload, partial)
			// A kernel without memory for a moment drops a datagram, and nobody sends it again but we. One that came
			// twice is followed by one of another size.
			for end := time.Now().Add(patience); ; {
				q := bytes.Clone(p)
				if err := l.dev.WritePacket(&h, [][]byte{q[:1], nil, q[1:l.ipLen()], q[l.ipLen():]}); err != nil {
					t.Fatal(err)
				}
				c.SetReadDeadline(time.Now().Add(2 * time.Second))
				n, from, err := c.ReadFromUDPAddrPort(buf)
				for last := i - 1; err == nil && last >= 0 && n == sizes[last]; {
					n, from, err = c.ReadFromUDPAddrPort(buf)
				}
				if errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(end) {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(buf[:n], payload) || from.Addr().Unmap() != us {
					t.Errorf("received %d bytes from %s, want %d", n, from, size)
				}
				break
			}
		}
	})
}

// TestUDPSuperPacketToKernel: one write of a GSO packet arrives as many datagrams.
func TestUDPSuperPacketToKernel(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		l := openLab(t, Options{})
		if !l.dev.Offload().USO {
			t.Skip("no USO on this kernel: ", l.dev.Offload().Why)
		}
		l.v6 = v6
		c := l.kernelUDP(t)
		const segment, count = 1200, 40
		payload := pattern(segment*count - 100)
		p := l.makeUDP(payload, true)
		h := VNetHdr{Flags: FlagNeedsCSum, GSOType: GSOUDPL4, HdrLen: uint16(l.ipLen() + 8), GSOSize: segment,
			CSumStart: uint16(l.ipLen()), CSumOffset: 6}
		// A kernel without memory for a moment drops what it then sends itself: once more, as for one datagram above.
		var all []byte
		buf := make([]byte, MaxPacket)
		for end := time.Now().Add(patience); !bytes.Equal(all, payload); {
			if time.Now().After(end) {
				t.Fatalf("%d of %d bytes arrived, or others", len(all), len(payload))
			}
			q := bytes.Clone(p)
			if err := l.dev.WritePacket(&h, [][]byte{q}); err != nil {
				t.Fatal(err)
			}
			all = all[:0]
			for len(all) < len(payload) {
				c.SetReadDeadline(time.Now().Add(2 * time.Second))
				n, err := c.Read(buf)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, buf[:n]...)
			}
		}
	})
}

// TestUDPSuperPacketFromKernel: an application that sends with UDP_SEGMENT has its super-packet delivered whole on
// the fast path, split on the plain one.
func TestUDPSuperPacketFromKernel(t *testing.T) {
	eachPath(t, func(t *testing.T, plain, v6 bool) {
		l := openLab(t, Options{Plain: plain})
		if !plain && !l.dev.Offload().USO {
			t.Skip("no USO on this kernel: ", l.dev.Offload().Why)
		}
		l.v6 = v6
		_, us := l.addrs()
		packets := l.reader(t, l.udp)
		c := l.kernelUDP(t)
		const segment, count = 1300, 30
		rc, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, segment) })
		if err != nil {
			t.Fatal(err)
		}
		payload := pattern(segment * count)
		if _, err := c.WriteToUDPAddrPort(payload, netip.AddrPortFrom(us, 6000)); err != nil {
			t.Fatal(err)
		}
		head := l.ipLen() + 8
		if !plain {
			g := next(t, packets)
			if g.hdr.GSOType != GSOUDPL4 || int(g.hdr.GSOSize) != segment || int(g.hdr.HdrLen) != head ||
				!bytes.Equal(g.data[head:], payload) {
				t.Errorf("header %v, %d bytes", &g.hdr, len(g.data))
			}
			return
		}
		var all []byte
		for range count {
			g := next(t, packets)
			if !g.hdr.IsZero() || len(g.data) != head+segment || !l.checkUDPSum(g.data) {
				t.Fatalf("segment of %d bytes, header %v, checksum right: %v", len(g.data), &g.hdr, l.checkUDPSum(g.data))
			}
			all = append(all, g.data[head:]...)
		}
		if !bytes.Equal(all, payload) {
			t.Error("the segments together are not the payload")
		}
	})
}

// TestForwardedSuperPacket: a super-packet that the kernel forwards from another device carries a header length of
// the kernel's linear part; ours is right.
func TestForwardedSuperPacket(t *testing.T) {
	eachFamily(t, func(t *testing.T, v6 bool) {
		l := openLab(t, Options{})
		if !l.dev.Offload().USO {
			t.Skip("no USO on this kernel: ", l.dev.Offload().Why)
		}
		l.v6 = v6
		_, us := l.addrs()
		far := nslab.New(t)
		nslab.Join(t, far, l.ns, "v0")
		far.IP(t, "addr", "add", "10.8.0.2/24", "dev", "v0")
		far.IP(t, "addr", "add", "fd08::2/64", "dev", "v0", "nodad")
		far.IP(t, "route", "add", "default", "via", "10.8.0.1")
		far.IP(t, "-6", "route", "add", "default", "via", "fd08::1")
		l.ns.IP(t, "addr", "add", "10.8.0.1/24", "dev", "v0")
		l.ns.IP(t, "addr", "add", "fd08::1/64", "dev", "v0", "nodad")
		err := l.ns.Do(func() error {
			return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
				os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
		})
		if err != nil {
			t.Fatal(err)
		}
		packets := l.reader(t, l.udp)
		var c *net.UDPConn
		err = far.Do(func() (err error) {
			c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(us, 6000)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		rc, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		const segment = 1200
		rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, segment) })
		if err != nil {
			t.Fatal(err)
		}
		payload := pattern(segment * 20)
		if _, err := c.Write(payload); err != nil {
			t.Fatal(err)
		}
		g := next(t, packets)
		head := l.ipLen() + 8
		if g.hdr.GSOType != GSOUDPL4 || int(g.hdr.HdrLen) != head || !bytes.Equal(g.data[head:], payload) {
			t.Errorf("header %v, %d bytes", &g.hdr, len(g.data))
		}
	})
}
