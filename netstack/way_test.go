package netstack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/tun"
)

// fakeWay keeps what is sent.
type fakeWay struct {
	sent   chan Datagram
	refuse error
	closed chan struct{}
}

func newFakeWay() *fakeWay {
	return &fakeWay{sent: make(chan Datagram, 16), closed: make(chan struct{})}
}

func (w *fakeWay) Send(d Datagram) error {
	if w.refuse != nil {
		return w.refuse
	}
	d.Payload = bytes.Clone(d.Payload)
	w.sent <- d
	return nil
}

func (w *fakeWay) Close() { close(w.closed) }

func (w *fakeWay) next(t *testing.T) Datagram {
	t.Helper()
	select {
	case d := <-w.sent:
		return d
	case <-time.After(patience):
		t.Fatal("nothing was sent")
		return Datagram{}
	}
}

// What the pod sends goes to the Way as datagrams: whole, in pieces, put together from fragments, pings.
func TestWaySends(t *testing.T) {
	w := newFakeWay()
	app, pod := memPair(1500, true)
	s := startStack(t, Config{App: app, Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()},
		Datagrams: &Datagrams{Way: w}})
	for _, f := range families {
		src, dst := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
		v6 := src.Addr().Is6()
		for _, n := range []int{0, 1, 90, 101, 1400} {
			data := bytes.Repeat([]byte{byte(n)}, n)
			b := udpPacket(src, dst, data)
			if v6 {
				b[7] = 9
			} else {
				b[8] = 9
				b[6] |= 0x40 // DF
			}
			pod.inject(b)
			if got := w.next(t); got.Pod != src || got.Peer != dst || got.TTL != 9 || !got.DF || got.Echo || got.Segment != 0 ||
				!bytes.Equal(got.Payload, data) {
				t.Errorf("%d bytes: %+v", n, got)
			}
		}
		data := make([]byte, 5000)
		for i := range data {
			data[i] = byte(i * 7)
		}
		at := 20
		if v6 {
			at = 40
		}
		pod.WritePacket(&tun.VNetHdr{Flags: tun.FlagNeedsCSum, GSOType: tun.GSOUDPL4, GSOSize: 1000, HdrLen: uint16(at + 8),
			CSumStart: uint16(at), CSumOffset: 6},
			[][]byte{udpPacket(src, dst, data)})
		if got := w.next(t); got.Segment != 1000 || !bytes.Equal(got.Payload, data) {
			t.Errorf("a super-packet: %d bytes in pieces of %d", len(got.Payload), got.Segment)
		}
		for _, p := range cut(udpPacket(src, dst, data), 7) {
			pod.inject(p)
		}
		if got := w.next(t); got.Segment != 0 || got.DF || !bytes.Equal(got.Payload, data) || got.Pod != src ||
			got.Peer != dst {
			t.Errorf("fragments: %d bytes, %+v", len(got.Payload), got.Pod)
		}
		ping := echo(src.Addr(), dst.Addr(), 77, false)
		pod.inject(ping)
		if got := w.next(t); !got.Echo || got.Pod.Port() != 77 || got.Peer != netip.AddrPortFrom(dst.Addr(), 0) ||
			!bytes.Equal(got.Payload, ping[at:]) {
			t.Errorf("%+v", got)
		}
		pod.inject(udpPacket(netip.AddrPortFrom(dst.Addr(), 1), dst, nil)) // in another's name
	}
	eventually(t, "foreign", func() bool { return s.Stats().Foreign == 2 })
	w.refuse = errors.New("no room")
	pod.inject(udpPacket(netip.AddrPortFrom(families[0].client.Addr(), 1), netip.AddrPortFrom(families[0].server.Addr(),
		1), nil))
	eventually(t, "counted", func() bool { return s.Stats().DatagramsFull == 1 })
	if n := len(w.sent); n != 0 {
		t.Errorf("%d datagrams too many", n)
	}
	s.Close()
	<-w.closed
}

