package admin

import (
	"time"

	"golang.org/x/sys/unix"
)

// breather paces long work of this side, so that on one processor connections do not wait for it.
//
// runtime.Gosched is not enough for that. Go looks for network events when a processor has run out of
// goroutines, else only every 10 ms (sysmon); a goroutine that merely yields is ready again at once, found
// before the network is looked at, and so keeps every connection waiting for up to 10 ms. With one processor
// in use (cmd/ztun's default for little traffic) a dump without pauses took the p50 of a 1 KiB echo from 1.2
// to 19 ms. A goroutine that sleeps is not ready: the network comes first, then whatever it woke.
//
// Work is measured in CPU time of the thread, so that a busy machine does not make the pauses more frequent.
// (The goroutine may have changed threads since the last look, and other goroutines' time on its thread
// counts: that is one pause too many or too few.)
type breather struct {
	since time.Duration // the thread's CPU time after the last pause; 0: not yet
}

const (
	breathAfter = 200 * time.Microsecond // of CPU time
	// Linux makes at least about that of any shorter time where there is nothing else to do
	breathFor = time.Millisecond
)

// breathe pauses if there has been enough work since the last pause. The first call begins the count.
func (b *breather) breathe() {
	now := threadCPU()
	if worked := now - b.since; b.since != 0 && worked >= 0 && worked < breathAfter {
		return
	}
	if b.since != 0 {
		time.Sleep(breathFor)
		now = threadCPU()
	}
	b.since = now
}

// threadCPU is the CPU time of the calling thread.
func threadCPU() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
