package steer

import (
	"net"

	"ztun/tun/netns"
)

// LoopbackUp brings the loopback device of a pod's namespace up, for whoever has to listen there before the rest of
// the pod's plan stands: without it ::1 does not exist. undo takes it down again if it was down.
func LoopbackUp(ns *netns.NS) (undo func() error, err error) {
	undo = func() error { return nil }
	pl, err := openPlace(Pod, ns)
	if err != nil {
		return undo, err
	}
	defer pl.h.Close()
	lo, err := pl.link("lo")
	if err != nil {
		return undo, err
	}
	if lo.Attrs().Flags&net.FlagUp != 0 {
		return undo, nil
	}
	if err := pl.h.LinkSetUp(lo); err != nil {
		return undo, err
	}
	return func() error {
		pl, err := openPlace(Pod, ns)
		if err != nil {
			return err
		}
		defer pl.h.Close()
		return pl.h.LinkSetDown(lo)
	}, nil
}
