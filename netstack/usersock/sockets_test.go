package usersock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"ztun/tun/tuntest/nslab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a set of sockets and what came by it.
type world struct {
	t *testing.T
	*Sockets
	in  chan Datagram
	bad chan Failure
}

func newWorld(t *testing.T, o Options) *world {
	w := &world{t: t, in: make(chan Datagram, 1024), bad: make(chan Failure, 1024)}
	o.Deliver = func(d Datagram) { d.Payload = bytes.Clone(d.Payload); w.in <- d }
	o.Fail = func(f Failure) { w.bad <- f }
	w.Sockets = New(o)
	t.Cleanup(w.Close)
	return w
}

func (w *world) send(d Datagram) {
	w.t.Helper()
	if err := w.Send(d); err != nil {
		w.t.Fatal(err)
	}
}

func next[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("nothing came in 20 s")
		panic("")
	}
}

// listen is a UDP server on loopback.
func listen(t *testing.T, addr string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func receive(t *testing.T, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n]), from
}

var families = []struct {
	name, lo, pod string
}{{"v4", "127.0.0.1:0", "10.1.0.2:5000"}, {"v6", "[::1]:0", "[fd00:1::2]:5000"}}

// One port of the pod's is one port outside, whoever it speaks to (REQ-1); whom it has spoken to may answer, from any
// port (REQ-8), and nobody else.
func TestMapping(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			w := newWorld(t, Options{})
			pod := netip.MustParseAddrPort(f.pod)
			one, at1 := listen(t, f.lo)
			two, at2 := listen(t, f.lo)
			w.send(Datagram{Pod: pod, Peer: at1, Payload: []byte("to one")})
			w.send(Datagram{Pod: pod, Peer: at2, Payload: []byte("to two")})
			got1, from1 := receive(t, one)
			got2, from2 := receive(t, two)
			if got1 != "to one" || got2 != "to two" || from1 != from2 {
				t.Errorf("%q from %v, %q from %v", got1, from1, got2, from2)
			}
			w.send(Datagram{Pod: netip.AddrPortFrom(pod.Addr(), 5001), Peer: at1, Payload: []byte("of another port")})
			if _, from := receive(t, one); from == from1 {
				t.Error("two ports of the pod's are one outside")
			}
			third, at3 := listen(t, f.lo)
			for c, at := range map[*net.UDPConn]netip.AddrPort{one: at1, third: at3} {
				c.WriteToUDPAddrPort([]byte("back"), from1)
				if d := next(t, w.in); d.Pod != pod || d.Peer != at || string(d.Payload) != "back" || d.Echo {
					t.Errorf("%+v", d)
				}
			}
			if f.name == "v4" { // another address of loopback's is another peer
				stranger, _ := listen(t, "127.0.0.2:0")
				stranger.WriteToUDPAddrPort([]byte("unasked"), from1)
				for end := time.Now().Add(20 * time.Second); w.Stats().Filtered == 0 &&
					time.Now().Before(end); time.Sleep(time.Millisecond) {
				}
				if st := w.Stats(); st.Filtered != 1 || len(w.in) != 0 {
					t.Errorf("%+v", st)
				}
			}
			if st := w.Stats(); st.Sockets != 2 || st.Opened != 2 || st.Sent != 3 || st.Received != 2 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// An ICMP error comes to who has sent, and ends nothing (REQ-12).
func TestErrors(t *testing.T) {
	for i, f := range families {
		t.Run(f.name, func(t *testing.T) {
			w := newWorld(t, Options{})
			pod := netip.MustParseAddrPort(f.pod)
			c, at := listen(t, f.lo)
			c.Close()
			open, there := listen(t, f.lo)
			for range 3 {
				w.send(Datagram{Pod: pod, Peer: at, Payload: []byte("x")})
				got := next(t, w.bad)
				want := []Failure{{Type: 3, Code: 3}, {Type: 1, Code: 4}}[i]
				want.Pod, want.Peer, want.From = pod, at, at.Addr()
				if got != want {
					t.Errorf("%+v, want %+v", got, want)
				}
				w.send(Datagram{Pod: pod, Peer: there, Payload: []byte("y")})
				if got, _ := receive(t, open); got != "y" {
					t.Errorf("%q", got)
				}
			}
			if st := w.Stats(); st.Sockets != 1 || st.Failures != 3 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// Datagrams of one size go together and come together, or one by one where the kernel does not do it.
func TestSegments(t *testing.T) {
	for _, plain := range []bool{false, true} {
		for _, f := range families {
			w := newWorld(t, Options{})
			pod := netip.MustParseAddrPort(f.pod)
			c, at := listen(t, f.lo)
			w.send(Datagram{Pod: pod, Peer: at, Payload: []byte("x")})
			_, from := receive(t, c)
			if plain {
				w.by[key{false, pod}].oneByOne = 1
			}
			data := make([]byte, 10_300)
			for i := range data {
				data[i] = byte(i * 7)
			}
			w.send(Datagram{Pod: pod, Peer: at, Payload: data, Segment: 1000})
			var got []byte
			for i := range 11 {
				piece, _ := receive(t, c)
				if want := min(1000, len(data)-1000*i); len(piece) != want {
					t.Errorf("piece %d has %d bytes, want %d", i, len(piece), want)
				}
				got = append(got, piece...)
			}
			if !bytes.Equal(got, data) {
				t.Error("other bytes")
			}
			// Back, by another set of sockets as the peer.
			oob := appendControl(nil, unix.SOL_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint16(nil, 1000))
			if _, _, err := c.WriteMsgUDPAddrPort(data, oob, from); err != nil {
				t.Fatal(err)
			}
			got = nil
			reads := 0
			for len(got) < len(data) {
				d := next(t, w.in)
				if len(d.Payload) > 1000 && d.Segment != 1000 {
					t.Errorf("%d bytes in pieces of %d", len(d.Payload), d.Segment)
				}
				got = append(got, d.Payload...)
				reads++
			}
			if !bytes.Equal(got, data) {
				t.Error("other bytes came back")
			}
			t.Logf("%s, plain %v: back in %d reads", f.name, plain, reads)
		}
	}
}

// What is there already, from one peer and of one size, is delivered together; whatever is different in its turn.
func TestJoins(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			in, open := make(chan Datagram, 64), make(chan struct{})
			w := New(Options{Deliver: func(d Datagram) { d.Payload = bytes.Clone(d.Payload); in <- d; <-open }})
			defer w.Close()
			pod := netip.MustParseAddrPort(f.pod)
			one, at1 := listen(t, f.lo)
			two, at2 := listen(t, f.lo)
			for _, at := range []netip.AddrPort{at1, at2} {
				if err := w.Send(Datagram{Pod: pod, Peer: at, Payload: []byte("x")}); err != nil {
					t.Fatal(err)
				}
			}
			_, from := receive(t, one)
			sent := 0
			say := func(c *net.UDPConn, sizes ...int) {
				t.Helper()
				sent += len(sizes)
				for _, n := range sizes {
					if _, err := c.WriteToUDPAddrPort(bytes.Repeat([]byte{byte(n)}, n), from); err != nil {
						t.Fatal(err)
					}
				}
			}
			say(one, 1)
			if d := next(t, in); d.Segment != 0 || len(d.Payload) != 1 {
				t.Errorf("one alone: %+v", d)
			}
			say(one, slices.Repeat([]int{1400}, 50)...)
			say(one, 100, 100, 100, 40, 40, 50) // a shorter one ends them
			say(two, 50, 50)
			say(one, 0, 0, 50)
			say(one, slices.Repeat([]int{10}, maxSegments+1)...)
			say(one, 1400)
			oob := appendControl(nil, unix.SOL_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint16(nil, 1400))
			if _, _, err := one.WriteMsgUDPAddrPort(make([]byte, 3000), oob, from); err != nil { // comes as one
				t.Fatal(err)
			}
			say(one, 1400)
			close(open)
			for _, want := range []Datagram{
				{Segment: 1400, Payload: make([]byte, 46*1400)}, {Segment: 1400, Payload: make([]byte, 4*1400+100)},
				{Segment: 100, Payload: make([]byte, 240)}, {Payload: make([]byte, 40)}, {Payload: make([]byte, 50)},
				{Peer: at2, Segment: 50, Payload: make([]byte, 100)}, {}, {}, {Segment: 50, Payload: make([]byte, 60)},
				{Segment: 10, Payload: make([]byte, 10*maxSegments)}, {Segment: 1400, Payload: make([]byte, 4400)},
				{Payload: make([]byte, 1400)},
			} {
				if !want.Peer.IsValid() {
					want.Peer = at1
				}
				got := next(t, in)
				if got.Peer != want.Peer || got.Segment != want.Segment || len(got.Payload) != len(want.Payload) {
					t.Errorf("%d bytes in pieces of %d from %v, want %d, %d, %v", len(got.Payload), got.Segment, got.Peer,
						len(want.Payload), want.Segment, want.Peer)
				}
				for b := got.Payload; len(b) > 0 && len(got.Payload) < 1400; {
					n := len(b)
					if got.Segment != 0 {
						n = min(n, got.Segment)
					}
					if b[0] != byte(n) || b[n-1] != byte(n) {
						t.Errorf("a piece of %d bytes is of a datagram of %d", n, b[0])
					}
					b = b[n:]
				}
			}
			if n := int(w.Stats().Received); n != sent+3 {
				t.Errorf("%d datagrams are counted, %d came", n, sent+3)
			}
		})
	}
}

// The hop limit is the pod's.
func TestTTL(t *testing.T) {
	w := newWorld(t, Options{})
	c, at := listen(t, "127.0.0.1:0")
	p := ipv4.NewPacketConn(c)
	if err := p.SetControlMessage(ipv4.FlagTTL, true); err != nil {
		t.Fatal(err)
	}
	for _, ttl := range []uint8{1, 7, 255} {
		w.send(Datagram{Pod: netip.MustParseAddrPort("10.1.0.2:1"), Peer: at, Payload: []byte("x"), TTL: ttl})
		_, cm, _, err := p.ReadFrom(make([]byte, 10))
		if err != nil || cm.TTL != int(ttl) {
			t.Errorf("%v, %v, want %d", cm, err, ttl)
		}
	}
}

// In a namespace of its own: pings where the host allows them, and a datagram that is too large for its path.
func TestNamespace(t *testing.T) {
	ns := nslab.New(t)
	ns.IP(t, "link", "set", "lo", "mtu", "1400", "up")
	echo := func(id uint16, v6 bool) []byte {
		b := []byte{8, 0, 0, 0, 0, 0, 0, 1, 'd', 'a', 't', 'a'}
		if v6 {
			b[0] = 128
		}
		binary.BigEndian.PutUint16(b[4:], id)
		return b
	}
	do := func(what string, f func() error) {
		t.Helper()
		if err := ns.Do(f); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	w := newWorld(t, Options{})
	pod, lo := netip.MustParseAddrPort("10.1.0.2:77"), netip.MustParseAddrPort("127.0.0.1:0")
	do("range", func() error { return writeFile("/proc/sys/net/ipv4/ping_group_range", "1 0") })
	do("a ping that is not allowed", func() error {
		if err := w.Send(Datagram{Echo: true, Pod: pod, Peer: lo, Payload: echo(77, false)}); !errors.Is(err, ErrNoPing) {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if got, want := next(t, w.bad), (Failure{Echo: true, Pod: pod, Peer: lo, Type: 3, Code: 13, Seq: 1}); got != want {
		t.Errorf("the pod is told %+v, want %+v", got, want)
	}
	do("range", func() error { return writeFile("/proc/sys/net/ipv4/ping_group_range", "0 2147483647") })
	for _, p := range []Datagram{
		{Echo: true, Pod: pod, Peer: lo, Payload: echo(77, false)},
		{Echo: true, Pod: netip.MustParseAddrPort("[fd00:1::2]:78"), Peer: netip.MustParseAddrPort("[::1]:0"),
			Payload: echo(78, true)},
	} {
		do("ping", func() error { return w.Send(p) })
		got := next(t, w.in)
		if want := p.Payload[0] + 129 - 128; !got.Echo || got.Pod != p.Pod || got.Peer != p.Peer || got.Payload[0] != 0 &&
			got.Payload[0] != want ||
			binary.BigEndian.Uint16(got.Payload[4:]) != p.Pod.Port() || !bytes.Equal(got.Payload[6:], p.Payload[6:]) {
			t.Errorf("%+v", got)
		}
	}
	for _, peer := range []string{"127.0.0.1:9", "[::1]:9"} {
		to := netip.MustParseAddrPort(peer)
		from := netip.MustParseAddrPort("10.1.0.2:78")
		want := Failure{Type: 3, Code: 4, MTU: 1400}
		if to.Addr().Is6() {
			from, want = netip.MustParseAddrPort("[fd00:1::2]:78"), Failure{Type: 2, MTU: 1400}
		}
		want.Pod, want.Peer = from, to
		do("too large", func() error {
			if err := w.Send(Datagram{Pod: from, Peer: to, Payload: make([]byte, 1450), DF: true}); !errors.Is(err,
				unix.EMSGSIZE) {
				return fmt.Errorf("%v", err)
			}
			return nil
		})
		if got := next(t, w.bad); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		do("in fragments", func() error { return w.Send(Datagram{Pod: from, Peer: to, Payload: make([]byte, 1450)}) })
		if got := next(t, w.bad); got.Type == want.Type && got.Code == want.Code {
			t.Errorf("%+v", got)
		}
		// Several of which each is too large go one by one, in fragments, too; smaller ones go together all the same.
		var c *net.UDPConn
		do("a server", func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.Addr(), 0)))
			return err
		})
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		to = c.LocalAddr().(*net.UDPAddr).AddrPort()
		for _, size := range []int{1450, 100} {
			do("several", func() error {
				return w.Send(Datagram{Pod: from, Peer: to, Payload: make([]byte, 3*size-1), Segment: size})
			})
			for i := range 3 {
				if got, _ := receive(t, c); len(got) != size-i/2 {
					t.Errorf("datagram %d of %d bytes each: %d bytes", i, size, len(got))
				}
			}
			if at := w.by[key{pod: from}].oneByOne; at != 1450 {
				t.Errorf("after %d bytes: those of %d are not sent together any more, want 1450", size, at)
			}
		}
		do("several that are too large", func() error {
			err := w.Send(Datagram{Pod: from, Peer: to, Payload: make([]byte, 3007), Segment: 1500, DF: true})
			if !errors.Is(err, unix.EMSGSIZE) {
				return fmt.Errorf("%v", err)
			}
			return nil
		})
		// The last is not: a probe of the path does not take what follows it with it.
		if got, _ := receive(t, c); len(got) != 7 {
			t.Errorf("%d bytes came, want the 7 of the shorter one", len(got))
		}
		if want.Peer = to; next(t, w.bad) != want {
			t.Errorf("want %+v", want)
		}
	}
}

// A mapping whose buffer is full hears of an error alone, after which Go's poller refuses to wait: what arrives later
// is read all the same. What fills the buffer waits for a neighbour that does not answer.
func TestErrorBesideFullBuffer(t *testing.T) {
	ns, net2 := nslab.New(t), nslab.New(t)
	nslab.Join(t, ns, net2, "eth0")
	ns.IP(t, "addr", "add", "192.0.2.1/24", "dev", "eth0")
	net2.IP(t, "addr", "add", "192.0.2.2/24", "dev", "eth0")
	var there *net.UDPConn
	if err := net2.Do(func() (err error) { there, err = net.ListenUDP("udp", nil); return err }); err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	there.SetReadDeadline(time.Now().Add(60 * time.Second))
	w := newWorld(t, Options{})
	pod := netip.MustParseAddrPort("10.1.0.2:79")
	send := func(to string, d Datagram) (err error) {
		d.Pod, d.Peer = pod, netip.MustParseAddrPort(to)
		if e := ns.Do(func() error { err = w.Send(d); return nil }); e != nil {
			t.Fatal(e)
		}
		return err
	}
	for name, value := range map[string]string{"mcast_solicit": "5", "unres_qlen_bytes": "10000000"} {
		file := "/proc/sys/net/ipv4/neigh/eth0/" + name
		if err := ns.Do(func() error { return writeFile(file, value) }); err != nil {
			t.Fatal(err)
		}
	}
	at := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.2"), there.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	answered := func() {
		t.Helper()
		for end := time.Now().Add(60 * time.Second); send(at.String(), Datagram{Payload: []byte("x")}) != nil; {
			if time.Now().After(end) {
				t.Fatal("the socket's buffer is full for ever")
			}
			time.Sleep(10 * time.Millisecond)
		}
		_, from := receive(t, there)
		there.WriteToUDPAddrPort([]byte("back"), from)
		if d := next(t, w.in); string(d.Payload) != "back" {
			t.Errorf("%+v", d)
		}
	}
	answered()
	time.Sleep(10 * time.Millisecond) // the reader waits
	full := false
	for i := 0; i < 100 && !full; i++ {
		full = errors.Is(send("192.0.2.9:9", Datagram{Payload: make([]byte, 20000)}), unix.EAGAIN)
	}
	if !full {
		t.Fatal("the socket's buffer takes all")
	}
	if err := send("192.0.2.9:9", Datagram{Payload: make([]byte, 1600), DF: true}); !errors.Is(err, unix.EMSGSIZE) {
		t.Fatal(err)
	}
	if got := next(t, w.bad); got.Type != 3 || got.Code != 4 {
		t.Errorf("%+v", got)
	}
	answered()
}

// At the bound the peer with the most mappings loses its oldest; what is refused is an error; and mappings end with
// their time.
func TestBounds(t *testing.T) {
	var mu sync.Mutex
	turned := map[string]int{}
	w := newWorld(t, Options{MaxSockets: 10, Turned: func(peer netip.Addr, evicted bool) {
		mu.Lock()
		defer mu.Unlock()
		turned[fmt.Sprint(peer, " ", evicted)]++
	}})
	_, at1 := listen(t, "127.0.0.1:0")
	_, at2 := listen(t, "127.0.0.2:0")
	pod := func(port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr("10.1.0.2"), uint16(port))
	}
	for i := range 12 {
		w.send(Datagram{Pod: pod(1000 + i), Peer: at1, Payload: []byte("x")})
	}
	for i := range 3 {
		w.send(Datagram{Pod: pod(2000 + i), Peer: at2, Payload: []byte("x")})
	}
	if st := w.Stats(); st.Sockets != 10 || st.Evicted != 5 || turned["127.0.0.1 true"] != 5 || len(turned) != 1 {
		t.Errorf("%+v, %v", st, turned)
	}
	for at := tick; at <= udpLife+2*tick; at += tick {
		if at == udpLife {
			w.send(Datagram{Pod: pod(2000), Peer: at2, Payload: []byte("kept")})
		}
		w.sweep()
	}
	if st := w.Stats(); st.Sockets != 1 || st.Ended != 9 || w.places.Used() != 1 {
		t.Errorf("%+v, %d places", st, w.places.Used())
	}
	c := w.by[key{false, pod(2000)}]
	for i := range maxPeers + 100 {
		c.spoke(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1)
	}
	if len(c.peers) != maxPeers {
		t.Errorf("%d peers", len(c.peers))
	}
	w.Close()
	if err := w.Send(Datagram{Pod: pod(1), Peer: at1}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	for _, d := range []Datagram{{}, {Pod: pod(1)}, {Pod: pod(1), Peer: netip.MustParseAddrPort("[::1]:1")},
		{Echo: true, Pod: pod(1), Peer: at1, Payload: []byte("short")}} {
		if err := w.Send(d); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%+v: %v", d, err)
		}
	}
}

