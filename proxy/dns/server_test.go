package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
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

// A message that is not ours reaches upstream byte for byte, and so does its
// reply the client: any opcode, type, class and option (issue 5 point 6).
func TestForwardedUnchanged(t *testing.T) {
	var got []byte
	odd := append(mustPack(ask("A elsewhere.test").SetEdns0(4096, true)), "trailing bytes"...)
	update := new(dns.Msg)
	update.SetUpdate("acme.test.")
	update.RemoveName([]dns.RR{&dns.ANY{Hdr: dns.RR_Header{Name: "x.acme.test."}}})
	opts := ask("HTTPS cart")
	opts.SetEdns0(1400, false)
	opts.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")}}
	chaos := ask("TXT version.bind")
	chaos.Question[0].Qclass = dns.ClassCHAOS
	notify := new(dns.Msg).SetNotify("acme.test.")
	dso := []byte{1, 2, 6 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 0, 58, 152, 0, 0, 58, 152} // RFC 8490 keepalive
	unknown := ask("A elsewhere.test")
	unknown.Question[0].Qtype = 65280
	strange := []byte("a reply that is none: \xff\xff\xff")
	for name, raw := range map[string][]byte{
		"trailing bytes": odd, "UPDATE": mustPack(update), "options": mustPack(opts), "class CHAOS": mustPack(chaos), "NOTIFY": mustPack(notify),
		"DSO": dso, "private type": mustPack(unknown), "ANY": mustPack(ask("ANY cart")), "MX": mustPack(ask("MX cart")),
		"two OPT": mustPack(ask("A elsewhere.test").SetEdns0(512, false).SetEdns0(600, false)),
		"STATUS":  {9, 9, 2 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	} {
		for _, tcp := range []bool{false, true} {
			reply := slices.Concat(raw[:2], []byte{raw[2] | 0x80, 0x20}, make([]byte, 8), strange)
			s := start(t, Config{Upstream: &upstream{answer: func(_ string, _ netip.AddrPort, raw []byte) [][]byte {
				got = bytes.Clone(raw)
				return [][]byte{reply}
			}}})
			var back []byte
			if tcp {
				c, serve := pipe(s, kubeDNS)
				writeMessage(c, raw)
				back, _ = readMessage(c)
				c.Close()
				serve.Wait()
			} else {
				back = s.Query(raw, kubeDNS)
			}
			if !bytes.Equal(got, raw) || !bytes.Equal(back, reply) {
				t.Errorf("%s, TCP %v:\nquery %x\n came %x\nreply %x\n came %x", name, tcp, raw, got, reply, back)
			}
		}
	}
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
	long := append([]byte{7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, bytes.Repeat(append([]byte{63}, bytes.Repeat([]byte{'a'}, 63)...), 5)...)
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
		if got := render(udp(t, s, ask("A cart"), kubeDNS)); got != "SERVFAIL qr rd ra" || time.Since(begin) != 5*time.Second {
			t.Errorf("%s after %v", got, time.Since(begin))
		}
		if c := m.series[labels{"a", "udp", "unknown", "unknown"}]; c == nil || c.requests.Load() != 1 || c.upstream.Load() != 0 {
			t.Errorf("counted: %v", m.series)
		}
		begin = time.Now()
		go func() {
			time.Sleep(time.Second)
			k.publish(build(service("other.test", "x", "/1.2.3.4"))) // still not the pod
			time.Sleep(time.Second)
			k.publish(build(vectors()...))
		}()
		if got := render(udp(t, s, ask("A cart"), kubeDNS)); got != ok+"; cart. 30 A 10.96.0.10" || time.Since(begin) != 2*time.Second {
			t.Errorf("%s after %v", got, time.Since(begin))
		}
	})
}

