// Package steer brings a pod's traffic to ztun's TUN devices, by routes, rules and sysctls alone: no packet filter,
// ever.
//
// What flows through it: the composition root describes a node or a pod (NodeConfig, PodConfig); NodePlan and PodPlan
// turn that into a Plan, which is data: a list of steps that prints as the equivalent `ip` and `sysctl` commands and
// is compared with golden files. Apply carries a plan out in the namespaces given, Undo takes it back, Sweep removes
// what a killed daemon left of pods that are no more.
//
// Who calls it: the composition root, once per daemon for the node and once per pod, always with the plan's TUN
// devices open.
//
// What it never does: it creates or deletes no device and no namespace, looks at no packet, and removes or changes no
// route, rule or address that is not its own. Its own are known by their routing protocol number (Protocol), which is
// also how a later daemon recognizes an earlier one's.
//
// Applying is idempotent: a step that is already true is left alone, so a plan can be applied over what a killed
// daemon left, and over itself. If a step fails, the steps that this call has made true are taken back, in reverse,
// and the error names the thing and its likely cause.
//
// Traps that shaped it (design.md section 2):
//   - the node's TUN stays when the daemon ends, with the routes to it, and swallows what is sent to the pods: whoever
//     calls them waits for the next daemon. The local routes are by a device that ends with the daemon (LiveTUN).
//   - fail closed: each pod has an `unreachable` route of high metric in the node's main table below the one to the
//     node's TUN. Without it, should somebody remove the TUN, packets for the pod would follow the node's default route
//     and bounce between it and its gateway.
//   - the table of captured HBONE traffic has one `local` route per attached pod; everything else on port 15008 finds
//     nothing there and falls through to main.
//   - the sockets of the mesh are the kernel's, but ICMP errors about their packets (host unreachable, packet too
//     big) are addressed to the pod and come out of the node's TUN like everything that is not the mesh's port.
//     netstack writes them back; a rule for what comes in by the TUN, is ICMP and carries netstack's mark delivers
//     them to the kernel. Other ICMP of the stacks' passes from pod to pod by the TUN as ever.
//   - link-local addresses, router solicitations and duplicate address detection are turned off on our devices:
//     nobody is there to answer.
//
// Limits: with IPv6, forwarding must be turned on for the whole namespace, and a namespace that takes its own default
// route from router advertisements then loses it unless its accept_ra is 2: a node that does so is to be set up for
// it by its owner. An application's port between MeshPortMin and MeshPortMax cannot be reached by a plaintext client
// whose own port is 15008: to the rules that is an answer to a call of the mesh's.
//
// Decisions:
//   - 2026-11-29: until then the node's TUN went with the daemon, and the local routes stayed: who called a pod between
//     two lives of the daemon was told "no route to host", or refused at the mesh's port.
//   - 2026-11-23: Undo leaves ip_forward, IPv6 forwarding and `lo up` as they are: we cannot know who else has come
//     to rely on them since, and a restarted daemon does not know what was there before. Per-device sysctls go with
//     their device.
//   - 2026-11-28: `ztun node clean` may, since an operator says so: Former is written down before Apply, and Restore
//     gives back what still has our value.
//   - 2026-11-23: a route or rule in our place that is not ours is an error, never replaced.
//   - 2026-11-28: the rule for answers matches the mesh's port and the local ports of our own calls. By the source
//     port alone, anybody who calls from port 15008 reached the node's own services at a pod's IPv6 address, and
//     answers from port 15008 of hosts outside the mesh never reached the pod's stack. The range is fixed and not the
//     kernel's ip_local_port_range: IP_LOCAL_PORT_RANGE (Linux 6.3) narrows that one and cannot leave it, and the
//     node's own sockets are not to compete for it.
//   - 2026-11-28: a process of the node's own gets its source address for port 15008 by a rule for sockets without
//     one, rather than by `src` on the local routes: the kernel deletes a route when its `src` is no longer the
//     node's (a new DHCP lease), and the pod would be cut off.
//   - 2026-11-23: in a pod's namespace a default route by another device is refused: it would be a way around the
//     mesh (isolated mode means lo and the TUN only).
package steer
