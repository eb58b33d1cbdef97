package netstack

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/proxy/refusal"
	"ztun/tun"
)

const (
	fSYN = header.TCPFlagSyn
	fACK = header.TCPFlagAck
	fRST = header.TCPFlagRst
	fFIN = header.TCPFlagFin
)

// TestTrack follows connections segment by segment.
func TestTrack(t *testing.T) {
	type step struct {
		way   int
		seq   uint32
		ack   uint32
		flags header.TCPFlags
		size  int
		want  news
		moved int
	}
	var c, s uint32 = 0xfffffff0, 500 // sequence numbers wrap
	open := []step{
		{back, s, c + 1, fSYN | fACK, 0, newAnswer, 0},
		{forth, c + 1, s + 1, fACK, 0, newStanding, 0},
	}
	with := func(more ...step) []step { return append(append([]step{}, open...), more...) }
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"bytes count when they are acknowledged, once", with(
			step{forth, c + 1, s + 1, fACK, 1000, nothingNew, 0},
			step{forth, c + 1, s + 1, fACK, 1000, nothingNew, 0},
			step{back, s + 1, c + 501, fACK, 0, nothingNew, 500},
			step{back, s + 1, c + 501, fACK, 0, nothingNew, 0},
			step{back, s + 1, c + 1001, fACK, 70, nothingNew, 500},
			step{forth, c + 1001, s + 71, fACK, 0, nothingNew, 70},
		)},
		{"both end, neither FIN is a byte", with(
			step{forth, c + 1, s + 1, fACK | fFIN, 10, nothingNew, 0},
			step{back, s + 1, c + 12, fACK, 0, nothingNew, 10},
			step{back, s + 1, c + 12, fACK | fFIN, 3, nothingNew, 0},
			step{back, s + 1, c + 12, fACK | fFIN, 3, nothingNew, 0},
			step{forth, c + 12, s + 5, fACK, 0, newEnd, 3},
		)},
		{"a FIN that is not acknowledged ends nothing", with(
			step{forth, c + 1, s + 1, fACK | fFIN, 0, nothingNew, 0},
			step{back, s + 1, c + 1, fACK | fFIN, 0, nothingNew, 0},
			step{forth, c + 2, s + 2, fACK, 0, nothingNew, 0},
			step{back, s + 2, c + 2, fACK, 0, newEnd, 0},
		)},
		{"what was never sent is not acknowledged", with(
			step{back, s + 1, c + 1000, fACK, 0, nothingNew, 0},
			step{forth, c + 1, s + 1 - 1000, fACK, 5, nothingNew, 0},
			step{back, s + 1, c + 6, fACK, 0, nothingNew, 5},
		)},
		{"a reset ends, one from the past does not", with(
			step{forth, c + 1, s + 1, fACK, 100, nothingNew, 0},
			step{back, s + 1, c + 101, fACK, 0, nothingNew, 100},
			step{forth, c + 1, 0, fRST, 0, nothingNew, 0},
			step{forth, c + 101 + 2*maxGap, 0, fRST, 0, nothingNew, 0},
			step{forth, c + 5000, 0, fRST, 0, newReset, 0}, // what was before it is lost
		)},
		{"a guess far away is not believed", with(
			step{forth, c + 1<<25, s + 1, fACK | fFIN, 0, nothingNew, 0},
			step{forth, c + 1, s + 1, fACK | fFIN, 4, nothingNew, 0},
			step{back, s + 1, c + 6, fACK | fFIN, 0, nothingNew, 4},
			step{forth, c + 6, s + 2, fACK, 0, newEnd, 0},
		)},
		{"the FIN is what was acknowledged", with(
			step{forth, c + 1000, s + 1, fACK | fFIN, 0, nothingNew, 0},
			step{forth, c + 1, s + 1, fACK | fFIN, 4, nothingNew, 0},
			step{back, s + 1, c + 6, fACK | fFIN, 0, nothingNew, 4},
			step{forth, c + 6, s + 2, fACK, 0, newEnd, 0},
		)},
		{"network: only the number that is awaited resets", with(
			step{back, s + 1, c + 1, fACK, 100, nothingNew, 0},
			step{back, s + 101, 0, fRST, 0, doubtful, 0},
			step{back, s + 50, 0, fRST, 0, doubtful, 0},
			step{forth, c + 1, s + 101, fACK, 0, nothingNew, 100},
			step{back, s + 50, 0, fRST, 0, nothingNew, 0},
			step{back, s + 101, 0, fRST, 0, newReset, 0},
		)},
		{"a reset's acknowledgement counts", with(
			step{forth, c + 1, s + 1, fACK, 100, nothingNew, 0},
			step{back, s + 1, c + 101, fRST | fACK, 0, newReset, 100},
		)},
		{"refused", []step{{back, 0, c + 1, fRST | fACK, 0, newRefusal, 0}}},
		{"what is no answer is left to the client", []step{
			{back, 7000, 1, fACK, 0, nothingNew, 0}, // of an older connection, in TIME_WAIT
			{forth, 1, 0, fRST, 0, nothingNew, 0},
			{back, 7000, 1, fRST | fACK, 0, unfit, 0},
			{back, 7000, 1, fSYN | fACK, 0, nothingNew, 0},
			{forth, c, 0, fSYN, 0, sameSYN, 0},
			{back, s, c + 1, fSYN | fACK, 0, newAnswer, 0},
		}},
		{"the SYN-ACK once more", with(
			step{back, s, c + 1, fSYN | fACK, 0, nothingNew, 0},
			step{forth, c + 1, s + 1, fACK, 1, nothingNew, 0},
		)},
		{"the client's ports are another connection's", with(step{forth, c + 5000, 0, fSYN, 0, newSYN, 0})},
		{"the same before there is an answer", []step{{forth, c + 5000, 0, fSYN, 0, newSYN, 0}}},
		{"the SYN once more after the answer", []step{open[0], {forth, c, 0, fSYN, 0, sameSYN, 0}}},
		{"no other SYN passes", with(
			step{forth, c, 0, fSYN, 0, unfit, 0},
			step{back, 5000, 0, fSYN, 0, unfit, 0},
			step{back, 5000, c + 1, fSYN | fACK, 0, unfit, 0},
			step{forth, c, s + 1, fSYN | fACK, 0, unfit, 0},
			step{back, s, c + 1, fSYN | fACK | fFIN, 0, unfit, 0},
			step{forth, c + 9, 0, fSYN | fRST, 0, unfit, 0},
		)},
		{"nothing else before the answer", []step{
			{back, s, 0, fSYN, 0, unfit, 0},
			{back, s, c + 1, fSYN | fACK | fFIN, 0, unfit, 0},
			{back, s, c + 1, fACK, 10, unfit, 0},
			{back, s, c + 1, fACK | fFIN, 0, unfit, 0},
			{back, s, c, fRST | fACK, 0, unfit, 0},
			{forth, c + 1, s + 1, fACK, 0, unfit, 0},
			{forth, c, s + 1, fSYN | fACK, 0, unfit, 0},
		}},
		{"no more than a window is believed", with(
			step{forth, c + 1 + maxGap - 10, s + 1, fACK, 5, nothingNew, 0},
			step{forth, c + 1 + 2*maxGap, s + 1, fACK, 5, nothingNew, 0},
			step{back, s + 1, c + 1 + 2*maxGap, fACK, 0, nothingNew, 0},
			step{back, s + 1, c + 1 + maxGap - 5, fACK, 0, nothingNew, maxGap - 5},
		)},
		{"a reset by the client before it has answered", []step{open[0], {forth, c + 1, 0, fRST, 0, newReset, 0}}},
		{"a first answer with data", []step{open[0], {forth, c + 1, s + 1, fACK, 9, newStanding, 0}}},
	} {
		var tr track
		tr.begin(c, strings.HasPrefix(tc.name, "network"))
		for i, st := range tc.steps {
			n, moved := tr.see(st.way, &segment{st.seq, st.ack, st.flags, st.size})
			if n != st.want || moved != st.moved {
				t.Errorf("%s, step %d: news %d and %d bytes, want %d and %d", tc.name, i, n, moved, st.want, st.moved)
			}
		}
	}
}