// What a Way receives becomes packets: whole, a super-packet, fragments, pings' answers and errors; what belongs to
// no flow does not.
func TestWayDelivers(t *testing.T) {
	w := newFakeWay()
	app, pod := memPair(1500, true)
	s := startStack(t, Config{App: app, Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()},
		Datagrams: &Datagrams{
			Way: w, Allow: func(f DatagramFlow) bool { return !f.Inbound },
		}})
	next := func() memPacket {
		t.Helper()
		select {
		case p := <-pod.in:
			return p
		case <-time.After(patience):
			t.Fatalf("nothing came: %+v", s.Stats())
			return memPacket{}
		}
	}
	for _, f := range families {
		mine, peer := netip.AddrPortFrom(f.client.Addr(), 5000), netip.AddrPortFrom(f.server.Addr(), 6000)
		at := 20
		if mine.Addr().Is6() {
			at = 40
		}
		sent := udpPacket(mine, peer, []byte("x"))
		s.DeliverDatagram(Datagram{Pod: mine, Peer: peer, Payload: []byte("unasked")})
		s.DeliverFailure(DatagramFailure{Pod: mine, Peer: peer, Type: 3, Code: 3})
		pod.inject(sent)
		w.next(t)
		for _, n := range []int{0, 1, 1200} {
			data := bytes.Repeat([]byte{7}, n)
			s.DeliverDatagram(Datagram{Pod: mine, Peer: peer, Payload: data})
			p := next()
			fillSum(p.b, &p.h)
			if !bytes.Equal(p.b, udpPacket(peer, mine, data)) || p.h.GSO() {
				t.Errorf("%d bytes: % x, %v", n, p.b[:at+8], &p.h)
			}
		}
		data := bytes.Repeat([]byte("0123456789"), 500)
		s.DeliverDatagram(Datagram{Pod: mine, Peer: peer, Payload: data, Segment: 1000})
		for i := range 5 { // this device takes no super-packets of UDP
			if p := next(); !p.h.IsZero() || len(p.b) != at+8+1000 || !bytes.Equal(p.b[at+8:], data[1000*i:1000*i+1000]) {
				t.Errorf("piece %d: %v, %d bytes", i, &p.h, len(p.b))
			}
		}
		s.DeliverDatagram(Datagram{Pod: mine, Peer: peer, Payload: data})
		var got int
		for n := 0; got < len(data)+8; n++ {
			p := next()
			v := see(p.b[:min(len(p.b), headSize)])
			if len(p.b) > 1500 || !v.part || (n == 0) != (v.kind == sightUDP) {
				t.Fatalf("fragment %d: %d bytes, %+v", n, len(p.b), v)
			}
			got += len(p.b) - at
			if at == 40 {
				got -= 8
			}
		}
		ping := echo(mine.Addr(), peer.Addr(), 77, false)
		pod.inject(ping)
		w.next(t)
		reply := echo(peer.Addr(), mine.Addr(), 77, true)
		s.DeliverDatagram(Datagram{Echo: true, Pod: netip.AddrPortFrom(mine.Addr(), 77),
			Peer: netip.AddrPortFrom(peer.Addr(), 0), Payload: reply[at:]})
		if p := next(); !bytes.Equal(p.b, reply) {
			t.Errorf("% x, want % x", p.b, reply)
		}
		router := []netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("fd00:9::9")}[at/40]
		for _, fl := range []DatagramFailure{
			{Pod: mine, Peer: peer, From: router, Type: 11}, {Pod: mine, Peer: peer, Type: 3, Code: 4, MTU: 1400},
			{Echo: true, Pod: netip.AddrPortFrom(mine.Addr(), 77), Peer: netip.AddrPortFrom(peer.Addr(), 0), From: router,
				Type: 11},
		} {
			if at == 40 {
				fl.Type = map[uint8]uint8{11: 3, 3: 2}[fl.Type]
			}
			s.DeliverFailure(fl)
			p := next()
			v := see(p.b)
			want := sight{kind: sightError, quotedSrc: fl.Pod, quotedDst: fl.Peer}
			from := fl.From
			if !from.IsValid() {
				from = peer.Addr()
			}
			mtu := int(binary.BigEndian.Uint16(p.b[at+6:]))
			if v.kind != want.kind || v.quotedSrc != want.quotedSrc || v.quotedDst != want.quotedDst || v.src.Addr() != from ||
				p.b[at] != fl.Type || p.b[at+1] != fl.Code || mtu != fl.MTU {
				t.Errorf("%+v became %+v (% x)", fl, v, p.b)
			}
			again := bytes.Clone(p.b)
			fillEchoSum(again, at)
			if at == 20 && header.IPv4(again).CalculateChecksum() != 0xffff {
				t.Error("the IP header's checksum is wrong")
			}
			if !bytes.Equal(again, p.b) {
				t.Error("the checksum is wrong")
			}
		}
	}
	if n := len(pod.in); n != 0 {
		t.Errorf("%d packets too many", n)
	}
	if st := s.Stats(); st.DatagramsDenied != 2 || st.DatagramsStray != 2 || st.DatagramFlows != 4 {
		t.Errorf("%+v", st)
	}
}

// An uplink and a Way exclude each other, and one of them is needed.
func TestWayConfig(t *testing.T) {
	app, _ := memPair(1500, true)
	up := NewUplink(app, nil, nil)
	defer up.Close()
	for i, c := range []Config{{Datagrams: &Datagrams{}}, {Datagrams: &Datagrams{Way: newFakeWay()}, Uplink: up}} {
		c.App, c.Addrs, c.OnFlow = app, []netip.Addr{families[0].client.Addr()}, func(*Flow) {}
		if _, err := New(c); err == nil {
			t.Error(fmt.Sprint(i), "is taken")
		}
	}
}
