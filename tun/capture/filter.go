package capture

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Packet is what a filter knows of a packet. Fragments but the first have no ports.
type Packet struct {
	Src, Dst netip.AddrPort // port 0 where there is none
	Proto    uint8          // of the IP header; behind an IPv6 extension header its number
}

// The protocols that have names.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// Parse reads the first bytes of an IP packet; false if it is none.
func Parse(b []byte) (p Packet, ok bool) {
	var l4 []byte
	var src, dst netip.Addr
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.Proto = b[9]
		if n := int(b[0]&15) * 4; n >= 20 && n <= len(b) && binary.BigEndian.Uint16(b[6:])&0x1fff == 0 {
			l4 = b[n:]
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.Proto, l4 = b[6], b[40:]
	default:
		return p, false
	}
	var sport, dport uint16
	if (p.Proto == protoTCP || p.Proto == protoUDP) && len(l4) >= 4 {
		sport, dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	}
	p.Src, p.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return p, true
}

// Filter says which packets are wanted.
type Filter func(Packet) bool

// MaxFilter bounds the text of a filter, in bytes.
const MaxFilter = 1024

// ParseFilter reads a filter, a few of tcpdump's words:
//
//	tcp, udp, icmp              the protocol (icmp is ICMPv6 as well)
//	host ADDRESS, net PREFIX    either end
//	port PORT                   either end
//	src host ..., dst port ...  one end only
//	not X, X and Y, X or Y, (X) "not" binds most, "or" least
//
// An empty one wants everything.
func ParseFilter(text string) (Filter, error) {
	if len(text) > MaxFilter {
		return nil, fmt.Errorf("a filter of %d bytes: %d at most", len(text), MaxFilter)
	}
	words := strings.Fields(strings.NewReplacer("(", " ( ", ")", " ) ").Replace(text))
	if len(words) == 0 {
		return func(Packet) bool { return true }, nil
	}
	p := &filterParser{words: words}
	f, err := p.or()
	if err == nil && p.at < len(words) {
		err = fmt.Errorf("%q is not expected: \"and\" or \"or\" would be", words[p.at])
	}
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	return f, nil
}

type filterParser struct {
	words []string
	at    int
}

func (p *filterParser) next() string {
	if p.at == len(p.words) {
		return ""
	}
	p.at++
	return p.words[p.at-1]
}

// take reports whether the next word is this one, and takes it.
func (p *filterParser) take(word string) bool {
	if p.at < len(p.words) && p.words[p.at] == word {
		p.at++
		return true
	}
	return false
}

func (p *filterParser) or() (Filter, error) {
	f, err := p.and()
	for err == nil && p.take("or") {
		left := f
		var right Filter
		right, err = p.and()
		f = func(x Packet) bool { return left(x) || right(x) }
	}
	return f, err
}

func (p *filterParser) and() (Filter, error) {
	f, err := p.not()
	for err == nil && p.take("and") {
		left := f
		var right Filter
		right, err = p.not()
		f = func(x Packet) bool { return left(x) && right(x) }
	}
	return f, err
}

func (p *filterParser) not() (Filter, error) {
	no := false
	for p.take("not") {
		no = !no
	}
	f, err := p.term()
	if err != nil || !no {
		return f, err
	}
	return func(x Packet) bool { return !f(x) }, nil
}

func (p *filterParser) term() (Filter, error) {
	side, which := ends(nil), p.next()
	switch which {
	case "(":
		f, err := p.or()
		if err == nil && !p.take(")") {
			err = fmt.Errorf("a parenthesis is not closed")
		}
		return f, err
	case "tcp", "udp", "icmp":
		protos := map[string][2]uint8{"tcp": {protoTCP, protoTCP}, "udp": {protoUDP, protoUDP},
			"icmp": {protoICMP, protoICMPv6}}[which]
		return func(x Packet) bool { return x.Proto == protos[0] || x.Proto == protos[1] }, nil
	case "src":
		side, which = func(x Packet, f func(netip.AddrPort) bool) bool { return f(x.Src) }, p.next()
	case "dst":
		side, which = func(x Packet, f func(netip.AddrPort) bool) bool { return f(x.Dst) }, p.next()
	}
	if side == nil {
		side = func(x Packet, f func(netip.AddrPort) bool) bool { return f(x.Src) || f(x.Dst) }
	}
	value := p.next()
	test, err := endTest(which, value)
	if err != nil {
		return nil, err
	}
	return func(x Packet) bool { return side(x, test) }, nil
}

// ends asks one or both ends of a packet.
type ends func(Packet, func(netip.AddrPort) bool) bool

func endTest(which, value string) (func(netip.AddrPort) bool, error) {
	switch which {
	case "host":
		a, err := netip.ParseAddr(value)
		if err != nil {
			return nil, fmt.Errorf("host %q is no address", value)
		}
		return func(e netip.AddrPort) bool { return e.Addr() == a.Unmap() }, nil
	case "net":
		n, err := netip.ParsePrefix(value)
		if err != nil {
			return nil, fmt.Errorf("net %q is no prefix like 10.0.0.0/8", value)
		}
		return func(e netip.AddrPort) bool { return n.Contains(e.Addr()) }, nil
	case "port":
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("port %q is not from 1 to 65535", value)
		}
		return func(e netip.AddrPort) bool { return e.Port() == uint16(n) }, nil
	case "":
		return nil, fmt.Errorf("it ends where host, net, port, tcp, udp or icmp is expected")
	}
	return nil, fmt.Errorf("%q is no word of it: there are host, net, port, src, dst, tcp, udp, icmp, not, and, or", which)
}
