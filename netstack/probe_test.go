package netstack

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// The kernel's answer to a probe is the port's, and its application sees nothing of it.
func TestTUNProbe(t *testing.T) {
	l := newLab(t, false, func(f *Flow) { f.Refuse(refusal.Reset) })
	for _, tc := range []struct{ dst, src, closed, filtered string }{
		{"10.1.0.2:8080", "192.0.2.7", "10.1.0.2:9", "10.1.0.2:10"},
		{"[fd00:1::2]:8080", "2001:db8::7", "[fd00:1::2]:9", "[fd00:1::2]:10"},
	} {
		ln := l.listen(t, tc.dst)
		src, dst := netip.MustParseAddr(tc.src), netip.MustParseAddrPort(tc.dst)
		before := len(l.s.app.gs.RegisteredEndpoints())
		for range 20 {
			if err := l.s.ProbeApp(context.Background(), src, dst); err != nil {
				t.Fatal(err)
			}
			l.s.probes.learn(dst, false, time.Now()) // ask again
		}
		if err := l.s.ProbeApp(context.Background(), src, netip.MustParseAddrPort(tc.closed)); !errors.Is(err,
			syscall.ECONNREFUSED) {
			t.Errorf("closed port: %v", err)
		}
		// The next who is accepted is the first who connected.
		c, err := l.s.DialApp(context.Background(), netip.AddrPortFrom(src, 0), dst)
		if err != nil {
			t.Fatal(err)
		}
		k, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := k.RemoteAddr().String(); got != c.LocalAddr().String() {
			t.Errorf("the application sees %v before %v", got, c.LocalAddr())
		}
		k.Close()
		c.Close()
		// What was found holds for a while, and no longer.
		if err := l.s.ProbeApp(context.Background(), src, dst); err != nil {
			t.Fatal(err)
		}
		ln.Close()
		l.s.probes.mu.Lock()
		if left := time.Until(l.s.probes.open[dst]); left <= 0 || left > probeFresh {
			t.Errorf("what was found is kept for %v", left)
		}
		l.s.probes.mu.Unlock()
		eventually(t, "closed", func() bool {
			return errors.Is(l.s.ProbeApp(context.Background(), src, dst), syscall.ECONNREFUSED)
		})
		if n := l.s.probes.n.Load(); n != 0 || len(l.s.app.gs.RegisteredEndpoints()) > before+1 {
			t.Errorf("left over: %d probes, %d endpoints", n, len(l.s.app.gs.RegisteredEndpoints()))
		}
	}
}

// What a packet filter may say to a probe, or nothing.
func TestProbeAnswers(t *testing.T) {
	for _, fam := range families {
		s, w := newWire(t, Config{PortMin: 40000, PortMax: 40000}) // one port, which has to come back each time
		dst := netip.AddrPortFrom(fam.client.Addr(), 8080)
		probe := func() (netip.AddrPort, []byte, chan error) {
			got := make(chan error, 1)
			go func() { got <- s.ProbeApp(context.Background(), fam.server.Addr(), dst) }()
			p := <-w.dev.in
			return addrPort2(t, p.b), p.b, got
		}
		for _, tc := range []struct {
			r    refusal.Way
			want error
		}{{refusal.HostUnreachable, syscall.EHOSTUNREACH}, {refusal.AdminProhibited, syscall.EHOSTUNREACH}} {
			_, syn, got := probe()
			w.dev.WritePacket(&tun.VNetHdr{}, [][]byte{icmpError(syn, tc.r)})
			if err := <-got; !errors.Is(err, tc.want) {
				t.Errorf("%v: %v", tc.r, err)
			}
		}
		// An answer to something else counts for nothing.
		src, syn, got := probe()
		seq := header.TCP(syn[len(syn)-24:]).SequenceNumber()
		w.send(dst, src, header.TCPFlagRst|header.TCPFlagAck, 0, seq)
		w.send(dst, src, header.TCPFlagSyn|header.TCPFlagAck, 0, seq+2)
		other := bytes.Clone(syn)
		header.TCP(other[len(other)-24:]).SetSequenceNumber(seq + 1)
		w.dev.WritePacket(&tun.VNetHdr{}, [][]byte{icmpError(other, refusal.HostUnreachable)})
		select {
		case err := <-got:
			t.Fatalf("answered: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		w.send(dst, src, header.TCPFlagSyn|header.TCPFlagAck, 99, seq+1)
		if err := <-got; err != nil {
			t.Error(err)
		}
		for {
			_, to, th := w.next(patience)
			if th == nil {
				t.Fatal("the kernel's half is not taken back")
			}
			if to == dst && th.Flags().Contains(header.TCPFlagRst) && th.SequenceNumber() == seq+1 {
				break
			}
		}
		// Many who ask at once are one question; when who asked gives up, another one asks.
		s.probes.learn(dst, false, time.Now())
		first, giveUp := context.WithCancel(context.Background())
		answers := make(chan error, 20)
		go func() { answers <- s.ProbeApp(first, fam.server.Addr(), dst) }()
		if _, _, th := w.next(patience); th == nil {
			t.Fatal("no probe")
		}
		for range 19 {
			go func() { answers <- s.ProbeApp(context.Background(), fam.server.Addr(), dst) }()
		}
		time.Sleep(20 * time.Millisecond)
		s.probes.mu.Lock()
		if n := len(s.probes.by); n > 1 {
			t.Errorf("%d probes under way", n)
		}
		s.probes.mu.Unlock()
		giveUp()
		if err := <-answers; !errors.Is(err, context.Canceled) {
			t.Errorf("who gave up: %v", err)
		}
		for told := 0; told < 19; {
			select {
			case p := <-w.dev.in: // SYNs of the first may be among them
				src, seq = addrPort2(t, p.b), header.TCP(p.b[len(p.b)-24:]).SequenceNumber()
				w.send(dst, src, header.TCPFlagRst|header.TCPFlagAck, 0, seq+1)
			case err := <-answers:
				if told++; !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("one of many: %v", err)
				}
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		if err := s.ProbeApp(ctx, fam.server.Addr(), netip.AddrPortFrom(dst.Addr(), 1)); !errors.Is(err,
			context.DeadlineExceeded) {
			t.Errorf("no answer: %v", err)
		}
		cancel()
		if err := s.ProbeApp(context.Background(), netip.IPv6Unspecified(),
			netip.MustParseAddrPort("10.1.0.2:1")); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("two families: %v", err)
		}
	}
}

// addrPort2 is where a TCP packet comes from.
func addrPort2(t *testing.T, b []byte) netip.AddrPort {
	t.Helper()
	var p rxPacket
	if parseHead(b, len(b), &p) != rxDeliver || !p.syn {
		t.Fatal("no SYN")
	}
	id := synOf(b, &p).id
	return addrPort(id.RemoteAddress, id.RemotePort)
}
