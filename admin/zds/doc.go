// Package zds is the client of a node agent (istio-cni, Cilium's, `ztun agent`) that says which pods of the node are
// the mesh's and hands over their network namespaces: ZDS as ztunnel speaks it (spec controlplane 8), over a
// SOCK_SEQPACKET socket of the node.
//
// What flows through it: requests of the agent, one at a time, each answered by exactly one ack or by an ack with the
// reason why not; namespaces as descriptors, with them. message.go is the wire, session.go decides what a request asks
// for (pure), conn.go is the socket, client.go joins them and reconnects. Who calls it: cmd/ztun, whose pod manager is
// the Pods. What it never does: know how a pod is attached, or wait for the control plane before it acks.
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
package zds
