package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// carried is a pod whose datagrams are carried, between the two devices in the hands of the test.
type carried struct {
	t            testing.TB
	s            *Stack
	up           *Uplink
	pod, network *memDevice
}

func newCarried(t testing.TB, o Datagrams, mod func(*Config)) *carried {
	node, network := memPair(1500, true)
	app, pod := memPair(1500, true)
	c := &carried{t: t, up: NewUplink(node, nil, nil), pod: pod, network: network}
	done := make(chan error, 1)
	go func() { done <- c.up.Run(context.Background()) }()
	t.Cleanup(func() {
		c.up.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	cfg := Config{App: app, Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()}, Uplink: c.up,
		Datagrams: &o}
	if mod != nil {
		mod(&cfg)
	}
	c.s = startStack(t, cfg)
	return c
}

// sends injects a packet on one side and returns what comes out on the other.
func (c *carried) sends(from, to *memDevice, b []byte) []byte {
	c.t.Helper()
	from.inject(b)
	return c.receives(to)
}

func (c *carried) receives(at *memDevice) []byte {
	c.t.Helper()
	select {
	case p := <-at.in:
		return p.b
	case <-time.After(patience):
		c.t.Fatalf("nothing came: %+v", c.s.Stats())
		return nil
	}
}

// same fails unless b comes out of the other side as it is.
func (c *carried) same(from, to *memDevice, what string, b []byte) {
	c.t.Helper()
	if got := c.sends(from, to, b); !bytes.Equal(got, b) {
		c.t.Errorf("%s: % x\nbecame % x", what, b, got)
	}
}

// dropped fails if b comes out of the other side: what is injected after it is the next that does.
func (c *carried) dropped(from, to *memDevice, what string, b []byte) {
	c.t.Helper()
	from.inject(b)
	f := families[0]
	mark := udpPacket(netip.AddrPortFrom(f.client.Addr(), 9), netip.AddrPortFrom(f.server.Addr(), 9), []byte("mark"))
	if from == c.network {
		mark = udpPacket(netip.AddrPortFrom(f.server.Addr(), 9), netip.AddrPortFrom(f.client.Addr(), 9), []byte("mark"))
	}
	c.same(from, to, what, mark)
}

// echo builds a ping or its answer.
func echo(src, dst netip.Addr, id uint16, reply bool) []byte {
	s, proto := fromAddr(src)
	d, _ := fromAddr(dst)
	const l4 = header.ICMPv4MinimumSize + 4
	if proto == header.IPv6ProtocolNumber {
		b := make([]byte, header.IPv6MinimumSize+l4)
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: l4, TransportProtocol: header.ICMPv6ProtocolNumber,
			HopLimit: 64, SrcAddr: s, DstAddr: d})
		h := header.ICMPv6(b[header.IPv6MinimumSize:])
		h.SetType(header.ICMPv6EchoRequest)
		if reply {
			h.SetType(header.ICMPv6EchoReply)
		}
		h.SetIdent(id)
		h.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: h, Src: s, Dst: d}))
		return b
	}
	b := make([]byte, header.IPv4MinimumSize+l4)
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber),
		SrcAddr: s, DstAddr: d})
	ip.SetChecksum(^ip.CalculateChecksum())
	h := header.ICMPv4(b[header.IPv4MinimumSize:])
	h.SetType(header.ICMPv4Echo)
	if reply {
		h.SetType(header.ICMPv4EchoReply)
	}
	h.SetIdent(id)
	h.SetChecksum(^checksum.Checksum(h, 0))
	return b
}

