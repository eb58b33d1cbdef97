// Package zds is what a node agent (istio-cni, Cilium's, `ztun agent`) and the node's proxies say to one another: which
// pods of the node are the mesh's, with their network namespaces. ZDS as ztunnel speaks it (spec controlplane 8), over
// a SOCK_SEQPACKET socket of the node; both sides.
//
// What flows through it: requests of the agent, one at a time, each answered by exactly one ack or by an ack with the
// reason why not; namespaces as descriptors, with them. message.go is the wire. The proxy's side: session.go decides
// what a request asks for (pure), conn.go is the socket, client.go joins them and reconnects; cmd/ztun calls it, whose
// pod manager is the Pods. The agent's side: server.go has the pods that the proxies are to have, peer.go says them to
// each; cmd/ztun-agent calls it. What it never does: know how a pod is attached or who chose it, or wait for the
// control plane before it acks.
//
// Decisions:
//   - 2026-11-28: where ztunnel ends its whole process (an Add without workload_info, a Keep after the snapshot, a
//     second SnapshotSent) the message is refused and all else goes on: one confused pod is no reason to take the
//     node's others down. A message that cannot be read is refused and the connection begun anew, as ztunnel does,
//     for the snapshot that comes then makes up for whatever it was.
//   - 2026-11-28: pods that could not be attached stay known over a reconnect (ztunnel forgets them) until they are
//     attached, deleted, or missing from a snapshot.
//   - 2026-11-28: a lost agent makes the node unready as in ztunnel, but only when it stays away (Grace): an agent
//     that is upgraded hangs up and is back within a second, while pods and their connections go on.
//   - 2026-11-28: messages may have 4 KiB (ztunnel: 1 KiB, less than the longest legal names); an ack stays below 1
//     KiB, which is all that istio-cni reads.
//   - 2026-11-29: the server keeps what the proxies are to have and, for each proxy, what it has answered; what is
//     queued for one are pods, not messages. So a slow or stuck proxy costs no more than there are pods, and the last
//     word about a pod is what it hears. It holds one descriptor for each pod.
//   - 2026-11-29: all proxies hear of everything (istio-cni: an Add goes to the newest alone). In an upgrade that is
//     given up the old proxy stays, and it would never have heard of the pods since. One proxy's ack is enough: the
//     others try a refused pod again by themselves.
//   - 2026-11-29: a proxy that does not ack in time loses its connection and begins anew with the snapshot: a late ack
//     would be taken for the next message's. Its pods go on meanwhile.
package zds
