// Package admin is everything that is not traffic: the loop that owns what is known, and the ways in
// which operators look at it and change it.
//
// What flows through it: sources (files, the control plane, the node agent) send events to the Loop,
// whose single goroutine changes its knowledge and publishes an immutable *state.View behind an atomic
// pointer. HTTP servers answer on 15000 (admin, loopback), 15020 (metrics) and 15021 (readiness), and the
// control socket takes `ztun pod` requests.
//
// Who calls it: cmd/ztun makes all of it, in ztunnel's start order: NewReadiness early, NewAdmin and
// NewStats bound before anything starts, Serve when there is something to say, Shutdown at the end.
// Workers only call Loop.View and Loop.TryPost.
//
// What it never does: no worker ever waits for the loop, a dump, a scrape or a probe, since these read a
// View or counters and hold no lock that workers take for longer than a copy. Nothing here imports the
// data plane (package proxy): what it has to show comes in as sections, collectors and functions.
//
// HTTP behaviour that all servers share (spec controlplane 6.1): paths match exactly, unknown ones are
// 404 with an empty body, a request's header must arrive within 2 s and 8 KiB, connections are bounded,
// a panic in a handler costs its connection only, and Shutdown lets requests in flight finish.
//
// Decisions:
//
//   - 2026-11-23: a panic on the loop is contained (logged, counted, reported to Do's caller and to
//     LoopOptions.Panicked), because the data plane is whole without the loop: it has the last View. A
//     View is published in one step, so a handler that panics publishes nothing.
//   - 2026-11-23: Do waits for a closure that has begun even if its context has ended, so that closures
//     may use the caller's variables; one that has not begun is withdrawn and never runs.
//   - 2026-11-23: prometheus.Registry sorts labels while gathering, also those of unchecked collectors
//     (client_golang 1.25, checkMetricConsistency). Collectors whose label order matters are therefore
//     collected directly (StatsOptions.Ordered) and not registered.
//   - 2026-11-23: whole numbers in the exposition are written as ztunnel writes them (1, not 1.0).
//   - 2026-11-23: a dump that fails after its first byte closes the connection instead of ending the JSON
//     early; before that it is a 500 with the error.
//   - 2026-11-23: at the bound of connections the one idle longest makes room, so that forgotten
//     keep-alive connections cannot lock out the kubelet's probe.
//   - 2026-11-23: elements of Accept are trimmed (ztunnel does not); br and zstd are not offered, which
//     HTTP allows: such clients get identity or gzip.
//   - 2026-11-23: /debug/pprof/heap/profiling always answers true: Go's allocator samples from the start.
package admin