// about builds an ICMP error of the type, from a router, about a packet.
func about(typ4 header.ICMPv4Type, typ6 header.ICMPv6Type, original []byte) []byte {
	b := icmpError(original[:min(len(original), 96)], refusal.HostUnreachable)
	if b[0]>>4 == 4 {
		ip := header.IPv4(b)
		ip.SetSourceAddress(tcpip.AddrFrom4([4]byte{10, 9, 9, 9}))
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		h := header.ICMPv4(b[header.IPv4MinimumSize:])
		h.SetType(typ4)
		h.SetCode(header.ICMPv4PortUnreachable)
		h.SetChecksum(0)
		h.SetChecksum(^checksum.Checksum(h, 0))
		return b
	}
	ip := header.IPv6(b)
	ip.SetSourceAddress(tcpip.AddrFrom16(netip.MustParseAddr("fd00:9::9").As16()))
	h := header.ICMPv6(b[header.IPv6MinimumSize:])
	h.SetType(typ6)
	h.SetCode(header.ICMPv6PortUnreachable)
	h.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: h, Src: ip.SourceAddress(),
		Dst: ip.DestinationAddress()}))
	return b
}

// UDP, ping and errors about them pass both ways as they are.
func TestDatagramsPass(t *testing.T) {
	c := newCarried(t, Datagrams{}, nil)
	for _, f := range families {
		pod, peer := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
		other := netip.AddrPortFrom(f.server.Addr(), 6001)
		for _, n := range []int{0, 1, 100, 101, 1400, 30000} {
			c.same(c.pod, c.network, "out", udpPacket(pod, peer, make([]byte, n)))
			c.same(c.network, c.pod, "in", udpPacket(peer, pod, bytes.Repeat([]byte{7}, n)))
		}
		asked := udpPacket(other, netip.AddrPortFrom(pod.Addr(), 5001), nil) // a server's
		c.same(c.network, c.pod, "in, unasked", asked)
		for typ4, typ6 := range map[header.ICMPv4Type]header.ICMPv6Type{
			header.ICMPv4DstUnreachable: header.ICMPv6PacketTooBig, header.ICMPv4TimeExceeded: header.ICMPv6TimeExceeded,
			header.ICMPv4ParamProblem: header.ICMPv6DstUnreachable,
		} {
			c.same(c.network, c.pod, "an error in", about(typ4, typ6, udpPacket(pod, peer, nil)))
		}
		// The pod's kernel: nobody listens.
		c.same(c.pod, c.network, "an error out", icmpError(asked, refusal.HostUnreachable))

		c.same(c.pod, c.network, "ping", echo(pod.Addr(), peer.Addr(), 77, false))
		c.same(c.network, c.pod, "its answer", echo(peer.Addr(), pod.Addr(), 77, true))
		c.same(c.network, c.pod, "an error about it", about(header.ICMPv4TimeExceeded, header.ICMPv6TimeExceeded,
			echo(pod.Addr(), peer.Addr(), 77, false)))
		c.same(c.network, c.pod, "ping from outside", echo(peer.Addr(), pod.Addr(), 78, false))
		c.same(c.pod, c.network, "its answer", echo(pod.Addr(), peer.Addr(), 78, true))
	}
	st := c.s.Stats()
	if st.DatagramFlows != 8 || st.DatagramFlowsOpened != 8 || st.DatagramsStray+st.DatagramsDenied+st.DatagramsFull+
		st.Foreign != 0 {
		t.Errorf("%+v", st)
	}
	if st.DatagramsOut != 18 || st.DatagramsIn != 26 || st.App.RxNotTCP+c.up.Stats().RxNotTCP != 0 {
		t.Errorf("%+v", st)
	}
}

