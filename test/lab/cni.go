package lab

import (
	"context"
	"fmt"
)

// CNI gives a pod an eth0 as a CNI does: routed, a host's address and an on-link gateway that is nowhere (Calico); or a
// subnet's address and a gateway in it (bridge). mtu is in bytes.
func (w *World) CNI(ctx context.Context, p *Pod, routed bool, mtu int) error {
	host, n := "veth"+p.Name, p.Node
	lines := []string{fmt.Sprintf("link add %s mtu %d type veth peer name eth0 netns %s", host, mtu, p.NS.Name),
		"link set " + host + " up", fmt.Sprintf("route add %s/32 dev %s", p.V4(), host),
		fmt.Sprintf("route add %s/128 dev %s", p.V6(), host), "addr add fe80::ecee/64 dev " + host + " nodad"}
	gateway := n.PodNet4.Addr().Next().String()
	in := []string{"link set lo up", fmt.Sprintf("link set eth0 mtu %d up", mtu)}
	if routed {
		gateway = "169.254.1.1"
		lines = append(lines, "addr add 169.254.1.1/32 dev "+host)
		in = append(in, fmt.Sprintf("addr add %s/32 dev eth0", p.V4()), "route add 169.254.1.1 dev eth0 scope link")
	} else {
		in = append(in, fmt.Sprintf("addr add %s/24 dev eth0", p.V4()))
	}
	in = append(in, "route add default via "+gateway, fmt.Sprintf("addr add %s/128 dev eth0 nodad", p.V6()),
		"route add default via fe80::ecee dev eth0")
	// Without duplicate address detection, which changes what is compared later.
	if err := p.NS.Sysctl("net/ipv6/conf/default/accept_dad", "0"); err != nil {
		return err
	}
	if err := w.IP(ctx, n.NS, lines...); err != nil {
		return err
	}
	return w.IP(ctx, p.NS, in...)
}
