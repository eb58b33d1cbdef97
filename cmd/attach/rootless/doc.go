// Package rootless attaches a workload without any privilege: its namespace, which a user namespace of the user's
// own owns, has nothing but lo and a TUN of ours, and everything that leaves it leaves by the user's own sockets, with
// the host's address.
//
// What flows through it: as in package isolated, but for the node, which has no part in it: no device, no rule, no
// listener. Who calls it: cmd/ztun's `ztun run`, from within the user namespace. What it never does: need root.
//
// Limits: peers find the workload's mesh port, a listener on the host's address, by a record that says where it is
// (meshAddresses). Peers see the host's address as the source and the workload's identity; ztun's own say in a line
// that the two do not belong together, where the mesh knows the host as another workload and the record does not say
// that this one is there. A client that has no address which the namespace could answer (it is on the
// host's loopback, or of the other family) is seen as a stand-in for it. UDP and pings leave by sockets
// as well (package usersock), so that what is neither, and an ICMP error of the workload's, goes nowhere; pings need
// net.ipv4.ping_group_range of the host to let them.
//
// Decisions:
//   - 2026-11-28: the daemon itself lives in the user namespace and in the host's network namespace, rather than a
//     child handing descriptors to a parent outside: in there it may enter the workload's namespace as a root daemon
//     enters a pod's, and all of it (devices, routes, listeners on the workload's loopback) is the same code. The
//     kernel lets a thread go in and not out again; netns.NS.Do gives such a thread up.
//   - 2026-11-29: where the record says that HBONE arrives is where we listen, unless Options name a port: one place
//     to say it. An address that is none of the host's (it is behind a NAT, or a VM's) is listened for on all.
//   - 2026-11-29: a published port hands connections to the proxy as any plaintext that arrives, so that policy judges
//     them; it does not answer for the application: a client is accepted by the kernel before that is known.
package rootless