// What is not the pod's, or nobody's, passes in neither direction.
func TestDatagramsDropped(t *testing.T) {
	c := newCarried(t, Datagrams{}, nil)
	for i, f := range families {
		pod, peer := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
		before := c.s.Stats()
		spoofed := []netip.Addr{netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("fd00:1::3")}[i]
		c.dropped(c.pod, c.network, "a foreign source", udpPacket(netip.AddrPortFrom(spoofed, 5000), peer, nil))
		c.dropped(c.pod, c.network, "a foreign ping", echo(spoofed, peer.Addr(), 1, false))
		if n := c.s.Stats().Foreign - before.Foreign; n != 2 {
			t.Errorf("%d foreign", n)
		}
		nowhere := [][]string{{"127.0.0.1", "224.0.0.251", "255.255.255.255", "0.0.0.0"},
			{"::1", "ff02::2", "fe80::1", "::"}}[i]
		for _, a := range append(nowhere, f.client.Addr().String()) {
			c.dropped(c.pod, c.network, "to "+a, udpPacket(pod, netip.AddrPortFrom(netip.MustParseAddr(a), 6000), nil))
		}
		c.dropped(c.network, c.pod, "an answer to no ping", echo(peer.Addr(), pod.Addr(), 77, true))
		c.dropped(c.pod, c.network, "an answer to no ping", echo(pod.Addr(), peer.Addr(), 77, true))
		c.dropped(c.network, c.pod, "an error about nothing", about(header.ICMPv4TimeExceeded, header.ICMPv6TimeExceeded,
			udpPacket(pod, peer, nil)))
		c.dropped(c.pod, c.network, "an error about nothing", icmpError(udpPacket(peer, pod, nil), refusal.HostUnreachable))
		// An error that goes to somebody else than it quotes.
		c.same(c.network, c.pod, "in", udpPacket(peer, pod, nil))
		wrong := icmpError(udpPacket(peer, pod, nil), refusal.HostUnreachable)
		if f.client.Addr().Is6() {
			wrong[39] ^= 1
		} else {
			wrong[19] ^= 1
		}
		c.dropped(c.pod, c.network, "an error for a stranger", wrong)
		if n := c.s.Stats().DatagramsStray - before.DatagramsStray; n != uint64(len(nowhere))+6 {
			t.Errorf("%d strays", n)
		}
	}
}

// Pings that are not carried are dropped, whole and in fragments: nobody here answers in another's name.
func TestPingsDropped(t *testing.T) {
	for name, dg := range map[string]*Datagrams{"nothing is carried": nil, "by a way": {Way: newFakeWay()}} {
		app, pod := memPair(1500, true)
		s := startStack(t, Config{App: app, Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()},
			Datagrams: dg})
		sent := uint64(0)
		for _, f := range families {
			ping := echo(f.client.Addr(), f.server.Addr(), 77, false)
			parts := cut(append(ping, make([]byte, 1000)...), 3)
			if dg == nil {
				parts = append(parts, ping)
			}
			for _, b := range parts {
				pod.inject(b)
				sent++
			}
		}
		eventually(t, "dropped", func() bool { return s.Stats().App.RxNotTCP == sent })
		mark := udpPacket(families[0].server, families[0].client, []byte("mark"))
		s.pump.send(rawPacket(bytes.Clone(mark)))
		select {
		case got := <-pod.in:
			if !bytes.Equal(got.b, mark) {
				t.Errorf("%s: the pod has % x", name, got.b)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: not even what was sent last has come", name)
		}
	}
}

