package tun

import (
	"fmt"
	"net/netip"
	"testing"
)

// BenchmarkWritePacket writes into a device whose kernel drops the packet (its UDP port is closed and ICMP goes back
// out at the device's end), in three pieces.
func BenchmarkWritePacket(b *testing.B) {
	for _, plain := range []bool{false, true} {
		b.Run(fmt.Sprintf("plain=%v", plain), func(b *testing.B) {
			l := openLab(b, Options{Plain: plain})
			p := l.makeUDP(pattern(1400), false)
			p[10] ^= 0xff // a wrong header checksum: dropped at once, so that our side is what is measured
			bufs := [][]byte{p[:28], p[28:500], p[500:]}
			var h VNetHdr
			b.ReportAllocs()
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if err := l.dev.WritePacket(&h, bufs); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkReadPacket reads what the kernel sends; sending is part of the time.
func BenchmarkReadPacket(b *testing.B) {
	for _, plain := range []bool{false, true} {
		b.Run(fmt.Sprintf("plain=%v", plain), func(b *testing.B) {
			l := openLab(b, Options{Plain: plain})
			c := l.kernelUDP(b)
			_, us := l.addrs()
			to := netip.AddrPortFrom(us, 6000)
			payload := pattern(1400)
			bufs := [][]byte{make([]byte, 128), make([]byte, MaxPacket)}
			var h VNetHdr
			b.ReportAllocs()
			b.SetBytes(1428)
			for b.Loop() {
				if _, err := c.WriteToUDPAddrPort(payload, to); err != nil {
					b.Fatal(err)
				}
				if _, err := l.dev.ReadPacket(&h, bufs); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestNoAllocations holds the promise that the benchmarks show.
func TestNoAllocations(t *testing.T) {
	for _, plain := range []bool{false, true} {
		l := openLab(t, Options{Plain: plain})
		c := l.kernelUDP(t)
		_, us := l.addrs()
		to := netip.AddrPortFrom(us, 6000)
		in := l.makeUDP(pattern(100), false)
		in[10] ^= 0xff
		bufs := [][]byte{make([]byte, 128), make([]byte, MaxPacket)}
		out := [][]byte{in[:28], in[28:]}
		payload := pattern(1000)
		var h VNetHdr
		n := testing.AllocsPerRun(200, func() {
			if _, err := c.WriteToUDPAddrPort(payload, to); err != nil {
				t.Fatal(err)
			}
			if _, err := l.dev.ReadPacket(&h, bufs); err != nil {
				t.Fatal(err)
			}
			h = VNetHdr{}
			if err := l.dev.WritePacket(&h, out); err != nil {
				t.Fatal(err)
			}
		})
		if n >= 1 {
			t.Errorf("plain %v: %v allocations per packet read and written", plain, n)
		}
	}
}
