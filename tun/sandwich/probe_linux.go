package sandwich

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// ProbeCopy says why this kernel cannot do Copy (cls_u32, act_mirred), by trying it in a namespace made for it.
func ProbeCopy(ctx context.Context) error {
	name := fmt.Sprintf("ztun-probe-%d", os.Getpid())
	ns, err := netns.Create(name)
	if err != nil {
		return err
	}
	defer netns.Remove(name)
	defer ns.Close()
	_, err = Apply(ctx, Plan{[]Step{
		{S, Pair{Dev: "a", MAC: gatewayMAC, Peer: "b", PeerMAC: "02:00:00:00:00:02", MTU: 1500}},
		{S, Copy{From: "a", Dst: netip.MustParseAddr("192.0.2.1"), To: "b", Pref: 1}},
	}}, Namespaces{ns, ns})
	return err
}

// Joined says whether the pod still has the device by which it is captured: its end of S, or the CNI's where that has
// stayed.
func (r Record) Joined(ns Namespaces) (bool, error) {
	there, err := has(ns.S, In)
	if there && err == nil && r.Rules {
		return has(ns.Pod, r.Facts.Dev)
	}
	return there, err
}

func has(ns *netns.NS, dev string) (bool, error) {
	p, err := openPlace(S, ns)
	if err != nil {
		return false, err
	}
	defer p.h.Close()
	l, err := rtnl.Link(p.h, dev)
	return l != nil, err
}

// End deletes the CNI's device in S, with its end in the node.
func End(s *netns.NS, dev string) error {
	p, err := openPlace(S, s)
	if err != nil {
		return err
	}
	defer p.h.Close()
	_, err = Absent{dev}.ensure(nil, p)
	return err
}

// Captured says whether S stands and has both the device towards the network, the CNI's if that is not to stay, and the
// pod's end.
func (r Record) Captured() bool {
	s, err := netns.OpenName(r.Name())
	if err != nil {
		return false
	}
	defer s.Close()
	out := r.Facts.Dev
	if r.Rules {
		out = Out
	}
	in, _ := has(s, In)
	net, _ := has(s, out)
	return in && net
}