// Policy is asked once per flow, and again when it may have changed. The pod is told, the network is not.
func TestDatagramPolicy(t *testing.T) {
	var version atomic.Uint64
	var mu sync.Mutex
	var asked []DatagramFlow
	open := map[uint16]bool{6000: true, 5001: true}
	c := newCarried(t, Datagrams{
		Version: version.Load,
		Allow: func(f DatagramFlow) bool {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, f)
			if f.Inbound {
				return open[f.Pod.Port()]
			}
			return open[f.Peer.Port()] || f.Peer.Port() == 9
		},
	}, nil)
	f := families[0]
	pod, peer := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
	out, in := udpPacket(pod, peer, []byte("x")), udpPacket(peer, pod, nil)
	for range 3 {
		c.same(c.pod, c.network, "allowed", out)
		c.same(c.network, c.pod, "the answer to it", in) // to 5000, which is not open to the network
	}
	if len(asked) != 1 || asked[0] != (DatagramFlow{Pod: pod, Peer: peer}) {
		t.Errorf("asked %v", asked)
	}
	refused := udpPacket(pod, netip.AddrPortFrom(peer.Addr(), 6666), []byte("x"))
	if got := c.sends(c.pod, c.pod, refused); !bytes.Equal(got, icmpError(refused[:28], refusal.AdminProhibited)) {
		t.Errorf("a refusal % x", got)
	}
	c.network.inject(udpPacket(peer, netip.AddrPortFrom(pod.Addr(), 5002), nil))
	c.same(c.network, c.pod, "a server's", udpPacket(peer, netip.AddrPortFrom(pod.Addr(), 5001), nil))
	c.same(c.network, c.pod, "ping is not asked for", echo(peer.Addr(), pod.Addr(), 1, false))
	if n := len(c.network.in); n != 0 {
		t.Errorf("%d packets to the network", n)
	}

	mu.Lock()
	delete(open, 6000)
	mu.Unlock()
	c.same(c.pod, c.network, "not asked again", out)
	version.Add(1)
	if got := c.sends(c.pod, c.pod, out); got[9] != 1 {
		t.Errorf("a refusal % x", got)
	}
	if st := c.s.Stats(); st.DatagramsDenied != 3 || st.DatagramFlows != 2 {
		t.Errorf("%+v", st)
	}
}

// cut makes IPv4 fragments of a UDP packet, or IPv6 ones, of at most 1000 bytes of payload each.
func cut(b []byte, id uint32) (parts [][]byte) {
	v6 := b[0]>>4 == 6
	ipLen := 20
	if v6 {
		ipLen = 40
	}
	data := b[ipLen:]
	for at := 0; at < len(data); at += 1000 {
		end := min(at+1000, len(data))
		more := end < len(data)
		p := slices.Clone(b[:ipLen])
		if v6 {
			frag := make([]byte, 8)
			frag[0] = p[6]
			p[6] = 44
			v := uint16(at)
			if more {
				v |= 1
			}
			binary.BigEndian.PutUint16(frag[2:], v)
			binary.BigEndian.PutUint32(frag[4:], id)
			p = append(append(p, frag...), data[at:end]...)
			binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		} else {
			p = append(p, data[at:end]...)
			h := header.IPv4(p)
			h.SetTotalLength(uint16(len(p)))
			h.SetID(uint16(id))
			var fl uint8
			if more {
				fl = header.IPv4FlagMoreFragments
			}
			h.SetFlagsFragmentOffset(fl, uint16(at))
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		}
		parts = append(parts, p)
	}
	return parts
}

// Fragments pass as they are, in any order once there is a flow; those of queries go to who captures them.
func TestDatagramFragments(t *testing.T) {
	queries := make(chan *DNSQuery, 4)
	c := newCarried(t, Datagrams{}, func(cfg *Config) { cfg.OnDNS = func(q *DNSQuery) { queries <- q } })
	for i, f := range families {
		pod, peer := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
		c.dropped(c.network, c.pod, "a fragment of nothing", cut(udpPacket(peer, pod, make([]byte, 3000)), 1)[1])
		for n, p := range cut(udpPacket(pod, peer, make([]byte, 3000)), 2) {
			c.same(c.pod, c.network, fmt.Sprint("fragment out ", n), p)
		}
		parts := cut(udpPacket(peer, pod, make([]byte, 3000)), 3)
		for _, n := range []int{3, 1, 0, 2} {
			c.same(c.network, c.pod, fmt.Sprint("fragment in ", n), parts[n])
		}
		for _, p := range cut(udpPacket(pod, dnsServers[i], bytes.Repeat([]byte("q"), 3000)), 4) {
			c.pod.inject(p)
		}
		if q := <-queries; len(q.Payload()) != 3000 || q.Dst() != dnsServers[i] {
			t.Errorf("%d bytes for %v", len(q.Payload()), q.Dst())
		}
		if n := len(c.network.in); n != 0 {
			t.Errorf("%d fragments of a query left", n)
		}
	}
}

