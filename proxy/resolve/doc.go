// Package resolve is a cache for the names of workloads that have a hostname instead of an address
// ("on-demand DNS").
//
// What flows through it: a hostname goes in, its addresses of both families come out, from the cache or
// from the system's resolver. Who calls it: proxy, through its Resolver seam; the composition root makes
// one for all pods, since it resolves in the daemon's own network namespace. What it never does: answer
// the pods' DNS queries (package dns does), choose among addresses, or run anything of its own: look-ups
// run in a caller's goroutine.
//
// Decisions:
//   - 2026-11-23: the system's resolver (net.Resolver) keeps TTLs to itself, so an answer is kept for 30 s,
//     an answer that there is no such name for 5 s, and a failure not at all. ztunnel keeps what the TTL says.
//   - 2026-11-23: callers for the same name share one look-up. If the one who makes it gives up, another
//     takes over.
package resolve
