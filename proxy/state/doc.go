// Package state is what the mesh looks like: workloads, services, policies.
//
// What flows through it: the admin loop owns a Builder and feeds it what xDS or
// the local file say; Build publishes a View. Proxies read the current View
// (through a pointer that the loop swaps) for every connection, DNS query and
// policy check; the admin server reads it for dumps. A View never changes, so
// nobody waits for anybody, and a dump of 100,000 workloads costs the data
// plane nothing.
//
// The package decides nothing about routes (package route) or access (package
// rbac), and knows no file format and no wire format.
//
// # Sharing between Views
//
// Every index is a table (table.go): 1,024 maps in 32 branches. A Builder
// copies only the maps that it writes to since the last Build; all others are
// shared with the Views that went out before. Endpoints of a service are
// rebuilt at Build, once per service that was touched.
//
// # Decisions
//
// 2026-11-23: which endpoints a service has is derived from the workloads
// that name it, whether the service is known or not and whatever their health.
// ztunnel moves endpoints between a staged list and the service and forgets
// those that it filters out. So here a service that comes back finds its
// endpoints, and one that turns to ALLOW_ALL its unhealthy ones; staged
// endpoints are simply those of services that do not exist.
//
// 2026-11-23: CIDR services sit in a table by masked prefix: a lookup is one
// probe per prefix length in use, an update replaces the entry (ztunnel appends
// and keeps answering from the oldest).
//
// 2026-11-23: two services of one namespace may share a VIP without
// overwriting or deleting each other; for a client of that namespace the
// canonical one is preferred, then the later.
//
// 2026-11-23: a policy that a workload lists but that is not loaded appears in
// its policies as rbac.Missing, so that whoever decides can wait for it. ztunnel
// skips it, so that the workload is open until the policy arrives.
package state
