// Package fdstore has another process hold listening sockets, so that they outlive this one: should it be killed, the
// kernel goes on completing handshakes, and the next life serves what waits in the queues. Without, whoever connects
// in between is refused.
//
// The protocol is systemd's: sd_notify(3) with FDSTORE=1, FDSTOREREMOVE=1 and FDNAME, over the socket that
// $NOTIFY_SOCKET names; at the start sd_listen_fds(3) with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES. The far side is
// systemd itself (FileDescriptorStoreMax=) or, in a container, our own supervisor (package cmd/supervise).
//
// What flows through it: descriptors, out with Keep and back with Take in the next life, under names that say which
// namespace, network, address and port they are for (Name). Who calls it: cmd/attach, which opens listeners, and
// cmd/ztun, which says when nobody else will come for what is left (Sweep) and when this process is about to end
// (Clear). What it never does: look into a socket; who takes one back sees whether it fits (tun/netns).
//
// Decisions:
//   - 2026-11-29: one way and without answers, as the protocol is: a store that is full keeps nothing more and says
//     so in its own log. What has to have happened is waited for with a barrier (sd_notify_barrier(3)): a listener
//     that the store still holds while we close ours would take connections that nobody accepts.
//   - 2026-11-29: no library: those that there are (coreos/go-systemd's SdNotify) send no descriptors and know no
//     barrier, and open the socket anew for each message.
//   - 2026-11-29: our supervisor gives its socket as a descriptor called "notify" and not by a path: file systems of
//     containers are read-only, and an abstract name belongs to a network namespace, the node's mostly, where anybody
//     may send to it. Nor can it say LISTEN_PID, as nothing of ours runs between fork and exec: ZTUN_SUPERVISED, with
//     its own process id, says whom the descriptors are for.
package fdstore
