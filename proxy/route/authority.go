package route

import (
	"net/netip"
	"strconv"
	"strings"
)

// Authority is the parsed :authority of a CONNECT: an address, or a hostname.
type Authority struct {
	Addr netip.Addr // valid, or else Host is set
	Host string
	Port uint16
}

// String prints the authority as it would be sent.
func (a Authority) String() string {
	if a.Addr.IsValid() {
		return netip.AddrPortFrom(a.Addr, a.Port).String()
	}
	return a.Host + ":" + strconv.Itoa(int(a.Port))
}

// AddrPort returns the address; not valid for a hostname.
func (a Authority) AddrPort() netip.AddrPort { return netip.AddrPortFrom(a.Addr, a.Port) }

// maxHost is the longest name that DNS allows, with a final dot.
const maxHost = 254

// ParseAuthority parses "ip:port", "[v6]:port" or "host:port". The port is
// required, decimal, at most 65535. IPv4 in IPv6 clothes becomes IPv4. The
// error is an *Error with BadAuthority.
func ParseAuthority(s string) (Authority, error) {
	bad := func() (Authority, error) { return Authority{}, &Error{Code: BadAuthority, Subject: quoted(s)} }
	i := strings.LastIndexByte(s, ':')
	if i <= 0 {
		return bad()
	}
	host := s[:i]
	port, ok := parsePort(s[i+1:])
	if !ok {
		return bad()
	}
	if host[0] == '[' {
		if len(host) < 4 || host[len(host)-1] != ']' {
			return bad()
		}
		a, err := netip.ParseAddr(host[1 : len(host)-1])
		if err != nil || !a.Is6() || a.Zone() != "" {
			return bad()
		}
		return Authority{Addr: a.Unmap(), Port: port}, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if !a.Is4() { // IPv6 has to be in brackets
			return bad()
		}
		return Authority{Addr: a, Port: port}, nil
	}
	if !validHost(host) {
		return bad()
	}
	return Authority{Host: host, Port: port}, nil
}

func parsePort(s string) (uint16, bool) {
	if s == "" || len(s) > 8 {
		return 0, false
	}
	n := 0
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int(s[i]-'0')
	}
	return uint16(n), n <= 65535
}

func validHost(s string) bool {
	if s == "" || len(s) > maxHost {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		default:
			return false
		}
	}
	return true
}

// quoted makes what a peer sent fit for an error text: bounded, one line.
func quoted(s string) string {
	if len(s) > 300 {
		s = s[:300] + "..."
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}
