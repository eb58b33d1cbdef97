package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// The bounds, each with its counter, and that names of ours need no place among
// the forwarded.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		s := start(t, Config{Metrics: m, MaxForwards: 3, MaxConns: 2, Upstream: &upstream{}})
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { udp(t, s, ask("A elsewhere.test"), kubeDNS) })
		}
		synctest.Wait()
		begin := time.Now()
		if got := render(udp(t, s, ask("A elsewhere.test"), kubeDNS)); got != "SERVFAIL qr rd ra" {
			t.Errorf("one too many: %s", got)
		}
		if got := render(udp(t, s, ask("A cart"), kubeDNS)); got != ok+"; cart. 30 A 10.96.0.10" {
			t.Errorf("ours: %s", got)
		}
		if time.Since(begin) != 0 || m.dropped[dropForwards].Load() != 1 {
			t.Errorf("after %v, %d counted", time.Since(begin), m.dropped[dropForwards].Load())
		}
		wg.Wait()

		a, serveA := pipe(s, kubeDNS)
		b, serveB := pipe(s, kubeDNS)
		synctest.Wait()
		c, serveC := pipe(s, kubeDNS)
		if _, err := c.Read(make([]byte, 1)); err != io.EOF || m.dropped[dropConnections].Load() != 1 {
			t.Errorf("a third connection: %v, %d counted", err, m.dropped[dropConnections].Load())
		}
		serveC.Wait()
		a.Close()
		b.Close()
		serveA.Wait()
		serveB.Wait()
	})
}

// packetConn is a socket in memory.
type packetConn struct {
	net.PacketConn // nil
	in             chan []byte
	out            chan []byte
	end            chan struct{}
	once           sync.Once
}

func newPacketConn() *packetConn {
	return &packetConn{in: make(chan []byte), out: make(chan []byte, 10000), end: make(chan struct{})}
}

func (p *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case m := <-p.in:
		return copy(b, m), &net.UDPAddr{Port: 4000}, nil
	case <-p.end:
		return 0, nil, net.ErrClosed
	}
}

func (p *packetConn) WriteTo(b []byte, _ net.Addr) (int, error) {
	p.out <- bytes.Clone(b)
	return len(b), nil
}

func (p *packetConn) SetReadDeadline(time.Time) error { p.once.Do(func() { close(p.end) }); return nil }

func (p *packetConn) Close() error { return p.SetReadDeadline(time.Time{}) }

func TestPacketBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, pc := NewMetrics(), newPacketConn()
		start(t, Config{Metrics: m, MaxQueries: 2, Packets: []net.PacketConn{pc}, Nameservers: []netip.AddrPort{kubeDNS},
			Upstream: &upstream{}})
		for range 5 {
			pc.in <- mustPack(ask("A elsewhere.test"))
		}
		synctest.Wait()
		if n := m.dropped[dropQueries].Load(); n != 3 {
			t.Errorf("%d dropped, want 3", n)
		}
		for range 2 {
			if m := mustUnpack(t, <-pc.out); m.Rcode != dns.RcodeServerFailure {
				t.Errorf("got %v", m)
			}
		}
		pc.in <- mustPack(ask("A cart"))
		if m := mustUnpack(t, <-pc.out); len(m.Answer) != 1 {
			t.Errorf("got %v", m)
		}
	})
}

// Datagrams beyond the rate are dropped unread; a second later there is room again.
func TestPacketRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, pc := NewMetrics(), newPacketConn()
		start(t, Config{Metrics: m, Rate: 10, Packets: []net.PacketConn{pc}, Upstream: &upstream{}})
		answers := 0
		flood := func() {
			for range 50 {
				pc.in <- mustPack(ask("A cart"))
				synctest.Wait()
				select {
				case <-pc.out:
					answers++
				default:
				}
			}
		}
		flood()
		if n := m.dropped[dropRate].Load(); n != 30 || answers != 20 {
			t.Errorf("%d dropped, %d answered, want 30 and 20", n, answers)
		}
		time.Sleep(time.Second)
		if flood(); answers != 30 {
			t.Errorf("%d answered, want 30", answers)
		}
	})
}

