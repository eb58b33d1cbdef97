// Package isolation holds tests of the promise that the admin side never disturbs the data plane (design section 5),
// where it can be tested without namespaces: a process with one processor that echoes requests, beside the admin
// servers with a big mesh.
//
// What flows through it: the test starts itself again as that process, asks it for dumps and metrics, and times small
// requests meanwhile. It is called by go test alone. It asserts no figure that a busy machine could spoil, only what
// differs by an order of magnitude when the promise is broken; `scripts/bench control` measures the real daemon.
//
// Decision (2026-11-23): one processor (GOMAXPROCS=1), because that is where cmd/ztun runs with little traffic and
// where work that only yields, instead of pausing, keeps every connection waiting for 10 ms (see admin's breather).
package isolation
