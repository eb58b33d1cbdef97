package netstack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// tcpPacket builds a packet with options and payload, and a right checksum.
func tcpPacket(v6 bool, opts, payload int) []byte {
	src4, dst4 := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.3")
	if v6 {
		src4, dst4 = netip.MustParseAddr("fd00:1::2"), netip.MustParseAddr("fd00:2::3")
	}
	src, _ := fromAddr(src4)
	dst, _ := fromAddr(dst4)
	l4 := header.TCPMinimumSize + opts + payload
	ipLen := header.IPv4MinimumSize
	if v6 {
		ipLen = header.IPv6MinimumSize
	}
	b := make([]byte, ipLen+l4)
	if v6 {
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(l4), TransportProtocol: header.TCPProtocolNumber,
			HopLimit: 64, SrcAddr: src, DstAddr: dst})
	} else {
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
			SrcAddr: src, DstAddr: dst})
		h.SetChecksum(^h.CalculateChecksum())
	}
	th := header.TCP(b[ipLen:])
	th.Encode(&header.TCPFields{SrcPort: 4000, DstPort: 80, SeqNum: 77, DataOffset: uint8(header.TCPMinimumSize + opts),
		Flags: header.TCPFlagSyn, WindowSize: 1000})
	for i := range th[20:] {
		th[20+i] = byte(i * 7)
	}
	x := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(l4))
	th.SetChecksum(^checksum.Checksum(th, x))
	return b
}

// scatter puts a packet where the reader would.
func scatter(b []byte, bufs [][]byte) {
	n := copy(bufs[0], b)
	copy(bufs[1], b[n:])
}

// The packet that the stack gets is the one that was read, its first view holds
// headers alone, and what is large is not copied.
func TestReceivePacket(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, opts := range []int{0, 12, 40} {
			for _, payload := range []int{0, 1, 27, 36, 37, 48, 76, 88, 100, 1460, copyLimit, copyLimit + 1,
				65535 - 40 - 20 - 40} {
				want := tcpPacket(v6, opts, payload)
				var bufs rxBuffers
				iov := bufs.prepare()
				scatter(want, iov)
				var p rxPacket
				if v := parseHead(iov[0][:min(len(want), headSize)], len(want), &p); v != rxDeliver || !p.tcp {
					t.Fatalf("v6 %v, options %d, payload %d: verdict %d, %+v", v6, opts, payload, v, p)
				}
				if !checksumValid(iov, len(want), &p) {
					t.Errorf("checksum of %d bytes", len(want))
				}
				chunk := bufs.chunk
				pkt := bufs.packet(len(want), &p)
				view := pkt.ToView()
				if !bytes.Equal(view.AsSlice(), want) {
					t.Errorf("v6 %v, options %d, payload %d: packet differs", v6, opts, payload)
				}
				view.Release()
				list, _ := pkt.AsViewList()
				if len(want) > headSize {
					if n := list.Front().Size(); n != p.hdrLen {
						t.Errorf("first view of %d bytes, headers are %d", n, p.hdrLen)
					}
					if list.Back() != list.Front().Next() {
						t.Error("payload in pieces")
					}
				}
				if given := bufs.chunk != chunk; given != (payload > copyLimit) {
					t.Errorf("payload %d: chunk given away: %v", payload, given)
				}
				pkt.DecRef()
				bufs.release()
			}
		}
	}
}

func TestChecksumCaught(t *testing.T) {
	for _, at := range []int{25, 60, 130, 900} {
		b := tcpPacket(false, 12, 1000)
		b[at] ^= 1
		var bufs rxBuffers
		iov := bufs.prepare()
		scatter(b, iov)
		var p rxPacket
		if v := parseHead(iov[0][:headSize], len(b), &p); v == rxDeliver && checksumValid(iov, len(b), &p) {
			t.Errorf("bit at %d was not noticed", at)
		}
		bufs.release()
	}
}

