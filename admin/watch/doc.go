// Package watch tells when files may have changed. One loop serves all that ztun reads again while it runs:
// the workload file, the revocation lists, roots, the mesh directory of the embedded control plane.
//
// What flows through it: inotify events (fsnotify) and the clock; out comes a call of the owner's look, from
// one goroutine, the owner's. Who calls it: admin/xds, admin/ca, admin/control. What it never does: read a
// file, or decide whether what it holds is new: a look may find nothing.
//
// Decisions:
//   - 2026-11-28: three loops of the same shape became this one. What differed stays with the owners: which
//     events concern them, and how they know that content is new (a checksum, or size and time first).
//   - 2026-11-28: a change is looked at when nothing has happened for Settle, so that a file is not read half
//     written; what never stops changing is looked at after five times that. Every Poll there is a look anyway:
//     network file systems and links into other directories report nothing.
//   - 2026-11-29: WithoutEvents is in the context, which all that watches for one daemon shares, rather than an option
//     of each owner: the next one that watches something would not know of it.
package watch
