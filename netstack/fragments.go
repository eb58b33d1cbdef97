package netstack

import (
	"net/netip"
	"time"

	"ztun/proxy/fair"
)

// Fragments from the network wait in a pod's stack for the rest of their packet: in gVisor up to 4 MiB in each
// family, for 30 to 60 s. That bounds one pod, and is nothing where a stranger sends first fragments to all pods of a
// node. Real fragments are rare: TCP sends none (its segments fit the path), and an answer of DNS has a few. So they
// are bounded by their number per second before a stack sees them, for each pod and for all: what waits at any time
// is then at most fragmentsBurst and a minute's worth, 4,400 packets, 7 MB of Ethernet's size.
const (
	podFragments      = 16 // per second to one pod
	podFragmentsBurst = 64
	fragmentsPerS     = 64 // per second to all pods of the node
	fragmentsBurst    = 512
	fragmentPods      = 4096 // pods told apart
)

// fragmentBudget is the reader's: one goroutine calls it.
type fragmentBudget struct {
	pods *fair.Rate[netip.Addr]
	all  *fair.Rate[struct{}]
}

func newFragmentBudget() *fragmentBudget {
	return &fragmentBudget{
		pods: fair.NewRate[netip.Addr](podFragments, podFragmentsBurst, fragmentPods),
		all:  fair.NewRate[struct{}](fragmentsPerS, fragmentsBurst, 1),
	}
}

// allow takes one fragment for a pod. The pod is asked first: what is refused to one costs the others nothing.
func (b *fragmentBudget) allow(pod netip.Addr, now time.Time) bool {
	return b.pods.AllowAt(pod, now) && b.all.AllowAt(struct{}{}, now)
}
