package dns

import (
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// special answers questions about names that mean the same on every host, so that they never reach the network:
// localhost and what is below it is loopback, of which there is nothing but addresses, invalid does not exist (RFC
// 6761 sections 6.3 and 6.4), and loopback's addresses are called localhost (RFC 6303 sections 4.3 and 4.4). False
// for all other names.
func special(q dns.Question, v6 bool) (Decision, bool) {
	if q.Qclass != dns.ClassINET && q.Qclass != dns.ClassANY {
		return Decision{}, false
	}
	name := normal(q.Name)
	d := Decision{Owner: dns.Fqdn(name), Result: resultSuccess}
	switch {
	case within(name, "localhost"):
		if q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY {
			d.Addrs = append(d.Addrs, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
		}
		if v6 && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY) {
			d.Addrs = append(d.Addrs, netip.IPv6Loopback())
		}
	case name == "1.0.0.127.in-addr.arpa" || name == reverse6:
		if q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY {
			d.Pointer = "localhost."
		}
	case within(name, "127.in-addr.arpa"), within(name, "invalid"):
		if name != "127.in-addr.arpa" {
			d.Rcode = dns.RcodeNameError
		}
	default:
		return Decision{}, false
	}
	if len(d.Addrs) == 0 && d.Pointer == "" {
		d.Result = resultNoRecords
	}
	return d, true
}

// reverse6 is the reverse name of ::1.
var reverse6 = "1." + strings.Repeat("0.", 31) + "ip6.arpa"

// within reports whether name is domain or below it.
func within(name, domain string) bool {
	if name == domain {
		return true
	}
	_, ok := trimDomain(name, domain)
	return ok
}
