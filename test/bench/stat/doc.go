// Package stat holds the few statistics that the benchmark prints: medians with their range, paired ratios,
// percentiles.
//
// It is pure: numbers in, numbers out. A measurement that failed is a NaN and is left out, never counted as zero.
// It is used by test/bench/report. It never rounds and never prints (report does both).
//
// Decisions (2026-11-23): a ratio is the median of the ratios of the repetitions, each against its own neighbour in
// time, because the machine's speed drifts over minutes by more than the differences that we look for. Means are not
// offered: one disturbed repetition would spoil them.
package stat
