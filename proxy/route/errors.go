package route

// Code says why a connection has no route, or why a CONNECT is refused.
type Code uint8

// The codes, with ztunnel's texts (Error.Error).
const (
	SelfCall               Code = iota + 1 // the destination is one of our own ports
	UnknownLocal                           // the proxied workload is not known
	NoHealthyUpstream                      // a service without usable endpoint
	UnknownWaypoint                        // a waypoint that does not exist
	UnknownNetworkGateway                  // a network gateway that does not exist
	NoValidDestination                     // a workload that cannot be addressed
	NoService                              // another network's workload, not called by service
	NoResolvedAddresses                    // DNS failed for a workload's hostname
	EmptyResolvedAddresses                 // DNS had no address for a workload's hostname
	BadMethod                              // not CONNECT
	BadAuthority                           // no or malformed authority
	IPMismatch                             // the authority is not ours to serve
	NoHostname                             // the authority names no service
	NoPort                                 // the service's port has no target here
	NoIPForService                         // PROXY protocol needs a VIP and there is none
)

// Error is a refusal by this package.
type Error struct {
	Code Code
	// Subject is what the text mentions: an address, a hostname, a uid. For
	// IPMismatch the local address; Other is then the requested one.
	Subject string
	Other   string
}

// Error returns ztunnel's text for the error field of the access log.
func (e *Error) Error() string {
	switch e.Code {
	case SelfCall:
		return "attempted recursive call to ourselves"
	case UnknownLocal:
		return "failed to fetch information about local workload: " + e.Subject
	case NoHealthyUpstream:
		return "no healthy upstream: " + e.Subject
	case UnknownWaypoint:
		return "unknown waypoint: " + e.Subject
	case UnknownNetworkGateway:
		return "unknown network gateway: " + e.Subject
	case NoValidDestination:
		return "no valid routing destination for workload: " + e.Subject
	case NoService:
		return "no service for target address: " + e.Subject
	case NoResolvedAddresses:
		return "no ip addresses were resolved for workload: " + e.Subject
	case EmptyResolvedAddresses:
		return "ip addresses were resolved for workload " + e.Subject + ", but valid dns response had no A/AAAA records"
	case BadMethod:
		return "expected method CONNECT, got " + e.Subject
	case BadAuthority:
		return "no valid authority pseudo header: " + e.Subject
	case IPMismatch:
		return "ip mismatch: " + e.Subject + " != " + e.Other
	case NoHostname:
		return "no service or workload for hostname: " + e.Subject
	case NoPort:
		return "requested service " + e.Subject + " found, but cannot resolve port"
	case NoIPForService:
		return "requested service " + e.Subject + " found, but has no IP addresses"
	}
	return "unknown route error: " + e.Subject
}

// Is makes errors.Is(err, &Error{Code: c}) compare by code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && (t.Subject == "" || t.Subject == e.Subject)
}

// Status returns the HTTP status that answers a CONNECT with this error: 400
// for what the peer got wrong, 503 for what we cannot serve.
func (e *Error) Status() int {
	switch e.Code {
	case BadMethod, BadAuthority, IPMismatch:
		return 400
	}
	return 503
}