// An answer to a query that was passed on comes to who has passed it on, whole and in fragments, and one to the
// application to the application.
func TestDatagramsBesideQueries(t *testing.T) {
	c := newCarried(t, Datagrams{}, nil)
	for i, f := range families {
		u, err := c.s.DialUDP(t.Context(), dnsServers[i])
		if err != nil {
			t.Fatal(err)
		}
		u.Write([]byte("q"))
		c.receives(c.network)
		stub := u.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort()
		pod := netip.AddrPortFrom(f.client.Addr(), 5000)
		c.same(c.network, c.pod, "the application's", udpPacket(dnsServers[i], pod, []byte("for the application")))
		for _, p := range cut(udpPacket(dnsServers[i], stub, bytes.Repeat([]byte("a"), 3000)), 5) {
			c.network.inject(p)
		}
		u.SetReadDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 4000)
		if n, err := u.Read(b); n != 3000 {
			t.Errorf("%d bytes, %v", n, err)
		}
		c.network.inject(about(header.ICMPv4DstUnreachable, header.ICMPv6DstUnreachable,
			udpPacket(stub, dnsServers[i], []byte("q"))))
		if _, err := u.Read(b); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("an error about the query: %v", err)
		}
		u.Close()
		for range 3 { // later fragments, for all we know the application's
			c.receives(c.pod)
		}
	}
}

// At the pod's bound the peer with the most flows loses its oldest, at one peer's bound that one; at the node's the
// greediest pod.
func TestDatagramBounds(t *testing.T) {
	bounds := map[string]int{}
	var mu sync.Mutex
	c := newCarried(t, Datagrams{MaxFlows: 100, MaxFlowsPerPeer: 80}, func(cfg *Config) {
		cfg.OnBound = func(resource, source string, evicted bool) {
			mu.Lock()
			defer mu.Unlock()
			bounds[fmt.Sprint(resource, " ", source, " ", evicted)]++
		}
	})
	pod := families[0].client.Addr()
	peer := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 7, 0, n}) }
	sends := func(port uint16, to netip.Addr) {
		c.same(c.pod, c.network, "out", udpPacket(netip.AddrPortFrom(pod, port), netip.AddrPortFrom(to, 7), nil))
	}
	for i := range 90 {
		sends(uint16(1000+i), peer(1))
	}
	for i := range 30 {
		sends(uint16(2000+i), peer(byte(2+i)))
	}
	st := c.s.Stats()
	if st.DatagramFlows != 100 || st.DatagramFlowsEvicted != 20 || bounds["datagram flows 10.7.0.1 true"] != 20 ||
		len(bounds) != 1 {
		t.Errorf("%+v, %v", st, bounds)
	}
	// The node's.
	app, pod2 := memPair(1500, true)
	addr := netip.MustParseAddr("10.1.0.9")
	small := startStack(t, Config{App: app, Addrs: []netip.Addr{addr}, Uplink: c.up, Datagrams: &Datagrams{}})
	c.up.flows.Take(&datagrams{s: &Stack{}}, nodeFlows-100, nil) // all the others
	pod2.inject(udpPacket(netip.AddrPortFrom(addr, 1), netip.AddrPortFrom(peer(1), 7), nil))
	c.receives(c.network)
	if st := small.Stats(); st.DatagramFlows != 1 {
		t.Errorf("%+v", st)
	}
	if st := c.s.Stats(); st.DatagramFlows != 99 || bounds["datagram flows of the node the pod true"] != 1 {
		t.Errorf("%+v, %v", st, bounds)
	}
}