// TestShortcutSYN: options that would make more of a connection than one do not pass, nor do headers that are not
// plain.
func TestShortcutSYN(t *testing.T) {
	src, dst := netip.MustParseAddrPort("10.1.0.2:4000"), netip.MustParseAddrPort("10.1.0.3:8080")
	b := tcpPacket(false, 40, 0)
	opts := header.TCP(b[20:]).Options()
	mss := []byte{header.TCPOptionMSS, 4, 5, 180}
	mptcp := []byte{30, 12, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8}
	fastOpen := []byte{34, 2}
	for i := range opts {
		opts[i] = header.TCPOptionNOP
	}
	copy(opts, bytes.Join([][]byte{mss, mptcp, fastOpen}, nil))
	got := shortcutSYN(b, src, dst)
	var p rxPacket
	if parseHead(got, len(got), &p) != rxDeliver || !p.syn || !checksumValid([][]byte{got}, len(got), &p) {
		t.Fatalf("%x", got)
	}
	if o := header.TCP(got[20:]).Options(); !bytes.Equal(o[:4], mss) || !bytes.Equal(o[4:], bytes.Repeat([]byte{1}, 36)) {
		t.Errorf("options %x", o)
	}
	if s := synOf(got, &p); addrPort(s.id.RemoteAddress, s.id.RemotePort) != src ||
		addrPort(s.id.LocalAddress, s.id.LocalPort) != dst || s.seq != 77 {
		t.Errorf("%+v", s)
	}
	opts[1] = 0 // an option without length
	if got := shortcutSYN(b, src, dst); got != nil {
		t.Errorf("%x", got)
	}
	if got := shortcutSYN(tcpPacket(true, 0, 0), src, dst); got != nil {
		t.Errorf("from one family to the other: %x", got)
	}
	withIPOption := append([]byte{0x46}, b[1:20]...)
	withIPOption = append(append(withIPOption, 1, 1, 1, 1), b[20:40]...)
	if got := shortcutSYN(withIPOption, src, dst); got != nil {
		t.Errorf("with an IP option: %x", got)
	}
}

