package xds

import "time"

// The reasons of istio_xds_connection_terminations_total.
const (
	endConnection = "ConnectionError" // no stream came about
	endReconnect  = "Reconnect"       // it ended in a way that is part of life
	endError      = "Error"
	endComplete   = "Complete" // the server ended it
)

// step is what follows the end of a session.
type step uint8

const (
	stepFailed step = iota // wait longer than the last time
	stepSoon               // wait for a moment
	stepNow                // do not wait
)

// ending is how a session ended.
type ending struct {
	reason   string
	step     step
	err      error
	messages int  // that arrived
	healthy  bool // every type was answered
	lived    time.Duration
}

const (
	backoffMin = 10 * time.Millisecond
	backoffMax = 15 * time.Second
	// brief is the life of a session that achieves nothing, however well it begins
	// or ends. A few of them are followed by waits as after failures: a server that
	// accepts, or even answers, and hangs up must not be called without pause.
	brief    = time.Second
	maxBrief = 3
)

// backoff says how long to wait (spec controlplane 2.5): 20, 40, ... 15000 ms
// after failures, 10 ms or nothing after other ends. A quarter is added at
// random, or taken away at the maximum, so that the nodes of a cluster do not
// come back in step. A session in which every type was answered makes earlier
// failures forgotten, unless there were several brief ones before it.
type backoff struct {
	cur    time.Duration
	briefs int
	random func(n int64) int64 // in [0, n)
}

func newBackoff(random func(int64) int64) backoff { return backoff{cur: backoffMin, random: random} }

func (b *backoff) next(e ending) time.Duration {
	switch {
	case e.lived >= brief:
		b.briefs = 0
	case e.step != stepFailed || e.healthy:
		b.briefs++
	}
	if e.healthy && b.briefs <= maxBrief {
		b.cur = backoffMin
	}
	switch {
	case e.step == stepFailed || b.briefs > maxBrief:
		b.cur = min(backoffMax, 2*b.cur)
	case e.step == stepSoon:
		b.cur = backoffMin
	default:
		b.cur = backoffMin
		return 0
	}
	jitter := time.Duration(b.random(int64(b.cur)/4 + 1))
	if b.cur == backoffMax {
		return b.cur - jitter
	}
	return b.cur + jitter
}
