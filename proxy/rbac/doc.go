// Package rbac decides whether a connection may reach a workload.
//
// What flows through it: a connection's addresses and the peer's identity go
// in, together with the policies that apply to the destination workload (the
// state package selects them); a Verdict comes out. proxy asks at every inbound
// connection and again when policies change.
//
// The package is pure: no clock, no network, no log, no state. What a verdict
// is worth logging is returned in it (dry-run hits), not written by it.
//
// # Order of evaluation
//
// As ztunnel: matching dry-run DENY policies are noted; the first enforced DENY
// that matches rejects; matching dry-run ALLOW policies are noted; without any
// enforced ALLOW policy the connection is allowed; with at least one, one of
// them has to match.
//
// # Boolean structure
//
// A policy is an OR of rules (none: never), a rule an AND of clauses (none:
// always), a clause an OR of matches (none: true), a match an AND of field
// pairs. A match that constrains nothing is false. See Match.
//
// # Decisions
//
// 2026-11-23: an entry that could not be understood (an address with a bad
// prefix length, a string match without a kind) is not dropped as in ztunnel,
// where a list that loses its last entry matches everything. The decoder marks
// the field in Match.Invalid, and the entry then counts as unknown: an ALLOW
// policy needs to match for certain, a DENY policy rejects what possibly
// matches. A damaged policy can so only reject more than its author asked,
// never less.
//
// 2026-11-28: a policy that a workload lists but that is not loaded is left out
// and named in the verdict (Missing): package proxy holds the connection for it
// for a moment and then decides as ztunnel does, without it, or refuses (Strict).
// Until then such a policy rejected. But istiod lists policies that it never
// sends (those converted from a PeerAuthentication that turns out to be UNSET),
// and sends a workload before the policy that it lists.
//
// 2026-11-28: Explain is Evaluate and the first rule of each policy that matches, by the same
// matcher.
package rbac
