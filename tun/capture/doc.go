// Package capture is what `ztun capture` is made of beside the tap of package tun: a filter (filter.go), the queue
// between the data path and who writes (queue.go), and pcapng (pcapng.go).
//
// What flows through it: packets as a device carries them. Who calls it: cmd/ztun. What it never does: open devices,
// know of pods, or make whoever moves packets wait.
//
// Decisions:
//   - 2026-11-28: pcapng is written here, three kinds of blocks, though gopacket could: its package layers costs every
//     daemon 1.2 MiB of memory at rest, for something that seldom runs. Tests read it by gopacket and by tcpdump.
//   - 2026-11-28: the filter is a small language in tcpdump's words rather than BPF: tcpdump's compiler is C.
package capture
