// Package agentcmd is the command line of `ztun agent`: what flags there are, and what they mean.
//
// What flows through it: arguments and environment into Options. Who calls it: cmd/ztun, for its help, completion and
// manual, and which then executes ztun-agent; and cmd/ztun-agent, which is that. What it never does: run anything.
//
// Decisions:
//   - 2026-11-29: `ztun agent` is a program of its own beside ztun, as git's commands are. With client-go in it each
//     `ztun proxy` and `ztun run` had 5.4 MiB more of resident memory (26.8 -> 32.2 MiB; 0.5 MiB of it anonymous), each
//     start took 2.7 ms more (6.6 -> 9.3 ms, which a CNI plugin pays for each pod), and the binary grew from 28.3 to
//     37.1 MB; medians of three, interleaved.
package agentcmd
