// Package load makes traffic with ordinary sockets, as an unmodified program would, and accounts for every byte of it.
//
// A server (Serve) answers on one port; the first line that a client sends says what it wants (echo, hold, sink,
// source, xfer, rand, whoami, report). Clients (Transfer, HalfClose, Random, ConnectRate, OpenLoop, Idle, Bulk,
// DialOnce) return plain structs that marshal to JSON. cmd/ztload is the command over both, to be run inside a pod's
// namespace. It is called by test/e2e and test/bench; it knows nothing of ztun, of namespaces or of HBONE.
//
// Payload is a pattern (Pattern): every 64 bytes begin with Marker, so that a capture with short snap lengths shows
// whether any payload crossed a wire in the clear, and the rest depends on seed and position, so that a lost, doubled
// or moved byte is found.
//
// Decisions:
//   - 2026-11-23: one port with a first line rather than a port per service: worlds stay small and policies simple.
//     Only "connect, one byte, close" has its own listener (ByteServer), because there the server must speak first,
//     as in the figures of the design.
//   - 2026-11-23: rates count what the receiver has acknowledged at application level, never what a sender could put
//     into buffers.
package load
