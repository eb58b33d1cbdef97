package dns

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

var (
	kubeDNS  = netip.MustParseAddrPort("10.96.0.2:53")
	kubeDNS6 = netip.MustParseAddrPort("[fd00:96::2]:53")
)

// udp asks as a datagram to server does.
func udp(t testing.TB, s *Server, q *dns.Msg, server netip.AddrPort) *dns.Msg {
	t.Helper()
	raw := s.Query(mustPack(q), server)
	if raw == nil {
		t.Fatalf("no reply to %v", q)
	}
	m := mustUnpack(t, raw)
	if m.Id != q.Id || !m.Response {
		t.Errorf("id %d, response %v", m.Id, m.Response)
	}
	return m
}

// pipe is a TCP client that meant to connect to asked.
func pipe(s *Server, asked netip.AddrPort) (net.Conn, *sync.WaitGroup) {
	near, far := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { s.ServeConn(far, asked) })
	return near, &wg
}

// What never reaches a decision (checklist 62).
func TestNotServed(t *testing.T) {
	up := &upstream{answer: echo}
	m := NewMetrics()
	s := start(t, Config{Upstream: up, Metrics: m})
	header := func(f ...byte) []byte { return append(f, make([]byte, 12-len(f))...) }
	loop := append([]byte{7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 0xc0, 12, 0, 1, 0, 1)
	pair := append([]byte{7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 1, 'a', 0xc0, 12, 0, 1, 0, 1)
	long := append([]byte{7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0},
		bytes.Repeat(append([]byte{63}, bytes.Repeat([]byte{'a'}, 63)...), 5)...)
	long = append(long, 0, 0, 1, 0, 1)
	answer := mustPack(new(dns.Msg).SetReply(ask("A cart")))
	formerr := func(f1, f2 byte) []byte { return header(7, 7, f1, f2) }
	for name, tc := range map[string]struct{ raw, want []byte }{
		"empty":             {nil, nil},
		"11 bytes":          {make([]byte, 11), nil},
		"an answer":         {answer, nil},
		"a count that lies": {header(7, 7, 1, 0x10, 0, 1), formerr(0x81, 0x91)},
		"loop":              {loop, formerr(0x81, 0x81)},
		"loop of two":       {pair, formerr(0x81, 0x81)},
		"name too long":     {long, formerr(0x81, 0x81)},
		"half a question":   {mustPack(ask("A cart"))[:15], nil},
		"garbage UPDATE":    {append(header(7, 7, 5<<3, 0, 0, 9), 0xff, 0xff), formerr(0x80|5<<3, 0x81)},
		"no question":       {header(7, 7, 1, 0), header(7, 7, 0x81, 0x82)},
	} {
		got := s.Query(tc.raw, kubeDNS)
		if name == "half a question" {
			if len(got) != 12 || got[3]&0xf != dns.RcodeFormatError {
				t.Errorf("%s: %x", name, got)
			}
			continue
		}
		if !bytes.Equal(got, tc.want) {
			t.Errorf("%s: got %x, want %x", name, got, tc.want)
		}
	}
	two := ask("A cart")
	two.Question = append(two.Question, two.Question[0])
	if got := render(udp(t, s, two, kubeDNS)); got != "SERVFAIL qr rd ra" {
		t.Errorf("two questions: %s", got)
	}
	if n := m.dropped[dropMalformed].Load(); n != 3 {
		t.Errorf("%d dropped as malformed, want 3", n)
	}
	if len(up.dialled()) != 0 || len(m.series) != 0 {
		t.Errorf("passed on: %v, counted: %v", up.dialled(), m.series)
	}
}

// An unknown pod has SERVFAIL after 5 s, counted with unknown labels (checklist
// 63); one that becomes known meanwhile is answered then.
func TestUnknownClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, m := know(build()), NewMetrics()
		s := start(t, Config{Knowledge: k, Metrics: m})
		begin := time.Now()
		if got := render(udp(t, s, ask("A cart"), kubeDNS)); got != "SERVFAIL qr rd ra" ||
			time.Since(begin) != 5*time.Second {
			t.Errorf("%s after %v", got, time.Since(begin))
		}
		if c := m.series[labels{"a", "udp", "unknown", "unknown"}]; c == nil || c.requests.Load() != 1 ||
			c.upstream.Load() != 0 {
			t.Errorf("counted: %v", m.series)
		}
		begin = time.Now()
		go func() {
			time.Sleep(time.Second)
			k.publish(build(service("other.test", "x", "/1.2.3.4"))) // still not the pod
			time.Sleep(time.Second)
			k.publish(build(vectors()...))
		}()
		if got := render(udp(t, s, ask("A cart"), kubeDNS)); got != ok+"; cart. 30 A 10.96.0.10" ||
			time.Since(begin) != 2*time.Second {
			t.Errorf("%s after %v", got, time.Since(begin))
		}
	})
}

