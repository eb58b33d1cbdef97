// Command ztun is Istio's node proxy over a TUN device and a userspace TCP/IP stack. See README.md.
//
// What flows through it: the environment (config.go is its only reader), signals, and the commands of `ztun pod`.
// daemon.go is the composition root: it makes everything in start order and ends it in ztunnel's order of shutting
// down; admin.go and worker.go are what it makes of the two runtimes. pod.go says what one pod consists of; pods.go
// attaches pods, remembers them over restarts and lets go of those that vanish; kind.go chooses how they are attached
// (package cmd/attach), which nothing else here knows. Nobody imports it. What it never does: look at a packet or a
// byte of a connection, or decide where one goes.
//
// Decisions:
//   - 2026-11-23: a daemon that ends leaves the pods' devices, addresses and routes where they are, and pods.json
//     says whose they are. Until the next daemon takes them over, a pod's packets end in a device that nobody reads:
//     closed, not open. A pod is known again by device and inode of its namespace, since a path or a process id may
//     mean another one by then.
//   - 2026-11-23: the control socket, whose lock tells two daemons with one ZTUN_STATE_DIR apart, is bound before
//     anything of the node is touched, and served last.
//   - 2026-11-23: GOMAXPROCS moves between one and the worker threads plus one (procs.go): processors that the work
//     does not need cost up to a quarter of the CPU per byte.
//   - 2026-11-23: a draining pod waits for its stack as well: what was copied in full may not have been read in full.
//   - 2026-11-29: where nobody else can serve the pods before this process has ended (isolated, steered: a TUN has one
//     reader), a daemon that is told to go serves new connections and names on while older ones finish (serveOn). Near
//     the deadline, or when none is left but brief ones, it takes nothing new: SYNs are dropped and not refused, and
//     the successor answers the client's next one; names are the last to end. Before, 5 of 1,941 requests beside a
//     rolling restart failed. ztunnel stops at once, since its successor listens beside it (SO_REUSEPORT), and so do
//     redirected pods. A handover between two processes (a TUN with two queues and eBPF that tells flows apart, or
//     packets passed on) would save the time between them; it needs a protocol, both versions' state on one node, and
//     two DaemonSet pods on the node's network and its ports. Where that time is too long (a DaemonSet on a busy node
//     took 8.5 s once, when a client's kernel sends its fourth SYN after 7), a successor that is started before
//     (maxSurge), is ready without the pods and takes them when the lock of ZTUN_STATE_DIR is free would do, without a
//     protocol: its readiness must not be asked for at a port of the node's then.
//   - 2026-11-28: pods are known by uid, which is namespace/name where nobody gave one; two of one name can be there
//     at once, and get two labels in logs and metrics.
//   - 2026-11-28: explain asks the daemon and not a copy of its state: what it says is what the daemon does. capture
//     holds a flow's first packet for up to 0.3 s, until the decision about it is known and can be its comment.
//   - 2026-11-29: `ztun proxy` as process 1 is the parent of one that is the proxy (kept.go, cmd/supervise) and holds
//     its listening sockets (admin/fdstore): kill -9, a fatal error of the Go runtime or the node's OOM killer had
//     refused whoever connected in the 0.35 to 1.4 s until the container was back; now the proxy starts again within
//     30 ms and serves who has waited. On an orderly end the sockets leave the store before anybody stops accepting,
//     so that nothing changes beside a successor (maxSurge). The parent has 7 MB, of which 3.6 are its own. Ready is
//     the next life as ever: with the agent's snapshot, with whose pods their sockets are taken over. What no pod
//     takes by then, or within a minute, is closed. A passing on of connections that stand is not tried: their TLS
//     and HTTP/2 are the dead process's.
//   - 2026-11-29: while there is work the collector lets 24 MiB of garbage lie (procs.go): connections that come and
//     go cost a fifth less. Afterwards it is as thrifty as before, so that neither the base nor idle connections grow.
package main