func TestVerdicts(t *testing.T) {
	udp := tcpPacket(false, 0, 10)
	udp[9] = 17
	other := tcpPacket(false, 0, 10)
	other[9] = 132
	short := tcpPacket(false, 0, 10)
	long := append(tcpPacket(false, 0, 10), 0)
	offset := tcpPacket(false, 0, 10)
	offset[32] = 0x40
	beyond := tcpPacket(false, 0, 0)
	beyond[32] = 0xf0
	v5 := tcpPacket(false, 0, 10)
	v5[0] = 0x55
	frag := tcpPacket(false, 0, 10)
	binary.BigEndian.PutUint16(frag[6:], 0x2000)
	for name, tc := range map[string]struct {
		b    []byte
		want verdict
	}{
		"udp": {udp, rxUDP}, "other": {other, rxNotTCP}, "short": {short[:40], rxMalformed}, "long": {long, rxMalformed},
		"empty":  {nil, rxMalformed},
		"offset": {offset, rxMalformed}, "offset beyond": {beyond, rxMalformed}, "version": {v5, rxMalformed},
		"fragment": {frag, rxDeliver},
	} {
		var p rxPacket
		if got := parseHead(tc.b[:min(len(tc.b), headSize)], len(tc.b), &p); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}

// Whatever comes out of a device, reading it does not crash the stack.
func FuzzReceive(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		f.Add(tcpPacket(v6, 12, 0))
		f.Add(tcpPacket(v6, 40, 200))
		f.Add(icmpError(tcpPacket(v6, 12, 0), refusal.HostUnreachable))
	}
	f.Add([]byte{0x45})
	for i, dst := range dnsServers {
		f.Add(udpPacket(netip.AddrPortFrom(families[i].client.Addr(), 4000), dst, []byte("query")))
	}
	a, b := memPair(1500, true)
	startStack(f, Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.3")},
		UplinkIsApp: true, OnFlow: func(fl *Flow) {
			fl.Refuse(refusal.HostUnreachable)
		}, OnDNS: func(q *DNSQuery) { q.Reply(q.Payload()) }})
	startStack(f, Config{App: b, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}})
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > 65535 {
			return
		}
		b.WritePacket(&tun.VNetHdr{Flags: tun.FlagDataValid}, [][]byte{packet})
	})
}

// Errors quote the SYN and carry right checksums; a rewritten one as well.
func TestICMPError(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		syn := tcpPacket(v6, 20, 0)
		for _, r := range []refusal.Way{refusal.HostUnreachable, refusal.NetUnreachable, refusal.AdminProhibited} {
			b := icmpError(syn, r)
			if !v6 {
				ip := header.IPv4(b)
				if !ip.IsValid(len(b)) || !ip.IsChecksumValid() {
					t.Errorf("%v: bad IPv4 header", r)
				}
				ic := header.ICMPv4(ip.Payload())
				if checksum.Checksum(ic, 0) != 0xffff || !bytes.Equal(ic[8:], syn) ||
					ip.DestinationAddress() != header.IPv4(syn).SourceAddress() {
					t.Errorf("%v: bad ICMP", r)
				}
				continue
			}
			check := func(what string) {
				ip := header.IPv6(b)
				ic := header.ICMPv6(ip.Payload())
				if !ip.IsValid(len(b)) ||
					header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: ic, Src: ip.SourceAddress(),
						Dst: ip.DestinationAddress()}) != ic.Checksum() || !bytes.Equal(ic[8:], syn) {
					t.Errorf("%v: bad ICMPv6 %s", r, what)
				}
			}
			check("as built")
			knownICMP6(b[:min(len(b), headSize)])
			check("as rewritten")
			if c := header.ICMPv6(b[40:]).Code(); c != header.ICMPv6NetworkUnreachable {
				t.Errorf("%v: code %d", r, c)
			}
		}
		if icmpError(syn, refusal.Reset) != nil || icmpError(syn, refusal.Silent) != nil ||
			icmpError(nil, refusal.HostUnreachable) != nil {
			t.Error("an error where none belongs")
		}
	}
}

func FuzzICMPError(f *testing.F) {
	f.Add(tcpPacket(false, 12, 0), uint8(1))
	f.Add(tcpPacket(true, 12, 0), uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, r uint8) {
		if len(b) > 120 || (len(b) > 0 && b[0]>>4 != 4 && len(b) < header.IPv6MinimumSize) {
			return // gVisor has parsed the SYN before
		}
		e := icmpError(b, refusal.Way(r))
		knownICMP6(e[:min(len(e), headSize)])
		knownICMP6(b)
	})
}

// sink is a device that keeps what is written.
type sink struct {
	memDevice
	packets [][]byte
	headers []tun.VNetHdr
}

func (s *sink) WritePacket(h *tun.VNetHdr, bufs [][]byte) error {
	s.packets = append(s.packets, bytes.Join(bufs, nil))
	s.headers = append(s.headers, *h)
	return nil
}

