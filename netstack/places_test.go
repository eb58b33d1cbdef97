package netstack

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"ztun/proxy/refusal"
)

// wire is the far end of a stack's device in the hands of the test.
type wire struct {
	t   testing.TB
	dev *memDevice
}

// newWire gives a stack for the pod 10.1.0.2, fd00:1::2, and the other end of its device.
func newWire(t testing.TB, cfg Config) (*Stack, wire) {
	dev, far := memPair(1500, false)
	cfg.App, cfg.Addrs = dev, []netip.Addr{families[0].client.Addr(), families[1].client.Addr()}
	return startStack(t, cfg), wire{t, far}
}

// send sends a TCP packet without data.
func (w wire) send(src, dst netip.AddrPort, flags header.TCPFlags, seq, ack uint32) {
	w.dev.inject(bareTCP(src, dst, &header.TCPFields{SeqNum: seq, AckNum: ack, Flags: flags, WindowSize: 65000}, nil))
}

// syn asks for a connection.
func (w wire) syn(src, dst string, seq uint32) {
	w.send(netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst), header.TCPFlagSyn, seq, 0)
}

// next is the next TCP packet that the stack sends within d, nil if there is none.
func (w wire) next(d time.Duration) (src, dst netip.AddrPort, th header.TCP) {
	w.t.Helper()
	buf := make([]byte, 1<<16)
	end := time.After(d)
	for {
		select {
		case <-end:
			return src, dst, nil
		case p := <-w.dev.in:
			b := buf[:copy(buf, p.b)]
			var pk rxPacket
			if parseHead(b[:min(len(b), headSize)], len(b), &pk) != rxDeliver || !pk.tcp {
				continue
			}
			th = header.TCP(b[pk.ipLen:])
			if b[0]>>4 == 4 {
				h := header.IPv4(b)
				return addrPort(h.SourceAddress(), th.SourcePort()), addrPort(h.DestinationAddress(), th.DestinationPort()), th
			}
			h := header.IPv6(b)
			return addrPort(h.SourceAddress(), th.SourcePort()), addrPort(h.DestinationAddress(), th.DestinationPort()), th
		}
	}
}

// hang is an OnFlow that waits for answers which never come, except from the given destinations, which are refused at
// once. What is evicted ends.
func hang(stop <-chan struct{}, live ...string) func(*Flow) {
	answers := map[netip.AddrPort]bool{}
	for _, l := range live {
		answers[netip.MustParseAddrPort(l)] = true
	}
	return func(f *Flow) {
		if answers[f.Dst()] {
			f.Refuse(refusal.Reset)
			return
		}
		gone := make(chan struct{})
		f.OnGone(func() { close(gone) })
		select {
		case <-gone:
		case <-stop:
		}
		f.Refuse(refusal.Reset) // which nobody is to see of what is gone
	}
}

// More connects than there are places to destinations that do not answer, one each: one that answers has its answer
// at once, be it new or known. At the bound somebody is told.
func TestDeadDestinations(t *testing.T) {
	stop := make(chan struct{})
	var mu sync.Mutex
	bounded := map[bool]int{}
	s, w := newWire(t, Config{MaxInFlight: 64, OnFlow: hang(stop, "10.8.0.1:80", "10.8.0.2:80"),
		OnBound: func(resource, source string, evicted bool) {
			mu.Lock()
			defer mu.Unlock()
			if _, err := netip.ParseAddrPort(source); err != nil || resource != "connects" {
				t.Errorf("bounded: %q of %q", resource, source)
			}
			bounded[evicted]++
		}})
	defer close(stop)
	answered := func(what, src, dst string) {
		t.Helper()
		w.syn(src, dst, 1)
		for {
			from, _, th := w.next(patience) // the SYN is not sent again
			if th == nil {
				t.Fatalf("%s: no answer", what)
			}
			if from.String() == dst {
				return
			}
		}
	}
	port := 1000
	dead := func(n int) {
		for range n {
			port++
			w.syn(fmt.Sprintf("10.1.0.2:%d", port), fmt.Sprintf("10.9.%d.%d:80", port/250, port%250+1), 1)
		}
	}
	answered("calm", "10.1.0.2:500", "10.8.0.1:80")
	dead(200)
	eventually(t, "bound", func() bool { return s.Stats().InFlight == 32 })
	for i := range 20 {
		answered("known", fmt.Sprintf("10.1.0.2:%d", 501+i), "10.8.0.1:80")
		dead(2)
	}
	answered("new", "10.1.0.2:600", "10.8.0.2:80")
	if st := s.Stats(); st.Over != 0 || st.Evicted < 200 {
		t.Errorf("over %d, evicted %d", st.Over, st.Evicted)
	}
	mu.Lock()
	if bounded[true] < 200 || bounded[false] != 0 {
		t.Errorf("told of %v", bounded)
	}
	mu.Unlock()
	if held := s.flows.opened.known.Used() + s.flows.opened.strange.Used(); held > 64 {
		t.Errorf("%d places", held)
	}
}

