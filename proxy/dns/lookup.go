package dns

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/miekg/dns"
)

// Lookup resolves a name as the pod would by its DNS proxy: a name of the mesh, or one that the configured
// nameservers know. It is how SOCKS5 clients get names resolved. Addresses of both families, IPv4 first; a name
// without any is an error. It takes as long as a query (Query), or until ctx ends.
func (s *Server) Lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	type result struct {
		addrs []netip.Addr
		why   string
	}
	ask := func(qtype uint16) <-chan result {
		c := make(chan result, 1)
		go s.cfg.Panics.Func("a look-up", func() { // ends with the query, which is bounded in time
			var r result
			r.addrs, r.why = s.lookup(host, qtype)
			c <- r
		}, func(err error) { c <- result{why: err.Error()} })()
		return c
	}
	var all []netip.Addr
	var why [2]string
	for i, c := range []<-chan result{ask(dns.TypeA), ask(dns.TypeAAAA)} {
		select {
		case r := <-c:
			all = append(all, r.addrs...)
			why[i] = r.why
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no address for %q: A %s, AAAA %s", host, why[0], why[1])
	}
	return all, nil
}

// lookup asks for one type; without an address it tells why.
func (s *Server) lookup(host string, qtype uint16) (all []netip.Addr, why string) {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(host), qtype)
	m.SetEdns0(4096, false)
	raw, err := m.Pack()
	if err != nil {
		return nil, "not a name (" + err.Error() + ")"
	}
	answer := s.Query(raw, netip.AddrPort{})
	reply := new(dns.Msg)
	switch {
	case answer == nil:
		return nil, "no answer"
	case reply.Unpack(answer) != nil:
		return nil, "an answer that is no DNS message"
	case reply.Rcode != dns.RcodeSuccess:
		return nil, rcodeName(reply.Rcode)
	}
	for _, rr := range reply.Answer {
		var ip netip.Addr
		switch rr := rr.(type) {
		case *dns.A:
			ip, _ = netip.AddrFromSlice(rr.A)
		case *dns.AAAA:
			ip, _ = netip.AddrFromSlice(rr.AAAA)
		}
		if ip.IsValid() {
			all = append(all, ip.Unmap())
		}
	}
	return all, "no records"
}
