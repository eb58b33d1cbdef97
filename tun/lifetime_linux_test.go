package tun

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/tuntest/nslab"
)

// TestCloseUnblocks: a reader that waits is sent home by Close, and every call afterwards says os.ErrClosed.
func TestCloseUnblocks(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			for range 20 {
				ns := nslab.New(t)
				dev, err := Open(Options{Name: "zt0", NetNS: ns.NS, Plain: plain})
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				bufs := [][]byte{make([]byte, MaxPacket)}
				go func() {
					var h VNetHdr
					for {
						if _, err := dev.ReadPacket(&h, bufs); err != nil {
							done <- err
							return
						}
					}
				}()
				time.Sleep(2 * time.Millisecond) // mostly it waits by then; if not, that is a case too
				if err := dev.Close(); err != nil {
					t.Fatal(err)
				}
				select {
				case err := <-done:
					if err != os.ErrClosed {
						t.Fatalf("ReadPacket: %v", err)
					}
				case <-time.After(patience):
					t.Fatal("the reader was not sent home")
				}
				var h VNetHdr
				if _, err := dev.ReadPacket(&h, bufs); err != os.ErrClosed {
					t.Errorf("ReadPacket after Close: %v", err)
				}
				h = VNetHdr{}
				if err := dev.WritePacket(&h, [][]byte{probePacket(GSOTCPv4)[VNetHdrLen:]}); err != os.ErrClosed {
					t.Errorf("WritePacket after Close: %v", err)
				}
				if err := dev.SetMTU(1400); err != os.ErrClosed {
					t.Errorf("SetMTU after Close: %v", err)
				}
				if err := dev.Close(); err != nil {
					t.Errorf("second Close: %v", err)
				}
				if links := ns.IP(t, "link"); strings.Contains(links, "zt0") {
					t.Fatalf("the device outlived Close: %s", links)
				}
			}
		})
	}
}

// TestPersistent: addresses and routes outlive Close; without a holder there is no carrier; whoever opens it next
// gets a working device, with either path before and after. This is what a daemon finds that starts after one that
// was killed.
func TestPersistent(t *testing.T) {
	for _, before := range []bool{false, true} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("plain %v then %v", before, after), func(t *testing.T) {
				l := openLab(t, Options{Persistent: true, Plain: before})
				l.ns.IP(t, "route", "add", "192.0.2.0/24", "dev", "zt0")
				l.ns.IP(t, "-6", "route", "add", "2001:db8::/64", "dev", "zt0")
				routes := l.ns.IP(t, "route") + l.ns.IP(t, "-6", "route")
				if err := l.dev.Close(); err != nil {
					t.Fatal(err)
				}
				if link := l.ns.IP(t, "link", "show", "zt0"); !strings.Contains(link, "NO-CARRIER") {
					t.Errorf("a carrier without a holder: %s", link)
				}
				var err error
				if l.dev, err = Open(Options{Name: "zt0", NetNS: l.ns.NS, Persistent: true, Plain: after, MTU: 1400}); err != nil {
					t.Fatal(err)
				}
				waitFor(t, "the carrier", func() bool {
					link := l.ns.IP(t, "link", "show", "zt0")
					return strings.Contains(link, "LOWER_UP") && !strings.Contains(link, "NO-CARRIER")
				})
				if link := l.ns.IP(t, "link", "show", "zt0"); !strings.Contains(link, "mtu 1400") {
					t.Errorf("the MTU is not the new one: %s", link)
				}
				if got := strings.ReplaceAll(l.ns.IP(t, "route")+l.ns.IP(t, "-6", "route"), " linkdown", ""); normal(got) !=
					normal(routes) {
					t.Errorf("routes before:\n%s\nafter:\n%s", routes, got)
				}
				// It works, both ways.
				packets := l.reader(t, l.udp)
				c := l.kernelUDP(t)
				_, us := l.addrs()
				if _, err := c.WriteToUDPAddrPort([]byte("out"), netip.AddrPortFrom(us, 6000)); err != nil {
					t.Fatal(err)
				}
				if g := next(t, packets); string(g.data[28:]) != "out" {
					t.Errorf("read %q", g.data)
				}
				var h VNetHdr
				if err := l.dev.WritePacket(&h, [][]byte{l.makeUDP([]byte("in"), false)}); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 100)
				if n, err := c.Read(buf); err != nil || string(buf[:n]) != "in" {
					t.Errorf("received %q, %v", buf[:n], err)
				}
				if err := errors.Join(l.dev.Close(), Remove(l.ns.NS, "zt0")); err != nil {
					t.Fatal(err)
				}
				if links := l.ns.IP(t, "link"); strings.Contains(links, "zt0") {
					t.Errorf("the device outlived Remove: %s", links)
				}
			})
		}
	}
}