// Flows end when nobody has spoken for so long: one way two minutes, both ways five, echoes one.
func TestDatagramLifetimes(t *testing.T) {
	c := newCarried(t, Datagrams{}, nil)
	d := c.s.dg
	f := families[0]
	peer := netip.AddrPortFrom(f.server.Addr(), 6000)
	pod := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.client.Addr(), port) }
	c.same(c.pod, c.network, "one way", udpPacket(pod(1), peer, nil))
	c.same(c.pod, c.network, "both ways", udpPacket(pod(2), peer, nil))
	c.same(c.network, c.pod, "both ways", udpPacket(peer, pod(2), nil))
	c.same(c.pod, c.network, "echo", echo(f.client.Addr(), peer.Addr(), 3, false))
	c.same(c.network, c.pod, "from outside", udpPacket(peer, pod(4), nil))
	has := func(k datagramKey) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.flows[k] != nil
	}
	ends := map[string]time.Duration{}
	keys := map[string]datagramKey{
		"one way": {header.UDPProtocolNumber, pod(1), peer}, "both ways": {header.UDPProtocolNumber, pod(2), peer},
		"echo":         {header.ICMPv4ProtocolNumber, pod(3), netip.AddrPortFrom(peer.Addr(), 0)},
		"from outside": {header.UDPProtocolNumber, pod(4), peer},
	}
	for at := flowTick; at <= 10*time.Minute; at += flowTick {
		d.sweep()
		if at == flowOneWay-flowTick { // kept by its own packet
			c.same(c.network, c.pod, "from outside", udpPacket(peer, pod(4), nil))
		}
		for name, k := range keys {
			if _, over := ends[name]; !over && !has(k) {
				ends[name] = at
			}
		}
	}
	want := map[string]time.Duration{"one way": flowOneWay, "both ways": flowBothWays, "echo": flowEcho,
		"from outside": 2*flowOneWay - flowTick}
	for name, w := range want {
		if got := ends[name]; got < w || got > w+flowTick {
			t.Errorf("%s ends after %v, want %v", name, got, w)
		}
	}
	if st := c.s.Stats(); st.DatagramFlows != 0 || d.peers.Used() != 0 || c.up.flows.Used() != 0 {
		t.Errorf("%+v, %d places", st, d.peers.Used())
	}
}

// A flood of one pod's datagrams leaves room for another's, and for connections.
func TestDatagramShares(t *testing.T) {
	q := &txQueue{wake: make(chan struct{}, 1)}
	var flood, other txShare
	datagram := func(s *txShare, n int) bool {
		return q.forward(rawPacket(make([]byte, n)), &tun.VNetHdr{}, s)
	}
	n := 0
	for datagram(&flood, 1200) {
		n++
	}
	if n < 100 || flood.bytes > txDatagrams/2 {
		t.Errorf("%d datagrams, %d bytes of %d", n, flood.bytes, txDatagrams)
	}
	for range 50 {
		if !datagram(&other, 1200) {
			t.Fatal("no room beside a flood")
		}
	}
	for range 64 { // however many flood
		for s := new(txShare); datagram(s, 60); {
		}
	}
	tcp := outgoing(tcpPacket(false, 0, 1000), stack.GSO{})
	defer tcp.DecRef()
	if q.full.Load() || q.push([]*stack.PacketBuffer{tcp}) != 1 {
		t.Errorf("datagrams keep connections waiting, in a queue of %d packets", len(q.q))
	}
	dev := &sink{}
	<-q.wake
	q.drain(dev, true)
	if flood.bytes != 0 || other.bytes != 0 || q.shared != 0 || q.bytes != 0 {
		t.Errorf("left: %d, %d, %d of %d", flood.bytes, other.bytes, q.shared, q.bytes)
	}
	if !datagram(&flood, 60000) {
		t.Error("no room in an empty queue")
	}
	q.close()
}

// offload is a device with these offloads.
type offload struct {
	sink
	o tun.Offload
}

func (d *offload) Offload() tun.Offload { return d.o }

