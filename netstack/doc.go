// Package netstack is a pod's TCP/IP in user space: everything that the pod's
// kernel sends into its TUN ends here, and so does the plaintext that the
// network sends to the pod by the node's TUN. It is the only package that
// imports gVisor.
//
// What flows through it, in the order in which packets meet the files:
//
//	rx.go       one packet, read into {headers, payload}; parsed, vouched for or verified
//	pump.go     the reader of a device, which delivers inline
//	uplink.go   the node's device: which pod a packet is for
//	icmpback.go ICMP errors about the mesh's sockets, which go back to the kernel
//	link.go     the device as gVisor's link endpoint
//	hop.go      one gVisor stack and its options, each with its reason
//	late.go     a SYN that meets an older connection of the same ports
//	forward.go  a SYN that nobody knows -> Flow
//	places.go   within which bounds, and whose flow loses its place; lately.go what is remembered for a while
//	flow.go     Accept or Refuse, once; icmp.go builds the refusals that are errors
//	probe.go    whether the application would take a connection, without its noticing
//	dns.go      UDP to port 53 -> DNSQuery, within bounds, and its answer
//	udp.go      UDP sockets to the network, for the queries that are passed on
//	sight.go    what is seen of other UDP and of ICMP; datagram.go their flows, policy and bounds
//	forwarding.go  their way from one device to the other; finish.go what one of the devices left undone
//	way.go      their way where packets cannot be forwarded (package usersock)
//	dial.go     connections that start here: to the application, to the network
//	shortcut.go a connection whose packets pass to another device (shortcuts.go: who has which ports, what is
//	            translated; shortcuttrack.go: what of it is seen)
//	conn.go     an established connection; wait.go how it waits, writeto.go how it lends
//	wheel.go    the stacks' timers, behind their clock (clock.go)
//	memory.go   how large buffers are, by the number of connections and the pod's memory
//	tx.go       the transmit queue and who writes it; merge.go what of a connection's packets there is needless
//	orphan.go   connections of the pod that a killed daemon left
//	stats.go    what was turned away, and where
//
// Who calls it: the composition root makes an Uplink per node and a Stack per
// pod and runs them; the proxy gets Flows and dials. What it never does: decide
// where a flow goes, speak TLS or HTTP, know what a DNS message is, touch
// namespaces or routes, or let a TCP packet pass from one link to the other, but
// for a Shortcut's.
//
// # Locks and goroutines
//
// Per device: a reader (the caller of Run) and a writer. Per gVisor stack:
// GOMAXPROCS segment processors of gVisor's. Per connection: none. Nothing is
// ever written to a device with an endpoint's lock held: WritePackets queues,
// and the device's writer drains. Data is held back before it enters gVisor
// (Conn.Write waits) while the queue is above its soft bound; the hard bound
// drops and counts.
//
// # Decisions
//
// 2026-11-23: Two gVisor stacks per pod, one per hop, rather than one with two
// NICs: gVisor's TCP options are per stack, and the hop to the pod's kernel
// (no loss, 50 us) and the hop to the network want different loss recovery,
// congestion control, TIME_WAIT and buffers. The second is made by the first
// packet or dial that needs it. It also does away with binds that take the
// wrong NIC.
//
// 2026-11-23: RACK and its tail loss probes are off on the hop to the kernel,
// see hop.go for the figures; timers are at least 8 ms, see clock.go.
//
// 2026-11-30: The ports of dials are drawn by us (dialports.go) and timers are in
// a wheel (wheel.go): gVisor's reservation of a port is three maps for as long as
// the connection lasts, and a timer of the runtime's three objects.
//
// 2026-11-23: Tried and not kept, each within the noise or worse (8 rounds of 1
// and 8 streams both ways, interleaved, on a busy 2-core machine): a goroutine
// in Conn.Write drains the queue itself (fewer wake-ups, but what read from the
// kernel and what writes to the TUN no longer overlap: 10-20 % less throughput);
// acknowledgements written at once under the endpoint's lock (+10 % with one
// stream, -20 % with 8 received ones); Atomic writes; relay chunks of 256 KiB.
// Kept: buffers of 512 KiB to 2 MiB instead of 256 KiB to 1 MiB (-15 % CPU).
//
// 2026-11-23: WriteTo lends slices of the receive queue itself (gVisor's Peek)
// and takes them out afterwards: no relay buffer, no copy, and a slow writer
// closes the peer's window. A connection that is closed meanwhile is reset at
// once, and its queue is freed when the writer has returned the slices.
//
// 2026-11-23: Packets above 16 KiB are handed to gVisor in the chunk they were
// read into, smaller ones are copied into a view of their size: taking a pooled
// 64 KiB chunk clears it, and a message of 1 KiB must not pin 64.
//
// 2026-11-23: Source ports are bound exclusively per address (not per 4-tuple):
// for DialApp the address is the client's, for DialPlain the pod's, so 44,616
// connections per client, or per pod, are the bound, and no two connections can
// ever collide on a tuple.
//
// 2026-11-23: Event-driven relays (callbacks instead of WaitRead) were not
// built: a callback would run in gVisor's segment processor with the endpoint
// locked, so it could only wake somebody, which WaitRead does. A parked
// goroutine costs 3 KiB of the 22 KiB that an idle relayed connection takes.
//
// 2026-11-23: ICMP errors about HBONE, which the node's routing sends to the
// uplink with the rest of the pod's packets, are written back to it for the
// kernel. Written back unchanged they would depend on the host's rp_filter, and
// could go round; icmpback.go says what is changed and why.
//
// 2026-11-23: A captured DNS query is no gVisor endpoint: a resolver asks twice
// from one port (A and AAAA), the second question would be queued to the
// first's endpoint. The default handler takes packets one by one, and an answer
// is built and routed by itself; gVisor fragments and reassembles. The sockets
// of DialUDP are gVisor's, one per query that is passed on: the kernel of the
// node has no socket with the pod's address, and a port drawn for each query is
// what protects it from forged answers (RFC 5452).
//
// 2026-11-28: Fragments from the network are bounded by number per second before
// a stack sees them. Each stack's own bound (gVisor's 4 MiB a family) is none for
// a node: first fragments at 3,000 a second made one pod's stack hold 12 MiB, and
// a node has hundreds. Fragments of real traffic come by the dozen.
//
// 2026-11-28: A connection begins with 512 KiB of buffers as long as its pod has
// few; beyond 64 it begins with 64 KiB and earns more (memory.go). While the
// pod's memory is tight all have 32 KiB at most. A buffer that is made smaller
// keeps what is in it, and a window that was told is kept: nothing is lost. One
// that is made larger again has to wake its writer, for gVisor does not.
//
// 2026-11-28: UDP and ICMP of a pod with an Uplink are forwarded from device to
// device as they are, by the two readers: the pod's address is routed to the node's
// TUN, so neither addresses nor ports need a translation, inbound servers work,
// and errors, path MTU, fragments, ECN and traceroute are the kernels' own. The TTL is
// left as it is: the node's kernel, which routes each packet, counts itself as
// the hop and answers for it, as with a veth. A relay by sockets, as for TCP, would have
// had all of that to imitate.
//
// 2026-11-28: Later fragments of datagrams are forwarded without memory if there
// is a flow with their peer: only the first has ports to judge, and without it
// the rest makes nothing. While a query is passed on they go to its stack as
// well. Fragments of a captured query are known by the first one's identification.
//
// 2026-11-28: Flows of datagrams exist for policy (an answer must not be judged as if it
// were a question), for errors (RFC 5508: only about what was sent) and for the
// counters, and cost a map look-up per packet. Their time is counted in ticks of 10 s by
// one timer per pod that has any: no clock is read per packet.
//
// 2026-11-28: A pod without Uplink has a DatagramWay instead, declared here by its
// user: datagrams and errors, not packets, so that an implementation with sockets
// has nothing to parse and nothing to build. Flows, policy and bounds are the same.
// Fragments are put together by the stack first, within the DNS tap's rate; pings
// that need some are not carried.
//
// 2026-11-28: Of ICMP, a stack gets errors alone, and those whole. It would answer pings for every address there is,
// ICMPv6's did: with ZTUN_UDP=off each host in the world seemed to be there.
//
// 2026-11-28: Refused datagrams are answered to the pod by ICMP "prohibited", so that
// connected sockets have an error; to the network nothing is said.
//
// 2026-11-28: A flow is pending until the last act of its verdict, which gives its place back, and Close waits for
// that as well as for OnFlow: before, a verdict on another goroutine could outlive the stack, and a flow that was not
// pending any more could still hold a place or be missing from the counters.
//
// 2026-11-29: Of a connection's packets that wait in a device's queue, FIN joins the last bytes and an acknowledgement
// gives way to what follows it (merge.go): gVisor sends each by itself, and each is a walk through the pod's kernel. To
// hold one back for what may follow was not tried: it takes a timer, and who waits for the acknowledgement waits
// longer. An acknowledgement that repeats the last number stays a packet: dropped before data of the same number, it
// was no duplicate for a peer without SACK to count.
//
// 2026-11-30: Between two pods of one daemon, and to what is not in the mesh, packets pass from device to device once
// the connection has been judged (Shortcut): the reader of one writes the other's. A copy between two pods' stacks
// took 0.9 to 1.2 CPU-s per GB, 0.27 ms and some 20 KiB of memory a connection; this 0.55 to 0.65, 0.13 ms and a
// table entry. The client's SYN is held until the verdict as ever, and goes to the other kernel then, so no port is
// translated and no state of TCP is ours; what is followed (shortcuttrack.go) is for the books, for the end, and for
// the reset of a connection that is cut, whose number is the last that passed. Not for pods that share their device
// with the network (UplinkIsApp): rules there know the proxy's packets by their ports. Not for what comes from the
// network: anybody can send a SYN in anybody's name, and gVisor's handshake keeps those from the application. Options
// of SYNs that would make more of the connection than was judged (Multipath TCP, Fast Open) do not pass.
//
// 2026-11-29: What a DatagramWay carries travels by the dozen. Out: the reader takes packets without waiting
// (tun.TryReader) as long as they are alike, and sends them at once, which the kernel does with one walk through its
// layers (UDP_SEGMENT); a packet that is different, or none, ends that, so nothing is held back. In: whoever received
// writes the device himself if nobody else does: to wake the writer took more time than to write. One datagram of 1,400
// bytes at a time `scripts/bench rootless --case UDP` had 0.36 and 0.57 Gb/s up and down, then 1.0 and 1.07.
package netstack
