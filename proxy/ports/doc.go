// Package ports has the numbers of the ports that the mesh agrees on, which are ztunnel's. Those that can be configured
// have their default here. Whoever needs one takes it from here, so that it is said once.
//
// Decisions:
//   - 2026-11-29: below proxy, though tun and netstack take numbers from it, too: the folders at the top are fixed, and
//     like fair, grow, refusal and rescue it imports nothing of ours that is not such a leaf, so that no floor comes to
//     know another by it.
package ports
