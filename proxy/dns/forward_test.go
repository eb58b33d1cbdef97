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
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

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
	opts.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"},
		&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")}}
	chaos := ask("TXT version.bind")
	chaos.Question[0].Qclass = dns.ClassCHAOS
	notify := new(dns.Msg).SetNotify("acme.test.")
	dso := []byte{1, 2, 6 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 0, 58, 152, 0, 0, 58, 152} // RFC 8490 keepalive
	unknown := ask("A elsewhere.test")
	unknown.Question[0].Qtype = 65280
	strange := []byte("a reply that is none: \xff\xff\xff")
	for name, raw := range map[string][]byte{
		"trailing bytes": odd, "UPDATE": mustPack(update), "options": mustPack(opts), "class CHAOS": mustPack(chaos),
		"NOTIFY": mustPack(notify),
		"DSO":    dso, "private type": mustPack(unknown), "ANY": mustPack(ask("ANY cart")), "MX": mustPack(ask("MX cart")),
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
				m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET,
					Ttl: 7}, A: net.IPv4(192, 0, 2, 1)}}
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
		{"silence", func(string, netip.AddrPort, []byte) [][]byte {
			return nil
		}, nil, "SERVFAIL qr rd ra", 1, "forwarding failed (10.96.0.2:53: timeout)", 5 * time.Second},
		{"no way", nil, syscall.ENETUNREACH, "SERVFAIL qr rd ra", 1,
			"forwarding failed (10.96.0.2:53: network is unreachable)", 0},
		{"refused", func(string, netip.AddrPort, []byte) [][]byte {
			return [][]byte{nil}
		}, nil, "SERVFAIL qr rd ra", 1, "forwarding failed (10.96.0.2:53: EOF)", 0},
	} {
		for _, tcp := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				if tcp && tc.name == "noise" {
					return
				}
				m := NewMetrics()
				var log bytes.Buffer
				s :=
					start(t,
						Config{Metrics: m, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
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
				if r := strings.Replace(render(got), "Elsewhere", "elsewhere", 1); r != strings.Replace(tc.want, "Elsewhere",
					"elsewhere", 1) || time.Since(begin) != tc.after {
					t.Errorf("%s, %s: got %s after %v, want %s after %v", tc.name, protocol, r, time.Since(begin), tc.want, tc.after)
				}
				c := m.series[labels{"a", protocol, "client", "v1"}]
				if c == nil || c.requests.Load() != 1 || c.upstream.Load() != 1 || c.failures.Load() != tc.failures ||
					c.total != 1 || c.sum != tc.after.Seconds() {
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
		n := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:53"), netip.MustParseAddrPort("[fd00::2]:53"),
			netip.MustParseAddrPort("10.0.0.3:5353")}
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
		own := netip.MustParseAddrPort("192.0.2.53:53")
		s := start(t, Config{Upstream: up, Nameservers: n, Own: own.Addr()})
		try := func(what string, server netip.AddrPort, after time.Duration, want ...string) {
			t.Helper()
			up.mu.Lock()
			up.dials = nil
			up.mu.Unlock()
			begin := time.Now()
			if got := render(udp(t, s, ask("A elsewhere.test"), server)); !strings.Contains(got, "192.0.2.1") ||
				time.Since(begin) != after {
				t.Errorf("%s: %s after %v", what, got, time.Since(begin))
			}
			if got := up.dialled(); !slices.Equal(got, want) {
				t.Errorf("%s: asked %v, want %v", what, got, want)
			}
		}
		try("the one that the pod asked", kubeDNS, 0, "udp 10.96.0.2:53")
		try("by IPv6", kubeDNS6, 0, "udp [fd00:96::2]:53")
		try("the first of resolv.conf", netip.AddrPort{}, 0, "udp 10.0.0.1:53")
		try("an address that stands for us", own, 0, "udp 10.0.0.1:53")
		c, serve := pipe(s, own)
		up.dials = nil
		writeMessage(c, mustPack(ask("A elsewhere.test")))
		if back, err := readMessage(c); err != nil || len(back) == 0 {
			t.Errorf("by TCP: %x, %v", back, err)
		}
		c.Close()
		serve.Wait()
		if got := up.dialled(); !slices.Equal(got, []string{"tcp 10.0.0.1:53"}) {
			t.Errorf("by TCP: asked %v", got)
		}
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
		if c := m.series[labels{"axfr", "tcp", "client", "v1"}]; c.requests.Load() != 1 || c.upstream.Load() != 1 ||
			c.failures.Load() != 0 {
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

// tcpUpstream reaches one nameserver by a socket of the kernel's.
type tcpUpstream struct {
	upstream
	addr string
}

func (u *tcpUpstream) DialTCP(context.Context, netip.AddrPort) (net.Conn, error) {
	return net.Dial("tcp", u.addr)
}

// A client that ends its direction after asking for a transfer gets all of it; so does one while the server drains.
func TestTransferGoesOn(t *testing.T) {
	for _, drain := range []bool{false, true} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		proceed := make(chan struct{})
		go func() {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			raw, _ := readMessage(c)
			for i := range 3 {
				writeMessage(c, append(slices.Concat(raw[:2], []byte{0x84, 0}, make([]byte, 8)), byte(i)))
				<-proceed
			}
		}()
		s := start(t, Config{Upstream: &tcpUpstream{addr: ln.Addr().String()}})
		front, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer front.Close()
		c, err := net.Dial("tcp", front.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		served, err := front.Accept()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { s.ServeConn(served, kubeDNS) })
		writeMessage(c, mustPack(ask("AXFR acme.test")))
		for i := range 3 {
			if raw, err := readMessage(c); err != nil || raw[12] != byte(i) {
				t.Fatalf("drain %v: message %d: %x, %v", drain, i, raw, err)
			}
			if i == 0 && drain {
				wg.Go(func() { s.Shutdown(context.Background()) })
			} else if i == 0 {
				c.(*net.TCPConn).CloseWrite()
			}
			time.Sleep(50 * time.Millisecond) // for whoever would cut it
			proceed <- struct{}{}
		}
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("drain %v: at the end: %v", drain, err)
		}
		wg.Wait()
	}
}
