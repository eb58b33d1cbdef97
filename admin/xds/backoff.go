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
	messages int // that arrived
	lived    time.Duration
}

const (
	backoffMin = 10 * time.Millisecond
	backoffMax = 15 * time.Second
	// healthy is the life of a session that makes earlier failures forgotten.
	healthy = time.Minute
	// brief is the life of a session that ends in a good way but achieves nothing.
	// A few of them are followed by waits as after failures: a server that accepts
	// and hangs up must not be called without pause.
	brief    = time.Second
	maxBrief = 3
)

// backoff says how long to wait (spec controlplane 2.5): 20, 40, ... 15000 ms
// after failures, 10 ms or nothing after other ends. A quarter is added at
// random, or taken away at the maximum, so that the nodes of a cluster do not
// come back in step.
type backoff struct {
	cur    time.Duration
	briefs int
	random func(n int64) int64 // in [0, n)
}

func newBackoff(random func(int64) int64) backoff { return backoff{cur: backoffMin, random: random} }

func (b *backoff) next(e ending) time.Duration {
	if e.messages > 0 && e.lived >= healthy {
		b.cur = backoffMin
	}
	switch {
	case e.lived >= brief:
		b.briefs = 0
	case e.step != stepFailed:
		b.briefs++
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