// A destination that has answered keeps its places however many others do not answer: it is not counted among them.
func TestKnownKeepsPlaces(t *testing.T) {
	stop, release := make(chan struct{}), make(chan struct{})
	busy := netip.MustParseAddrPort("10.8.0.1:80")
	var later atomic.Bool
	var answer atomic.Uint32 // Reset
	held := hang(stop)
	s, w := newWire(t, Config{MaxInFlight: 64, OnFlow: func(f *Flow) {
		if f.Dst() != busy {
			held(f)
			return
		}
		if later.Load() {
			<-release
		}
		f.Refuse(refusal.Way(answer.Load()))
	}})
	defer close(stop)
	known := func() bool {
		p := s.flows.opened
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.answered.has(busy, time.Now())
	}
	for port := 500; !known(); port-- { // an answer makes it known if it is prompt, which depends on the machine
		w.syn(fmt.Sprintf("10.1.0.2:%d", port), busy.String(), 1)
		if _, _, th := w.next(patience); th == nil {
			t.Fatal("no answer")
		}
	}
	later.Store(true)
	for i := range 20 {
		w.syn(fmt.Sprintf("10.1.0.2:%d", 501+i), busy.String(), 1)
	}
	for i := range 200 {
		w.syn(fmt.Sprintf("10.1.0.2:%d", 1001+i), fmt.Sprintf("10.9.0.%d:80", 1+i), 1)
	}
	eventually(t, "bound", func() bool { return s.Stats().Evicted >= 168 && s.Stats().InFlight == 52 })
	close(release)
	for range 20 {
		if from, _, th := w.next(patience); th == nil || from != busy {
			t.Fatalf("answer from %v, want %v", from, busy)
		}
	}
	// One that falls silent is none of the known any more.
	if !known() {
		t.Error("a destination that answered is not known")
	}
	answer.Store(uint32(refusal.Silent))
	w.syn("10.1.0.2:600", busy.String(), 1)
	eventually(t, "unknown", func() bool { return !known() })
}