func FuzzShortcutSYN(f *testing.F) {
	f.Add(tcpPacket(false, 0, 0))
	f.Add(tcpPacket(true, 40, 10))
	src, dst := netip.MustParseAddrPort("10.1.0.2:4000"), netip.MustParseAddrPort("10.1.0.3:8080")
	f.Fuzz(func(t *testing.T, b []byte) {
		got := shortcutSYN(b, src, dst)
		if got == nil {
			return
		}
		var p rxPacket
		if parseHead(got, len(got), &p) != rxDeliver || !p.tcp || p.hdrLen != len(got) ||
			!checksumValid([][]byte{got}, len(got), &p) {
			t.Errorf("%x of %x", got, b)
		}
		opts, ok := plainOptions(header.TCP(got[p.ipLen:]).Options())
		if !ok || !bytes.Equal(opts, header.TCP(got[p.ipLen:]).Options()) {
			t.Errorf("options %x of %x", opts, b)
		}
	})
}

// TestTurn: translated packets have right checksums, whole ones and those that are left to the device.
func TestTurn(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		to := netip.MustParseAddrPort("192.0.2.250:60001")
		if v6 {
			to = netip.MustParseAddrPort("[2001:db8::fffe]:60001")
		}
		for _, src := range []bool{false, true} {
			for _, payload := range []int{0, 1, 1000} {
				b := tcpPacket(v6, 12, payload)
				var p rxPacket
				parseHead(b[:min(len(b), headSize)], len(b), &p)
				th := header.TCP(b[p.ipLen:])
				partial := bytes.Clone(b)
				s, d := addrsOf(partial, &p)
				header.TCP(partial[p.ipLen:]).SetChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, s, d,
					uint16(len(b)-p.ipLen)))
				u := turnTo(to, src)
				u.apply(b, &p, &tun.VNetHdr{})
				u.apply(partial, &p, &tun.VNetHdr{Flags: tun.FlagNeedsCSum})
				if !checksumValid([][]byte{b[:min(len(b), headSize)], b[min(len(b), headSize):]}, len(b), &p) ||
					!v6 && !header.IPv4(b).IsChecksumValid() {
					t.Errorf("v6 %v, src %v, payload %d: bad checksum", v6, src, payload)
				}
				s, d = addrsOf(partial, &p)
				if x := header.PseudoHeaderChecksum(header.TCPProtocolNumber, s, d, uint16(len(b)-p.ipLen)); x !=
					header.TCP(partial[p.ipLen:]).Checksum() {
					t.Errorf("v6 %v, src %v: %#x for the device, want %#x", v6, src,
						header.TCP(partial[p.ipLen:]).Checksum(), x)
				}
				got := addrPort(d, th.DestinationPort())
				if src {
					got = addrPort(s, th.SourcePort())
				}
				if got != to {
					t.Errorf("v6 %v, src %v: %v", v6, src, got)
				}
			}
		}
	}
}