// Replies of upstream, what is counted as a failure (checklist 65), and what the
// log says.
func TestForwardOutcomes(t *testing.T) {
	rcodes := func(rcode int, answers bool) func(string, netip.AddrPort, []byte) [][]byte {
		return func(_ string, _ netip.AddrPort, raw []byte) [][]byte {
			q := new(dns.Msg)
			q.Unpack(raw)
			m := new(dns.Msg).SetRcode(q, rcode)
			m.RecursionAvailable = true
			if answers {
				m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 7}, A: net.IPv4(192, 0, 2, 1)}}
			}
			return [][]byte{mustPack(m)}
		}
	}
	truncate := func(p string, d netip.AddrPort, raw []byte) [][]byte {
		r := rcodes(0, false)(p, d, raw)
		r[0][2] |= 2
		return r
	}
	// Forged or late packets come first: wrong id, a query, another question.
	noise := func(p string, d netip.AddrPort, raw []byte) [][]byte {
		good := rcodes(0, true)(p, d, raw)[0]
		id, query, other, short := bytes.Clone(good), bytes.Clone(good), bytes.Clone(good), good[:5]
		id[0] ^= 1
		query[2] &^= 0x80
		other[13] = 'X'
		return [][]byte{short, id, query, other, good}
	}
	upper := func(p string, d netip.AddrPort, raw []byte) [][]byte { // RFC 4343: case does not matter
		r := rcodes(0, true)(p, d, raw)
		r[0][13] ^= 0x20
		return r
	}
	for _, tc := range []struct {
		name     string
		answer   func(string, netip.AddrPort, []byte) [][]byte
		dead     error
		want     string
		failures uint64
		result   string
		after    time.Duration
	}{
		{"an answer", rcodes(0, true), nil, "NOERROR qr rd ra; elsewhere.test. 7 A 192.0.2.1", 0, "forwarded", 0},
		{"another case", upper, nil, "NOERROR qr rd ra; Elsewhere.test. 7 A 192.0.2.1", 0, "forwarded", 0},
		{"NXDOMAIN", rcodes(dns.RcodeNameError, false), nil, "NXDOMAIN qr rd ra", 1, "forwarding failed (NXDOMAIN)", 0},
		{"REFUSED", rcodes(dns.RcodeRefused, false), nil, "REFUSED qr rd ra", 1, "forwarding failed (REFUSED)", 0},
		{"nothing of the type", rcodes(0, false), nil, "NOERROR qr rd ra", 1, "forwarding failed (no records)", 0},
		{"truncated", truncate, nil, "NOERROR qr tc rd ra", 0, "forwarded", 0},
		{"noise", noise, nil, "NOERROR qr rd ra; elsewhere.test. 7 A 192.0.2.1", 0, "forwarded", 0},
		{"silence", func(string, netip.AddrPort, []byte) [][]byte { return nil }, nil, "SERVFAIL qr rd ra", 1, "forwarding failed (10.96.0.2:53: timeout)", 5 * time.Second},
		{"no way", nil, syscall.ENETUNREACH, "SERVFAIL qr rd ra", 1, "forwarding failed (10.96.0.2:53: network is unreachable)", 0},
		{"refused", func(string, netip.AddrPort, []byte) [][]byte { return [][]byte{nil} }, nil, "SERVFAIL qr rd ra", 1, "forwarding failed (10.96.0.2:53: EOF)", 0},
	} {
		for _, tcp := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				if tcp && tc.name == "noise" {
					return
				}
				m := NewMetrics()
				var log bytes.Buffer
				s := start(t, Config{Metrics: m, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
					Upstream: &upstream{answer: tc.answer, dead: func(string, netip.AddrPort) error { return tc.dead }}})
				begin := time.Now()
				var got *dns.Msg
				protocol := "udp"
				if q := ask("A elsewhere.test"); tcp {
					protocol = "tcp"
					c, serve := pipe(s, kubeDNS)
					writeMessage(c, mustPack(q))
					raw, err := readMessage(c)
					if err != nil {
						t.Fatal(err)
					}
					got = mustUnpack(t, raw)
					c.Close()
					serve.Wait()
				} else {
					got = udp(t, s, q, kubeDNS)
				}
				if r := strings.Replace(render(got), "Elsewhere", "elsewhere", 1); r != strings.Replace(tc.want, "Elsewhere", "elsewhere", 1) || time.Since(begin) != tc.after {
					t.Errorf("%s, %s: got %s after %v, want %s after %v", tc.name, protocol, r, time.Since(begin), tc.want, tc.after)
				}
				c := m.series[labels{"a", protocol, "client", "v1"}]
				if c == nil || c.requests.Load() != 1 || c.upstream.Load() != 1 || c.failures.Load() != tc.failures || c.total != 1 || c.sum != tc.after.Seconds() {
					t.Errorf("%s, %s: counted %+v", tc.name, protocol, c)
				}
				if !strings.Contains(log.String(), fmt.Sprintf("result=%s ", quoteIf(tc.result))) {
					t.Errorf("%s, %s: logged %s", tc.name, protocol, log.String())
				}
			})
		}
	}
}

