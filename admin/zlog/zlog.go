package zlog

import (
	"context"
	"io"
	"log/slog"
	"sync/atomic"
	"time"
)

// Options of New. The zero value of each field but Writer is usable.
type Options struct {
	Writer  io.Writer        // where lines go; one Write at a time, up to 64 whole lines each
	JSON    bool             // LOG_FORMAT=json
	Control *Control         // the filter; NewControl(nil) if nil
	Lines   int              // bound of the queue, 10000 if 0
	Now     func() time.Time // for records without a time; time.Now if nil
}

// Log owns the writer goroutine and the filter. Make loggers of it with Logger, and Close it last.
type Log struct {
	*Control
	queue *queue
	json  bool
	now   func() time.Time
	cut   atomic.Uint64
}

// New starts the writer goroutine; Close ends it.
func New(o Options) *Log {
	if o.Control == nil {
		o.Control = NewControl(nil)
	}
	if o.Lines <= 0 {
		o.Lines = queueLines
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Log{Control: o.Control, queue: newQueue(o.Writer, o.Lines), json: o.JSON, now: o.Now}
}

// Logger returns a logger for target; logger.With("target", other) leads to another one.
func (l *Log) Logger(target string) *slog.Logger { return slog.New(l.Handler(target)) }

// Handler returns the handler behind Logger. A caller that counts allocations may skip slog.Logger:
//
//	if h.Enabled(ctx, level) {
//		r := slog.NewRecord(now, level, "connection complete", 0)
//		r.AddAttrs(attrs...)
//		h.Handle(ctx, r)
//	}
func (l *Log) Handler(target string) slog.Handler {
	return &handler{log: l, target: l.Target(target), name: target}
}

// Stats returns the counters of this log.
func (l *Log) Stats() Stats {
	s := l.queue.snapshot()
	s.Cut = l.cut.Load()
	return s
}

// Flush waits until every line logged before it is written, or for ctx: then ErrUnfinished.
func (l *Log) Flush(ctx context.Context) error { return l.queue.flush(ctx) }

// Close writes what is queued and ends the writer goroutine; later lines are counted and dropped. It
// waits no longer than one second (ztunnel's bound) and no longer than ctx, then returns ErrUnfinished:
// whoever reads our output has stopped reading, and the goroutine stays in its write call until it is
// released. Calling it again is harmless.
func (l *Log) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return l.queue.close(ctx)
}