func addrsOf(b []byte, p *rxPacket) (src, dst tcpip.Address) {
	if p.proto == header.IPv4ProtocolNumber {
		return header.IPv4(b).SourceAddress(), header.IPv4(b).DestinationAddress()
	}
	return header.IPv6(b).SourceAddress(), header.IPv6(b).DestinationAddress()
}

// pair is two pods of one process whose kernels are in the hands of the test. What one opens goes to the same port of
// the other.
type pair struct {
	*testing.T
	client, server   wire
	stacks           [2]*Stack
	errs             chan error
	made             chan *Shortcut
	ended            atomic.Int32
	why              chan error // what each has ended with
	clientA, serverA netip.Addr
}

func newPair(t *testing.T, mods ...func(*Config)) *pair {
	p := &pair{T: t, errs: make(chan error, 8), made: make(chan *Shortcut, 8), why: make(chan error, 8),
		clientA: families[0].client.Addr(), serverA: netip.MustParseAddr("10.1.0.9")}
	for i, a := range []netip.Addr{p.clientA, p.serverA} {
		dev, far := memPair(1500, false)
		cfg := Config{App: dev, Addrs: []netip.Addr{a}, Shortcuts: true}
		if i == 0 {
			cfg.OnFlow = p.serve
		}
		for _, m := range mods {
			m(&cfg)
		}
		w := wire{t, far}
		if p.stacks[i] = startStack(t, cfg); i == 0 {
			p.client = w
		} else {
			p.server = w
		}
	}
	return p
}

func (p *pair) serve(f *Flow) {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	f.OnGone(stop)
	p.took(f)(f.Shortcut(ctx, p.stacks[1], netip.AddrPortFrom(p.serverA, f.Dst().Port())))
}

// took is what a proxy does with what came of a flow.
func (p *pair) took(f *Flow) func(*Shortcut, error) {
	return func(s *Shortcut, err error) {
		if err != nil {
			f.Refuse(refusal.Reset)
			p.errs <- err
			return
		}
		if err := s.Accept(); err != nil {
			s.Reset()
			p.errs <- err
			return
		}
		s.Watch(func(bool, int) {}, func(why error) { p.ended.Add(1); p.why <- why })
		p.made <- s
	}
}

// saw checks the next packet of a wire.
func (p *pair) saw(w wire, what string, src, dst netip.AddrPort, flags header.TCPFlags, seq, ack uint32) {
	p.Helper()
	s, d, th := w.next(patience)
	if th == nil {
		p.Fatalf("%s: nothing came", what)
	}
	if s != src || d != dst || th.Flags() != flags || th.SequenceNumber() != seq || th.AckNumber() != ack {
		p.Fatalf("%s: %v > %v %v seq %d ack %d; want %v > %v %v seq %d ack %d", what, s, d, th.Flags(),
			th.SequenceNumber(), th.AckNumber(), src, dst, flags, seq, ack)
	}
}

