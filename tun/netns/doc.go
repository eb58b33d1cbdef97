// Package netns is the only place in the program that moves a thread into another network namespace, and the only one
// that opens kernel sockets which carry an address that is not the host's own.
//
// What flows through it: references to namespaces as an operator writes them (a path, a name of `ip netns`, a pid)
// become *NS; functions run inside an *NS on a thread of their own (Do); and the mesh's TCP sockets are made here, in
// a chosen namespace and with a chosen source (DialTransparent, ListenTransparent).
//
// Who calls it: tun (a device is created in the namespace in which /dev/net/tun is opened), tun/steer (netlink
// sockets and sysctls belong to a namespace), and the kinds of attachment (HBONE on kernel sockets; the sockets in a
// pod that istio-cni's rules redirect to, which ask here where a connection was going).
//
// WatchAddrs tells when the addresses of our own namespace change; what follows from that is its caller's affair.
//
// Namespaces of our own (tun/sandwich) are made and removed here, under names that `ip netns` knows.
//
// What it never does: it changes no route, and leaves no thread of the Go scheduler in a foreign namespace.
//
// Decisions:
//   - 2026-11-23: Do runs its function in a new goroutine that is locked to its thread. If the thread cannot be
//     brought back, the goroutine ends while locked and the Go runtime throws the thread away. A caller's own
//     goroutine never changes namespace, so that a panic or a Goexit inside the function cannot leave the caller
//     elsewhere. (The runtime starts new threads from a clean template thread as soon as any goroutine is locked, so
//     a thread born during Do does not inherit the namespace.)
//   - 2026-11-23: only socket(2) happens inside the namespace; bind, connect and the wait for the handshake happen
//     outside it. A dial that takes a minute therefore holds no thread.
//   - 2026-11-29: WatchAddrs reads nothing of rtnetlink's messages: that there was one, or that some were lost, is a
//     reason to ask for all addresses, and a list has no order to get wrong.
//   - 2026-11-23: all-digit references are looked up in /var/run/netns first and taken as a pid when nothing of that
//     name is there, since `ip netns add 1` is legal and a name is the more deliberate of the two.
package netns
