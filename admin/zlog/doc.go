// Package zlog writes ztun's log lines in ztunnel's exact formats.
//
// What flows through it: a slog.Record enters Handler, is checked against the filter (one atomic load),
// is formatted in the caller's goroutine into a pooled buffer, and is appended to one bounded queue. A
// single writer goroutine takes what has gathered and writes up to 64 lines by one write call.
//
// Who calls it: cmd/ztun makes one Log and hands loggers down; package admin changes the filter through
// POST /logging. Everything else sees *slog.Logger only.
//
// What it never does: it never drops a line while it is open (a full queue makes callers wait, as in
// ztunnel), never lets a value break out of its line (control characters are escaped, invalid UTF-8 is
// replaced), never calls back into the program while it holds its lock, and never ends the process.
//
// How slog maps to ztunnel's tracing:
//
//   - logger.With("target", "access") names the target; the last one wins; without one it is "ztun".
//     Targets are ztunnel's short names (access, proxy, xds, inbound); filters may also name them the
//     long way, ztunnel::xds=debug. access and dns are whole names in ztunnel as well and have no long form.
//   - logger.WithGroup("proxy").With("wl", x) opens a span: text shows it as target:proxy{wl=x}, JSON as
//     a trailing "proxy":{"wl":x}. Attributes of the call itself are event fields and never part of a
//     span. This is where the handler departs from what slog asks of groups, on purpose.
//   - logger.With("k", v) outside a group puts a field before those of the call. A group value
//     (slog.Group("src", "addr", a)) is flattened to src.addr.
//   - slog levels: below -4 trace, below 0 debug, below 4 info, below 8 warn, else error.
//
// Values: strings and errors are quoted (Rust's debug form); numbers and booleans are bare; times,
// time.Duration, netip values, fmt.Stringer and encoding.TextMarshaler are "display" values, unquoted in
// text and strings in JSON. A duration therefore appears as given: slog.String("duration", "98ms") is
// quoted, slog.Duration is not.
//
// Decisions:
//
//   - 2026-11-23: lines are formatted by the caller, not by the writer, so that values may change after
//     the call and the writer does nothing but system calls.
//   - 2026-11-23: the queue is one byte buffer that the writer swaps, not a channel: no wake-up per line
//     while the writer is busy, no per-line allocation.
//   - 2026-11-23: a busy writer lingers 1 ms before its next write, which makes hundreds of lines a
//     second share writes and wake-ups; a lone line is written at once.
//   - 2026-11-23: RUST_LOG="" means level error, as the library that ztunnel uses has it; an empty clause
//     inside a list is ignored rather than read as a bare "error".
//   - 2026-11-28: RUST_LOG=debgu is an error. ztunnel takes such a word for a target, which turns all others off: a
//     daemon that says nothing, not even why. Words that are known as targets, and module paths (a::b), still are that.
package zlog
