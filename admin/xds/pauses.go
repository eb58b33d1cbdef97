package xds

import (
	"time"

	"ztun/admin/backoff"
)

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

// pauses says how long to wait (spec controlplane 2.5): as package backoff after failures, 10 ms or nothing after other
// ends. A session in which every type was answered makes earlier failures forgotten, unless there were several brief
// ones before it.
type pauses struct {
	backoff.Backoff
	briefs int
}

func newPauses(random func(int64) int64) pauses { return pauses{Backoff: backoff.New(random)} }

func (p *pauses) next(e ending) time.Duration {
	switch {
	case e.lived >= backoff.Brief:
		p.briefs = 0
	case e.step != stepFailed || e.healthy:
		p.briefs++
	}
	if e.healthy && p.briefs <= backoff.MaxBrief {
		p.Reset()
	}
	if e.step == stepFailed || p.briefs > backoff.MaxBrief {
		return p.Longer()
	}
	p.Reset()
	if e.step == stepSoon {
		return p.Again()
	}
	return 0
}
