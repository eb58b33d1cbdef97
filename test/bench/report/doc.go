// Package report collects what the repetitions measured and shows it: a table for people, JSON for programs.
//
// test/bench declares a Row for each figure in the order in which it shall appear, adds values as repetitions end,
// and prints; Compare shows what became of the figures of one run in another. The package is pure: it measures
// nothing, reads no clock and no file but those to compare, and writes only to the io.Writer that it is
// given. It judges nothing either: a missed target is printed as such and is no failure, because a benchmark on a
// shared machine is evidence and no test.
//
// Decisions (2026-11-23): a missing value is a NaN in memory, null in JSON and "-" in the table, never a zero. Base
// and subject stand on one line with the ratio of their repetitions (see package stat), since the ratio is what
// travels between machines.
//
// Decision (2026-11-29): a comparison calls something a change only where the ranges of the repetitions do not touch,
// rather than by a rank test: with the three repetitions that are usual no rank test can say anything at 5 %, and with
// five apart ranges mean 1 %.
package report
