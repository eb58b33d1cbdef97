// Package route decides where a connection goes.
//
// What flows through it: for each outbound connection proxy asks Decide with
// the current state.View, who is calling and what was called, and gets a
// Decision: plain TCP, HBONE, or HBONE within HBONE through a network gateway,
// with address, authority and the identities to expect. For each CONNECT that
// arrives it asks Inbound, for each plaintext connection Passthrough.
//
// The package is pure: it reads the View and its arguments and nothing else, not
// even a random number generator (Question.Rand is the caller's). It does not
// dial, resolve names, log or judge policy. What needs DNS comes back as a
// Decision with a Hostname, to be completed by Decision.Resolved.
//
// Reading order: decide.go (an outbound connection from above), gateway.go
// (waypoints and network gateways), balance.go (one endpoint of a service),
// address.go (one address of a workload), inbound.go, authority.go, errors.go.
// The cases in testdata/*.yaml say the same in examples.
//
// # Decisions
//
// 2026-11-23: choices are made exactly as ztunnel makes them, in one or two
// scans without allocation; services whose endpoints are all equal are drawn by
// index.
//
// 2026-11-23: inbound validation consults weighted waypoints as well as the
// primary one. ztunnel looks at the primary only, so that a canary waypoint is
// refused with 400.
//
// 2026-11-23: a service without endpoints is refused also where a workload has
// the same address. ztunnel passes such connections through in plaintext.
//
// 2026-11-23: an authority may hold a name of letters, digits, '-', '_' and '.'
// only, and a port of digits only. ztunnel's URI library lets user names and
// more through, none of which a mesh peer sends.
//
// 2026-11-23: a Decision spells out authority and identities when asked for
// them, so that deciding costs no memory.
//
// 2026-11-23: what was looked up in vain is told to callers that ask
// (Question.Missed), so that they can look it up elsewhere and decide again.
//
// 2026-11-28: a decision can be traced (Question.Trace) for whoever wants to know why. The
// trace is written by the deciding itself, so that it cannot tell another story; without
// one it costs a comparison here and there.
package route
