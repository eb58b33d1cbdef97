package netstack

import (
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"ztun/proxy/refusal"
)

// A SYN that comes again after it was refused by silence is the same attempt; one of another connect from that port
// is not.
func TestAgain(t *testing.T) {
	again := make(chan bool, 10)
	s, w := newWire(t, Config{OnFlow: func(f *Flow) {
		again <- f.Again()
		f.Refuse(refusal.Way(int(refusal.Silent) * int(f.Dst().Port()%2)))
	}})
	for i, tc := range []struct {
		dst  string
		seq  uint32
		want bool
	}{
		{"10.2.0.3:81", 5, false}, {"10.2.0.3:81", 5, true}, {"10.2.0.3:81", 5, true}, {"10.2.0.3:81", 6, false},
		{"10.2.0.3:83", 5, false},
		{"10.2.0.3:80", 5, false}, {"10.2.0.3:80", 5, false}, // a reset is an answer
	} {
		w.syn("10.1.0.2:4000", tc.dst, tc.seq)
		if got := <-again; got != tc.want {
			t.Errorf("%d: again %v, want %v", i, got, tc.want)
		}
		eventually(t, "the verdict", func() bool { return s.Stats().InFlight == 0 })
	}
}

func TestLately(t *testing.T) {
	l := lately[int]{span: time.Minute, limit: 10}
	now := time.Now()
	l.note(1, now)
	l.note(2, now)
	l.forget(2)
	if !l.has(1, now) || l.has(2, now) || l.has(3, now) {
		t.Error("at once")
	}
	if now = now.Add(59 * time.Second); !l.has(1, now) {
		t.Error("forgotten too early")
	}
	l.note(4, now)
	if now = now.Add(59 * time.Second); !l.has(4, now) {
		t.Error("forgotten before its span")
	}
	if now = now.Add(2 * time.Minute); l.has(1, now) || l.has(4, now) {
		t.Error("remembered for ever")
	}
	l.note(5, now)
	if now = now.Add(3 * time.Minute); l.has(5, now) {
		t.Error("remembered for three spans")
	}
	for i := range 1000 {
		l.note(i, now)
	}
	if n := len(l.young) + len(l.old); n > 20 || !l.has(999, now) || !l.has(991, now) || l.has(900, now) {
		t.Errorf("%d remembered", n)
	}
}

// One client, one source port, again and again: reset by the client, closed by our side first, given up while it
// waits.
func TestSamePort(t *testing.T) {
	for _, fam := range families {
		src, dst := netip.AddrPortFrom(fam.client.Addr(), 4000), fam.server
		conns := make(chan *Conn, 10)
		waiting, stop := make(chan struct{}, 10), make(chan struct{})
		s, w := newWire(t, Config{OnFlow: func(f *Flow) {
			if f.Dst().Port() == 9 {
				gone := make(chan struct{})
				f.OnGone(func() { close(gone) })
				waiting <- struct{}{}
				select {
				case <-gone:
				case <-stop:
				}
				f.Refuse(refusal.Reset)
				return
			}
			c, err := f.Accept()
			if err != nil {
				t.Error(err)
			}
			conns <- c
		}})
		connect := func(seq uint32) (c *Conn, ack uint32) {
			t.Helper()
			w.send(src, dst, header.TCPFlagSyn, seq, 0)
			for {
				_, _, th := w.next(patience) // the SYN is not sent again
				if th == nil {
					t.Fatal("no SYN-ACK")
				}
				switch fl := th.Flags(); {
				case fl.Contains(header.TCPFlagRst):
					t.Fatal("refused")
				case fl == header.TCPFlagSyn|header.TCPFlagAck && th.AckNumber() == seq+1:
					w.send(src, dst, header.TCPFlagAck, seq+1, th.SequenceNumber()+1)
					return <-conns, th.SequenceNumber() + 1
				}
			}
		}
		for i := range uint32(50) {
			c, _ := connect(1000 * (i + 1))
			w.send(src, dst, header.TCPFlagRst, 1000*(i+1)+1, 0)
			defer c.Close()
		}
		if s.Stats().Delayed == 0 {
			t.Log("no SYN met an older connection")
		}
		// Closed by us first: TIME_WAIT.
		c, ack := connect(100_000)
		c.Close()
		w.send(src, dst, header.TCPFlagAck|header.TCPFlagFin, 100_001, ack+1)
		eventually(t, "TIME_WAIT", func() bool { return s.Stats().Conns <= 50 })
		c, _ = connect(200_000)
		w.send(src, dst, header.TCPFlagRst, 200_001, 0)
		c.Close()
		// The client gives up while its SYN is held, and opens again.
		dst = netip.AddrPortFrom(dst.Addr(), 9)
		w.send(src, dst, header.TCPFlagSyn, 1, 0)
		<-waiting
		w.send(src, dst, header.TCPFlagSyn, 2, 0)
		select {
		case <-waiting:
		case <-time.After(patience):
			t.Fatal("the second attempt did not take the first one's place")
		}
		w.send(src, dst, header.TCPFlagSyn, 3, 0)
		<-waiting
		w.send(src, dst, header.TCPFlagSyn, 3, 0) // sent again: nothing new
		eventually(t, "duplicate", func() bool { return s.Stats().Duplicates >= 1 })
		close(stop)
		s.Close()
	}
}

// A SYN on a living connection ends nothing: it is answered by gVisor's challenge, if late.
func TestSYNOnLiving(t *testing.T) {
	conns := make(chan *Conn, 1)
	s, w := newWire(t, Config{OnFlow: func(f *Flow) {
		c, err := f.Accept()
		if err != nil {
			t.Error(err)
		}
		conns <- c
	}})
	src, dst := netip.MustParseAddrPort("10.1.0.2:4000"), netip.MustParseAddrPort("10.2.0.3:80")
	w.send(src, dst, header.TCPFlagSyn, 1, 0)
	_, _, th := w.next(patience)
	ack := th.SequenceNumber() + 1
	w.send(src, dst, header.TCPFlagAck, 2, ack)
	c := <-conns
	defer c.Close()
	w.send(src, dst, header.TCPFlagSyn, 500, 0)
	for {
		_, _, th = w.next(patience)
		if th == nil {
			t.Fatal("no challenge")
		}
		if th.Flags() == header.TCPFlagAck && th.AckNumber() == 2 {
			break
		}
	}
	if st := s.Stats(); st.Delayed != 1 || st.Conns != 1 || st.InFlight != 0 {
		t.Errorf("%+v", st)
	}
	// Beyond the bound nothing waits.
	for i := range maxLate + 50 {
		w.send(src, dst, header.TCPFlagSyn, uint32(600+i), 0)
	}
	eventually(t, "all delivered", func() bool {
		s.flows.mu.Lock()
		defer s.flows.mu.Unlock()
		if s.flows.late > maxLate {
			t.Errorf("%d wait", s.flows.late)
		}
		return s.flows.late == 0
	})
}
