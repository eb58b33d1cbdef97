//go:build race

package connpath

// instrumented: the race detector is on.
const instrumented = true
