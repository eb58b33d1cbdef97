package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// minTimer is the shortest timer that a stack sets: two jiffies at 250 Hz, which
// is also Linux's least (TCP_TIMEOUT_MIN). gVisor has none for tail loss probes
// and for RACK's reordering window. On a hop with a round trip of 50 us a probe
// is then due whenever the other side is not scheduled for 100 us: with 8
// streams one packet in 70 was sent twice, 64 KiB of it, on a link that loses
// nothing.
const minTimer = 8 * time.Millisecond

// clock is the standard clock with the stack's own timers.
type clock struct {
	tcpip.Clock
	timers *wheel
}

func newClock(s *Stack) tcpip.Clock { return clock{tcpip.NewStdClock(), s.timers} }

func (c clock) AfterFunc(d time.Duration, f func()) tcpip.Timer { return c.timers.after(d, f) }
