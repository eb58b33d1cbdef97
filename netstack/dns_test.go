package netstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"ztun/proxy/refusal"
)

// udpPacket builds a UDP packet with a right checksum.
func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	s, proto := fromAddr(src.Addr())
	d, _ := fromAddr(dst.Addr())
	l4 := header.UDPMinimumSize + len(payload)
	ipLen := header.IPv4MinimumSize
	if proto == header.IPv6ProtocolNumber {
		ipLen = header.IPv6MinimumSize
	}
	b := make([]byte, ipLen+l4)
	if proto == header.IPv6ProtocolNumber {
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(l4), TransportProtocol: header.UDPProtocolNumber,
			HopLimit: 64, SrcAddr: s, DstAddr: d})
	} else {
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.UDPProtocolNumber),
			SrcAddr: s, DstAddr: d})
		h.SetChecksum(^h.CalculateChecksum())
	}
	u := header.UDP(b[ipLen:])
	u.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(l4)})
	copy(u.Payload(), payload)
	u.SetChecksum(
		^u.CalculateChecksum(checksum.Checksum(payload, header.PseudoHeaderChecksum(header.UDPProtocolNumber, s, d,
			uint16(l4)))))
	return b
}

// askers joins a stack without OnDNS whose App device is its way out, so that its
// DialUDP meets the tap, to one with OnDNS.
func askers(t *testing.T, offload bool, onDNS func(*DNSQuery), mod func(*Config)) *joined {
	return join(t, offload, func(c, s *Config) {
		c.UplinkIsApp = true
		s.OnDNS = onDNS
		if mod != nil {
			mod(s)
		}
	})
}

func exchange(t *testing.T, s *Stack, dst netip.AddrPort, q []byte) []byte {
	t.Helper()
	c, err := s.DialUDP(context.Background(), dst)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(q); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 65536)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

var dnsServers = []netip.AddrPort{netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("[fd00:96::10]:53")}

// A query to any address comes to the tap and its answer back from that address,
// both also when they take several fragments.
func TestDNSExchange(t *testing.T) {
	for _, offload := range []bool{true, false} {
		for i, dst := range dnsServers {
			t.Run(fmt.Sprint(dst, offload), func(t *testing.T) {
				j := askers(t, offload, func(q *DNSQuery) {
					if q.Dst() != dst || q.Src().Addr() != families[i].client.Addr() || q.Src().Port() == 0 {
						t.Errorf("from %v to %v", q.Src(), q.Dst())
					}
					if err := q.Reply(append([]byte("re:"), q.Payload()...)); err != nil {
						t.Error(err)
					}
				}, nil)
				for _, n := range []int{0, 1, 40, 512, 1232, 1452, 1472, 1473, 4096, 60000} {
					want := bytes.Repeat([]byte("q"), n)
					if got := exchange(t, j.client, dst, want); !bytes.Equal(got, append([]byte("re:"), want...)) {
						t.Errorf("%d bytes: %d came back", n, len(got))
					}
				}
				if st := j.server.Stats(); st.DNSQueries != 10 || st.DNSOver+st.DNSMalformed+st.UDPStray != 0 {
					t.Errorf("stats %+v", st)
				}
				eventually(t, "no query in flight", func() bool { return j.server.Stats().DNSInFlight == 0 })
				if n := j.client.up.port.udp.Load(); n != 0 {
					t.Errorf("%d sockets left", n)
				}
			})
		}
	}
}

// A resolver asks for A and AAAA from one port, to one server.
func TestDNSTwoFromOnePort(t *testing.T) {
	both := make(chan *DNSQuery, 2)
	j := askers(t, true, func(q *DNSQuery) { both <- q }, nil)
	c, err := j.client.DialUDP(context.Background(), dnsServers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("A"))
	c.Write([]byte("AAAA"))
	for range 2 {
		q := <-both
		if err := q.Reply(q.Payload()); err != nil {
			t.Fatal(err)
		}
	}
	got := map[string]bool{}
	for range 2 {
		b := make([]byte, 16)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		got[string(b[:n])] = true
	}
	if !got["A"] || !got["AAAA"] {
		t.Errorf("got %v", got)
	}
}

