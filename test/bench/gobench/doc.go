// Package gobench reads what `go test -bench` prints (golang.org/design/14313-benchmark-format) into values.
//
// It is pure. The benchmark's hbone measurement feeds it the output of proxy/hbone's own benchmarks and pairs them
// with those of bare crypto/tls by name. Lines that are not results (log output of the code under test, PASS, ok) are
// skipped; a line that opens like a result but cannot be read is an error, so that a figure is never lost in silence.
//
// Decision (2026-11-23): golang.org/x/perf/benchfmt does this and more; its module is not among ours, and thirty
// lines do.
package gobench