// The header says what is left to the kernel, for each kind of packet.
func TestTransmitHeader(t *testing.T) {
	for _, tc := range []struct {
		name    string
		payload int
		gso     stack.GSO
		want    tun.VNetHdr
	}{
		{"complete", 0, stack.GSO{}, tun.VNetHdr{}},
		{"ack", 0, stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1448},
			tun.VNetHdr{Flags: tun.FlagNeedsCSum, CSumStart: 20, CSumOffset: 16}},
		{"one segment", 1448, stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1448},
			tun.VNetHdr{Flags: tun.FlagNeedsCSum, CSumStart: 20, CSumOffset: 16}},
		{"super-packet", 1449, stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1448},
			tun.VNetHdr{Flags: tun.FlagNeedsCSum, GSOType: tun.GSOTCPv4, HdrLen: 52, GSOSize: 1448, CSumStart: 20,
				CSumOffset: 16}},
		{"super-packet v6", 3000, stack.GSO{Type: stack.GSOTCPv6, NeedsCsum: true, CsumOffset: 16, MSS: 1428},
			tun.VNetHdr{Flags: tun.FlagNeedsCSum, GSOType: tun.GSOTCPv6, HdrLen: 72, GSOSize: 1428, CSumStart: 40,
				CSumOffset: 16}},
	} {
		raw := tcpPacket(tc.want.CSumStart == 40, 12, tc.payload)
		pkt := outgoing(raw, tc.gso)
		var h tun.VNetHdr
		fillVNetHdr(&h, pkt)
		if h != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, &h, &tc.want)
		}
		if err := h.Validate(len(raw)); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		pkt.DecRef()
	}
}

// outgoing makes a packet as gVisor hands it to a link.
func outgoing(raw []byte, g stack.GSO) *stack.PacketBuffer {
	ipLen := 20
	if raw[0]>>4 == 6 {
		ipLen = 40
	}
	hdr := ipLen + int(raw[ipLen+12]>>4)*4
	data := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: hdr, Payload: rawBuffer(raw[hdr:])})
	copy(data.TransportHeader().Push(hdr-ipLen), raw[ipLen:])
	copy(data.NetworkHeader().Push(ipLen), raw)
	data.GSOOptions = g
	return data
}

// The queue keeps order, wakes the writer once, gives back what does not fit,
// and counts it.
func TestTransmitQueue(t *testing.T) {
	dev := &sink{}
	q := &txQueue{wake: make(chan struct{}, 1)}
	push := func(i int) int {
		p := outgoing(tcpPacket(false, 0, 4+i%7), stack.GSO{})
		defer p.DecRef()
		return q.push([]*stack.PacketBuffer{p})
	}
	for i := range 5 {
		push(i)
	}
	if len(q.wake) != 1 || q.idle() {
		t.Fatal("the writer was not woken")
	}
	<-q.wake
	q.drain(dev, false)
	if len(dev.packets) != 5 || !q.idle() {
		t.Fatalf("written %d", len(dev.packets))
	}
	for i, p := range dev.packets {
		if len(p) != 40+4+i%7 {
			t.Errorf("packet %d has %d bytes: order?", i, len(p))
		}
	}
	// The bound.
	for i := range txHardPackets + 3 {
		if want := i < txHardPackets; (push(i) == 1) != want {
			t.Fatalf("packet %d accepted: %v", i, !want)
		}
	}
	if n := q.dropped.Load(); n != 3 {
		t.Errorf("dropped %d", n)
	}
	q.close()
	if push(0) != 0 {
		t.Error("a closed queue takes packets")
	}
	if n := q.dropped.Load(); n != txHardPackets+4 {
		t.Errorf("dropped %d", n)
	}
}

// A queue that is full holds writers back before they enter gVisor.
func TestTransmitRoom(t *testing.T) {
	q := &txQueue{wake: make(chan struct{}, 1)}
	big := outgoing(tcpPacket(false, 0, 60000), stack.GSO{})
	defer big.DecRef()
	for !q.full.Load() {
		q.push([]*stack.PacketBuffer{big})
	}
	var h half
	h.arm()
	if !q.waitRoom(&h) {
		t.Fatal("room in a full queue")
	}
	done := make(chan struct{})
	go func() { h.sleep(); close(done) }()
	<-q.wake
	q.drain(&sink{}, false)
	<-done
	if q.waitRoom(&h) || q.full.Load() {
		t.Error("no room in an empty queue")
	}
	q.close()
}
