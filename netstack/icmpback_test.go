package netstack

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// icmpAbout builds an ICMP error of the type from a router to src, about a TCP
// segment from src to dst, quoting its first eight bytes and more.
func icmpAbout(typ uint8, src, dst netip.AddrPort, quote int) []byte {
	s, _ := fromAddr(src.Addr())
	d, _ := fromAddr(dst.Addr())
	tcp := make([]byte, header.TCPMinimumSize)
	header.TCP(tcp).Encode(&header.TCPFields{SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: 7, DataOffset: 20,
		Flags: header.TCPFlagSyn})
	tcp = tcp[:quote]
	if src.Addr().Is4() {
		router, _ := fromAddr(netip.MustParseAddr("192.0.2.1"))
		b := make([]byte, 28+20+len(tcp))
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TOS: 0xc0, TotalLength: uint16(len(b)), TTL: 61, Protocol: 1, SrcAddr: router,
			DstAddr: s})
		h.SetChecksum(^h.CalculateChecksum())
		header.IPv4(b[28:]).Encode(&header.IPv4Fields{TotalLength: 1500, TTL: 60, Protocol: 6, SrcAddr: s, DstAddr: d})
		copy(b[48:], tcp)
		ic := header.ICMPv4(b[20:])
		ic.SetType(header.ICMPv4Type(typ))
		ic.SetChecksum(^checksum.Checksum(ic, 0))
		return b
	}
	router, _ := fromAddr(netip.MustParseAddr("2001:db8::1"))
	b := make([]byte, 48+40+len(tcp))
	h := header.IPv6(b)
	h.Encode(&header.IPv6Fields{PayloadLength: uint16(len(b) - 40), TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit: 61, SrcAddr: router, DstAddr: s})
	h.SetTOS(0xc0, 0x12345)
	header.IPv6(b[48:]).Encode(&header.IPv6Fields{PayloadLength: 1460, TransportProtocol: header.TCPProtocolNumber,
		HopLimit: 60, SrcAddr: s, DstAddr: d})
	copy(b[88:], tcp)
	ic := header.ICMPv6(b[40:])
	ic.SetType(header.ICMPv6Type(typ))
	ic.SetCode(header.ICMPv6AddressUnreachable)
	ic.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: ic, Src: router, Dst: s}))
	return b
}

var (
	pod4, pod6   = netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")
	peer4, peer6 = netip.MustParseAddr("10.2.0.2"), netip.MustParseAddr("fd00:2::2")
)

func podPeer(v6 bool, podPort, peerPort uint16) (pod, peer netip.AddrPort) {
	if v6 {
		return netip.AddrPortFrom(pod6, podPort), netip.AddrPortFrom(peer6, peerPort)
	}
	return netip.AddrPortFrom(pod4, podPort), netip.AddrPortFrom(peer4, peerPort)
}

