package admin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"time"
)

// Section writes one JSON value: that of its key in /config_dump. It runs in the request's goroutine, so
// it must read immutable or copied data only, stream what is large element by element, and may return
// when ctx ends or e has an error (e's calls return both).
type Section func(ctx context.Context, e *Encoder) error

// SectionOf is a section that encodes the value that f returns at that moment.
func SectionOf(f func() any) Section {
	return func(_ context.Context, e *Encoder) error { return e.Value(f()) }
}

// Bounds of a dump. What one reader takes cannot hold up the next one for longer than dumpTime.
const (
	dumpChunk   = 32 << 10
	dumpTime    = 2 * time.Minute  // for a whole dump
	dumpStall   = 10 * time.Second // for a reader to take one chunk
	dumpWaiting = 8                // requests that may wait for their turn
)

// dumper answers /config_dump: one at a time, streamed with one chunk of memory, yielding the processor
// between chunks so that workers come first.
type dumper struct {
	sections func() map[string]Section // called once per dump: the sections close over one snapshot
	turn     chan struct{}             // holds one token while a dump runs
	waiting  chan struct{}
	drain    <-chan struct{}
	logger   *slog.Logger
}

func newDumper(sections func() map[string]Section, logger *slog.Logger) *dumper {
	return &dumper{sections: sections, turn: make(chan struct{}, 1), waiting: make(chan struct{}, dumpWaiting), logger: logger}
}

func (d *dumper) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case d.waiting <- struct{}{}:
		defer func() { <-d.waiting }()
	default:
		w.Header().Set("Retry-After", "5")
		plain(w, http.StatusServiceUnavailable, "too many configuration dumps are waiting\n")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), dumpTime)
	defer cancel()
	select {
	case d.turn <- struct{}{}:
		defer func() { <-d.turn }()
	case <-ctx.Done():
		return // the client has left or the wait was too long
	}
	out := &chunkWriter{ctx: ctx, w: w, rc: http.NewResponseController(w)}
	out.header = func() { w.Header().Set("Content-Type", "application/json") }
	if err := d.write(ctx, out); err != nil {
		if !out.started {
			plain(w, http.StatusInternalServerError, err.Error())
			return
		}
		if !errors.Is(err, context.Canceled) {
			d.logger.Warn("configuration dump broken off", "error", err)
		}
		// Half of it is sent: a closed connection is the only way left to say that it is not whole.
		panic(http.ErrAbortHandler)
	}
}

func (d *dumper) write(ctx context.Context, out *chunkWriter) error {
	sections := map[string]Section{}
	if d.sections != nil {
		sections = d.sections()
	}
	buf := bufio.NewWriterSize(out, dumpChunk)
	e := NewEncoder(buf)
	e.BeginObject()
	keys := make([]string, 0, len(sections))
	for k := range sections {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		e.Key(k)
		before := e.depth
		if err := sections[k](ctx, e); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		if err := e.Err(); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		if e.key || e.depth != before {
			return fmt.Errorf("%s: the section did not write exactly one value", k)
		}
	}
	if err := e.EndObject(); err != nil {
		return err
	}
	return buf.Flush()
}

// chunkWriter passes chunks on, each with its own deadline, and lets others run in between.
type chunkWriter struct {
	ctx     context.Context
	w       http.ResponseWriter
	rc      *http.ResponseController
	header  func()
	started bool
}

func (c *chunkWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	if !c.started {
		c.started = true
		c.header()
	}
	c.rc.SetWriteDeadline(time.Now().Add(dumpStall))
	n, err := c.w.Write(p)
	runtime.Gosched()
	return n, err
}
