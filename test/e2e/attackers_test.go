package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
)

// What an attacker does, for the Attack of attackOptions: each goes on until ctx ends, and returns when all that it
// opened is closed.

// paced calls f rate times a second, late ones at once, until ctx ends or f says that it is enough. Rate 0 is as fast
// as it can.
func paced(ctx context.Context, rate float64, f func(i int) bool) {
	start := time.Now()
	for i := 0; ctx.Err() == nil && f(i); i++ {
		if rate > 0 {
			select {
			case <-time.After(time.Until(start.Add(time.Duration(float64(i+1) / rate * float64(time.Second))))):
			case <-ctx.Done():
			}
		}
	}
}

// always is one target for everything.
func always(to netip.AddrPort) func(int) netip.AddrPort {
	return func(int) netip.AddrPort { return to }
}

// mesh15008 is a pod's door for the mesh.
func mesh15008(p *lab.Pod) netip.AddrPort { return netip.AddrPortFrom(p.V4(), lab.HBONEPort) }

// opener is how an attacker opens connections.
type opener struct {
	To    func(i int) netip.AddrPort // of the i-th connection
	From  func(i int) netip.AddrPort // its source, which nobody needs to have (see invent); nil: the kernel's choice
	Rate  float64                    // connections per second; 0: as fast as it can
	Max   int                        // at once; one that ends makes room for another. Default 1,000
	Total int                        // in all; 0: no limit
	First []byte                     // sent when the connection stands
}

// hold opens connections, sends First over each, and then waits for the other end to end it, reading on. It tells how
// many ever stood and how many of them the other end ended.
func (m *mesh) hold(ctx context.Context, ns *lab.NS, o opener) (stood, ended int64) {
	if o.Max == 0 {
		o.Max = 1000
	}
	places := make(chan struct{}, o.Max)
	var wg sync.WaitGroup
	var nStood, nEnded atomic.Int64
	var mu sync.Mutex
	open := map[*os.File]struct{}{}
	m.inside(ns, func() {
		paced(ctx, o.Rate, func(i int) bool {
			if o.Total > 0 && i >= o.Total {
				<-ctx.Done()
				return false
			}
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return false
			}
			var from netip.AddrPort
			if o.From != nil {
				from = o.From(i)
			}
			f, err := beginConnect(from, o.To(i))
			if err != nil {
				<-places
				if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.EADDRNOTAVAIL) {
					time.Sleep(10 * time.Millisecond)
				}
				return true
			}
			mu.Lock()
			open[f] = struct{}{}
			mu.Unlock()
			wg.Go(func() {
				defer func() {
					mu.Lock()
					delete(open, f)
					mu.Unlock()
					f.Close()
					<-places
				}()
				if _, err := f.Write(o.First); err != nil { // waits for the connection to stand
					return
				}
				nStood.Add(1)
				_, _ = io.Copy(io.Discard, f)
				if ctx.Err() == nil {
					nEnded.Add(1)
				}
			})
			return true
		})
	})
	mu.Lock()
	for f := range open {
		_ = f.SetDeadline(time.Unix(1, 0))
	}
	mu.Unlock()
	wg.Wait()
	return nStood.Load(), nEnded.Load()
}

// inside runs f on a thread of its own in the namespace.
func (m *mesh) inside(ns *lab.NS, f func()) {
	if err := ns.Do(func() error { f(); return nil }); err != nil {
		m.t.Errorf("attacker in %s: %v", ns.Name, err)
	}
}

// beginConnect begins a TCP connection of the calling thread's namespace; it does not wait for an answer. Writing
// waits.
func beginConnect(from, to netip.AddrPort) (*os.File, error) {
	family := unix.AF_INET6
	if to.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	err = func() error {
		if from.IsValid() {
			level, option := unix.SOL_IP, unix.IP_FREEBIND
			if family == unix.AF_INET6 {
				level, option = unix.SOL_IPV6, unix.IPV6_FREEBIND
			}
			if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
				return err
			}
			if err := unix.Bind(fd, sockaddr(from)); err != nil {
				return err
			}
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil && err != unix.EINPROGRESS {
			return err
		}
		return nil
	}()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), to.String()), nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// invent makes all addresses of a prefix the namespace's own, so that connections may come from them and answers
// arrive.
func (m *mesh) invent(ns *lab.NS, p netip.Prefix) {
	m.t.Helper()
	must(m.t, m.IP(m.ctx, ns, "route add local "+p.String()+" dev lo"))
}