// Every type, both directions of a connection, and each thing that makes a
// packet no error of the mesh's.
func TestHBONEError(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		types := map[uint8]bool{3: true, 11: true, 12: true, 0: false, 4: false, 5: false, 8: false, 255: false}
		inner := 28
		if v6 {
			types = map[uint8]bool{1: true, 2: true, 3: true, 4: true, 0: false, 5: false, 127: false, 128: false, 135: false,
				137: false}
			inner = 48
		}
		for typ, want := range types {
			for _, ports := range [][2]uint16{{MeshPortMin, hbonePort}, {65535, hbonePort}, {hbonePort, 40000},
				{hbonePort, hbonePort},
				{MeshPortMin - 1, hbonePort}, {MeshPortMin, 15006}, {0, 0}} {
				pod, peer := podPeer(v6, ports[0], ports[1])
				for _, quote := range []int{0, 2, 3, 4, 8, 20} {
					got, ok := hboneError(icmpAbout(typ, pod, peer, quote))
					if w := want && quote >= 4 && (ports[0] == hbonePort || ports[1] == hbonePort && ports[0] >= 61000); ok != w ||
						(ok && got != pod.Addr()) {
						t.Errorf("v6 %v, type %d, ports %v, quote %d: %v %v, want %v", v6, typ, ports, quote, got, ok, w)
					}
				}
			}
		}
		pod, peer := podPeer(v6, MeshPortMin+7, hbonePort)
		good := icmpAbout(1+2*b2u(!v6), pod, peer, 8)
		for n := range good {
			if _, ok := hboneError(good[:n]); ok != (n >= len(good)-4) {
				t.Errorf("v6 %v: cut to %d of %d: %v", v6, n, len(good), ok)
			}
		}
		type change struct {
			name string
			at   int
			to   byte
		}
		changes := []change{
			{"outer version", 0, 0x50}, {"quoted version", inner, 0x05},
		}
		if v6 {
			changes = append(changes, change{"hop-by-hop before", 6, 0}, change{"quoted UDP", inner + 6, 17},
				change{"quoted fragment", inner + 6, 44}, change{"another's source quoted", inner + 8 + 15, 9},
				change{"IPv4 quoted", inner, 0x45})
		} else {
			changes = append(changes, change{"header too short", 0, 0x44}, change{"header too long", 0, 0x4f},
				change{"UDP", 9, 17},
				change{"fragment", 6, 0x20}, change{"later fragment", 7, 1}, change{"quoted header too short", inner, 0x40},
				change{"quoted header too long", inner, 0x4f}, change{"quoted UDP", inner + 9, 17},
				change{"quoted later fragment", inner + 7, 1},
				change{"another's source quoted", inner + 12 + 3, 9}, change{"IPv6 quoted", inner, 0x65})
		}
		for _, c := range changes {
			b := bytes.Clone(good)
			b[c.at] = c.to
			if _, ok := hboneError(b); ok {
				t.Errorf("v6 %v: %s: taken", v6, c.name)
			}
		}
	}
	if _, ok := hboneError(nil); ok {
		t.Error("nothing was taken")
	}
}

func b2u(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// What the kernel gets is what came, but for the mark, the hop limit and, of
// IPv4, source and header checksum, also with options in the header.
func TestForKernel(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		pod, peer := podPeer(v6, MeshPortMin+7, hbonePort)
		was := icmpAbout(1+2*b2u(!v6), pod, peer, 20)
		b := bytes.Clone(was)
		forKernel(b)
		if v6 {
			h := header.IPv6(b)
			if tos, flow := h.TOS(); tos != ReturnTOS || flow != 0x12345 || h.HopLimit() != 1 {
				t.Errorf("tos %#x flow %#x hop limit %d", tos, flow, h.HopLimit())
			}
			copy(b[:4], was)
			b[7] = was[7]
			if !bytes.Equal(b, was) {
				t.Errorf("\n%x, was\n%x", b, was)
			}
			continue
		}
		withOptions := append(append(bytes.Clone(was[:20]), 1, 1, 1, 0), was[20:]...)
		withOptions[0]++
		for _, was := range [][]byte{was, withOptions} {
			b := bytes.Clone(was)
			forKernel(b)
			h := header.IPv4(b)
			if tos, _ := h.TOS(); tos != ReturnTOS || h.TTL() != 1 || !h.IsChecksumValid() ||
				h.SourceAddress() != h.DestinationAddress() {
				t.Errorf("%x", b)
			}
			if !bytes.Equal(b[16:], was[16:]) || !bytes.Equal(b[2:8], was[2:8]) || b[9] != was[9] {
				t.Errorf("\n%x, was\n%x", b, was)
			}
		}
	}
}