// stand opens a connection from a port of the client's.
func (p *pair) stand(port uint16, seq uint32) (c, s netip.AddrPort, made *Shortcut) {
	p.Helper()
	c, s = netip.AddrPortFrom(p.clientA, port), netip.AddrPortFrom(p.serverA, 80)
	p.client.send(c, s, fSYN, seq, 0)
	p.saw(p.server, "the SYN", c, s, fSYN, seq, 0)
	p.server.send(s, c, fSYN|fACK, 900, seq+1)
	p.saw(p.client, "the SYN-ACK", s, c, fSYN|fACK, 900, seq+1)
	p.client.send(c, s, fACK, seq+1, 901)
	p.saw(p.server, "the client's answer", c, s, fACK, seq+1, 901)
	return c, s, <-p.made
}

// empty waits until nobody holds anything.
func (p *pair) empty() {
	p.Helper()
	eventually(p, "shortcuts that end", func() bool {
		for _, s := range p.stacks {
			if st := s.Stats(); st.Shortcuts != 0 || st.InFlight != 0 {
				return false
			}
			s.shortcuts.mu.Lock()
			n := len(s.shortcuts.by)
			s.shortcuts.mu.Unlock()
			if n != 0 {
				return false
			}
		}
		return true
	})
}

// TestShortcutEnds: both FINs, a reset, a cut; and what comes after that is answered with a reset.
func TestShortcutEnds(t *testing.T) {
	p := newPair(t)
	c, s, _ := p.stand(4000, 100)
	p.client.send(c, s, fFIN|fACK, 101, 901)
	p.saw(p.server, "FIN", c, s, fFIN|fACK, 101, 901)
	p.server.send(s, c, fFIN|fACK, 901, 102)
	p.saw(p.client, "FIN", s, c, fFIN|fACK, 901, 102)
	p.client.send(c, s, fACK, 102, 902)
	p.saw(p.server, "the last ACK", c, s, fACK, 102, 902)
	p.empty()

	c, s, _ = p.stand(4001, 100)
	p.server.send(s, c, fRST, 901, 0)
	p.saw(p.client, "RST", s, c, fRST, 901, 0)
	p.empty()

	c, s, cut := p.stand(4002, 100)
	cut.Reset()
	p.saw(p.server, "the cut", c, s, fRST|fACK, 101, 901)
	p.saw(p.client, "the cut", s, c, fRST|fACK, 901, 101)
	p.empty()
	p.client.send(c, s, fACK, 101, 950)
	p.saw(p.client, "an answer to what has ended", s, c, fRST, 950, 0)
	for _, want := range []error{nil, nil, net.ErrClosed} {
		if why := <-p.why; why != want {
			t.Errorf("ended with %v, not %v", why, want)
		}
	}
}

// TestShortcutRefused: the reset of a closed port goes to whoever asked, not to the client: the flow is still to be
// refused.
func TestShortcutRefused(t *testing.T) {
	p := newPair(t)
	c, s := netip.AddrPortFrom(p.clientA, 4000), netip.AddrPortFrom(p.serverA, 80)
	p.client.send(c, s, fSYN, 100, 0)
	p.saw(p.server, "the SYN", c, s, fSYN, 100, 0)
	p.server.send(s, c, fRST|fACK, 0, 101)
	if err := <-p.errs; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
	p.saw(p.client, "the refusal", s, c, fRST|fACK, 0, 101)
	p.empty()

	// Its packet filter may say so by ICMP.
	p.client.send(c, s, fSYN, 300, 0)
	p.saw(p.server, "the SYN", c, s, fSYN, 300, 0)
	syn := bareTCP(c, s, &header.TCPFields{SeqNum: 300, Flags: fSYN}, nil)
	p.server.dev.inject(icmpError(syn, refusal.AdminProhibited))
	if err := <-p.errs; !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Error(err)
	}
	p.empty()
}

