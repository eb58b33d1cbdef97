// Package socks is the server's half of a SOCKS5 handshake (RFC 1928) as ztunnel speaks it: no
// authentication, CONNECT only.
//
// What flows through it: the first few bytes of a connection to port 15080. Negotiate reads them and says
// what the client wants; when it is known whether that can be had, WriteReply tells the client. Who calls
// it: package proxy. What it never does: resolve names, dial, set deadlines, or read a byte beyond the
// handshake (what follows belongs to the tunnel).
//
// Decisions:
//   - 2026-11-23: protocol violations are answered as by ztunnel: the ten bytes of a reply with code 07,
//     also where RFC 1928 knows better (05 FF for "no acceptable method", 08 for address types). Clients
//     tell those apart from success all the same.
//   - 2026-11-23: success is said when the upstream stands, and failures as what they are (02 to 06).
//     ztunnel says success right after parsing.
//   - 2026-11-23: a domain that is an IP address is that address.
package socks