// nth address of a prefix, from 1 on; it wraps.
func nth(p netip.Prefix, i int) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	n := uint64(i)%(1<<min(p.Addr().BitLen()-p.Bits(), 62)-1) + 1
	for k := len(b) - 1; k >= 0 && n > 0; k-- {
		n += uint64(b[k])
		b[k] = byte(n)
		n >>= 8
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// synFlood sends SYNs at a rate from random addresses of spoof to the targets in turn. Nobody answers what comes
// back. It tells how many went out.
func (m *mesh) synFlood(ctx context.Context, ns *lab.NS, spoof netip.Prefix, rate float64, to ...netip.AddrPort) (
	sent int64) {
	raw := m.rawSocket(ns, spoof.Addr().Is4())
	defer unix.Close(raw)
	paced(ctx, rate, func(i int) bool {
		src := netip.AddrPortFrom(nth(spoof, int(rand.Int32())), uint16(1024+rand.IntN(60000)))
		dst := to[i%len(to)]
		if unix.Sendto(raw, tcpPacket(src, dst, rand.Uint32(), 0, tcpSYN), 0, sockaddr(netip.AddrPortFrom(dst.Addr(), 0))) ==
			nil {
			sent++
		}
		return true
	})
	return sent
}

// fragmentFlood sends first fragments of TCP packets at a rate from random IPv4 addresses of spoof; no second one
// follows. It tells how many went out.
func (m *mesh) fragmentFlood(ctx context.Context, ns *lab.NS, spoof netip.Prefix, rate float64, to netip.Addr) (
	sent int64) {
	raw := m.rawSocket(ns, true)
	defer unix.Close(raw)
	payload := make([]byte, 1400) // a multiple of 8, as RFC 791 wants of all but the last
	paced(ctx, rate, func(int) bool {
		src := nth(spoof, int(rand.Int32()))
		p := append(ipHeader(src, to, len(payload)), payload...)
		binary.BigEndian.PutUint16(p[4:], uint16(rand.Uint32()))
		p[6] = 0x20 // more fragments
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
		if unix.Sendto(raw, p, 0, sockaddr(netip.AddrPortFrom(to, 0))) == nil {
			sent++
		}
		return true
	})
	return sent
}

// rawSocket sends whole packets, their headers included, from inside a namespace.
func (m *mesh) rawSocket(ns *lab.NS, v4 bool) (fd int) {
	m.t.Helper()
	must(m.t, ns.Do(func() (err error) {
		family := unix.AF_INET6
		if v4 {
			family = unix.AF_INET
		}
		fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	}))
	return fd
}

const (
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

// tcpPacket is an IP packet with a TCP segment without payload; with SYN it carries an MSS.
func tcpPacket(src, dst netip.AddrPort, seq, ack uint32, flags byte) []byte {
	var options []byte
	if flags&tcpSYN != 0 {
		options = []byte{2, 4, 0x05, 0xb4}
	}
	seg := make([]byte, 20+len(options))
	binary.BigEndian.PutUint16(seg[0:], src.Port())
	binary.BigEndian.PutUint16(seg[2:], dst.Port())
	binary.BigEndian.PutUint32(seg[4:], seq)
	binary.BigEndian.PutUint32(seg[8:], ack)
	seg[12], seg[13] = byte(len(seg)/4)<<4, flags
	binary.BigEndian.PutUint16(seg[14:], 64240)
	copy(seg[20:], options)
	pseudo := append(append([]byte{}, src.Addr().AsSlice()...), dst.Addr().AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(seg)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, unix.IPPROTO_TCP)
	binary.BigEndian.PutUint16(seg[16:], checksum(append(pseudo, seg...)))
	return append(ipHeader(src.Addr(), dst.Addr(), len(seg)), seg...)
}

func ipHeader(src, dst netip.Addr, payload int) []byte {
	if src.Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(h[2:], uint16(20+payload))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], checksum(h))
		return h
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, unix.IPPROTO_TCP, 64
	binary.BigEndian.PutUint16(h[4:], uint16(payload))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return h
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// udpFlood sends datagrams at a rate (0: as fast as it can) over eight sockets; payload may differ for each. It tells
// how many went out.
func (m *mesh) udpFlood(ctx context.Context, ns *lab.NS, to netip.AddrPort, rate float64, payload func(i int) []byte) (
	sent int64) {
	var fds [8]int
	must(m.t, ns.Do(func() error {
		for k := range fds {
			family := unix.AF_INET6
			if to.Addr().Is4() {
				family = unix.AF_INET
			}
			fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			fds[k] = fd
			if err := unix.Connect(fd, sockaddr(to)); err != nil {
				return err
			}
		}
		return nil
	}))
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	paced(ctx, rate, func(i int) bool {
		if _, err := unix.Write(fds[i%len(fds)], payload(i)); err == nil {
			sent++
		}
		return true
	})
	return sent
}

// dnsQuery is a query for the A records of a name that nobody has asked for before.
func dnsQuery(i int) []byte {
	q := []byte{byte(i >> 8), byte(i), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8}
	const hex = "0123456789abcdef"
	for k := range 8 {
		q = append(q, hex[uint32(i)*2654435761>>(4*k)&15])
	}
	return append(q, "\x07example\x00\x00\x01\x00\x01"...)
}

// member is a mesh member that speaks bare HTTP/2 over a tunnel to a pod's 15008 from a namespace: what it sends is
// exactly what it is told.
func (m *mesh) member(ns *lab.NS, to netip.AddrPort, id string) (*h2Client, error) {
	c, err := ns.Dial(m.ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	h, err := dialH2(m.t, c, loadCA(m.t, m.Path("ca")).client(m.t, id))
	if err != nil {
		return nil, err
	}
	go h.run()
	return h, nil
}
