// Package grow makes a goroutine's stack large enough for deep calls in one step.
//
// A fresh goroutine has 2 KiB of stack and doubles it, copying all frames and adjusting every pointer into them, each
// time that a call does not fit. A connection's goroutines do so three times on their way down into gVisor or TLS,
// which was 15 % of the CPU per connection. Grown once, while next to nothing is on the stack, the copies are small.
//
// Who calls it: netstack and proxy/hbone, at the top of what goes deep. What it never does: keep the stack large. The
// garbage collector halves stacks that are used by less than a quarter, so that idle connections stay small.
package grow
