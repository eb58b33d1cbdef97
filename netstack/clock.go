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

// clock is the standard clock with timers of at least minTimer.
type clock struct {
	tcpip.Clock
	s *Stack // that a panic in one of its timers ends
}

func newClock(s *Stack) tcpip.Clock { return clock{tcpip.NewStdClock(), s} }

func (c clock) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	t := &timer{s: c.s, f: f}
	t.t = time.AfterFunc(max(d, minTimer), t.fire)
	return t
}

// timer is one object where gVisor's timer, our wrapper and what catches panics would be five: a connection has three
// to five of them.
type timer struct {
	t *time.Timer
	s *Stack
	f func()
}

func (t *timer) fire() { t.s.cfg.Panics.Run("a timer of gVisor's", t.f, t.s.crash) }

func (t *timer) Stop() bool            { return t.t.Stop() }
func (t *timer) Reset(d time.Duration) { t.t.Reset(max(d, minTimer)) }
