// Package supervise is a small parent of `ztun proxy`, for containers, where there is no systemd: it holds the
// proxy's listening sockets (package fdstore) and starts it again at once when it was killed, so that nobody is
// refused in between.
//
// What flows through it: one kind of message from the child, with descriptors; signals, on to the child; the ends of
// processes, of the child and of orphans (it is process 1). Who calls it: cmd/ztun's main, before anything else. What
// it never does: look into a socket, or read a configuration beyond the few words that decide whether it is wanted.
//
// Decisions:
//   - 2026-11-29: only what nobody meant is repaired: a signal that we have not passed on, or exit code 2 (a fatal
//     error of the Go runtime) of a proxy that had said READY=1 and not STOPPING=1. Every other end is the proxy's
//     own decision and ours: Kubernetes sees the code and does what it always does.
//   - 2026-11-29: five times within a minute, then it is Kubernetes' turn, which backs off and shows it.
//   - 2026-11-29: the same program and not one of its own: one file in the image, and ztunnel's chart starts it as
//     "ztunnel proxy ztunnel". What package initialisation has touched is given back to the kernel afterwards.
//   - 2026-11-29: should the parent be killed the child ends as well (PDEATHSIG, set anew by the child whenever it has
//     executed itself: EndWithParent): a proxy that nobody watches would hold the ports of its successor. The kernel
//     does it, and not a goroutine that watches the parent: it works for a child that hangs as well.
//   - 2026-11-29: the cgroup's own OOM killer ends all processes of a container (memory.oom.group, which kubelet sets
//     but for singleProcessOOMKill): there nothing is held.
package supervise