// The places of either direction are its own, and a client that does not end its handshake loses its place after a
// while, or at once to others when there is none left.
func TestHandshakeBounds(t *testing.T) {
	errs := make(chan error, 100)
	s, w := newWire(t, Config{MaxInFlight: 16, UplinkIsApp: true, OnFlow: func(f *Flow) {
		if !f.Inbound() {
			f.Refuse(refusal.Reset)
			return
		}
		c, err := f.Accept()
		if err == nil {
			c.Close()
		}
		errs <- err
	}})
	s.handshakePatience = time.Minute // read by flows that come later; nobody is to lose it here
	for i := range 40 {
		w.syn(fmt.Sprintf("192.0.2.%d:4000", 1+i), "10.1.0.2:8080", 1)
	}
	for range 32 { // half of the places are for those who are known
		if err := <-errs; !errors.Is(err, errEvicted) {
			t.Errorf("evicted: %v", err)
		}
	}
	eventually(t, "bound", func() bool { return s.Stats().InFlight == 8 })
	// The other direction has its places.
	w.syn("10.1.0.2:500", "192.0.2.1:80", 1)
	for {
		from, _, th := w.next(patience)
		if th == nil {
			t.Fatal("no answer for the pod itself")
		}
		if from.Port() == 80 {
			break
		}
	}
	// Whoever answers gets in.
	client, server := netip.MustParseAddrPort("192.0.2.200:4000"), netip.MustParseAddrPort("10.1.0.2:8080")
	w.send(client, server, header.TCPFlagSyn, 7, 0)
	for {
		_, to, th := w.next(patience)
		if th == nil {
			t.Fatal("no SYN-ACK")
		}
		if to == client && th.Flags() == header.TCPFlagSyn|header.TCPFlagAck {
			w.send(client, server, header.TCPFlagAck, 8, th.SequenceNumber()+1)
			break
		}
	}
	var evicted, accepted int
	for range 2 {
		switch err := <-errs; {
		case err == nil:
			accepted++
		case errors.Is(err, errEvicted):
			evicted++
		default:
			t.Error(err)
		}
	}
	if evicted != 1 || accepted != 1 {
		t.Errorf("%d evicted, %d accepted", evicted, accepted)
	}
	if p := netip.AddrPortFrom(client.Addr(), 0); !s.flows.arriving.answered.has(p, time.Now()) {
		t.Error("a client that ended its handshake is not known")
	}
}

func TestHandshakePatience(t *testing.T) {
	errs := make(chan error, 1)
	s, w := newWire(t, Config{UplinkIsApp: true, OnFlow: func(f *Flow) {
		_, err := f.Accept()
		errs <- err
	}})
	s.handshakePatience = 50 * time.Millisecond // read by flows that come later
	w.syn("192.0.2.1:4000", "10.1.0.2:8080", 1)
	select {
	case err := <-errs:
		if !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("accept: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the handshake is still awaited")
	}
	eventually(t, "nothing left over", func() bool {
		st := s.Stats()
		return st.InFlight == 0 && st.AcceptFailed == 1 && s.app.gs.Stats().TCP.CurrentConnected.Value() == 0 &&
			len(s.app.gs.RegisteredEndpoints()) == 0
	})
}

// The pod speaks in its own name only, to the network and to name servers, and nobody but the network speaks to the
// pod.
func TestForeignSource(t *testing.T) {
	for _, steered := range []bool{false, true} {
		got := make(chan *Flow, 10)
		queries := make(chan *DNSQuery, 10)
		s, w := newWire(t, Config{UplinkIsApp: steered, OnDNS: func(q *DNSQuery) { queries <- q },
			OnFlow: func(f *Flow) { got <- f; f.Refuse(refusal.Silent) }})
		w.syn("10.1.0.3:1", "10.2.0.3:80", 1)
		w.syn("[fd00:1::3]:1", "[fd00:2::3]:80", 1)
		w.syn("[fe80::1]:1", "[fd00:2::3]:80", 1)
		w.dev.inject(udpPacket(netip.MustParseAddrPort("10.1.0.3:1"), dnsServers[0], []byte("q")))
		w.dev.inject(udpPacket(netip.MustParseAddrPort("[fd00:1::3]:1"), dnsServers[1], []byte("q")))
		want := uint64(5)
		if !steered {
			w.syn("192.0.2.1:1", "10.1.0.2:80", 1)
			want++
		}
		eventually(t, "foreign", func() bool { return s.Stats().Foreign == want })
		w.syn("10.1.0.2:1", "10.2.0.3:80", 1)
		w.syn("[fd00:1::2]:1", "[fd00:2::3]:80", 1)
		w.dev.inject(udpPacket(netip.MustParseAddrPort("10.1.0.2:1"), dnsServers[0], []byte("q")))
		for range 2 {
			if f := <-got; !s.isOwn(f.Src().Addr()) {
				t.Errorf("a flow from %v", f.Src())
			}
		}
		if q := <-queries; !s.isOwn(q.Src().Addr()) {
			t.Errorf("a query from %v", q.Src())
		}
		if n := s.Stats().Foreign; n != want {
			t.Errorf("%d foreign, want %d", n, want)
		}
		if from, _, th := w.next(20 * time.Millisecond); th != nil {
			t.Errorf("an answer from %v", from)
		}
	}
}

