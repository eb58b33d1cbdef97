// Package fair shares what outsiders can take: handshake places, pending connections, descriptors, log
// lines. Its rule is one for all of ztun: every such resource has a bound; at the bound the greediest
// source loses its oldest place and the others go on; a counter and a log line that is itself bounded say
// who was turned away.
//
// What flows through it: Ledger gives out places of a bounded resource, Rate is a budget per second, Lines bounds log
// lines, Budget counts bytes (which are not turned away: whoever holds them takes less when it is tight), Report
// counts and says what the bounds did. Who calls it: whoever owns a resource (netstack, the proxy, the admin servers,
// the control plane); the composition root makes one Report and lends it. What it never does: know what the resource
// is, start goroutines, wait.
//
// Decisions:
//   - 2026-11-28: evict the oldest place of the greediest source rather than refuse the newcomer. An honest
//     handshake ends within milliseconds, a stuck one is old; so also when each of an attacker's places
//     claims another source, what goes is what has waited longest, and a newcomer always gets in.
//   - 2026-11-28: the newcomer counts as if it had its place already. A source that would become the
//     greediest makes room itself.
//   - 2026-11-28: memory is a Budget and no Ledger: a connection whose bytes were taken away would be broken. At
//     three quarters windows and buffers become small, flows go on slowly, and what comes on top is bounded by the
//     number of connections, which has bounds of its own. What sockets hold is weighed twice a second (a count per
//     packet would cost every packet); what tunnels hold is counted as it comes.
//   - 2026-11-28: a source is what an outsider cannot multiply for free: an IPv4 address, an IPv6 /64 (Group).
package fair
