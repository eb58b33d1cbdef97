package route

import (
	"net/netip"

	"ztun/proxy/state"
)

// workload chooses the address of a workload that is to be reached at port:
// the very address that was called if it is the workload's own; else the first
// that the service's families allow, of the called family if there is one. A
// workload without usable address is reached by its hostname or, in another
// network, through its gateway; then addr is not valid. The error is
// NoValidDestination if there is neither.
func (r *resolver) workload(w *state.Workload, s *state.Service, target netip.AddrPort, port uint16) (upstream, error) {
	up := upstream{workload: w, service: s, port: port, prefer6: target.Addr().Is6()}
	if w.HasAddress(target.Addr()) {
		up.addr = target.Addr()
		return up, nil
	}
	families := state.FamiliesAutomatic
	if s != nil {
		families = s.IPFamilies
	}
	for _, a := range w.Addresses {
		if !families.Accepts(a) {
			continue
		}
		if a.Is6() == up.prefer6 {
			up.addr = a
			return up, nil
		}
		if !up.addr.IsValid() {
			up.addr = a
		}
	}
	if !up.addr.IsValid() && w.Hostname == "" && w.NetworkGateway == nil {
		return upstream{}, &Error{Code: NoValidDestination, Subject: w.UID}
	}
	return up, nil
}