// Queries beyond a pod's rate are dropped by the reader, in one piece or in several, and told of; TCP is not touched
// by that.
func TestDNSRate(t *testing.T) {
	var mu sync.Mutex
	asked, told := 0, 0
	s, w := newWire(t, Config{DNSRate: 10, OnDNS: func(q *DNSQuery) {
		mu.Lock()
		defer mu.Unlock()
		asked++
	}, OnBound: func(resource, source string, evicted bool) {
		mu.Lock()
		defer mu.Unlock()
		if told++; resource != "DNS queries" || evicted {
			t.Errorf("%s of %s, evicted %v", resource, source, evicted)
		}
	}})
	pod := netip.MustParseAddrPort("10.1.0.2:4000")
	begin := time.Now()
	for range 300 {
		w.dev.inject(udpPacket(pod, dnsServers[0], []byte("q")))
		for _, part := range fragments(udpPacket(pod, dnsServers[0], make([]byte, 64))) {
			w.dev.inject(part)
		}
	}
	w.syn("10.1.0.2:1", "10.2.0.3:80", 1)
	if _, _, th := w.next(patience); th == nil {
		t.Fatal("no answer to a connect")
	}
	eventually(t, "no query in flight", func() bool { return s.Stats().DNSInFlight == 0 })
	mu.Lock()
	defer mu.Unlock()
	if most := 20 + int(10*time.Since(begin).Seconds()) + 1; asked > most || asked < 5 {
		t.Errorf("%d queries taken, at most %d", asked, most)
	}
	if st := s.Stats(); int(st.DNSOver) != told || told < 800 {
		t.Errorf("over %d, told of %d", st.DNSOver, told)
	}
}

// fragments cuts an IPv4 packet in two.
func fragments(b []byte) (parts [][]byte) {
	const cut = header.IPv4MinimumSize + 40
	for i, p := range [][]byte{b[header.IPv4MinimumSize:cut], b[cut:]} {
		f := append(append([]byte{}, b[:header.IPv4MinimumSize]...), p...)
		h := header.IPv4(f)
		h.SetTotalLength(uint16(len(f)))
		h.SetID(7)
		h.SetFlagsFragmentOffset(uint8(1-i), uint16(i)*40)
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		parts = append(parts, f)
	}
	return parts
}

// A SYN that comes again after it was turned down takes no place from anybody: a dead destination is tried once, not
// once per retransmission.
func TestAgainTakesNobodysPlace(t *testing.T) {
	stop := make(chan struct{})
	s, w := newWire(t, Config{MaxInFlight: 8, OnFlow: func(f *Flow) {
		gone := make(chan struct{})
		f.OnGone(func() { close(gone) })
		select {
		case <-gone:
		case <-stop:
		}
		f.Refuse(refusal.Silent)
	}})
	defer close(stop)
	syn := func(i int) { w.syn(fmt.Sprintf("10.1.0.2:%d", 1000+i), fmt.Sprintf("10.9.0.%d:80", 1+i), 7) }
	for i := range 5 {
		syn(i)
	}
	eventually(t, "bound", func() bool {
		s.flows.mu.Lock()
		noted := len(s.flows.unanswered.young)
		s.flows.mu.Unlock()
		st := s.Stats()
		return noted == 1 && st.Evicted == 1 && st.InFlight == 4 && st.Flows == 5
	})
	syn(0)
	eventually(t, "the retransmission", func() bool { st := s.Stats(); return st.Over > 0 || st.Evicted > 1 })
	if st := s.Stats(); st.Evicted != 1 || st.Over != 1 || st.InFlight != 4 || st.Flows != 5 {
		t.Errorf("evicted %d, over %d, in flight %d of %d flows; want 1, 1, 4 of 5", st.Evicted, st.Over, st.InFlight,
			st.Flows)
	}
	// A new attempt from the same port is one.
	w.syn("10.1.0.2:1000", "10.9.0.1:80", 8)
	eventually(t, "new attempt", func() bool { st := s.Stats(); return st.Evicted == 2 && st.Flows == 6 })
}
