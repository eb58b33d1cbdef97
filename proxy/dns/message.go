package dns

import (
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

const (
	// ttl of every record, in seconds (ztunnel's).
	ttl        = 30
	minUDP     = 512   // RFC 1035 section 4.2.1: what every client takes
	maxUDP     = 65507 // what fits an IPv4 packet
	maxTCP     = 65535 // RFC 1035 section 4.2.2: a length of two bytes
	headerSize = 12
)

// reply builds the answer to q that d calls for.
func (d *Decision) reply(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	m.Id, m.Response, m.Opcode = q.Id, true, q.Opcode
	// AD is never set: nothing of ours is signed (RFC 4035 section 3.2.3).
	m.RecursionDesired, m.CheckingDisabled, m.RecursionAvailable = q.RecursionDesired, q.CheckingDisabled, true
	m.Rcode = d.Rcode
	missing := d.Rcode == dns.RcodeNameError && d.Owner != ""
	if len(q.Question) == 1 {
		m.Question = q.Question // as asked, letter by letter
	}
	if o := q.IsEdns0(); o != nil {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(max(o.UDPSize(), minUDP))
		opt.SetDo(o.Do())
		m.Extra = append(m.Extra, opt)
	}
	if d.Rcode != dns.RcodeSuccess && !missing || len(q.Question) != 1 {
		return m
	}
	m.Authoritative = true
	hdr := func(name string, t uint16) dns.RR_Header {
		return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
	}
	if d.Alias != "" {
		m.Answer = append(m.Answer, &dns.CNAME{Hdr: hdr(d.Alias, dns.TypeCNAME), Target: d.Owner})
	}
	for _, a := range d.Addrs {
		if a.Is4() {
			m.Answer = append(m.Answer, &dns.A{Hdr: hdr(d.Owner, dns.TypeA), A: a.AsSlice()})
		} else {
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: hdr(d.Owner, dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	if d.Pointer != "" {
		m.Answer = append(m.Answer, &dns.PTR{Hdr: hdr(d.Owner, dns.TypePTR), Ptr: d.Pointer})
	}
	if len(m.Answer) == 0 {
		// RFC 2308 section 3: what allows a client to cache that there is nothing.
		// The owner is the name itself, as if it were a zone: no client can draw
		// conclusions about its neighbours.
		m.Ns = append(m.Ns, &dns.SOA{Hdr: hdr(d.Owner, dns.TypeSOA), Ns: "ns.ztun.invalid.", Mbox: "nobody.ztun.invalid.",
			Serial: d.Serial, Refresh: ttl, Retry: ttl, Expire: ttl, Minttl: ttl})
	}
	return m
}

// udpLimit is how many bytes the sender of q takes in a UDP packet.
func udpLimit(q *dns.Msg) int {
	if o := q.IsEdns0(); o != nil {
		return min(max(int(o.UDPSize()), minUDP), maxUDP)
	}
	return minUDP
}

// pack writes m in at most limit bytes, leaving out whole records, with TC set,
// if need be. Nil if m cannot be written.
func pack(m *dns.Msg, limit int) []byte {
	m.Truncate(limit)
	m.Compress = true
	b, err := m.Pack()
	if err != nil || len(b) > limit {
		return nil
	}
	return b
}

// errorReply answers a message of which nothing but the header is to be trusted.
func errorReply(raw []byte, rcode int) []byte {
	b := make([]byte, headerSize)
	copy(b, raw[:2])
	b[2] = 0x80 | raw[2]&0x79               // QR; opcode and RD as asked
	b[3] = 0x80 | raw[3]&0x10 | byte(rcode) // RA; CD as asked
	return b
}

// header of a raw message of at least headerSize bytes.
func isResponse(raw []byte) bool { return raw[2]&0x80 != 0 }
func opcode(raw []byte) int      { return int(raw[2]) >> 3 & 0xf }
func rcode(raw []byte) int       { return int(raw[3]) & 0xf }
func truncated(raw []byte) bool  { return raw[2]&2 != 0 }

// rcodeName is how an rcode is written.
func rcodeName(rcode int) string {
	if rcode == dns.RcodeBadVers { // which is BADSIG in a TSIG record, and so to miekg/dns
		return "BADVERS"
	}
	if s, ok := dns.RcodeToString[rcode]; ok {
		return s
	}
	return "RCODE" + strconv.Itoa(rcode)
}

// count is the i-th of the four counts: questions, answers, authority, additional.
func count(raw []byte, i int) int { return int(raw[4+2*i])<<8 | int(raw[5+2*i]) }

// parse reads a message all of whose sections are as long as its header says.
func parse(raw []byte) (*dns.Msg, bool) {
	m := new(dns.Msg)
	if m.Unpack(raw) != nil {
		return nil, false
	}
	for i, n := range []int{len(m.Question), len(m.Answer), len(m.Ns), len(m.Extra)} {
		if n != count(raw, i) {
			return nil, false
		}
	}
	return m, true
}

// typeName is a record type as labels and log have it: upper case, "UNKNOWN" for
// one without a name (there are too many to tell apart).
func typeName(q *dns.Msg) string {
	if len(q.Question) == 0 {
		return "NONE"
	}
	if s, ok := dns.TypeToString[q.Question[0].Qtype]; ok {
		return strings.ToUpper(s)
	}
	return "UNKNOWN"
}