func quoteIf(s string) string {
	if strings.ContainsAny(s, " ()") {
		return `"` + s + `"`
	}
	return s
}

// Whom a query is passed on to, by which protocol, and what becomes of it when
// the first of several does not answer.
func TestNameservers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:53"), netip.MustParseAddrPort("[fd00::2]:53"), netip.MustParseAddrPort("10.0.0.3:5353")}
		var silent, dead, refusing netip.AddrPort
		up := &upstream{answer: func(p string, dst netip.AddrPort, raw []byte) [][]byte {
			switch dst {
			case silent:
				return nil
			case refusing:
				return [][]byte{nil}
			}
			return echo(p, dst, raw)
		}, dead: func(_ string, dst netip.AddrPort) error {
			if dst == dead {
				return syscall.ECONNREFUSED
			}
			return nil
		}}
		s := start(t, Config{Upstream: up, Nameservers: n})
		try := func(what string, server netip.AddrPort, after time.Duration, want ...string) {
			t.Helper()
			up.mu.Lock()
			up.dials = nil
			up.mu.Unlock()
			begin := time.Now()
			if got := render(udp(t, s, ask("A elsewhere.test"), server)); !strings.Contains(got, "192.0.2.1") || time.Since(begin) != after {
				t.Errorf("%s: %s after %v", what, got, time.Since(begin))
			}
			if got := up.dialled(); !slices.Equal(got, want) {
				t.Errorf("%s: asked %v, want %v", what, got, want)
			}
		}
		try("the one that the pod asked", kubeDNS, 0, "udp 10.96.0.2:53")
		try("by IPv6", kubeDNS6, 0, "udp [fd00:96::2]:53")
		try("the first of resolv.conf", netip.AddrPort{}, 0, "udp 10.0.0.1:53")
		dead = n[0]
		try("first dead", netip.AddrPort{}, 0, "udp 10.0.0.1:53", "udp [fd00::2]:53")
		refusing = n[1]
		try("two dead", netip.AddrPort{}, 0, "udp 10.0.0.1:53", "udp [fd00::2]:53", "udp 10.0.0.3:5353")
		dead, refusing, silent = netip.AddrPort{}, netip.AddrPort{}, n[0]
		try("first silent", netip.AddrPort{}, 5*time.Second/3, "udp 10.0.0.1:53", "udp [fd00::2]:53")
	})
	s := start(t, Config{})
	if got := render(udp(t, s, ask("A elsewhere.test"), netip.AddrPort{})); got != "SERVFAIL qr rd ra" {
		t.Errorf("without nameservers: %s", got)
	}
	if got := render(udp(t, s, ask("A cart"), netip.AddrPort{})); got != ok+"; cart. 30 A 10.96.0.10" {
		t.Errorf("ours without nameservers: %s", got)
	}
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
		s := start(t, Config{Upstream: up, Knowledge: know(build(append(vectors(), service("big.test", "blue", strings.Join(l, " ")))...))})
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

