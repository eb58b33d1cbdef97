// Package words is how what people read is worded, the same by `ztun`, by `ztun control` and on the pages: spans of
// time, and texts that somebody else chose.
//
// Decisions:
//   - 2026-11-29: one Printable. There were two, and the one of `ztun connections` let through what turns the text
//     around it (U+202E), which a peer's name may have. On pages such a character is shown by its number (package
//     page): there is room for it, and somebody who looks for it.
//   - 2026-11-29: one Span. There were three, which said 150 minutes as 2h30m, 2h30m and 2 h 30 min, 1.5 seconds as
//     1.5s, 1s and 1 s, and one of which rounded 59.97 seconds to 60.0s.
package words
