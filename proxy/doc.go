// Package proxy is one pod's data plane: it takes flows whose SYN still awaits a verdict, and mesh
// connections accepted on port 15008, decides where each goes, connects the far side, and only then
// accepts the near side and copies bytes until both directions have ended.
//
// # The story of one connection
//
//  1. Flow. A SYN is held and comes in as a Flow (ServeOutbound, ServePassthrough), or a SOCKS5 request that is one
//     (ServeSOCKS), or a CONNECT on a stream of a peer's tunnel (ServeMesh, serveStream). It becomes a connection
//     (enter, connection.go), which a cut can end from here on (await).
//  2. Decision. Package route says where it goes, from the newest View (decide in outbound.go, receive in
//     inbound.go); what the View does not know is asked for (ondemand.go). The connection is registered with its path
//     in the table, and then, if it is inbound, package rbac says whether it may (admit): in this order, so that a
//     change of policy in between finds it.
//  3. Upstream. The far side is connected: a stream of a pooled tunnel, plain TCP (connect), a tunnel within a
//     gateway's (double.go), or the application (reach). One endpoint that fails may give way to another (retry.go).
//  4. Accept. Only now is the near side told: SYN-ACK, SOCKS5's success, or 200. What failed before is refused instead,
//     with the reason (errors.go: one row per reason, for each who is told).
//  5. Copy. Two goroutines move the bytes, one per direction (carry, copy.go). An end of file ends one direction, a
//     reset both.
//  6. Books. When both have ended, or at the refusal, the metrics are closed and the access line is written (record,
//     books.go), and the connection leaves (leave).
//
// # Words
//
//   - flow: a SYN that is held. Nothing has been answered.
//   - connection: one application connection from its flow or CONNECT to the end of its copying (connection.go). Its
//     path is where it comes from and goes to; the table (table.go) has those that are registered.
//   - Conn: Go's word, one end of a connection: a byte stream of two directions. A connection has two, down (who asked
//     for it) and up (whom we connected to).
//   - to sever a connection: to end it for a reason of ours. To cancel or abort a Conn: to reset it, as cut by us or as
//     lost.
//   - books: what a connection reports. They are opened with an entry, recorded once, and know nothing of its ends.
//   - tunnel: TLS and HTTP/2 between two proxies; its streams carry connections (package hbone). A tunnel's own TCP
//     connection is nobody's connection here: it has no books.
//   - outbound is what the pod's application opens (ztunnel's port 15001), inbound is HBONE on 15008, passthrough is
//     inbound plaintext (ztunnel's port 15006), as in Istio.
//   - denied: turned down before anything was counted. Refused: what the SYN or the CONNECT is answered.
//
// What flows through: Flow (from netstack, by way of the composition root), net.Conn (accepted on
// 15008), and the immutable state.View that the admin side publishes. Who calls it: cmd/ztun makes one
// Proxy per attached pod. What it never does: touch packets, devices, namespaces or files, or wait for
// the admin side (except for a certificate or the pod's own workload record, both bounded).
//
// Decisions:
//   - 2026-11-23: truthful connect. The application's SYN is answered after the upstream stands, so a
//     refusal is a RST and not an accepted connection that is reset (ztunnel cannot do this).
//   - 2026-11-23: a reset is carried through as a reset (CONNECT_ERROR on the tunnel, RFC 9113 8.5);
//     ztunnel turns it into an orderly end. The access line still reports success, as ztunnel's does.
//   - 2026-11-23: live connections are registered before their policy check, so that a policy change
//     between check and registration cannot be missed (as in ztunnel).
//   - 2026-11-23: SOCKS5 requests take the same way as captured flows and are answered when the upstream
//     stands, with the code that fits; ztunnel says success first. Loopback, which only SOCKS5 can ask for, is
//     the pod's own and is dialled there; netstack sends nothing to the network for it, nor to multicast and 0.0.0.0.
//   - 2026-11-23: a connection into another network is named in metrics and logs by what its far end says
//     and proves. If that says nothing, all but its identity is unknown, as with ztunnel.
//   - 2026-11-23: a peer that resets its stream ends the connect to the application that is under way for
//     it. Its access line reports success, as that of any connection that was given up.
//   - 2026-11-23: on-demand look-ups are made for what a decision missed, then it is made again: package
//     route stays pure. They hold a connection up for 5 s at most (1 s where only labels depend on them).
//   - 2026-11-28: what outsiders can take (handshakes, tunnels without a stream, requests, log lines) is shared
//     by package fair; an evicted connection is reset, and said by the report rather than by a line of its own.
//   - 2026-11-28: a connection is counted after its policy check, and what a peer says of itself (baggage) is read
//     only then: a refused peer chooses no label. An admitted one may fill 64 KiB of series, then it counts by
//     identity.
//   - 2026-11-28: a policy that the workload lists and that is not loaded is waited for, up to 3 s from when it was
//     first missed, and then left out as in ztunnel; ZTUN_UNKNOWN_POLICY=deny refuses.
//   - 2026-11-28: RST_STREAM before END_STREAM is a reset at the application whatever its code, and an error in the
//     access line unless the code says that the far application reset (CONNECT_ERROR). ztunnel takes CANCEL and
//     NO_ERROR for an end of file and reports success, so that a download that a policy or a drain has cut looks
//     whole. What we cut is still said by CANCEL, as ztunnel does: a ztunnel peer reports other codes as errors, but
//     leaves its application waiting.
//   - 2026-11-28: the loss of one side ends the other at once (tearAfter), also while the copying waits for a reader
//     who may never read: until then 160 streams kept 590 MiB as long as their application lived.
//   - 2026-11-28: a connection whose look-up has no answer is reset. What is not known may be in the mesh, and
//     before it went out in plaintext.
//   - 2026-11-28: while the SYN is held another endpoint of the service is tried, 3 at most, when one cannot be
//     reached, is somebody else by now, or cannot reach its application (503): not when it refuses (401, 400), nor
//     after a waypoint's answer. An endpoint that failed is avoided for 10 s where there are others. ztunnel tries one.
//   - 2026-11-28: a source address that the mesh knows as another workload's, or that is a link's, was rewritten on the
//     way (istio-cni's SNAT on the same node, masquerading): the connection stands, lists of source addresses in
//     policies are undecided. An address that nobody has is not suspected: peers of other networks come from such.
//   - 2026-11-29: a peer whose own record says that its HBONE arrives at the address it calls from (meshAddresses: a
//     workload without root, on its user's host) is no such case, and the source is that record. One that is
//     called nowhere says so by the same key, its protocol being TCP; without it is suspected where the mesh knows its
//     host as another workload. ztunnel's VMs have their host's address for their own.
//   - 2026-11-28: what an operator sees of connections (history.go) is their own books: a live one points at them, an
//     ended one leaves them in a ring of the pod, without a lock or memory of its own. Those that never stood have
//     another ring, so that a scan does not push out what really happened.
//   - 2026-11-28: a peer of the mesh that is refused is told why (x-ztun-reason, ZTUN_SEND_REASON): the name of a
//     policy and the application's error, 256 bytes at most. It proved who it is, and its operator would find it in
//     our log only.
//   - 2026-11-29: two pods of one daemon are relayed in memory. Identity is proven all the same, by identity.Meet, and
//     what it does not pass is left to the wire rather than refused here: the one place where refusals are worded and
//     counted. A revocation is the end of such a connection's stream at its other side (CANCEL), not of a tunnel. What
//     lies between the pods' devices, a NetworkPolicy of the CNI above all, is not asked: beside a CNI
//     ZTUN_LOCAL_RELAY is off by default.
//   - 2026-11-29: the ends of a connection that is cut are canceled one after the other; what the first end's copying
//     makes of it (an end of file, a reset by the application) is not passed on to the second. In tests
//     a drain at the client's side looked now and then like an orderly end at the server's.
//   - 2026-11-29: before the first state has come, a connection that has waited 5 s for its workload's record is
//     dropped rather than reset: nothing says that it may not be, and its client's next SYN may find what is missing.
//     ztunnel resets it.
//   - 2026-11-29: a direction through which nothing came for 2 to 4 s has no goroutine (rest.go): its source starts it
//     again. Its copying ends at a wait and nowhere else, so that there is nothing to be kept but who is to be called.
//     One timer of the pod's looks for such directions, since one per wait would be paid for by those that are busy.
//     Kernel sockets (rootless, redirected) and the splice's readers do not rest.
package proxy
