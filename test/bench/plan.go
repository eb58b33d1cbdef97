package main

import (
	"context"
	"time"

	"ztun/test/bench/report"
)

// outcome is what one measurement found: values by metric name. Metrics that the case declares as rows are shown in
// that order, others after them.
type outcome map[string]float64

// subject is one of the things that a case compares.
type subject struct {
	name string
	run  func(ctx context.Context, rep int) (outcome, error)
}

// kase is one line or a few of the table: the same work done by each subject.
type kase struct {
	suite, name string
	rows        []report.Row  // declared with Metric, Unit, Target, Subject, Reference; suite and case are filled in
	subjects    []subject     // the base first
	lasts       time.Duration // of one measurement, about: bounds it and tells the user what to expect
	// profile names the subject that --profile looks into and the processes to ask; nil for none.
	profile func() (subject string, ts []target)
}

// turn says which subject is measured i-th in a repetition: the order is turned round every time, so that neither
// subject always comes after the other's heat.
func turn(n, rep, i int) int {
	if rep%2 == 0 {
		return i
	}
	return n - 1 - i
}

// limit bounds one measurement: generous, because a slow machine is no error, but finite.
func (k kase) limit() time.Duration { return 4*k.lasts + 40*time.Second }

// expected is how long the whole plan takes when all goes well.
func expected(ks []kase, reps int) time.Duration {
	var d time.Duration
	for _, k := range ks {
		d += time.Duration(reps*len(k.subjects)) * (k.lasts + 100*time.Millisecond)
	}
	return d
}
