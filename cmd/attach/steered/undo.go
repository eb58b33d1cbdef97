package steered

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"ztun/tun/sandwich"
)

// Undo gives back all pods that there is a record of but those with an address of keep. It needs no daemon.
func Undo(records string, keep []netip.Addr) error {
	all, err := sandwich.Records(records)
	errs := []error{err}
	for _, r := range all {
		if !slices.ContainsFunc(r.Facts.Addrs, func(a sandwich.Addr) bool {
			return slices.Contains(keep, a.Prefix.Addr())
		}) {
			errs = append(errs, r.Restore(context.Background(), records))
		}
	}
	return errors.Join(errs...)
}
