// Package steered attaches pods that keep their CNI's eth0, by tun/sandwich: a namespace of ours (S) lies between pod
// and network.
//
// What flows through it: node.go is the kind (what the kernel can do, which records of earlier lives there are);
// pod.go one pod: S, its two TUNs, netstack between them, the listener of HBONE in S; package attach's KernelTCP is
// how it gets out; watch.go puts back what somebody has changed, and ends S when the pod's end has gone; probe.go
// tells the kubelet's connections by the node's own sockets. Who calls it: cmd/ztun, by attach.Kind. What it never
// does: touch the node's namespace.
//
// Decisions:
//   - 2026-11-28: whether a connection is a probe is asked of the kernel: the node has a socket of exactly these
//     addresses and ports. A source address alone proves nothing, anybody can write one into a SYN; and whoever comes
//     from elsewhere in the node's name (masquerading, another node) has no socket here. A pod with hostNetwork has:
//     it is the node for this purpose, as for the kubelet's own probes.
//   - 2026-11-29: of the node's sockets only one that waits for the answer to its SYN counts: by one that stands, or
//     that the kernel remembers for a minute after its end, somebody else's SYN of the same addresses and ports would
//     reach the application.
//   - 2026-11-28: without tc's mirred UDP and ICMP go by netstack as an isolated pod's do, rather than ICMP alone being
//     copied: that is a way that is tested, and policy is asked about UDP then.
//   - 2026-11-28: a connection from before the pod was captured goes on by the kernel until it ends, at most 256. Which
//     one it is, the number of the application's file says (2026-11-29): by addresses and ports alone a client might
//     close it and connect again, past policy, as often as it likes. One that the application has closed stays until
//     the kernel has sent what was written.
//   - 2026-11-29: a daemon that is about to end leaves peers' SYNs to port 15008 without an answer: first its
//     listener is deaf (netns.Deafen), then S has no route for them to its sockets (sandwich.Live), which goes with a
//     daemon that is killed as well. A listener that is closed would have S's kernel refuse peers until the next daemon
//     listens, and who has no other endpoint would refuse its client. One that the
//     store of descriptors holds (admin/fdstore) has their next SYNs as soon as a daemon has the route again.
//   - 2026-11-29: with a node agent this is the daemon's only kind: on Kubernetes the node got the TUN, rules and port
//     15008 of pods without a device, of which there is none. Its own metrics are not offered over HBONE then; istiod
//     tells nobody to ask a pod of the node's network that way.
//   - 2026-11-29: ZTUN_STEERING=rules leaves eth0 in the pod. A pod that was captured the other way stays so until it
//     is removed: to change over would leave a moment in which it is not captured.
package steered
