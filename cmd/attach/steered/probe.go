package steered

import (
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/tun/sandwich"
)

// prober tells the node's own connections from others'.
type prober struct {
	attach.Handler
	n *Node
	p *pod
}

// ServePassthrough implements attach.Handler.
func (h prober) ServePassthrough(f proxy.Flow) {
	if ours, err := sandwich.Connecting(h.n.ns, f.Src(), f.Dst()); err != nil {
		h.p.log.Warn("the node's sockets cannot be asked, a probe may be refused", "pod", h.p.spec.Label, "error", err)
	} else if ours {
		h.Handler.ServeProbe(f)
		return
	}
	h.Handler.ServePassthrough(f)
}