// A zone transfer has many messages; they all come, and the client's own follow.
func TestTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &upstream{answer: func(_ string, _ netip.AddrPort, raw []byte) [][]byte {
			r := slices.Concat(raw[:2], []byte{0x84, 0}, make([]byte, 8))
			var out [][]byte
			for i := range 5 {
				out = append(out, append(slices.Clone(r), byte(i)))
			}
			return out
		}}
		m := NewMetrics()
		s := start(t, Config{Upstream: up, Metrics: m})
		c, serve := pipe(s, kubeDNS)
		for range 2 { // by the same connection
			writeMessage(c, mustPack(ask("AXFR acme.test")))
			for i := range 5 {
				if raw, err := readMessage(c); err != nil || raw[12] != byte(i) {
					t.Fatalf("message %d: %x, %v", i, raw, err)
				}
			}
		}
		c.Close()
		serve.Wait()
		if got := up.dialled(); len(got) != 1 {
			t.Errorf("connections: %v", got)
		}
		if c := m.series[labels{"axfr", "tcp", "client", "v1"}]; c.requests.Load() != 1 || c.upstream.Load() != 1 || c.failures.Load() != 0 {
			t.Errorf("counted %+v", c)
		}

		// Upstream that says nothing, or is not there: SERVFAIL, then the end.
		for _, up := range []*upstream{{}, {dead: func(string, netip.AddrPort) error { return syscall.ECONNREFUSED }}} {
			s := start(t, Config{Upstream: up})
			c, serve := pipe(s, kubeDNS)
			writeMessage(c, mustPack(ask("IXFR acme.test")))
			raw, err := readMessage(c)
			if err != nil || mustUnpack(t, raw).Rcode != dns.RcodeServerFailure {
				t.Errorf("%x, %v", raw, err)
			}
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after it: %v", err)
			}
			serve.Wait()
		}
	})
}

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
	mu             sync.Mutex
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
func (p *packetConn) Close() error                    { return p.SetReadDeadline(time.Time{}) }

func TestPacketBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, pc := NewMetrics(), newPacketConn()
		start(t, Config{Metrics: m, MaxQueries: 2, Packets: []net.PacketConn{pc}, Nameservers: []netip.AddrPort{kubeDNS}, Upstream: &upstream{}})
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
		s, err := New(Config{Client: blueClient.Info(), Knowledge: know(build(vectors()...)), Upstream: slowly(), Packets: []net.PacketConn{pc}, Nameservers: []netip.AddrPort{kubeDNS}})
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
		s, err := New(Config{Client: blueClient.Info(), Knowledge: know(build(vectors()...)), Upstream: &upstream{answer: func(_ string, _ netip.AddrPort, raw []byte) [][]byte {
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
		server := start(t, Config{Packets: []net.PacketConn{pc}, Listeners: []net.Listener{ln}, Nameservers: []netip.AddrPort{kubeDNS}, Options: Options{IPv6: true}})
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
	h := slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})
	s := start(t, Config{Logger: slog.New(h), Options: Options{IPv6: true}})
	for q, want := range map[string]string{
		"A CART":                                 "query=A domain=cart. result=success endpoints=1",
		"A hl":                                   "query=A domain=hl. result=success endpoints=2",
		"A api.acme.test.blue.svc.cluster.local": "query=A domain=api.acme.test.blue.svc.cluster.local. result=success endpoints=1",
		"A far":                                  `query=A domain=far. result="no records" endpoints=0`,
		"MX cart":                                "query=MX domain=cart. result=forwarded endpoints=1",
		"A elsewhere.test":                       "query=A domain=elsewhere.test. result=forwarded endpoints=1",
	} {
		log.Reset()
		udp(t, s, ask(q), kubeDNS)
		if got, want := log.String(), `level=DEBUG msg="" target=dns src.workload=client src.namespace=blue `+want+"\n"; got != want {
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
