package proxy

import (
	"context"
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
// asked for it once, and try is called again with what is known then. It gives up silently after wait:
// what is known decides, as it does with on-demand look-ups off.
func (p *Proxy) asking(ctx context.Context, wait time.Duration, view *state.View, try func(view *state.View, missed *string)) {
	if p.o.Demand == nil {
		try(view, nil)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var asked []string
	for {
		missed := ""
		try(view, &missed)
		if missed == "" || len(asked) == maxDemanded || slices.Contains(asked, missed) {
			return
		}
		asked = append(asked, missed)
		if err := p.o.Demand(ctx, missed); err != nil {
			p.o.Log.Debug("on-demand look-up failed", "key", missed, "error", err)
			return
		}
		view = p.o.Knowledge.View()
	}
}

// peer is the workload that a connection comes from, or nil.
func (p *Proxy) peer(ctx context.Context, view *state.View, addr netip.Addr) (w *state.Workload) {
	network := p.o.Config.NetworkName
	p.asking(ctx, labelWait, view, func(view *state.View, missed *string) {
		if w = view.WorkloadByAddr(network, addr); w == nil && missed != nil {
			*missed = state.NetworkAddress{Network: network, Addr: addr}.String()
		}
	})
	return w
}
