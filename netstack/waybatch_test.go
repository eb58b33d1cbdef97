package netstack

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"ztun/tun"
)

// gate is a Way that waits in each Send until it is let go on, so that what a pod sends meanwhile is there at once.
type gate struct {
	*fakeWay
	open chan struct{}
}

func (g gate) Send(d Datagram) error {
	err := g.fakeWay.Send(d)
	<-g.open
	return err
}

// Datagrams of one size, from one socket to one peer, that are there already leave together and in order; whatever is
// different leaves in its turn, and nothing waits for what is not there.
func TestWayBatches(t *testing.T) {
	for _, f := range families {
		pod, peer := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
		other := netip.AddrPortFrom(pod.Addr(), 5001)
		udp := func(src netip.AddrPort, n int, fill byte) []byte {
			return udpPacket(src, peer, bytes.Repeat([]byte{fill}, n))
		}
		hops := func(b []byte) []byte {
			if b[0]>>4 == 6 {
				b[7]++
			} else {
				b[8]++
			}
			return b
		}
		for _, c := range []struct {
			name string
			sent [][]byte
			want string // bytes*datagrams of each Send; of one datagram its bytes alone
		}{
			{"alike", slices.Repeat([][]byte{udp(pod, 100, 1)}, 5), "100*5"},
			{"more than a kernel takes", slices.Repeat([][]byte{udp(pod, 10, 1)}, 70), "10*64 10*6"},
			{"more than a packet holds", slices.Repeat([][]byte{udp(pod, 1400, 1)}, 50), "1400*46 1400*4"},
			{"a shorter one ends it", [][]byte{udp(pod, 9, 1), udp(pod, 9, 2), udp(pod, 4, 3), udp(pod, 4, 4)}, "9*3 4"},
			{"a longer one begins anew", [][]byte{udp(pod, 9, 1), udp(pod, 10, 2), udp(pod, 10, 3)}, "9 10*2"},
			{"of two sockets", [][]byte{udp(pod, 9, 1), udp(other, 9, 2), udp(pod, 9, 3)}, "9 9 9"},
			{"another hop limit", [][]byte{udp(pod, 9, 1), udp(pod, 9, 2), hops(udp(pod, 9, 3))}, "9*2 9"},
			{"empty ones", [][]byte{udp(pod, 9, 1), udp(pod, 0, 0), udp(pod, 0, 0), udp(pod, 9, 2)}, "9 0 0 9"},
			{"a ping between", [][]byte{udp(pod, 9, 1), echo(pod.Addr(), peer.Addr(), 7, false), udp(pod, 9, 2)}, "9 12 9"},
			{"something else between", [][]byte{udp(pod, 9, 1), make([]byte, 20), udp(pod, 9, 2)}, "9 9"},
			{"in fragments", append([][]byte{udp(pod, 9, 1)}, append(cut(udp(pod, 5000, 2), 7), udp(pod, 9, 3))...), "9 5000 9"},
		} {
			t.Run(f.name+", "+c.name, func(t *testing.T) {
				w := gate{newFakeWay(), make(chan struct{})}
				app, dev := memPair(1500, true)
				s := startStack(t, Config{App: app, Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()},
					Datagrams: &Datagrams{Way: w}})
				dev.inject(udp(netip.AddrPortFrom(pod.Addr(), 4999), 1, 0))
				if d := w.next(t); d.Segment != 0 || len(d.Payload) != 1 {
					t.Errorf("one alone: %+v", d)
				}
				var data, got []byte
				for _, b := range c.sent {
					dev.inject(b)
					if v := see(b); v.kind == sightUDP && !v.part {
						data = append(data, b[v.l4+8:]...)
					}
				}
				close(w.open)
				text := ""
				for len(text) < len(c.want) {
					d := w.next(t)
					one, n := len(d.Payload), 1
					if d.Segment != 0 {
						one, n = d.Segment, (len(d.Payload)+d.Segment-1)/d.Segment
					}
					if text != "" {
						text += " "
					}
					if text += fmt.Sprint(one); n > 1 {
						text += fmt.Sprintf("*%d", n)
					}
					if !d.Echo && one < 5000 {
						got = append(got, d.Payload...)
					}
				}
				if text != c.want || !bytes.Equal(got, data) {
					t.Errorf("sent as %s, want %s; the same bytes: %v", text, c.want, bytes.Equal(got, data))
				}
				s.Close()
			})
		}
	}
}

// A batch that the Way refuses is counted as what it is made of.
func TestWayBatchRefused(t *testing.T) {
	w := gate{newFakeWay(), make(chan struct{})}
	app, dev := memPair(1500, true)
	f := families[0]
	s := startStack(t, Config{App: app, Addrs: []netip.Addr{f.client.Addr()}, Datagrams: &Datagrams{Way: w}})
	b := udpPacket(netip.AddrPortFrom(f.client.Addr(), 5000), f.server, []byte("x"))
	dev.inject(b)
	w.next(t)
	for range 9 {
		dev.inject(b)
	}
	w.refuse = errors.New("no room")
	close(w.open)
	eventually(t, "nine are counted", func() bool { return s.Stats().DatagramsFull == 9 })
	s.Close()
}

// A device that has to be waited for has its datagrams sent one by one.
func TestWayWithoutTry(t *testing.T) {
	w := newFakeWay()
	app, dev := memPair(1500, true)
	f := families[0]
	startStack(t, Config{App: struct{ tun.Device }{app}, Addrs: []netip.Addr{f.client.Addr()},
		Datagrams: &Datagrams{Way: w}})
	b := udpPacket(netip.AddrPortFrom(f.client.Addr(), 5000), f.server, []byte("x"))
	for range 3 {
		dev.inject(b)
	}
	for range 3 {
		if d := w.next(t); d.Segment != 0 || string(d.Payload) != "x" {
			t.Errorf("%+v", d)
		}
	}
}
