// Package backoff says how long whoever keeps a connection to a control plane or a node agent waits before the next
// one: the pauses of ztunnel (spec controlplane 2.5, 8.3). When to wait is decided by its callers, admin/xds and
// admin/zds, each of which knows what a good end of a connection is. It never sleeps.
//
// Decisions:
//   - 2026-11-29: one home for the doubling and its jitter, which admin/zds had copied from admin/xds.
package backoff
