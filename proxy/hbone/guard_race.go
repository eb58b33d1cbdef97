//go:build race

package hbone

import "runtime"

// The race detector must not take the guard itself for what keeps two goroutines apart: it would then be silent about
// those who merely do not meet.
func blind() { runtime.RaceDisable() }
func see()   { runtime.RaceEnable() }
