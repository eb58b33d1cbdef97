package fair

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// LinesOptions is what Lines is made of.
type LinesOptions struct {
	Log       *slog.Logger
	PerSecond float64 // lines of one source; 0: 10
	Burst     int     // at once; 0: 100
}

// Lines writes log lines that outsiders can cause, within a budget per source. What it swallows is counted and said
// in a summary at most every ten seconds. All methods may be called at the same time.
type Lines struct {
	log  *slog.Logger
	rate *Rate[string]

	mu       sync.Mutex
	timer    *time.Timer // runs while something is swallowed and not yet said
	unsaid   uint64
	source   string // the latest whose line was swallowed
	msg      string
	swallows uint64
	closed   bool
}

// maxLineSources bounds the sources that are told apart.
const maxLineSources = 1024

// NewLines makes a bounded log.
func NewLines(o LinesOptions) *Lines {
	if o.PerSecond == 0 {
		o.PerSecond = 10
	}
	if o.Burst == 0 {
		o.Burst = 100
	}
	return &Lines{log: o.Log, rate: NewRate[string](o.PerSecond, o.Burst, maxLineSources)}
}

// Log writes a line that source has caused, or counts it.
func (l *Lines) Log(ctx context.Context, level slog.Level, source, msg string, attrs ...slog.Attr) {
	if !l.log.Enabled(ctx, level) {
		return
	}
	if l.Allow(source, msg) {
		l.log.LogAttrs(ctx, level, msg, attrs...)
	}
}

// Allow reports whether a line that source has caused may be written, and counts it if not: for those who write it by
// a logger of their own.
func (l *Lines) Allow(source, msg string) bool {
	if l.rate.Allow(source) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.swallows++
	l.unsaid++
	l.source, l.msg = source, msg
	if l.timer == nil && !l.closed {
		l.timer = time.AfterFunc(Every, l.say)
	}
	return false
}

// Swallowed is how many lines were not written.
func (l *Lines) Swallowed() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.swallows
}

// Close says what is still unsaid.
func (l *Lines) Close() {
	l.mu.Lock()
	l.closed = true
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	l.say()
}

func (l *Lines) say() {
	l.mu.Lock()
	n, source, msg := l.unsaid, l.source, l.msg
	l.unsaid, l.timer = 0, nil
	l.mu.Unlock()
	if n > 0 {
		l.log.Warn("log lines left out", "count", n, "like", msg, "latest_source", source)
	}
}
