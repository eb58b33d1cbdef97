// Package usersock carries a pod's UDP and pings by sockets of the process's own: the way to the network of a pod whose
// packets cannot be forwarded, because nobody routes its address (rootless attachment). It is a NAT whose outside is
// the kernel's port space.
//
// What flows through it: datagrams of the pod's (Send), datagrams and ICMP errors for it (Options.Deliver,
// Options.Fail), as addresses and payload; whoever owns the pod's stack makes packets of them. Who calls it: an
// attachment without an uplink. What it never does: look at policy, at names, or at a packet's headers.
//
// RFC 4787, requirement by requirement: REQ-1, endpoint-independent mapping: one unconnected socket per address and
// port of the pod's, whoever it speaks to. REQ-2, pooling: the addresses are the host's, chosen by its routes. REQ-3,
// no port is shared by two mappings (the kernel's); ports keep neither number nor parity, which is recommended only.
// REQ-5: a mapping ends five minutes after the pod last spoke by it (pings: one, RFC 5508), REQ-6: what the network
// sends keeps none alive. REQ-7 does not apply: the outside is the host's own. REQ-8: filtering is address-dependent,
// the more stringent of the two choices: the host's ports are not the pod's to offer, but for those that its user
// publishes (Publish). REQ-9, hairpinning: the kernel's loopback does it, with the external source. REQ-10, no ALG.
// REQ-11: behaviour does not depend on what is free. REQ-12: ICMP errors come by the sockets' error queue and end no
// mapping. REQ-13: DF is kept, and what is too large is told. REQ-14: the kernel puts fragments together, in any order.
//
// Decisions:
//   - 2026-11-29: datagrams of one size from one peer that are at a socket already are delivered together; UDP_GRO
//     joins only what a device has let it join. Nothing waits for what is not there. Each is a call all the same:
//     recvmmsg would need 64 KiB for each of its messages, because of UDP_GRO, and the costly call is the TUN's.
//   - 2026-11-28: unconnected sockets, not one connected per flow: a connected one would be an address- and
//     port-dependent mapping, which RFC 4787 forbids (REQ-1) and QUIC, WebRTC and games break at.
//   - 2026-11-28: a goroutine per socket, in Go's poller, that holds buffers (130 KiB) only while there is something to
//     read: an idle mapping costs a descriptor and some 3 KiB.
//   - 2026-11-28: the descriptors are the process's, whose TCP calls need some, too: Options.Descriptor asks for each.
//   - 2026-11-28: a ping that the host does not let leave is refused to the pod ("Packet filtered"), not lost.
//   - 2026-11-28: datagrams of one size travel together where the kernel can (UDP_SEGMENT out, UDP_GRO in); where it
//     refuses, they are sent one by one.
//   - 2026-11-29: a published port is a mapping whose socket is bound beforehand and lets everybody in; the bounds of
//     what comes by it are netstack's, of flows. It answers by the address that the host's routes choose: where a host
//     has several, its user publishes at one.
package usersock
