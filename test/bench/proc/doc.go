// Package proc reads the figures that the benchmark needs from /proc: CPU time and memory of a process, load that
// others put on the machine, and the machine's description.
//
// Parsing is pure (text in, values out, fuzzed); FS is the thin rim that reads the files, through an fs.FS so that
// tests bring their own. It is called by test/bench. It starts nothing and never writes.
//
// Decisions (2026-11-23): CPU time comes from /proc/PID/stat (ticks of 10 ms, all threads, dead ones included): the
// bursts that we measure last seconds. A tick is taken as 1/100 s, which is what the kernel shows to user space on
// every architecture that Go runs on (USER_HZ).
package proc
