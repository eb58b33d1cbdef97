package refusal

// Way is the way in which a SYN is turned down.
type Way uint8

const (
	// Reset answers with RST: connect fails with ECONNREFUSED.
	Reset Way = iota
	// HostUnreachable answers with ICMP type 3 code 1 or ICMPv6 type 1 code 3:
	// connect fails with EHOSTUNREACH.
	HostUnreachable
	// NetUnreachable answers with ICMP type 3 code 0 or ICMPv6 type 1 code 0:
	// connect fails with ENETUNREACH.
	NetUnreachable
	// AdminProhibited answers with ICMP type 3 code 13 (EHOSTUNREACH) or ICMPv6
	// type 1 code 1 (EACCES).
	AdminProhibited
	// Silent drops the SYN, as a network that drops packets: the application's own timeout decides, and its next SYN is a
	// new attempt.
	Silent
)

func (w Way) String() string {
	switch w {
	case Reset:
		return "reset"
	case HostUnreachable:
		return "host unreachable"
	case NetUnreachable:
		return "network unreachable"
	case AdminProhibited:
		return "administratively prohibited"
	case Silent:
		return "silent"
	}
	return "unknown"
}
