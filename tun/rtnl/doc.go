// Package rtnl has what those who change links, addresses, routes and rules over netlink have in common: the socket in
// a namespace, questions that are asked again, and our types against the library's.
//
// Who calls it: tun/steer and tun/sandwich, which know what is to become true. What it never does: change anything.
//
// Decisions:
//   - 2026-11-29: the two have plans of their own (steer takes back what it did, sandwich gives back what it found),
//     and came to have these functions twice.
package rtnl
