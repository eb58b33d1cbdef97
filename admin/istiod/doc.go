// Package istiod is the way to a control plane: an address, the roots that prove it, the token that proves us, the
// headers that go with every call. It makes gRPC channels and knows none of the services that are called on them.
//
// What flows through it: Options come in from cmd/ztun (New checks them); Dial reads the roots and gives a channel
// that connects when first used; Context gives one call its metadata. Who calls it: admin/xds and admin/ca, for the
// state and for certificates. What it never does: call anything, keep a channel, retry, watch files (ca.Remote does),
// watch addresses (Moved is told), start a goroutine of its own, read the environment, or log or put into an error a
// byte of a token.
//
// # Transport (spec/controlplane.md 2.1)
//
// HTTP/2 over TLS 1.3 (TLS12 allows 1.2; PQC leaves one group, X25519MLKEM768), ALPN h2, SNI the host of the address
// (none for an IP literal), TCP connect within 5 s, TCP keepalive 300 s / 75 s / 9, PING every 30 s with 10 s to
// answer while a call is open. No compression, retries, health checks, service configuration, HTTP proxy or idle
// pings (istiod answers those with GOAWAY too_many_pings). The server's chain is verified first, then its name: the
// address's host, or else AltHostname; both are compared with the certificate's names, and an IP literal with its IP
// addresses.
//
// # Decisions
//
//   - 2026-11-23: a root file that is missing, unreadable or without a certificate makes Dial fail, with an error that
//     names file and cause; New only warns, since the file may come. ztunnel takes a path that does not exist at
//     start for PEM text and then trusts nothing, which looks like a broken server (spec 12.21 for the rest).
//   - 2026-11-23: tokens are trimmed of white space at their end; ztunnel sends a file's newline and fails (spec
//     12.23).
//   - 2026-11-23: PQC beats TLS12: TLS 1.2 has no such group.
//   - 2026-11-23: a client certificate (ClientCert, ClientKey) is ours, for `ztun control`; istiod asks for none.
//   - 2026-11-23: 10 s for TCP and TLS together: a server that accepts and says nothing is one that is down.
//   - 2026-11-29: a connection from an address that the host has lost is closed by whoever is told of the loss (Moved),
//     beneath gRPC, whose users see what they see when a server dies. A shorter PING would tell it later, and istiod
//     takes those that come more often for an attack.
package istiod
