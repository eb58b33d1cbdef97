package tun

import (
	"bytes"
	"testing"
)

func TestVNetHdrCodec(t *testing.T) {
	b := []byte{0x01, 0x81, 0x36, 0x00, 0xb4, 0x05, 0x14, 0x00, 0x10, 0x02}
	want := VNetHdr{Flags: FlagNeedsCSum, GSOType: GSOTCPv4 | GSOECN, HdrLen: 54, GSOSize: 1460, CSumStart: 20,
		CSumOffset: 0x210}
	var h VNetHdr
	if err := h.Decode(b); err != nil || h != want {
		t.Errorf("Decode: %v, %v", &h, err)
	}
	out := make([]byte, VNetHdrLen+2)
	out[10] = 7
	h.Encode(out)
	if !bytes.Equal(out[:VNetHdrLen], b) || out[10] != 7 {
		t.Errorf("Encode: %x", out)
	}
	if err := h.Decode(b[:9]); err == nil || h != want {
		t.Errorf("a short header: %v, %v", err, &h)
	}
	if h.IsZero() || !(&VNetHdr{}).IsZero() || !h.GSO() || (&VNetHdr{Flags: FlagNeedsCSum}).GSO() {
		t.Error("IsZero or GSO is wrong")
	}
}

func TestVNetHdrValidate(t *testing.T) {
	tcp := VNetHdr{Flags: FlagNeedsCSum, GSOType: GSOTCPv4, HdrLen: 40, GSOSize: 1460, CSumStart: 20, CSumOffset: 16}
	edit := func(f func(h *VNetHdr)) VNetHdr { h := tcp; f(&h); return h }
	for _, c := range []struct {
		name string
		h    VNetHdr
		n    int
		want error
	}{
		{"zero", VNetHdr{}, 0, nil},
		{"checksum at the very end", VNetHdr{Flags: FlagNeedsCSum, CSumStart: 20, CSumOffset: 6}, 28, nil},
		{"checksum outside by one", VNetHdr{Flags: FlagNeedsCSum, CSumStart: 20, CSumOffset: 6}, 27, errHdrCSum},
		{"checksum offsets that wrap", VNetHdr{Flags: FlagNeedsCSum, CSumStart: 0xffff, CSumOffset: 0xffff}, 1500,
			errHdrCSum},
		{"offsets without meaning", VNetHdr{CSumStart: 0xffff, HdrLen: 0xffff, GSOSize: 1}, 20, nil},
		{"unknown flag", VNetHdr{Flags: 0x80}, 20, nil},
		{"TCP", tcp, 10000, nil},
		{"TCP with ECN", edit(func(h *VNetHdr) { h.GSOType |= GSOECN }), 10000, nil},
		{"UDP with ECN", edit(func(h *VNetHdr) { h.GSOType = GSOUDPL4 | GSOECN }), 10000, errHdrType},
		{"ECN alone", VNetHdr{GSOType: GSOECN}, 100, errHdrType},
		{"UFO, long gone", edit(func(h *VNetHdr) { h.GSOType = 3 }), 10000, errHdrType},
		{"no segment size", edit(func(h *VNetHdr) { h.GSOSize = 0 }), 10000, errHdrGSOSize},
		{"no checksum start", edit(func(h *VNetHdr) { h.Flags = 0 }), 10000, errHdrGSONoSum},
		{"header longer than packet", tcp, 39, errHdrLen},
		{"header before transport", edit(func(h *VNetHdr) { h.HdrLen = 19 }), 10000, errHdrLen},
	} {
		if err := c.h.Validate(c.n); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func TestVNetHdrFix(t *testing.T) {
	packet := make([]byte, 3000)
	packet[20+12] = 0x80 // a TCP header of 32 bytes at 20
	split := func(at ...int) (bufs [][]byte) {
		last := 0
		for _, a := range at {
			bufs = append(bufs, packet[last:a])
			last = a
		}
		return append(bufs, packet[last:])
	}
	for _, bufs := range [][][]byte{split(), split(128), split(32), split(33), split(0, 0, 10, 10, 32, 33)} {
		h := VNetHdr{GSOType: GSOTCPv4, HdrLen: 1500, CSumStart: 20}
		if err := h.Fix(len(packet), bufs); err != nil || h.HdrLen != 52 {
			t.Errorf("%d buffers: %v, %v", len(bufs), &h, err)
		}
	}
	for _, c := range []struct {
		name string
		h    VNetHdr
		n    int
		want uint16
		err  error
	}{
		{"UDP", VNetHdr{GSOType: GSOUDPL4, HdrLen: 1500, CSumStart: 40}, 3000, 48, nil},
		{"no super-packet", VNetHdr{HdrLen: 1500, CSumStart: 20}, 3000, 1500, nil},
		{"TCP header of 0", VNetHdr{GSOType: GSOTCPv6, HdrLen: 1, CSumStart: 100}, 3000, 1, errHdrTCP},
		{"data offset beyond the packet", VNetHdr{GSOType: GSOTCPv4, HdrLen: 1, CSumStart: 20}, 32, 1, errHdrLen},
		{"header beyond the packet", VNetHdr{GSOType: GSOTCPv4, HdrLen: 1, CSumStart: 20}, 51, 1, errHdrLen},
		{"start at the end of numbers", VNetHdr{GSOType: GSOUDPL4, HdrLen: 1, CSumStart: 0xffff}, 0xffff, 1, errHdrLen},
	} {
		h := c.h
		if err := h.Fix(c.n, [][]byte{packet}); err != c.err || h.HdrLen != c.want {
			t.Errorf("%s: %v, %v", c.name, &h, err)
		}
	}
}

// FuzzVNetHdr: whatever the kernel, or a bug, puts in front of a packet: decoding never panics, what is accepted lies
// within the packet, and encoding gives the same bytes back.
func FuzzVNetHdr(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add(make([]byte, VNetHdrLen), uint16(1))
	for _, kind := range []uint8{GSOTCPv4, GSOTCPv6, GSOUDPL4} {
		f.Add(probePacket(kind), uint16(30))
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		var h VNetHdr
		if err := h.Decode(b); err != nil {
			if len(b) >= VNetHdrLen || !h.IsZero() {
				t.Fatalf("%d bytes: %v, %v", len(b), err, &h)
			}
			return
		}
		out := make([]byte, VNetHdrLen)
		h.Encode(out)
		if !bytes.Equal(out, b[:VNetHdrLen]) {
			t.Fatalf("%x became %x", b[:VNetHdrLen], out)
		}
		packet := b[VNetHdrLen:]
		n := len(packet)
		at := min(int(cut), n)
		before := h
		if err := h.Fix(n, [][]byte{packet[:at], packet[at:]}); err != nil {
			if h != before {
				t.Fatalf("Fix failed and changed %v to %v", &before, &h)
			}
		} else if h.GSO() && (h.GSOType&^GSOECN == GSOTCPv4 || h.GSOType&^GSOECN == GSOTCPv6 ||
			h.GSOType&^GSOECN == GSOUDPL4) &&
			(int(h.HdrLen) > n || h.HdrLen < h.CSumStart) {
			t.Fatalf("Fix made %v for a packet of %d bytes", &h, n)
		}
		whole := before
		if errA, errB := whole.Fix(n, [][]byte{packet}), h; errA == nil && whole != errB {
			t.Fatalf("Fix depends on where the buffers are cut: %v, %v", &whole, &h)
		}
		if h.Validate(n) != nil {
			return
		}
		if h.Flags&FlagNeedsCSum != 0 && int(h.CSumStart)+int(h.CSumOffset)+2 > n {
			t.Fatalf("accepted %v for %d bytes", &h, n)
		}
		if h.GSO() && (h.GSOSize == 0 || int(h.HdrLen) > n || h.HdrLen < h.CSumStart) {
			t.Fatalf("accepted %v for %d bytes", &h, n)
		}
	})
}
