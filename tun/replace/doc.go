// Package replace writes files that must be whole whenever somebody reads them: what a process keeps for its next life,
// and keys and lists that another process reads.
//
// Decisions:
//   - 2026-11-29: one writer for all of them. There were four, two of which did not wait for the disk: after a loss of
//     power the new name could have stood for an empty file. It lies on the lowest floor as tun/sandwich writes by it.
package replace
