// Package tuntest has TUN devices in memory, for tests of packages that use tun.Device and want neither root nor a
// kernel.
//
// What flows through it: a Pair's two devices stand for the two ends of a link: what one writes the other reads,
// header and all, in order, through a queue of bounded length. With offload super-packets pass as they do through a
// TUN device; without, headers must be zero. A writer that breaks the rules of tun.Device gets the error that the
// kernel would give, so that tests find it.
//
// Who calls it: tests, of netstack above all. What it never does: segment, checksum or drop, unless it is told to
// drop what does not fit the queue.
//
// Decision, 2026-11-23: a full queue makes the writer wait, as a real device does for its writer, since lost packets
// would make most tests wait for retransmissions; Options.Drop gives the other behaviour, the kernel's towards us.
package tuntest