// What one device left undone is done where the other does not.
func TestDatagramFinish(t *testing.T) {
	full := tun.Offload{VNetHdr: true, CSum: true, TSO4: true, TSO6: true, USO: true}
	noUSO := full
	noUSO.USO = false
	for _, f := range families {
		src, dst := netip.AddrPortFrom(f.client.Addr(), 1), netip.AddrPortFrom(f.server.Addr(), 2)
		ipLen := 20
		if f.client.Addr().Is6() {
			ipLen = 40
		}
		for _, payload := range []int{1, 999, 1000, 1001, 2500, 60000} {
			data := make([]byte, payload)
			for i := range data {
				data[i] = byte(i * 7)
			}
			whole := udpPacket(src, dst, data)
			undone := bytes.Clone(whole)
			s, _ := fromAddr(src.Addr())
			d, _ := fromAddr(dst.Addr())
			header.UDP(undone[ipLen:]).SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, s, d,
				uint16(8+payload)))
			h := tun.VNetHdr{Flags: tun.FlagNeedsCSum, CSumStart: uint16(ipLen), CSumOffset: 6}
			gso := h
			gso.GSOType, gso.GSOSize, gso.HdrLen = tun.GSOUDPL4, 1000, uint16(ipLen+8)

			write := func(o tun.Offload, h tun.VNetHdr) *offload {
				dev := &offload{o: o}
				q := &txQueue{wake: make(chan struct{}, 1)}
				q.forward(rawPacket(bytes.Clone(undone)), &h, &txShare{})
				q.drain(dev, true)
				if q.errors.Load() != 0 {
					t.Errorf("%d errors", q.errors.Load())
				}
				return dev
			}
			if dev := write(full, gso); len(dev.packets) != 1 || dev.headers[0] != gso || !bytes.Equal(dev.packets[0], undone) {
				t.Errorf("%d bytes are not left to the kernel: %v", payload, dev.headers)
			}
			if dev := write(tun.Offload{}, h); len(dev.packets) != 1 || !dev.headers[0].IsZero() ||
				!bytes.Equal(dev.packets[0], whole) {
				t.Errorf("%d bytes, a checksum: % x, want % x", payload, dev.packets[0][:ipLen+8], whole[:ipLen+8])
			}
			for _, o := range []tun.Offload{{}, noUSO} {
				dev := write(o, gso)
				var got []byte
				for i, p := range dev.packets {
					got = append(got, p[ipLen+8:]...)
					piece := udpPacket(src, dst, p[ipLen+8:])
					if ipLen == 20 {
						ip := header.IPv4(piece)
						ip.SetID(uint16(i))
						ip.SetChecksum(0)
						ip.SetChecksum(^ip.CalculateChecksum())
					}
					if !bytes.Equal(p, piece) || !dev.headers[i].IsZero() {
						t.Fatalf("piece %d is % x, want % x", i, p[:ipLen+8], piece[:ipLen+8])
					}
				}
				if !bytes.Equal(got, data) || len(dev.packets) != (payload+999)/1000 {
					t.Errorf("%d bytes in %d packets", len(got), len(dev.packets))
				}
			}
		}
	}
}

// Nothing that a packet says of itself is believed.
func FuzzSee(f *testing.F) {
	for _, fam := range families {
		pod, peer := netip.AddrPortFrom(fam.client.Addr(), 5000), netip.AddrPortFrom(fam.server.Addr(), 6000)
		u := udpPacket(pod, peer, make([]byte, 2000))
		f.Add(u[:128])
		f.Add(echo(pod.Addr(), peer.Addr(), 1, false))
		f.Add(about(header.ICMPv4TimeExceeded, header.ICMPv6TimeExceeded, u))
		for _, p := range cut(u, 9) {
			f.Add(p[:min(len(p), 64)])
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		head := b[:min(len(b), headSize)]
		s := see(head)
		if s.kind == sightNone {
			return
		}
		if !s.src.Addr().IsValid() || !s.dst.Addr().IsValid() || s.src.Addr().Is4() != s.dst.Addr().Is4() ||
			s.l4 > len(head) {
			t.Errorf("%+v", s)
		}
		if s.kind == sightError && (!s.quotedSrc.IsValid() || s.quotedSrc.Addr().Is4() != s.src.Addr().Is4()) {
			t.Errorf("%+v", s)
		}
	})
}