// TCP: pipelined queries in order, one connection upstream for all, opened again
// when upstream has closed it; large answers whole (checklist 66).
func TestTCP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l []string
		for i := range 256 {
			l = append(l, fmt.Sprintf("n1/10.9.%d.1", i))
		}
		var asked []string
		up := &upstream{answer: func(p string, dst netip.AddrPort, raw []byte) [][]byte {
			q := mustUnpack(t, raw)
			asked = append(asked, q.Question[0].Name)
			if q.Question[0].Name == "slow.test." {
				time.Sleep(time.Second)
			}
			if q.Question[0].Name == "last.test." {
				return append(echo(p, dst, raw), nil)
			}
			return echo(p, dst, raw)
		}}
		s :=
			start(t,
				Config{Upstream: up,
					Knowledge: know(build(append(vectors(), service("big.test", "blue", strings.Join(l, " ")))...))})
		c, serve := pipe(s, kubeDNS)
		names := []string{"A slow.test", "A cart", "A big.test", "A quick.test", "A last.test", "A again.test", "A cart"}
		go func() {
			for i, n := range names {
				q := ask(n)
				q.Id = uint16(i)
				writeMessage(c, mustPack(q))
			}
		}()
		for i, n := range names {
			raw, err := readMessage(c)
			if err != nil {
				t.Fatal(err)
			}
			m := mustUnpack(t, raw)
			want := 1
			if n == "A big.test" {
				want = 256
			}
			if m.Id != uint16(i) || len(m.Answer) != want || m.Truncated {
				t.Errorf("%d, %s: id %d, %s", i, n, m.Id, render(m))
			}
		}
		if got, want := up.dialled(), []string{"tcp 10.96.0.2:53", "tcp 10.96.0.2:53"}; !slices.Equal(got, want) {
			t.Errorf("connections: %v", got)
		}
		if want := []string{"slow.test.", "quick.test.", "last.test.", "again.test."}; !slices.Equal(asked, want) {
			t.Errorf("asked %v", asked)
		}
		c.Close()
		serve.Wait()
		synctest.Wait()
		if up.live != 0 {
			t.Error("the upstream connection stays")
		}
	})
}

// A TCP client that is silent for 5 s is closed (checklist 69); so is one that
// dawdles within a message, or does not take its answer.
func TestTCPIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, Config{})
		for what, act := range map[string]func(net.Conn){
			"silent":   func(net.Conn) {},
			"dawdling": func(c net.Conn) { c.Write([]byte{0}); time.Sleep(3 * time.Second); c.Write([]byte{40, 1}) },
		} {
			c, serve := pipe(s, kubeDNS)
			begin := time.Now()
			go act(c)
			if _, err := io.ReadAll(c); err != nil || time.Since(begin) != 5*time.Second {
				t.Errorf("%s: %v after %v", what, err, time.Since(begin))
			}
			serve.Wait()
			c.Close()
		}
		c, serve := pipe(s, kubeDNS)
		time.Sleep(4 * time.Second)
		writeMessage(c, mustPack(ask("A cart")))
		if _, err := readMessage(c); err != nil {
			t.Errorf("after 4 s: %v", err)
		}
		begin := time.Now()
		writeMessage(c, mustPack(ask("A cart")))
		serve.Wait() // nobody reads
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("not reading: closed after %v", d)
		}
		c.Close()
	})
}

