package tun

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

// TestTCPThroughTwoDevices joins two namespaces by two devices and copies packets between them as they come, headers
// and super-packets included, while the kernels at both ends talk TCP: the whole of reading and writing, with real
// traffic. Fast to plain proves that the plain path hands out only complete packets.
func TestTCPThroughTwoDevices(t *testing.T) {
	for _, c := range []struct {
		plain bool
		v6    bool
	}{{false, false}, {false, true}, {true, false}, {true, true}} {
		t.Run(fmt.Sprintf("plain=%v,v6=%v", c.plain, c.v6), func(t *testing.T) {
			a := openBridgeEnd(t, "10.9.0.1", "fd09::1", Options{Plain: c.plain})
			b := openBridgeEnd(t, "10.9.0.2", "fd09::2", Options{Plain: c.plain})
			var super, largest [2]int
			pump := func(from, to Device, super, largest *int) <-chan struct{} {
				done := make(chan struct{})
				go func() {
					defer close(done)
					bufs := [][]byte{make([]byte, 128), make([]byte, MaxPacket)}
					out := make([][]byte, 0, 2)
					for {
						var h VNetHdr
						n, err := from.ReadPacket(&h, bufs)
						if err != nil {
							return
						}
						if n > from.MTU() {
							*super++
							*largest = max(*largest, n-iphl(bufs[0])-int(bufs[0][iphl(bufs[0])+12]>>4*4))
						}
						out = append(out[:0], bufs[0][:min(n, 128)])
						if n > 128 {
							out = append(out, bufs[1][:n-128])
						}
						if err := to.WritePacket(&h, out); err != nil && err != os.ErrClosed {
							t.Errorf("WritePacket %v of %d bytes: %v", &h, n, err)
						}
					}
				}()
				return done
			}
			ab, ba := pump(a.dev, b.dev, &super[0], &largest[0]), pump(b.dev, a.dev, &super[1], &largest[1])
			total := 64 << 20
			if c.plain {
				total = 16 << 20
			}
			transfer(t, a, b, c.v6, total)
			a.dev.Close()
			b.dev.Close()
			<-ab
			<-ba
			if c.plain && super[0] > 0 {
				t.Errorf("%d super-packets on the plain path", super[0])
			}
			if !c.plain && a.dev.Offload().VNetHdr && super[0] == 0 {
				t.Error("no super-packet was seen on the fast path")
			}
			// Full ones but for a segment, and none that is longer than a frame of a tunnel.
			if n := largest[0]; super[0] > 0 && (n > SuperPayload || n < SuperPayload-1500) {
				t.Errorf("the largest super-packet carries %d bytes, want at most %d", n, SuperPayload)
			}
			for _, d := range []Device{a.dev, b.dev} {
				if s := d.(StatsReader).Stats(); s != (Stats{}) {
					t.Errorf("turned away: %+v", s)
				}
			}
		})
	}
}

// iphl is the length of a packet's IP header.
func iphl(p []byte) int {
	if p[0]>>4 == 6 {
		return 40
	}
	return int(p[0]&15) * 4
}

func openBridgeEnd(t *testing.T, v4, v6 string, o Options) *lab {
	l := &lab{ns: nslab.New(t)}
	o.Name, o.NetNS = "zt0", l.ns.NS
	dev, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	l.dev = dev
	l.ns.IP(t, "addr", "add", v4+"/24", "dev", "zt0")
	l.ns.IP(t, "addr", "add", v6+"/64", "dev", "zt0", "nodad")
	l.ns.IP(t, "link", "set", "zt0", "up")
	return l
}

// transfer sends total bytes from a's kernel to b's and compares them.
func transfer(t *testing.T, a, b *lab, v6 bool, total int) {
	t.Helper()
	dst, src := "10.9.0.2:0", "10.9.0.1"
	if v6 {
		dst, src = "[fd09::2]:0", "fd09::1"
	}
	var l net.Listener
	err := b.ns.Do(func() (err error) {
		l, err = net.Listen("tcp", dst)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	payload := pattern(1 << 20)
	result := make(chan error, 1)
	go func() {
		result <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(3 * patience))
			if got := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String(); got != src {
				return fmt.Errorf("the client's address is %s", got)
			}
			buf := make([]byte, len(payload))
			for i := 0; i < total; i += len(payload) {
				if _, err := io.ReadFull(c, buf); err != nil {
					return err
				}
				if !bytes.Equal(buf, payload) {
					return errors.New("the bytes differ")
				}
			}
			return nil
		}()
	}()
	c := dialIn(t, a.ns.NS, l.Addr().String())
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * patience))
	for i := 0; i < total; i += len(payload) {
		if _, err := c.Write(payload); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

func dialIn(t *testing.T, ns *netns.NS, addr string) net.Conn {
	t.Helper()
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", addr, patience)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
