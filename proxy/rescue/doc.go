// Package rescue keeps a panic of the data plane from being everybody's: it ends the connection, or the pod, that it
// came from, and the daemon with all its other pods goes on.
//
// What flows through it: functions on their way into goroutines and timers. Who calls it: whoever starts a goroutine
// of the data plane (proxy, proxy/hbone, proxy/dns, netstack, cmd/ztun's pods); test/layers has a test that finds
// those who do without. What it never does: decide what a panic ends. That is the starter's to say.
//
// Decisions:
//   - 2026-11-28: recover, although state may be half changed. What a goroutine was in charge of is thrown away with
//     it: the whole tunnel, the pod's whole stack. A daemon that dies takes down all the pods of a node, and a packet
//     that kills it once can do so again.
//   - 2026-11-28: a lock that was held at the panic is taken over (Seize) rather than every lock being released by
//     defer: the data path's locks are taken per frame.
//   - 2026-11-28: what cannot be caught: goroutines that a library starts by itself. gVisor runs a few per stack
//     (segment processors); a panic in one of them still ends the process. Its forwarder's goroutines, its timers and
//     its work on our reader are caught.
package rescue
