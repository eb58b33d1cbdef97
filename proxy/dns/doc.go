// Package dns answers the DNS queries of one pod: names of the mesh from the
// state.View, everything else by asking the nameserver that the pod meant.
//
// What flows through it, in the order in which a query meets the files:
//
//	server.go   datagrams and connections, their bounds, drain
//	query.go    one message: parsed, decided, answered or passed on; counted, logged
//	names.go    which hostnames a name may stand for
//	answer.go   Answer: what the mesh says to a question. Pure
//	special.go  localhost and others that are no network's business
//	message.go  a Decision as the bytes of a reply, within the client's limits
//	forward.go  what is not ours, relayed byte for byte
//	metrics.go  istio_dns_*
//
// Who calls it: cmd/ztun makes one Server per pod. It hands it the sockets of
// the pod's 127.0.0.1:15053 (Config.Packets, Listeners) and what the pod sent to
// port 53 of any address (Server.Query, Server.ServeConn). What it never does:
// open a socket except by Upstream, cache, follow CNAMEs, or read files.
//
// Answers are those of ztunnel (spec controlplane 5, samples/dns.txt).
//
// # Decisions
//
// 2026-11-23: what is not ours is relayed byte for byte to the server that the
// pod asked (to the configured nameservers for queries to 15053), any opcode,
// class, type or EDNS option: ztunnel asks a resolver of its own, which answers
// some names from its own /etc/hosts, loses the authority section and with it
// negative caching, and cannot do UPDATE (NOTIMP). So an upstream's reply keeps
// its own flags, AA and RA among them, and a zone transfer keeps its many
// messages. There is no cache: the client's resolver and CoreDNS have theirs, and
// ours would have to know when an answer depends on who asks.
//
// 2026-11-23: better than ztunnel (its known limitations, spec 12.27): hostnames
// match whatever their case; a negative answer has a SOA record (owner: the name
// asked for, minimum 30 s), so that clients may cache it; error replies have RA
// and, to an EDNS query, OPT; without EDNS a UDP reply has at most 512 bytes (RFC
// 1035; ztunnel 4096); classes other than IN and ANY are not ours; EDNS versions
// other than 0 get BADVERS (RFC 6891; ztunnel echoes the version); the log's
// "endpoints" counts addresses. Not changed: search domains are the three of the
// pod's namespace unless Config names others, and names of single pods of a
// headless service are passed on, to be answered by the cluster's DNS (12.5-6;
// spec 5.7 has it so).
//
// 2026-11-28: the search domains of the daemon's resolv.conf, which kubelet gives
// to pods after the cluster's three, are stripped as those are (ZTUN_DNS_SEARCH for
// others). A pod's own dnsConfig is not read: its resolv.conf is in another mount
// namespace, of processes that may not exist yet. Stripping whatever follows a
// known hostname instead would take names such as example.com.cdn.net away from
// their owners.
//
// 2026-11-28: localhost, invalid (RFC 6761) and loopback's reverse names (RFC 6303)
// are answered here: the nameserver of a pod is a machine of the network, whose
// localhost is another one.
//
// 2026-11-28: datagrams have a rate per pod besides the bound on queries at work
// (Config.Rate; netstack has its own for what is captured): a flood of queries
// that are answered at once takes no places but a processor.
//
// 2026-11-23: istio_dns_upstream_failures counts what ztunnel's resolver calls an
// error: no reply, an rcode other than NOERROR, and NOERROR without any answer.
//
// 2026-11-23: queries that are passed on have a bound of their own, so that a
// dead upstream (5 s each) takes no place from names that we answer at once.
// Beyond it the answer is SERVFAIL at once rather than silence: a resolver then
// goes on to its next server.
//
// 2026-11-23: one UDP socket per forwarded query, so the id needs no rewriting
// and the source port is drawn anew (RFC 5452). A reply must have the id, the
// opcode and the question of the query; others are ignored, not an error.
package dns
