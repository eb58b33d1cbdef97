// Package isolated attaches pods whose namespace has nothing but lo and a TUN of ours: everything that they send
// comes out of that TUN, everything that is sent to them is routed to the node's TUN or, for the mesh's port, to the
// node's sockets.
//
// What flows through it: node.go is what all pods share (the node's TUN, rules and sysctls, by tun/steer's NodePlan;
// the listener on 15008, whose accepted connections mesh.go gives to the pod that has their local address); pod.go is
// one pod's namespace, device and routes (PodPlan); package attach's KernelTCP is how it gets out. Who calls it:
// cmd/ztun, by attach.Kind. What it never does: look at what a connection carries.
//
// Decisions:
//   - 2026-11-23: a daemon that ends leaves the pods' devices, addresses and routes where they are. Until the next
//     daemon takes them over, a pod's packets end in a device that nobody reads: closed, not open.
//   - 2026-11-29: the listener is not held for the next daemon (admin/fdstore), should this one be killed: it is all
//     pods', and who had waited in it was reset before its pod was attached. A SYN that comes meanwhile has no answer
//     and comes again, since the pods' routes to the listener end with the daemon (steer.LiveTUN).
//   - 2026-11-23: a pod that reaches itself through a service is dialled by the kernel in its own namespace: the
//     kernel drops packets from a device that carry one of its own addresses as source.
package isolated