// TestShortcutImpatience: a client that does not answer is cut, and its flow's place is free.
func TestShortcutImpatience(t *testing.T) {
	p := newPair(t)
	p.stacks[0].handshakePatience = 50 * time.Millisecond
	c, s := netip.AddrPortFrom(p.clientA, 4000), netip.AddrPortFrom(p.serverA, 80)
	p.client.send(c, s, fSYN, 100, 0)
	p.saw(p.server, "the SYN", c, s, fSYN, 100, 0)
	p.server.send(s, c, fSYN|fACK, 900, 101)
	p.saw(p.client, "the SYN-ACK", s, c, fSYN|fACK, 900, 101)
	p.saw(p.server, "the cut", c, s, fRST|fACK, 101, 901)
	p.empty()
	if n := p.ended.Load(); n != 1 {
		t.Errorf("told %d times that it ended", n)
	}
}

// TestShortcutAgain: a client that takes its port again has given the old connection up: the application's end of
// that is reset, and the new one stands.
func TestShortcutAgain(t *testing.T) {
	p := newPair(t)
	c, s, _ := p.stand(4000, 100)
	p.client.send(c, s, fSYN, 70000, 0)
	p.saw(p.server, "the reset of the old one", c, s, fRST|fACK, 101, 901)
	p.saw(p.client, "the same", s, c, fRST|fACK, 901, 101)
	p.saw(p.server, "the SYN", c, s, fSYN, 70000, 0)
	p.server.send(s, c, fSYN|fACK, 5000, 70001)
	p.saw(p.client, "the SYN-ACK", s, c, fSYN|fACK, 5000, 70001)
	p.client.send(c, s, fRST, 70001, 0)
	p.empty()
}

// TestShortcutPorts: no port is both a shortcut's and a dial's.
func TestShortcutPorts(t *testing.T) {
	p := newPair(t, func(c *Config) { c.PortMin, c.PortMax = 4000, 4001 })
	dial := func() (netip.AddrPort, context.CancelFunc) {
		ctx, stop := context.WithCancel(context.Background())
		go p.stacks[1].DialApp(ctx, netip.AddrPortFrom(p.clientA, 0), netip.AddrPortFrom(p.serverA, 80))
		src, _, th := p.server.next(patience)
		if th == nil {
			t.Fatal("no SYN of a dial")
		}
		return src, stop
	}
	_, _, cut := p.stand(4000, 100)
	src, stop := dial()
	defer stop()
	if src.Port() != 4001 {
		t.Errorf("a dial from %v, whose port a shortcut has", src)
	}
	// And now a flow from the port of the dial: it is no shortcut's.
	p.client.send(netip.AddrPortFrom(p.clientA, 4001), netip.AddrPortFrom(p.serverA, 80), fSYN, 5, 0)
	if err := <-p.errs; err != ErrNoShortcut {
		t.Errorf("a shortcut from a dial's port: %v", err)
	}
	cut.Reset()
}

// TestShortcutBound: beyond the bound connections are copied.
func TestShortcutBound(t *testing.T) {
	p := newPair(t)
	p.stacks[1].shortcuts.limit = 1
	_, _, cut := p.stand(4000, 100)
	p.client.send(netip.AddrPortFrom(p.clientA, 4001), netip.AddrPortFrom(p.serverA, 80), fSYN, 5, 0)
	if err := <-p.errs; err != ErrNoShortcut {
		t.Error(err)
	}
	if n := p.stacks[1].Stats().ShortcutsOver; n != 1 {
		t.Errorf("%d were counted", n)
	}
	cut.Reset()
	p.empty()
}

// TestShortcutClose: the end of either stack resets both sides.
func TestShortcutClose(t *testing.T) {
	for i, name := range []string{"client's", "server's"} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			c, s, _ := p.stand(4000, 100)
			p.stacks[i].Close()
			if i == 0 {
				p.saw(p.server, "the end", c, s, fRST|fACK, 101, 901)
			} else {
				p.saw(p.client, "the end", s, c, fRST|fACK, 901, 101)
			}
			eventually(t, "its end", func() bool { return p.ended.Load() == 1 })
			p.empty()
		})
	}
}

