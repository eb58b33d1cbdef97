package netstack

import (
	"context"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// firstFragment is the first part of a packet from a random neighbour that no other part follows.
func firstFragment(dst netip.Addr, id int) []byte {
	payload := make([]byte, 1400)
	if dst.Is4() {
		b := append(make([]byte, header.IPv4MinimumSize), payload...)
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), ID: uint16(id), Flags: header.IPv4FlagMoreFragments, TTL: 64,
			Protocol: uint8(header.TCPProtocolNumber)})
		copy(b[12:], []byte{10, 9, byte(id >> 8), byte(id)})
		copy(b[16:], dst.AsSlice())
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		return b
	}
	b := make([]byte, header.IPv6MinimumSize+8, header.IPv6MinimumSize+8+len(payload))
	b[0], b[6], b[7] = 0x60, uint8(header.IPv6FragmentExtHdrIdentifier), 64
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	src := netip.MustParseAddr("fd09::1").As16()
	binary.BigEndian.PutUint16(src[14:], uint16(id))
	copy(b[8:], src[:])
	copy(b[24:], dst.AsSlice())
	b[40], b[43] = uint8(header.TCPProtocolNumber), 1 // offset 0, more to come
	binary.BigEndian.PutUint32(b[44:], uint32(id))
	return append(b, payload...)
}

// TestFragmentBudget: first fragments to one pod stop being put aside at its bound, in both families; another pod's
// still are; and in all, whatever the number of pods, no more than a few thousand a minute.
func TestFragmentBudget(t *testing.T) {
	nodeA, nodeB := memPair(1500, true)
	uplink := NewUplink(nodeA, nil, nil)
	done := make(chan error, 1)
	go func() { done <- uplink.Run(context.Background()) }()
	other := netip.MustParseAddr("10.1.0.3")
	var stacks []*Stack
	for _, addrs := range [][]netip.Addr{{pod4, pod6}, {other}} {
		app, _ := memPair(1500, true)
		stacks = append(stacks, startStack(t, Config{Addrs: addrs, App: app, Uplink: uplink, OnFlow: func(f *Flow) {
			f.Refuse(refusal.Reset)
		}}))
	}
	flood := func(dst netip.Addr, n int) (over int) {
		t.Helper()
		before := uplink.Stats()
		for i := range n {
			if err := nodeB.WritePacket(&tun.VNetHdr{}, [][]byte{firstFragment(dst, i)}); err != nil {
				t.Fatal(err)
			}
		}
		// A packet is counted as read before it is judged; when the next one is read it has been.
		if err := nodeB.WritePacket(&tun.VNetHdr{}, [][]byte{make([]byte, header.IPv4MinimumSize)}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "all read", func() bool { return uplink.Stats().RxPackets == before.RxPackets+uint64(n)+1 })
		return int(uplink.Stats().RxOverFragments - before.RxOverFragments)
	}
	for _, dst := range []netip.Addr{pod4, pod6} {
		start := time.Now()
		over := flood(dst, 500)
		least := 500 - podFragmentsBurst - int(podFragments*time.Since(start).Seconds()) - 2
		if over < least || over > 500-podFragmentsBurst {
			t.Errorf("%v: %d of 500 were turned away, want %d to %d", dst, over, least, 500-podFragmentsBurst)
		}
	}
	if over := flood(other, podFragmentsBurst); over != 0 {
		t.Errorf("%d of another pod's first %d were turned away", over, podFragmentsBurst)
	}
	for _, s := range stacks {
		s.Close()
	}
	uplink.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	nodeB.Close()

	for _, c := range []struct {
		name string
		ext  []byte // extension headers; the first's kind is hop by hop
		part bool
	}{
		{"options alone", []byte{6, 0, 1, 4, 0, 0, 0, 0}, false},
		{"a fragment behind options", []byte{60, 0, 1, 4, 0, 0, 0, 0, 44, 0, 1, 4, 0, 0, 0, 0}, true},
		{"options longer than what is looked at", []byte{60, 40, 1, 4, 0, 0, 0, 0}, true},
	} {
		b := firstFragment(pod6, 1)[:header.IPv6MinimumSize]
		b[6] = uint8(header.IPv6HopByHopOptionsExtHdrIdentifier)
		b = append(append(b, c.ext...), make([]byte, 600)...)
		header.IPv6(b).SetPayloadLength(uint16(len(b) - header.IPv6MinimumSize))
		var p rxPacket
		if v := parseHead(b[:headSize], len(b), &p); v != rxDeliver || p.part != c.part {
			t.Errorf("%s: verdict %v, a fragment: %v", c.name, v, p.part)
		}
	}

	b := newFragmentBudget()
	now := time.Unix(1e9, 0)
	allowed := 0
	for i := range 60_000 {
		pod := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) // each packet another pod
		if b.allow(pod, now) {
			allowed++
		}
		now = now.Add(time.Millisecond)
	}
	if most := fragmentsBurst + 60*fragmentsPerS; allowed > most || allowed < most-fragmentsPerS {
		t.Errorf("%d fragments in a minute, want %d", allowed, most)
	}
}