// Shutdown lets what is under way finish and takes nothing new; its context ends
// it; and so does Run's.
func TestShutdown(t *testing.T) {
	slowly := func() *upstream {
		return &upstream{answer: func(p string, dst netip.AddrPort, raw []byte) [][]byte {
			time.Sleep(2 * time.Second)
			return echo(p, dst, raw)
		}}
	}
	// What is under way: a datagram, a captured query, a TCP client at work, an idle one.
	begin := func(t *testing.T) (s *Server, pc *packetConn, got chan string, clients *sync.WaitGroup) {
		pc, got, clients = newPacketConn(), make(chan string, 4), new(sync.WaitGroup)
		s, err := New(Config{Client: blueClient.Info(), Knowledge: know(build(vectors()...)), Upstream: slowly(),
			Packets: []net.PacketConn{pc}, Nameservers: []netip.AddrPort{kubeDNS}})
		if err != nil {
			t.Fatal(err)
		}
		q := mustPack(ask("A elsewhere.test"))
		clients.Go(func() { got <- what(s.Query(q, kubeDNS)) })
		busy, serve := pipe(s, kubeDNS)
		clients.Go(func() {
			writeMessage(busy, q)
			raw, _ := readMessage(busy)
			got <- what(raw)
			_, err := io.ReadAll(busy)
			got <- fmt.Sprint("end ", err)
			serve.Wait()
		})
		idle, serve2 := pipe(s, kubeDNS)
		clients.Go(func() {
			_, err := io.ReadAll(idle)
			got <- fmt.Sprint("end ", err)
			serve2.Wait()
		})
		return s, pc, got, clients
	}
	next := func(t *testing.T, got chan string, n int, want ...string) {
		t.Helper()
		var l []string
		for range n {
			l = append(l, <-got)
		}
		slices.Sort(l)
		if !slices.Equal(l, want) {
			t.Errorf("got %v, want %v", l, want)
		}
	}
	t.Run("graceful", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, pc, got, clients := begin(t)
			done := make(chan error, 1)
			go func() { done <- s.Run(context.Background()) }()
			pc.in <- mustPack(ask("A elsewhere.test"))
			synctest.Wait()
			at := time.Now()
			if err := s.Shutdown(context.Background()); err != nil || time.Since(at) != 2*time.Second {
				t.Errorf("%v after %v", err, time.Since(at))
			}
			next(t, got, 4, "NOERROR", "NOERROR", "end <nil>", "end <nil>")
			if w := what(<-pc.out); w != "NOERROR" {
				t.Errorf("the datagram: %s", w)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if raw := s.Query(mustPack(ask("A cart")), kubeDNS); raw != nil {
				t.Errorf("after it: %s", what(raw))
			}
			c, serve := pipe(s, kubeDNS)
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("a connection after it: %v", err)
			}
			serve.Wait()
			if err := s.Shutdown(context.Background()); err != nil {
				t.Errorf("again: %v", err)
			}
			clients.Wait()
		})
	})
	t.Run("in a hurry", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, _, got, clients := begin(t)
			synctest.Wait()
			at := time.Now()
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(at) != time.Second {
				t.Errorf("%v after %v", err, time.Since(at))
			}
			next(t, got, 4, "SERVFAIL", "end <nil>", "end <nil>", "nothing")
			clients.Wait()
			time.Sleep(5 * time.Second) // the fake upstream's own
		})
	})
	t.Run("Run's context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, pc, got, clients := begin(t)
			synctest.Wait()
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(time.Second, cancel)
			at := time.Now()
			if err := s.Run(ctx); err != nil || time.Since(at) != time.Second {
				t.Errorf("%v after %v", err, time.Since(at))
			}
			next(t, got, 4, "SERVFAIL", "end <nil>", "end <nil>", "nothing")
			if _, _, err := pc.ReadFrom(nil); !errors.Is(err, net.ErrClosed) {
				t.Error("the socket is open")
			}
			clients.Wait()
			time.Sleep(5 * time.Second)
		})
	})
}

func what(raw []byte) string {
	if len(raw) < 12 {
		return "nothing"
	}
	return rcodeName(rcode(raw))
}

// A transfer under way ends when the server is aborted.
func TestShutdownTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Config{Client: blueClient.Info(), Knowledge: know(build(vectors()...)),
			Upstream: &upstream{answer: func(_ string, _ netip.AddrPort, raw []byte) [][]byte {
				return [][]byte{slices.Concat(raw[:2], []byte{0x84, 0}, make([]byte, 8))}
			}}})
		if err != nil {
			t.Fatal(err)
		}
		c, serve := pipe(s, kubeDNS)
		writeMessage(c, mustPack(ask("AXFR acme.test")))
		if _, err := readMessage(c); err != nil {
			t.Fatal(err)
		}
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		begin := time.Now()
		if err := s.Shutdown(ended); !errors.Is(err, context.Canceled) || time.Since(begin) != 0 {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		serve.Wait()
		c.Close()
	})
}