// The bounds hold, are counted, and let go again.
func TestDNSBounds(t *testing.T) {
	release := make(chan struct{})
	j := askers(t, false, func(*DNSQuery) { <-release }, func(c *Config) { c.MaxDNS = 3 })
	c, err := j.client.DialUDP(context.Background(), dnsServers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 5 {
		c.Write([]byte("q"))
	}
	eventually(t, "5 queries", func() bool { st := j.server.Stats(); return st.DNSQueries+st.DNSOver == 5 })
	if st := j.server.Stats(); st.DNSQueries != 3 || st.DNSOver != 2 || st.DNSInFlight != 3 {
		t.Errorf("stats %+v", st)
	}
	close(release)
	eventually(t, "no query in flight", func() bool { return j.server.Stats().DNSInFlight == 0 })
	c.Write([]byte("q"))
	eventually(t, "a fourth query", func() bool { return j.server.Stats().DNSQueries == 4 })
}

func TestDNSBytesBound(t *testing.T) {
	release := make(chan struct{})
	j := askers(t, true, func(*DNSQuery) { <-release }, func(c *Config) { c.DNSRate = 1e6 }) // each query is 23 fragments
	defer close(release)
	c, err := j.client.DialUDP(context.Background(), dnsServers[1])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	big := make([]byte, 32<<10)
	const fit = maxDNSBytes / (32 << 10)
	for i := range fit + 2 {
		c.Write(big)
		eventually(t, "one more", func() bool { st := j.server.Stats(); return st.DNSQueries+st.DNSOver == uint64(i+1) })
	}
	if st := j.server.Stats(); st.DNSQueries != fit || st.DNSOver != 2 {
		t.Errorf("%d taken, %d over, want %d and 2", st.DNSQueries, st.DNSOver, fit)
	}
}

// Other UDP is dropped as before, whatever is wrong with DNS packets as well,
// and nothing goes back to the pod.
func TestDNSNotTaken(t *testing.T) {
	a, b := memPair(1500, false)
	s := startStack(t,
		Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")},
			OnDNS: func(q *DNSQuery) { t.Errorf("taken: %v to %v, %q", q.Src(), q.Dst(), q.Payload()) }})
	ap := netip.MustParseAddrPort
	good := func() []byte { return udpPacket(ap("10.1.0.2:4000"), dnsServers[0], []byte("query")) }
	change := func(b []byte, at int, v byte) []byte { b[at] = v; return b }
	noSum6 := udpPacket(ap("[fd00:1::2]:4000"), dnsServers[1], []byte("query"))
	noSum6[46], noSum6[47] = 0, 0
	short := good()
	short[20+4], short[20+5] = 0, 7 // a UDP length without its own header
	short[20+6], short[20+7] = 0, 0
	long := good()
	long[20+4], long[20+5] = 0, 200
	long[20+6], long[20+7] = 0, 0
	for _, tc := range []struct {
		name string
		b    []byte
		n    func(Stats) uint64
	}{
		{"another port", udpPacket(ap("10.1.0.2:4000"), ap("10.96.0.10:5353"), []byte("x")), func(s Stats) uint64 {
			return s.App.RxNotTCP
		}},
		{"another port, IPv6", udpPacket(ap("[fd00:1::2]:4000"), ap("[fd00::1]:443"), []byte("x")), func(s Stats) uint64 {
			return s.App.RxNotTCP
		}},
		{"checksum", change(good(), 30, 'Q'), func(s Stats) uint64 { return s.App.RxBadChecksum }},
		{"no checksum in IPv6", noSum6, func(s Stats) uint64 { return s.App.RxBadChecksum }},
		{"too short", good()[:26], func(s Stats) uint64 { return s.App.RxMalformed }},
		{"length below 8", short, func(s Stats) uint64 { return s.DNSMalformed }},
		{"length beyond", long, func(s Stats) uint64 { return s.DNSMalformed }},
		{"port 0", udpPacket(ap("10.1.0.2:0"), dnsServers[0], []byte("x")), func(s Stats) uint64 { return s.DNSMalformed }},
		// gVisor's to drop
		{"multicast", udpPacket(ap("10.1.0.2:4000"), ap("224.0.0.251:53"), []byte("x")), func(s Stats) uint64 {
			return s.App.RxPackets
		}},
		{"the pod itself", udpPacket(ap("10.9.9.9:4000"), ap("10.1.0.2:53"), []byte("x")), func(s Stats) uint64 {
			return s.UDPStray
		}},
	} {
		before := tc.n(s.Stats())
		b.inject(tc.b)
		eventually(t, tc.name, func() bool { return tc.n(s.Stats()) == before+1 })
	}
	if st := s.Stats(); st.App.TxPackets != 0 || st.DNSQueries != 0 {
		t.Errorf("stats %+v", st)
	}
}

