package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"ztun/proxy/state"
)

// Bounds of on-demand look-ups (spec controlplane 2.3).
const (
	demandWait  = 5 * time.Second // for what decides where a connection goes: as long as for the pod's own record
	labelWait   = time.Second     // for what only names the peer in metrics and logs
	maxDemanded = 4               // per connection: destination, waypoint, its network's gateway, and one to spare
)

// asking calls try with view. If on-demand look-ups are on and try misses a key, the control plane is
// asked for it once, and try is called again with what is known then. An error means that something which try
// missed is not known to be in the mesh or not: what try made of it must not be used, or what belongs in the
// mesh goes out in plaintext.
func (p *Proxy) asking(ctx context.Context, wait time.Duration, view *state.View,
	try func(view *state.View, missed *string)) error {
	if p.o.Demand == nil {
		try(view, nil)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var asked []string
	for {
		missed := ""
		try(view, &missed)
		if missed == "" || slices.Contains(asked, missed) {
			return nil
		}
		if len(asked) == maxDemanded {
			return fail(kindLookup, fmt.Errorf("%q is one name more than a connection may ask for, after %q", missed, asked))
		}
		asked = append(asked, missed)
		if err := p.o.Demand(ctx, missed); err != nil {
			return fail(kindLookup, err)
		}
		view = p.o.Knowledge.View()
	}
}

// peer is the workload that a connection comes from, or nil.
func (p *Proxy) peer(ctx context.Context, view *state.View, addr netip.Addr) (w *state.Workload) {
	network := p.o.Config.NetworkName
	_ = p.asking(ctx, labelWait, view, func(view *state.View, missed *string) { // labels are not worth a connection
		if w = view.WorkloadByAddr(network, addr); w == nil && missed != nil {
			*missed = state.NetworkAddress{Network: network, Addr: addr}.String()
		}
	})
	return w
}
