package e2e

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"ztun/test/lab"
)

// nameserver answers every A query for a name below example. with 192.0.2.77, but for nowhere.example, and counts.
type nameserver struct{ asked atomic.Int64 }

func newNameserver(t testing.TB, ns *lab.NS, ips []netip.Addr) *nameserver {
	t.Helper()
	s := &nameserver{}
	for _, ip := range ips {
		address := lab.HostPort(ip, 53)
		l, err := ns.Listen("tcp", address)
		must(t, err)
		var pc net.PacketConn
		must(t, ns.Do(func() (err error) { pc, err = net.ListenPacket("udp", address); return err }))
		for _, srv := range []*dns.Server{{Listener: l, Handler: s}, {PacketConn: pc, Handler: s}} {
			started := make(chan struct{})
			srv.NotifyStartedFunc = func() { close(started) }
			go srv.ActivateAndServe()
			<-started
			t.Cleanup(func() { srv.Shutdown() })
		}
	}
	return s
}

func (s *nameserver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	s.asked.Add(1)
	m := new(dns.Msg)
	m.SetReply(q)
	switch name := q.Question[0].Name; {
	case name == "nowhere.example." || !dns.IsSubDomain("example.", name):
		m.Rcode = dns.RcodeNameError
	case q.Question[0].Qtype == dns.TypeA:
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5},
			A: net.IPv4(192, 0, 2, 77)}}
	}
	w.WriteMsg(m)
}

// udpFrom is a UDP socket of a namespace.
func udpFrom(ns *lab.NS, dst netip.AddrPort) (c *net.UDPConn, err error) {
	err = ns.Do(func() (err error) { c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(dst)); return err })
	return c, err
}

// ask sends one query for an A record and waits for its answer.
func ask(ns *lab.NS, server netip.AddrPort, name string) (time.Duration, error) {
	c, err := udpFrom(ns, server)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	q := new(dns.Msg)
	q.SetQuestion(name, dns.TypeA)
	start := time.Now()
	conn := &dns.Conn{Conn: c}
	if err := conn.WriteMsg(q); err != nil {
		return 0, err
	}
	m, err := conn.ReadMsg()
	if err == nil && len(m.Answer) == 0 {
		err = errors.New("an answer without records")
	}
	return time.Since(start), err
}

// flood sends queries, one in eight of them garbage, at a rate, and throws the answers away; the channel tells at the
// end how many.
func flood(ctx context.Context, t testing.TB, ns *lab.NS, server netip.AddrPort, perSecond int) <-chan int {
	t.Helper()
	c, err := udpFrom(ns, server)
	must(t, err)
	var messages [][]byte
	for _, name := range []string{"shop.default.svc.cluster.local.", "shop.", "elsewhere.example.",
		"a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r.s.t.u.v.w.x.y.z.example."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeMX} {
			q := new(dns.Msg)
			q.SetQuestion(name, qtype)
			b, err := q.Pack()
			must(t, err)
			messages = append(messages, b)
		}
	}
	// A name that points to itself, and one that is cut short.
	loop := append(append([]byte{}, messages[0][:12]...), 0xc0, 0x0c, 0, 1, 0, 1)
	messages = append(messages, loop, messages[0][:20])
	sent := make(chan int, 1)
	var work sync.WaitGroup
	work.Go(func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := c.Read(b); err != nil && errors.Is(err, net.ErrClosed) {
				return
			}
		}
	})
	go func() {
		n := 0
		start := time.Now()
		for ctx.Err() == nil {
			for due := int(time.Since(start).Seconds() * float64(perSecond)); n < due; n++ {
				c.Write(messages[rand.IntN(len(messages))])
			}
			time.Sleep(time.Millisecond)
		}
		c.Close()
		work.Wait()
		sent <- n
	}()
	return sent
}
