// Package redirected attaches pods as ztunnel does: somebody else (istio-cni, Cilium's agent) has put rules into the
// pod's namespace that redirect its connections to the ports 15001, 15006 and 15053 there, and ztun listens on those
// and on 15008. With it ztun stands in ztunnel's DaemonSet under an istio-cni that does not know the difference.
//
// What flows through it: accepted connections, as flows, with the destination that the kernel remembers
// (SO_ORIGINAL_DST); dials by sockets of the pod's namespace, marked so that the rules let them pass, towards the
// application with the client's own address (IP_TRANSPARENT), whose answers the rules bring back. Names are asked at
// 127.0.0.1:15053, which the pod's DNS proxy serves on any kind. Who calls it: cmd/ztun. What it never does: write a
// rule, an address or a route anywhere; without the rules nothing is captured.
//
// Limits, which are those of REDIRECT: the kernel has accepted an application's connection before anybody could say
// whether there is somebody at the other end, so connect always succeeds and a refusal is a reset right after it; a
// DNS question does not say which nameserver was meant; UDP and ICMP are nobody's business here; there is no device
// to look at (`ztun capture`). While no daemon runs, what is redirected is refused; after a kill it waits, where the
// sockets are held (admin/fdstore).
//
// Decisions:
//   - 2026-11-28: a connection to a listener itself, not redirected, is reset: carried on, to the pod's own address, it
//     would come back as the next one, without end. ztunnel goes round once and answers by its rule on ports; that
//     rule (proxy/route) stands here as well, for what was redirected.
//   - 2026-11-28: the listeners close when the daemon begins to leave, with the pods still attached: with a second
//     daemon in the same namespaces (maxSurge; SO_REUSEPORT shares connections out) the kernel gives it all new ones.
//     What waits in a listener's queue then is served first.
//   - 2026-11-29: before it closes them it has the descriptor store let go of them, and waits for that: a listener
//     that is open and that nobody accepts at would get its share of the connections beside the successor's.
//   - 2026-11-28: a client's address that cannot be worn (another family than the pod's address, its own address)
//     leads to a connection from the pod's own, as in ztunnel, and is no error.
package redirected