// TestShortcutIdle: kernels are asked whether they still have a connection through which nothing passes, and where none
// answers it ends.
func TestShortcutIdle(t *testing.T) {
	p := newPair(t, func(c *Config) {
		c.KeepaliveIdle, c.KeepaliveInterval, c.KeepaliveCount = 20*time.Millisecond, 10*time.Millisecond, 2
	})
	for _, s := range p.stacks {
		s.shortcuts.tick = 10 * time.Millisecond
	}
	c, s, _ := p.stand(4000, 100)
	for range 2 {
		p.saw(p.server, "a probe", c, s, fACK, 100, 901)
		p.saw(p.client, "a probe", s, c, fACK, 900, 101)
	}
	p.saw(p.server, "the end", c, s, fRST|fACK, 101, 901)
	p.saw(p.client, "the end", s, c, fRST|fACK, 901, 101)
	p.empty()
	if why := <-p.why; why != syscall.ETIMEDOUT {
		t.Errorf("ended with %v", why)
	}
}

// TestShortcutMapped: IPv4 addresses in an IPv6 packet are nobody's.
func TestShortcutMapped(t *testing.T) {
	p := newPair(t)
	c, s, cut := p.stand(4000, 100)
	b := bareTCP(netip.MustParseAddrPort("[fd00::1]:80"), netip.MustParseAddrPort("[fd00::2]:4000"),
		&header.TCPFields{SeqNum: 901, Flags: fRST}, nil)
	src, dst := s.Addr().As16(), c.Addr().As16()
	h := header.IPv6(b)
	h.SetSourceAddress(tcpip.AddrFrom16(src))
	h.SetDestinationAddress(tcpip.AddrFrom16(dst))
	th := header.TCP(b[header.IPv6MinimumSize:])
	th.SetChecksum(0)
	th.SetChecksum(^th.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, h.SourceAddress(),
		h.DestinationAddress(), header.TCPMinimumSize)))
	p.server.dev.inject(b)
	p.server.send(s, c, fACK, 901, 101)
	p.saw(p.client, "the connection, which stands", s, c, fACK, 901, 101)
	cut.Reset()
	p.empty()
}

// TestShortcutSelf: a pod that calls itself is none: its kernel believes no packet that comes in its own name.
func TestShortcutSelf(t *testing.T) {
	p := newPair(t)
	p.stacks[1], p.serverA = p.stacks[0], p.clientA
	p.client.send(netip.AddrPortFrom(p.clientA, 4000), netip.MustParseAddrPort("10.96.0.1:80"), fSYN, 5, 0)
	if err := <-p.errs; err != ErrNoShortcut {
		t.Error(err)
	}
}

// TestShortcutGone: what loses its place, or whose dial is given up, before the client has answered is no connection:
// nobody is told of an error.
func TestShortcutGone(t *testing.T) {
	p := newPair(t)
	p.stacks[0].handshakePatience = time.Hour
	c, s := netip.AddrPortFrom(p.clientA, 4000), netip.AddrPortFrom(p.serverA, 80)
	p.client.send(c, s, fSYN, 100, 0)
	p.saw(p.server, "the SYN", c, s, fSYN, 100, 0)
	p.server.send(s, c, fSYN|fACK, 900, 101)
	p.saw(p.client, "the SYN-ACK", s, c, fSYN|fACK, 900, 101)
	made := <-p.made
	made.flow.evict()
	p.saw(p.server, "the cut", c, s, fRST|fACK, 101, 901)
	p.saw(p.client, "the cut", s, c, fRST|fACK, 901, 101)
	if why := <-p.why; why != nil {
		t.Errorf("ended with %v", why)
	}
	p.empty()

	p.client.send(c, s, fSYN, 500, 0)
	p.saw(p.server, "the SYN", c, s, fSYN, 500, 0)
	f := p.stacks[0].flows
	f.mu.Lock()
	fl := f.pending[flowKey{p.stacks[0].app, tupleEndpoint(c, s)}]
	f.mu.Unlock()
	fl.evict()
	if err := <-p.errs; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	p.saw(p.server, "the end of the dial", c, s, fRST|fACK, 501, 0)
	p.empty()
}

func tupleEndpoint(src, dst netip.AddrPort) stack.TransportEndpointID {
	k := tupleOf(src, dst)
	return k.endpoint()
}
