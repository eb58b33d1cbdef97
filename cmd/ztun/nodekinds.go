package main

import (
	"context"
	"errors"
	"net/netip"

	"ztun/cmd/attach"
	"ztun/cmd/attach/isolated"
	"ztun/cmd/attach/steered"
)

// nodeKinds is the kind of a node whose pods have an eth0 of a CNI's, or nothing but lo: each is attached its own way.
type nodeKinds struct {
	*isolated.Node // what is asked of the node as a whole, beside what follows
	steered        *steered.Node
}

var _ attach.Kind = nodeKinds{}

// Open implements attach.Kind.
func (k nodeKinds) Open(ctx context.Context) error {
	return errors.Join(k.Node.Open(ctx), k.steered.Open(ctx))
}

// Locate implements attach.Kind: a pod that has an eth0 has its addresses, too.
func (k nodeKinds) Locate(p *attach.Pod) error {
	if len(p.IPs) > 0 {
		return k.Node.Locate(p)
	}
	return k.steered.Locate(p)
}

// Attach implements attach.Kind.
func (k nodeKinds) Attach(ctx context.Context, p attach.Pod, h attach.Handler) (attach.Attachment, error) {
	ns, err := attach.Open(p)
	if err != nil {
		return nil, err
	}
	has, err := steered.HasDevice(ns)
	if err = errors.Join(err, ns.Close()); err != nil {
		return nil, err
	}
	if has || k.steered.Has(p.Place) {
		return k.steered.Attach(ctx, p, h)
	}
	return k.Node.Attach(ctx, p, h)
}

// Clean implements attach.Kind.
func (k nodeKinds) Clean(p attach.Place) error {
	if k.steered.Has(p) {
		return k.steered.Clean(p)
	}
	return k.Node.Clean(p)
}

// Sweep implements attach.Kind.
func (k nodeKinds) Sweep(keep []netip.Addr) error {
	return errors.Join(k.Node.Sweep(keep), k.steered.Sweep(keep))
}

// Leave implements attach.Kind.
func (k nodeKinds) Leave() {
	k.Node.Leave()
	k.steered.Leave()
}

// Close implements attach.Kind.
func (k nodeKinds) Close() error { return errors.Join(k.Node.Close(), k.steered.Close()) }