// Real sockets of both families, as in a pod's namespace, with a real client.
func TestSockets(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		pc, err := net.ListenPacket("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		server := start(t, Config{Packets: []net.PacketConn{pc}, Listeners: []net.Listener{ln},
			Nameservers: []netip.AddrPort{kubeDNS}, Options: Options{IPv6: true}})
		for _, tc := range [][2]string{
			{"A cart", ok + "; cart. 30 A 10.96.0.10"},
			{"AAAA hl.blue", ok + "; hl.blue. 30 AAAA 2001:db8::4"},
			{"AAAA cart", nothing("cart.")},
			{"A elsewhere.test", "NOERROR qr rd ra ad; elsewhere.test. 7 A 192.0.2.1"},
		} {
			for protocol, addr := range map[string]string{"udp": pc.LocalAddr().String(), "tcp": ln.Addr().String()} {
				c := dns.Client{Net: protocol, Timeout: 20 * time.Second}
				m, _, err := c.Exchange(ask(tc[0]), addr)
				if err != nil {
					t.Fatalf("%s by %s %s: %v", tc[0], protocol, addr, err)
				}
				if got := render(m); got != tc[1] {
					t.Errorf("%s by %s %s: got %s, want %s", tc[0], protocol, addr, got, tc[1])
				}
			}
		}
		if err := server.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
			t.Error("the listener is open after Shutdown")
		}
	}
}

// The DNS access line has ztunnel's fields (spec 5.6).
func TestLog(t *testing.T) {
	var log bytes.Buffer
	h := slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}})
	s := start(t, Config{Logger: slog.New(h), Options: Options{IPv6: true}})
	for q, want := range map[string]string{
		"A CART": "query=A domain=cart. result=success endpoints=1",
		"A hl":   "query=A domain=hl. result=success endpoints=2",
		"A api.acme.test.blue.svc.cluster.local": "query=A domain=api.acme.test.blue.svc.cluster.local. result=success " +
			"endpoints=1",
		"A far":            `query=A domain=far. result="no records" endpoints=0`,
		"MX cart":          "query=MX domain=cart. result=forwarded endpoints=1",
		"A elsewhere.test": "query=A domain=elsewhere.test. result=forwarded endpoints=1",
	} {
		log.Reset()
		udp(t, s, ask(q), kubeDNS)
		if got, want := log.String(), `level=DEBUG msg="" target=dns src.workload=client src.namespace=blue `+want+
			"\n"; got != want {
			t.Errorf("%s:\n got %s\nwant %s", q, got, want)
		}
	}
	s = start(t, Config{Logger: slog.New(h)})
	log.Reset()
	udp(t, s, ask("AAAA cart"), kubeDNS)
	if !strings.Contains(log.String(), `result="service does not support this record type" endpoints=0`) {
		t.Error(log.String())
	}
}

func TestNewRefuses(t *testing.T) {
	good := Config{Knowledge: know(nil), Upstream: &upstream{}}
	for want, change := range map[string]func(*Config){
		"no Knowledge":  func(c *Config) { c.Knowledge = nil },
		"no Upstream":   func(c *Config) { c.Upstream = nil },
		"no nameserver": func(c *Config) { c.Nameservers = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:0")} },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	// A nil View is an empty one.
	c := good
	c.ClientWait = time.Millisecond
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if w := what(s.Query(mustPack(ask("A cart")), kubeDNS)); w != "SERVFAIL" {
		t.Error(w)
	}
	s.Shutdown(context.Background())
}
