// Package sandwich captures a pod that keeps its CNI's eth0, without iptables, nft or eBPF: a namespace of ours (S)
// lies between pod and network. The CNI's eth0 is moved into S, the pod gets one end of a veth of ours, called eth0
// too, with the same MAC, MTU and addresses. In S are the other end (in0), a TUN towards the application (ztun-app),
// one towards the network (ztun-up), all rules, and the kernel's sockets of HBONE. No application ever runs in S, so
// that a rule like "what comes from port 15008 is ours" opens nothing; the node's own namespace is not touched.
//
// What flows through it: Read takes the facts about a pod's eth0 (addresses, routes, neighbours, settings); New turns
// them into the Plan, Undo into the plan that gives everything back. Both are data, print as the commands that a
// person would type, and are compared with golden files. Apply makes a plan true over netlink, step by step, leaving
// alone what is true already. Save writes the facts down before the first step, so that
// Restore can give the pod back without the daemon.
//
// Who calls it: cmd/attach/steered, once per pod. What it never does: look at a packet, or touch the node's namespace.
//
// What goes where (the rules of S, New has them):
//
//	application's TCP, DNS       in0 -> ztun-app -> netstack
//	application's UDP, ICMP      in0 -> eth0, by the kernel
//	answers of nameservers       eth0 -> ztun-up -> netstack, which asks them for the pod's DNS proxy
//	HBONE, port 15008            kernel sockets in S with the pod's address
//	other TCP from the network   eth0 -> ztun-up -> netstack
//	netstack to the application  ztun-app -> in0
//	netstack to the network      ztun-up -> eth0
//	connections from before      in0 <-> eth0, by the kernel, each by its five-tuple
//	anything else                blackhole
//
// Traps that shaped it:
//   - UDP and ICMP have rules of their own that let them through, and the rest ends: "all but TCP" would let a TCP
//     packet with many extension headers through, which the kernel's dissector takes for something else.
//   - ICMP errors have three readers: the sockets in S (path MTU of HBONE), the pod, and netstack (path MTU of
//     plaintext). They stay local in S, and tc copies them (Copy). S answers no echo itself.
//   - the pod's IPv4 address is in0's and not eth0's, its IPv6 address is no device's but a proxy entry on eth0: ARP
//     and neighbour answers are to stop when the pod goes. A CNI's DEL deletes the pod's eth0, ours, and in0 with it;
//     the CNI's own stays in S, which the owner of S then has to delete.
//   - a path MTU that HBONE's sockets learn is remembered with their route. IPv6 forwards by it, and S would itself
//     refuse larger datagrams, by errors to an address that for it lies on the network: what is forwarded has a table
//     of its own (15005), in which nothing is learnt, and the router tells the pod.
//   - the TUNs are persistent, and below each route into one there is a blackhole: with the daemon dead packets end.
//   - a device that changes its namespace loses addresses, routes, neighbours and settings, and its number where that
//     is taken: all of them are in Facts.
//   - since the application's UDP to port 53 is netstack's, so is what comes from port 53 (2026-11-29; seen on a
//     cluster: answers went to the pod, and no name outside the mesh resolved). A nameserver in the pod that is asked
//     from port 53 has a port below 1024 and goes on. Rules has the same in the pod, before what lets UDP past.
//
// Limits: a fragmented IPv6 ping does not reach the pod (tc looks for ICMPv6 behind the fixed header), nor a
// nameserver's fragmented answer the DNS proxy (later fragments have no ports). One address of a family per pod.
// Multicast and the CNI's layer 2 do not reach the pod, protocols other than TCP, UDP and ICMP are dropped. One more
// hop of TTL each way.
//
// Decisions:
//   - 2026-11-28: a package beside steer and not more kinds of step in it: steer's plans change a namespace that is
//     others' and remove nothing foreign; in S everything is ours, and a foreign rule there is removed (OnlyRules).
//   - 2026-11-28: S is a name below /var/run/netns: it has to outlive the daemon, and `ip -n ztun-... rule` is how an
//     operator looks.
//   - 2026-11-29: where eth0 must not move (Rules), S stands beside the pod, with two veths to it, rather than that the
//     sockets of HBONE live in the pod: a rule for their answers would open the application's ports to whoever calls
//     from port 15008, unless every port of a range were occupied. What is let past S is named there, too.
//   - 2026-11-29: traps of Rules. ARP asks for a route without a protocol, so that the pod's address is a proxy entry;
//     IPv6 learns the path MTU of datagrams for such a route; what is forwarded and looks like an application's own
//     (also a nameserver's answer to netstack, at a port that the application has, too) is dropped by early demux; an
//     IPv4 socket bound to eth0 leaves by it when a rule says blackhole.
//   - 2026-11-29: of IPv6 each protocol is closed by its number, so that all of which an ordinary process has
//     sockets have to be named (L2TP was not). What CAP_NET_RAW sends to eth0 itself no rule sees, and a filter of
//     tc's would hold only who does not ask for PACKET_QDISC_BYPASS: it is said in docs/steered.md instead.
package sandwich