// IPv4 allows a packet without a checksum, and padding after the datagram.
func TestDNSNoChecksumAndPadding(t *testing.T) {
	got := make(chan string, 1)
	a, b := memPair(1500, false)
	startStack(t, Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, OnDNS: func(q *DNSQuery) {
		got <- string(q.Payload())
	}})
	p := append(udpPacket(netip.MustParseAddrPort("10.1.0.2:4000"), dnsServers[0], []byte("query")), "padding"...)
	ip := header.IPv4(p)
	ip.SetTotalLength(uint16(len(p)))
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	p[26], p[27] = 0, 0
	b.inject(p)
	if q := <-got; q != "query" {
		t.Errorf("got %q", q)
	}
}

// What DialUDP says when there is no way, and when nobody listens there.
func TestDialUDPErrors(t *testing.T) {
	ctx := context.Background()
	a, _ := memPair(1500, false)
	s := startStack(t, Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}})
	if _, err := s.DialUDP(ctx, dnsServers[0]); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("without an uplink: %v", err)
	}
	if _, err := s.DialUDP(ctx, dnsServers[1]); !errors.Is(err, syscall.EAFNOSUPPORT) {
		t.Errorf("without an IPv6 address: %v", err)
	}
	if _, err := s.DialUDP(ctx, netip.AddrPort{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("to nowhere: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.DialUDP(ended, dnsServers[0]); !errors.Is(err, context.Canceled) {
		t.Errorf("too late: %v", err)
	}
	s.Close()

	c, d := memPair(1500, false)
	s = startStack(t, Config{App: c, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, UplinkIsApp: true})
	conn, err := s.DialUDP(ctx, dnsServers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Write([]byte("q"))
	sent := <-d.in
	e := icmpError(sent.b, refusal.HostUnreachable)
	e[21] = 3 // port unreachable
	e[22], e[23] = 0, 0
	ic := header.ICMPv4(e[20:])
	ic.SetChecksum(^checksum.Checksum(ic, 0))
	conn.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := conn.Read(make([]byte, 16)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing there: %v", err)
	}
	time.AfterFunc(10*time.Millisecond, func() { d.inject(e) }) // most likely while Read waits
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := conn.Read(make([]byte, 16)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a refusal from the network: %v", err)
	}
	s.Close()
	if _, err := s.DialUDP(ctx, dnsServers[0]); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// What is no address of the network is not asked of the node: it would be its own loopback.
func TestNotTheNetworks(t *testing.T) {
	a, _ := memPair(1500, false)
	s := startStack(t,
		Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")},
			UplinkIsApp: true})
	for _, addr := range []string{"127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "224.0.0.1",
		"255.255.255.255", "ff02::1"} {
		dst := netip.AddrPortFrom(netip.MustParseAddr(addr), 8080)
		if _, err := s.DialPlain(t.Context(), dst); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("TCP to %s: %v", addr, err)
		}
		if _, err := s.DialUDP(t.Context(), dst); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("UDP to %s: %v", addr, err)
		}
	}
	if n := s.Stats().App.TxPackets; n != 0 {
		t.Errorf("%d packets left", n)
	}
}