// Mappings are made, used, evicted and closed at the same time.
func TestStress(t *testing.T) {
	w := New(Options{Deliver: func(Datagram) {}, Fail: func(Failure) {}, MaxSockets: 8})
	c, at := listen(t, "127.0.0.1:0")
	go func() {
		b := make([]byte, 100)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 {
				_ = w.Send(Datagram{Pod: netip.AddrPortFrom(netip.MustParseAddr("10.1.0.2"), uint16(1+(g*7+i)%16)), Peer: at,
					Payload: []byte("x")})
				if i%100 == 0 {
					w.sweep()
				}
			}
		})
	}
	wg.Wait()
	w.Close()
	if st := w.Stats(); st.Sockets != 0 || w.places.Used() != 0 {
		t.Errorf("%+v, %d places", st, w.places.Used())
	}
}

func writeFile(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }

// A published port lets in whoever speaks to it, who is answered from it; the pod's own calls from that port leave by
// it, too; a client on loopback is another one to the pod. It is none of the bounded, and is there until Close.
func TestPublish(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			w := newWorld(t, Options{MaxSockets: 1})
			pod := netip.MustParseAddrPort(f.pod)
			client, at := listen(t, f.lo)
			local := map[bool]netip.Addr{true: netip.MustParseAddr("192.0.0.8"),
				false: netip.MustParseAddr("64:ff9b::c000:8")}[pod.Addr().Is4()]
			if err := w.Publish(Published{At: netip.MustParseAddrPort(f.lo), Pod: pod, Local: local}); err != nil {
				t.Fatal(err)
			}
			var where netip.AddrPort
			w.by[key{pod: pod}].rc.Control(func(fd uintptr) {
				switch name, _ := unix.Getsockname(int(fd)); a := name.(type) {
				case *unix.SockaddrInet4:
					where = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
				case *unix.SockaddrInet6:
					where = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
				}
			})
			if err := w.Publish(Published{At: at, Pod: netip.AddrPortFrom(pod.Addr(), 1)}); !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("at a port that is another's: %v", err)
			}
			client.WriteToUDPAddrPort([]byte("unasked"), where)
			d := next(t, w.in)
			if d.Pod != pod || d.Peer != netip.AddrPortFrom(local, at.Port()) || string(d.Payload) != "unasked" {
				t.Fatalf("%+v", d)
			}
			w.send(Datagram{Pod: pod, Peer: d.Peer, Payload: []byte("answer")})
			if got, from := receive(t, client); got != "answer" || from != where {
				t.Errorf("%q from %v, want it from %v", got, from, where)
			}
			other, at2 := listen(t, f.lo)
			w.send(Datagram{Pod: pod, Peer: at2, Payload: []byte("call")})
			if got, from := receive(t, other); got != "call" || from != where {
				t.Errorf("%q from %v, want it from %v", got, from, where)
			}
			// A mapping of the bounded one takes none of it, and time does not end it.
			w.send(Datagram{Pod: netip.AddrPortFrom(pod.Addr(), 5001), Peer: at2, Payload: []byte("bounded")})
			receive(t, other)
			for range 100 {
				w.sweep()
			}
			client.WriteToUDPAddrPort([]byte("later"), where)
			if d := next(t, w.in); string(d.Payload) != "later" {
				t.Errorf("%+v", d)
			}
			if st := w.Stats(); st.Sockets != 1 || st.Ended != 1 || st.Evicted+st.Refused+st.Filtered != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}