// TestTakeOverForeignFlags: a persistent device made by somebody else, with several queues and packet information, is
// taken over.
func TestTakeOverForeignFlags(t *testing.T) {
	for _, extra := range [][]string{nil, {"pi"}, {"multi_queue"}, {"vnet_hdr"}, {"multi_queue", "vnet_hdr", "pi"}} {
		t.Run(strings.Join(extra, "+"), func(t *testing.T) {
			l := &lab{ns: nslab.New(t)}
			l.ns.IP(t, append([]string{"tuntap", "add", "dev", "zt0", "mode", "tun"}, extra...)...)
			var err error
			if l.dev, err = Open(Options{Name: "zt0", NetNS: l.ns.NS}); err != nil {
				t.Fatal(err)
			}
			l.up(t)
			packets := l.reader(t, l.udp)
			c := l.kernelUDP(t)
			_, us := l.addrs()
			if _, err := c.WriteToUDPAddrPort([]byte("out"), netip.AddrPortFrom(us, 6000)); err != nil {
				t.Fatal(err)
			}
			if g := next(t, packets); string(g.data[28:]) != "out" {
				t.Errorf("read %q", g.data)
			}
			l.dev.Close()
			if links := l.ns.IP(t, "link"); strings.Contains(links, "zt0") {
				t.Errorf("not persistent any more, yet it outlived Close: %s", links)
			}
		})
	}
}

