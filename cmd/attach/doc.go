// Package attach is the seam between what one pod consists of for the mesh (its proxy, its DNS proxy, its SOCKS5:
// cmd/ztun) and how the pod is captured and reaches the network. Kind's comment has the table of the four ways; each
// is a package below this one: isolated, steered, redirected and rootless. attachtest is a fifth, in memory, with which
// the daemon's own pod manager runs in tests without root.
//
// What flows through it: pods, which a Kind makes an Attachment of; flows, questions and mesh connections, which an
// Attachment gives to the pod's Handler; dials, which the proxy gives to an Attachment. Who calls it: cmd/ztun, which
// chooses the Kind by mode and knows nothing else of it. What it never does: decide where a connection goes, or
// remember pods over a restart.
//
// stack.go and kernel.go are what the kinds with a TUN have in common, redirect.go what those have that rules
// redirect connections to, accept.go what all with a mesh listener have, keep.go how listeners outlive a killed
// daemon; descriptors.go shares out the process's descriptors among the pods' kernel sockets, place.go tells network
// namespaces apart, orphans.go ends what a killed daemon left in a pod's kernel.
//
// Decisions:
//   - 2026-11-28: attaching has two steps, Attach and Capture. Between them the pod's own servers are made (they need
//     its namespace, and netstack to ask upstream), and nothing leaves the pod before all of it stands.
//   - 2026-11-28: a pod is known by a uid; its name, the path of its namespace and its addresses are attributes. A
//     node agent (ZDS) knows two pods of one name at once while a StatefulSet's replica is replaced, and gives
//     namespaces as descriptors without a path.
//   - 2026-11-28: what is wrong with a request is said with package admin's errors: they decide the status that the
//     control socket answers with, and only who looks at the namespace can tell.
package attach
