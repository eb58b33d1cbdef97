// Package admin is everything that is not traffic: the loop that publishes what is known, and the ways in
// which operators look at it and change it.
//
// What flows through it: sources (files, the control plane) decode and build on goroutines of their own, each with
// what it builds from (the xDS client its state.Builder), and give finished views to the Loop, whose single goroutine
// makes one after the other the *state.View of all, immutable and behind an atomic pointer, and says that it has
// changed. HTTP servers answer on 15000 (admin, loopback), 15020 (metrics) and 15021 (readiness), and the control
// socket takes `ztun pod` requests.
//
// Who calls it: cmd/ztun makes all of it, in ztunnel's start order: NewReadiness early, NewAdmin and
// NewStats bound before anything starts, Serve when there is something to say, Shutdown at the end.
// Workers only call Loop.View and Loop.TryPost.
//
// What it never does: no worker ever waits for the loop, a dump, a scrape or a probe, since these read a
// View or counters and hold no lock that workers take for longer than a copy. Nothing here imports the
// data plane (package proxy): what it has to show comes in as sections, collectors and functions.
//
// HTTP behaviour that all servers share (spec controlplane 6.1): paths match exactly, unknown ones are 404 with a
// line that lists them, a request's header must arrive within 2 s and 8 KiB, connections are bounded and shared among
// sources (package guard), a panic in a handler costs its connection only, and Shutdown lets requests in flight
// finish.
//
// Reading order: loop.go, event.go (knowledge); server.go, http.go, logging.go, profile.go, ready.go (the servers);
// overview.go, meter.go and package page (the page at /); dump.go, encode.go, raw.go, breather.go (/config_dump);
// stats.go, plainnum.go and metrics.go, tokio.go, controlmetrics.go, histogram.go (/metrics); pods.go, podsock.go,
// podclient.go.
//
// Decisions:
//
//   - 2026-11-28: the loop owns one pointer and the order in which it changes, and no Builder. A second source would
//     need the first one's Builder no more than a reader does; and building 100,000 workloads on the loop would keep
//     every closure of an operator's waiting behind it. What the loop is for: publications in one order, each whole
//     or not at all, and a place where a panic or a slow listener shows (LoopStats).
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
//   - 2026-11-23, 2026-11-28: at the bound of connections the greediest source loses the one that has waited
//     longest, so that neither forgotten keep-alive connections nor half-open ones lock out the kubelet's probe.
//   - 2026-11-28: 15000 refuses what a web page may have sent (403; ztunnel answers it), and with
//     ZTUN_ADMIN_TOKEN_FILE wants a token of whoever changes something. Reading takes none: istioctl shows none.
//   - 2026-11-28: / is a page of the node's state, where ztunnel has links alone. Title and table of links stay; of
//     the links those that want POST are buttons of forms whose bodies are empty, which package guard takes from the
//     page itself and from no other.
//   - 2026-11-28: the Meter measures every 5 s whether somebody looks or not: who opens the page in trouble wants
//     what came before. It reads counters, as a scrape does.
//   - 2026-11-23: elements of Accept are trimmed (ztunnel does not). What else differs from ztunnel stands, with
//     reasons, in the tables of differences_test.go.
//   - 2026-11-28: scrapes are compressed by klauspost/compress's gzhttp, with zstd or gzip. ztunnel has br and deflate
//     too, which no scraper asks for alone: Prometheus and its kin ask for gzip, newer ones for zstd.
//   - 2026-11-28: the text of /metrics is made by Prometheus' encoder (expfmt), but not by promhttp's handler, which
//     answers otherwise than ztunnel in six lines: TestWhyNotPromhttp has them, BenchmarkScrape the costs of both.
//   - 2026-11-23: long work of this side pauses for real and does not merely yield (breather): on one
//     processor Go looks at the network every 10 ms only as long as anything is ready to run.
//   - 2026-11-23: /config_dump: one at a time; up to seven wait, for 20 s at most; the rest is told to come
//     again (503, Retry-After). Two scrapes at a time; others wait for 10 s at most.
//   - 2026-11-23: Tokio's names are kept for what Go can answer honestly (RuntimeCollector); per-worker
//     counters are left out. The two roles share one scheduler and so one go_sched_latencies_seconds; what
//     tells them apart is ztun_goroutines{role}, ztun_admin_loop_wait_seconds and
//     ztun_http_request_duration_seconds{server}.
//   - 2026-11-23: client_golang's go_memstats_alloc_bytes is left out: in OpenMetrics it is the same family
//     as the counter go_memstats_alloc_bytes_total, and a family that is there twice is refused.
//   - 2026-11-23: /debug/pprof/heap/profiling always answers true: Go's allocator samples from the start.
//   - 2026-11-28: 404 and 405 say what there is and what is wanted, where ztunnel's bodies are empty, and /logging
//     refuses parameters that it does not know, where ztunnel answers 200 and changes nothing
//     (admin/differences_test.go). Tools look at the status; the text is for people.
package admin