// A socket that waits when the stack closes is woken.
func TestDialUDPClose(t *testing.T) {
	a, _ := memPair(1500, false)
	s := startStack(t, Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, UplinkIsApp: true})
	c, err := s.DialUDP(context.Background(), dnsServers[0])
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Read(make([]byte, 16)); err == nil {
			t.Error("a packet from nowhere")
		}
	})
	s.Close()
	wg.Wait()
	c.Close()
	c.Close()
	if n := s.up.port.udp.Load(); n != 0 {
		t.Errorf("%d sockets left", n)
	}
}

// Answers from the network reach the pod that asked, by the node's uplink, whole
// and in fragments; without a socket UDP for a pod is dropped and makes no stack.
func TestDialUDPByUplink(t *testing.T) {
	node, network := memPair(1500, true)
	up := NewUplink(node, nil, nil)
	done := make(chan error, 1)
	go func() { done <- up.Run(context.Background()) }()
	defer func() {
		up.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	app, _ := memPair(1500, true)
	pod := netip.MustParseAddr("10.1.0.2")
	s := startStack(t, Config{App: app, Addrs: []netip.Addr{pod}, Uplink: up})
	defer s.Close()

	network.inject(udpPacket(dnsServers[0], netip.AddrPortFrom(pod, 4000), []byte("unasked")))
	eventually(t, "dropped", func() bool { return up.Stats().RxNotTCP == 1 })
	s.up.mu.Lock()
	if s.up.gs != nil {
		t.Error("a stack was made for it")
	}
	s.up.mu.Unlock()

	// The far side is a stack too: it fragments.
	far := startStack(t, Config{App: network, Addrs: []netip.Addr{pod}, OnDNS: func(q *DNSQuery) {
		q.Reply(bytes.Repeat(q.Payload(), 4000))
	}})
	if got := exchange(t, s, dnsServers[0], []byte("q")); len(got) != 4000 {
		t.Errorf("%d bytes", len(got))
	}
	far.Close()
}

// The kernel's own resolver sockets in a pod, with super-packet offload and
// without, both families, UDP answers above the MTU, and other UDP untouched.
func TestTUNDNS(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			l := newLabWith(t, plain, func(f *Flow) { f.Refuse(refusal.Reset) }, func(c *Config) {
				c.OnDNS = func(q *DNSQuery) {
					if err := q.Reply(bytes.Repeat(q.Payload(), 100)); err != nil {
						t.Error(err)
					}
				}
			})
			for _, dst := range dnsServers {
				for _, size := range []int{1, 12, 40, 600} {
					if err := l.ns.Do(func() error {
						c, err := net.Dial("udp", dst.String())
						if err != nil {
							return err
						}
						defer c.Close()
						q := bytes.Repeat([]byte("z"), size)
						if _, err := c.Write(q); err != nil {
							return err
						}
						c.SetReadDeadline(time.Now().Add(20 * time.Second))
						b := make([]byte, 65536)
						n, err := c.Read(b)
						if err == nil && !bytes.Equal(b[:n], bytes.Repeat(q, 100)) {
							err = fmt.Errorf("%d bytes came back", n)
						}
						return err
					}); err != nil {
						t.Errorf("%v, %d bytes: %v", dst, size, err)
					}
				}
			}
			st := l.s.Stats()
			if st.DNSQueries != 8 || st.DNSOver+st.DNSMalformed+st.App.RxBadChecksum+st.App.TxDropped+st.App.TxErrors != 0 {
				t.Errorf("stats %+v", st)
			}
			// Other UDP gets no answer at all, as before.
			err := l.ns.Do(func() error {
				c, err := net.Dial("udp", "10.96.0.10:54")
				if err != nil {
					return err
				}
				defer c.Close()
				c.Write([]byte("x"))
				c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				if _, err = c.Read(make([]byte, 16)); errors.Is(err, os.ErrDeadlineExceeded) {
					return nil
				}
				return fmt.Errorf("read: %w", errors.Join(err, io.ErrUnexpectedEOF))
			})
			if err != nil {
				t.Error(err)
			}
			eventually(t, "other UDP dropped", func() bool { return l.s.Stats().App.RxNotTCP > 0 })
		})
	}
}