func TestOpenErrors(t *testing.T) {
	ns := nslab.New(t)
	ns.IP(t, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
	ns.IP(t, "tuntap", "add", "dev", "tap0", "mode", "tap")
	held, err := Open(Options{Name: "held", NetNS: ns.NS})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for _, c := range []struct {
		o    Options
		want string
		is   error
	}{
		{Options{}, "is not a name for a device", nil},
		{Options{Name: "sixteen-bytes-xx"}, "is not a name", nil},
		{Options{Name: "a%d"}, "is not a name", nil},
		{Options{Name: "a b"}, "is not a name", nil},
		{Options{Name: "a/b"}, "is not a name", nil},
		{Options{Name: "x", MTU: 60}, "MTU 60 is not between", nil},
		{Options{Name: "x", MTU: 70000}, "MTU 70000 is not between", nil},
		{Options{Name: "x", TxQueueLen: -1}, "queue length -1", nil},
		{Options{Name: "veth0"}, "an interface of that name exists and is not a TUN device", unix.EINVAL},
		{Options{Name: "tap0"}, "an interface of that name exists and is not a TUN device", unix.EINVAL},
		{Options{Name: "held"}, "in use by another process", unix.EBUSY},
	} {
		c.o.NetNS = ns.NS
		dev, err := Open(c.o)
		if err == nil {
			dev.Close()
			t.Errorf("%+v: opened", c.o)
			continue
		}
		if dev != nil {
			t.Errorf("%+v: a device along with error %v", c.o, err)
		}
		if !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
	if got := ns.IP(t, "tuntap"); !strings.Contains(got, "tap0") || !strings.Contains(got, "persist") {
		t.Errorf("the attempt changed another's device: %s", got)
	}
}

func TestRemove(t *testing.T) {
	ns := nslab.New(t)
	if err := Remove(ns.NS, "zt0"); err != nil {
		t.Errorf("what is not there: %v", err)
	}
	dev, err := Open(Options{Name: "zt0", NetNS: ns.NS, Persistent: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := Remove(ns.NS, "zt0"); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a device in use: %v", err)
	}
	dev.Close()
	if !strings.Contains(ns.IP(t, "link"), "zt0") {
		t.Fatal("the device is not persistent")
	}
	if err := Remove(ns.NS, "zt0"); err != nil {
		t.Error(err)
	}
	ns.IP(t, "tuntap", "add", "dev", "zt1", "mode", "tun", "multi_queue")
	if err := Remove(ns.NS, "zt1"); err != nil {
		t.Error(err)
	}
	ns.IP(t, "link", "add", "zt2", "type", "veth", "peer", "name", "zt3")
	if err := Remove(ns.NS, "zt2"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("not a TUN: %v", err)
	}
	links := ns.IP(t, "link")
	if strings.Contains(links, "zt0") || strings.Contains(links, "zt1") || !strings.Contains(links, "zt2") {
		t.Errorf("left: %s", links)
	}
}

// TestFallback: a kernel that refuses super-packets leads to the plain path, with the reason; the device works.
func TestFallback(t *testing.T) {
	ns := nslab.New(t)
	dev, err := open(Options{Name: "zt0", NetNS: ns.NS}, func(int) (probeResult, error) {
		return probeResult{}, unix.EINVAL
	})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if off := dev.Offload(); off.VNetHdr || off.TSO4 || off.TSO6 || off.CSum || off.USO || off.Why == "" {
		t.Errorf("%+v", off)
	}
	if err := dev.WritePacket(&VNetHdr{Flags: FlagNeedsCSum}, [][]byte{{0x45}}); err != ErrNoOffload {
		t.Errorf("a header on the plain path: %v", err)
	}
	// And a kernel without USO alone keeps the fast path.
	dev2, err := open(Options{Name: "zt1", NetNS: ns.NS}, func(int) (probeResult, error) {
		return probeResult{whyNoUSO: "x"}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer dev2.Close()
	if off := dev2.Offload(); !off.VNetHdr || off.USO || off.Why != "x" {
		t.Errorf("%+v", off)
	}
}

// TestProbeIsHarmless: the probe's packets, written to a live device of a forwarding namespace, cause no packet in
// return, and the kernel's counters say that they were dropped as malformed.
func TestProbeIsHarmless(t *testing.T) {
	l := openLab(t, Options{})
	if !l.dev.Offload().VNetHdr {
		t.Skip("no offload here: ", l.dev.Offload().Why)
	}
	packets := l.reader(t, func(p []byte) bool { return p[0]>>4 == 4 || p[6] != unix.IPPROTO_ICMPV6 && p[6] != 0 })
	for _, kind := range []uint8{GSOTCPv4, GSOTCPv6, GSOUDPL4} {
		b := probePacket(kind)
		var h VNetHdr
		if err := h.Decode(b); err != nil {
			t.Fatal(err)
		}
		if kind == GSOUDPL4 && !l.dev.Offload().USO {
			continue
		}
		if err := l.dev.WritePacket(&h, [][]byte{b[VNetHdrLen:]}); err != nil {
			t.Errorf("probe %d on a live device: %v", kind, err)
		}
	}
	// What follows is answered, so all before it has been dealt with.
	c := l.kernelUDP(t)
	_, us := l.addrs()
	if _, err := c.WriteToUDPAddrPort([]byte("last"), netip.AddrPortFrom(us, 6000)); err != nil {
		t.Fatal(err)
	}
	if g := next(t, packets); !l.udp(g.data) {
		t.Errorf("the probe was answered: %x", g.data)
	}
}

// TestRefusedWrites: what the kernel will not take is an error that leaves the device usable.
func TestRefusedWrites(t *testing.T) {
	l := openLab(t, Options{})
	if !l.dev.Offload().VNetHdr {
		t.Skip("no offload here: ", l.dev.Offload().Why)
	}
	good := l.makeUDP([]byte("x"), false)
	many := make([][]byte, maxIOVec)
	for _, c := range []struct {
		name string
		h    VNetHdr
		bufs [][]byte
		want error
	}{
		{"nothing", VNetHdr{}, nil, unix.EINVAL},
		{"not IP", VNetHdr{}, [][]byte{{0x00, 0x01}}, unix.EINVAL},
		{"checksum outside", VNetHdr{Flags: FlagNeedsCSum, CSumStart: 2000}, [][]byte{good}, unix.EINVAL},
		{"too many buffers", VNetHdr{}, many, ErrTooManyBuffers},
	} {
		if err := l.dev.WritePacket(&c.h, c.bufs); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if _, err := l.dev.ReadPacket(&VNetHdr{}, many); err != ErrTooManyBuffers {
		t.Errorf("reading into too many buffers: %v", err)
	}
	l.ns.IP(t, "link", "set", "zt0", "down")
	if err := l.dev.WritePacket(&VNetHdr{}, [][]byte{good}); err != unix.EIO {
		t.Errorf("a device that is down: %v", err)
	}
	l.up(t)
	if err := l.dev.WritePacket(&VNetHdr{}, [][]byte{good}); err != nil {
		t.Errorf("up again: %v", err)
	}
}

// TestShortBuffer: a packet that does not fit is lost with an error, the next one is whole.
func TestShortBuffer(t *testing.T) {
	for _, plain := range []bool{false, true} {
		l := openLab(t, Options{Plain: plain})
		c := l.kernelUDP(t)
		_, us := l.addrs()
		send := func(n int) {
			if _, err := c.WriteToUDPAddrPort(pattern(n), netip.AddrPortFrom(us, 6000)); err != nil {
				t.Fatal(err)
			}
		}
		read := func(bufs ...[]byte) (int, error) {
			for {
				var h VNetHdr
				n, err := l.dev.ReadPacket(&h, bufs)
				if err != nil || l.udp(bufs[0]) {
					return n, err
				}
			}
		}
		// Noise of the kernel's may be short of buffers too, hence: until an exact fit has passed.
		send(1000)
		if n, err := read(make([]byte, 60), make([]byte, 200)); err != ErrShortBuffer {
			t.Errorf("plain %v: %d, %v", plain, n, err)
		}
		if s := l.dev.(StatsReader).Stats(); s.ShortBuffers == 0 {
			t.Errorf("plain %v: %+v", plain, s)
		}
		send(1000)
		for {
			n, err := read(make([]byte, 28), make([]byte, 1000))
			if err == ErrShortBuffer { // the first may still be before us, if noise was short
				continue
			}
			if n != 1028 || err != nil {
				t.Errorf("plain %v: an exact fit: %d, %v", plain, n, err)
			}
			break
		}
	}
}

// TestDeviceDeleted: a device deleted under us ends the reader with an error of its own.
func TestDeviceDeleted(t *testing.T) {
	for _, plain := range []bool{false, true} {
		l := openLab(t, Options{Plain: plain})
		done := make(chan error, 1)
		go func() {
			bufs := [][]byte{make([]byte, MaxPacket)}
			for {
				var h VNetHdr
				if _, err := l.dev.ReadPacket(&h, bufs); err != nil {
					done <- err
					return
				}
			}
		}()
		l.ns.IP(t, "link", "del", "zt0")
		select {
		case err := <-done:
			if err != ErrDeviceDeleted {
				t.Errorf("plain %v: reading: %v", plain, err)
			}
		case <-time.After(patience):
			t.Fatalf("plain %v: the reader still waits", plain)
		}
		if err := l.dev.WritePacket(&VNetHdr{}, [][]byte{l.makeUDP(nil, false)}); err != ErrDeviceDeleted {
			t.Errorf("plain %v: writing: %v", plain, err)
		}
		if err := l.dev.SetMTU(1400); !errors.Is(err, unix.ENODEV) {
			t.Errorf("plain %v: SetMTU: %v", plain, err)
		}
	}
}

// TestDeviceDeletedUnread: a device that is deleted while nobody waits for its next packet says so to whoever reads
// later, also once Go's poller has heard of it and lets nobody read any more.
func TestDeviceDeletedUnread(t *testing.T) {
	for _, plain := range []bool{false, true} {
		l := openLab(t, Options{Plain: plain})
		l.ns.IP(t, "link", "del", "zt0")
		done := make(chan error, 1)
		go func() {
			bufs := [][]byte{make([]byte, MaxPacket)}
			for range 50 {
				if _, err := l.dev.ReadPacket(&VNetHdr{}, bufs); err != ErrDeviceDeleted {
					done <- fmt.Errorf("reading: %w", err)
					return
				}
				time.Sleep(2 * time.Millisecond) // in which the poller hears of it, mostly
			}
			done <- nil
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("plain %v: %v", plain, err)
			}
		case <-time.After(patience):
			t.Fatalf("plain %v: the reader does not come back", plain)
		}
		l.dev.Close()
		if _, err := l.dev.ReadPacket(&VNetHdr{}, nil); err != os.ErrClosed {
			t.Errorf("plain %v: reading after Close: %v", plain, err)
		}
	}
}

// TestSetMTU: the kernel's packets follow it, on the plain path super-packets of the larger size are split without
// harm.
func TestSetMTU(t *testing.T) {
	for _, plain := range []bool{false, true} {
		l := openLab(t, Options{Plain: plain})
		packets := l.reader(t, l.udp)
		c := l.kernelUDP(t)
		_, us := l.addrs()
		for _, mtu := range []int{1280, 9000, MaxMTU} {
			if err := l.dev.SetMTU(mtu); err != nil {
				t.Fatal(err)
			}
			if l.dev.MTU() != mtu {
				t.Errorf("MTU is %d, not %d", l.dev.MTU(), mtu)
			}
			size := min(mtu, 65535) - 28
			if _, err := c.WriteToUDPAddrPort(pattern(size), netip.AddrPortFrom(us, 6000)); err != nil {
				t.Fatal(err)
			}
			if g := next(t, packets); len(g.data) != size+28 {
				t.Errorf("plain %v: MTU %d: a packet of %d", plain, mtu, len(g.data))
			}
		}
		for _, mtu := range []int{0, 67, 65536, -1} {
			if err := l.dev.SetMTU(mtu); err == nil {
				t.Errorf("MTU %d was taken", mtu)
			}
		}
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// normal sorts the lines, for comparing lists whose order means nothing.
func normal(s string) string {
	var lines []string
	for l := range strings.Lines(s) {
		lines = append(lines, strings.Join(strings.Fields(l), " "))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
