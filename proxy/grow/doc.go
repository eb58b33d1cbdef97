// Package grow makes a goroutine's stack large enough for deep calls in one step, and keeps such goroutines for further
// work.
//
// A fresh goroutine has 2 KiB of stack and doubles it, copying all frames and adjusting every pointer into them, each
// time that a call does not fit. A connection's goroutines do so three times on their way down into gVisor or TLS,
// which was 15 % of the CPU per connection. Grown once, while next to nothing is on the stack, the copies are small.
//
// A connection has three goroutines at each node, most of which live for less than a millisecond: Workers does their
// work on few, whose stacks stay as large as the collector leaves them.
//
// Who calls it: netstack, proxy and proxy/hbone, at the top of what goes deep. What it never does: keep a stack large.
// The garbage collector halves stacks that are used by less than a quarter, so that idle connections stay small.
package grow