// On the uplink: errors about an attached pod's mesh connections come back out
// of the device, of any length; another's do not, nor errors about connections
// of the stacks, which fail the dial that they are about.
func TestGiveBack(t *testing.T) {
	nodeA, nodeB := memPair(1500, true)
	uplink := NewUplink(nodeA, nil, nil)
	done := make(chan error, 1)
	go func() { done <- uplink.Run(context.Background()) }()
	app, _ := memPair(1500, true)
	s := startStack(t, Config{Addrs: []netip.Addr{pod4, pod6}, App: app, Uplink: uplink, OnFlow: func(f *Flow) {
		f.Refuse(refusal.Reset)
	}})

	buf := make([]byte, 1<<16)
	var h tun.VNetHdr
	for _, v6 := range []bool{false, true} {
		pod, peer := podPeer(v6, hbonePort, 40000)
		stranger := netip.AddrPortFrom(peer.Addr(), hbonePort)
		for _, quote := range []int{4, 8, 20} {
			if err := nodeB.WritePacket(&tun.VNetHdr{}, [][]byte{icmpAbout(1+2*b2u(!v6), stranger, pod, quote)}); err != nil {
				t.Fatal(err)
			}
			in := icmpAbout(1+2*b2u(!v6), pod, peer, quote)
			if quote == 20 { // more than the head, as RFC 4443 wants it
				in = append(in, make([]byte, 1100)...)
				if v6 {
					header.IPv6(in).SetPayloadLength(uint16(len(in) - 40))
				} else {
					header.IPv4(in).SetTotalLength(uint16(len(in)))
				}
				in[len(in)-1] = 0xaa
			}
			want := bytes.Clone(in)
			forKernel(want)
			if err := nodeB.WritePacket(&tun.VNetHdr{}, [][]byte{in}); err != nil {
				t.Fatal(err)
			}
			n, err := nodeB.ReadPacket(&h, [][]byte{buf})
			if err != nil || !bytes.Equal(buf[:n], want) || h != (tun.VNetHdr{}) {
				t.Errorf("v6 %v, quote %d: %v %+v\n%x, want\n%x", v6, quote, err, h, buf[:n], want)
			}
		}
		// A dial of the stack's own: answered by an error that is delivered to it.
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		failed := make(chan error, 1)
		go func() {
			_, err := s.DialPlain(ctx, netip.AddrPortFrom(peer.Addr(), 80))
			failed <- err
		}()
		n, err := nodeB.ReadPacket(&h, [][]byte{buf})
		if err != nil {
			t.Fatal(err)
		}
		if err := nodeB.WritePacket(&tun.VNetHdr{},
			[][]byte{icmpError(bytes.Clone(buf[:n]), refusal.HostUnreachable)}); err != nil {
			t.Fatal(err)
		}
		if err := <-failed; err == nil || ctx.Err() != nil {
			t.Errorf("v6 %v: dial: %v", v6, err)
		}
		cancel()
	}
	if st := uplink.Stats(); st.RxReturned != 6 || st.RxUnknownDst != 6 {
		t.Errorf("%+v", st)
	}
	s.Close()
	uplink.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	nodeB.Close()
}

// Whatever comes: no panic, and what is taken has the form that it must have,
// and is no longer than it was, well-formed and not to be forwarded afterwards.
func FuzzHBONEError(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		pod, peer := podPeer(v6, MeshPortMin+7, hbonePort)
		f.Add(icmpAbout(1+2*b2u(!v6), pod, peer, 8))
		f.Add(icmpAbout(2+9*b2u(!v6), peer, pod, 20))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		head := b[:min(len(b), headSize)]
		pod, ok := hboneError(head)
		if !ok {
			return
		}
		was := bytes.Clone(b)
		forKernel(b)
		if again, ok := hboneError(b[:len(head)]); !ok || again != pod {
			t.Fatalf("%x became %x", was, b)
		}
		if pod.Is4() {
			if h := header.IPv4(b); h.TTL() != 1 || !h.IsChecksumValid() ||
				!bytes.Equal(b[h.HeaderLength():], was[h.HeaderLength():]) {
				t.Fatalf("%x became %x", was, b)
			}
		} else if h := header.IPv6(b); h.HopLimit() != 1 || !bytes.Equal(b[8:], was[8:]) {
			t.Fatalf("%x became %x", was, b)
		}
	})
}
