package admin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync/atomic"
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

// PodDump is one entry of the member "workloadState".
type PodDump struct {
	Name, Namespace, ServiceAccount string
	Up                              bool             // else Pending, which shows no connections
	Inbound, Outbound               []ConnectionDump // in any order
}

// ConnectionDump is one connection of a pod.
type ConnectionDump struct {
	Src, OriginalDst, ActualDst netip.AddrPort // the zero OriginalDst is shown as null
	Protocol                    string         // inbound HBONE or TCP, outbound also DOUBLEHBONE
}

// WorkloadState is the member "workloadState". pods gives the pods by uid (namespace/name for those that no
// node agent gave a uid to); the functions in it are called one after the other, so that only one pod's
// connections are in memory at a time.
func WorkloadState(pods func() map[string]func() PodDump) Section {
	type info struct {
		Name           string `json:"name"`
		Namespace      string `json:"namespace"`
		ServiceAccount string `json:"serviceAccount"`
	}
	type connection struct {
		ActualDst   string  `json:"actualDst"`
		OriginalDst *string `json:"originalDst"`
		Protocol    string  `json:"protocol"`
		Src         string  `json:"src"`
	}
	list := func(e *Encoder, key string, cs []ConnectionDump) {
		e.Key(key)
		e.BeginArray()
		for _, c := range cs {
			x := connection{ActualDst: c.ActualDst.String(), Protocol: c.Protocol, Src: c.Src.String()}
			if c.OriginalDst.IsValid() {
				t := c.OriginalDst.String()
				x.OriginalDst = &t
			}
			if e.Value(x) != nil {
				return
			}
		}
		e.EndArray()
	}
	return func(ctx context.Context, e *Encoder) error {
		all := pods()
		e.BeginObject()
		for _, uid := range slices.Sorted(maps.Keys(all)) {
			p := all[uid]()
			e.Key(uid)
			e.BeginObject()
			state := "Pending"
			if p.Up {
				state = "Up"
				e.Key("connections")
				e.BeginObject()
				list(e, "inbound", p.Inbound)
				list(e, "outbound", p.Outbound)
				e.EndObject()
			}
			e.Key("info")
			e.Value(info{p.Name, p.Namespace, p.ServiceAccount})
			e.Key("state")
			e.Value(state)
			if err := errors.Join(e.EndObject(), ctx.Err()); err != nil {
				return err
			}
		}
		return e.EndObject()
	}
}

// Bounds of a dump. What one reader takes cannot hold up the next one for longer than dumpTime.
const (
	dumpChunk   = 16 << 10
	dumpTime    = 2 * time.Minute  // for a whole dump
	dumpStall   = 10 * time.Second // for a reader to take one chunk
	dumpWait    = 20 * time.Second // for one's turn; less than writeTimeout, so that the refusal arrives
	dumpWaiting = 8                // requests under way, of which one has its turn
)

// dumper answers /config_dump: one at a time, streamed with one chunk of memory, pausing between chunks so
// that workers come first (see breather). Others wait for their turn, a few of them and not for long;
// the rest is told to come again (503, Retry-After).
type dumper struct {
	sections func() map[string]Section // called once per dump: the sections close over one snapshot
	turn     chan struct{}             // holds one token while a dump runs
	waiting  chan struct{}
	drain    <-chan struct{} // closed at shutdown: those that wait give up
	wait     time.Duration
	logger   *slog.Logger

	done, refused, failed atomic.Uint64
}

func newDumper(sections func() map[string]Section, logger *slog.Logger) *dumper {
	return &dumper{sections: sections, turn: make(chan struct{}, 1), waiting: make(chan struct{}, dumpWaiting),
		wait: dumpWait, logger: logger}
}

func (d *dumper) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case d.waiting <- struct{}{}:
		defer func() { <-d.waiting }()
	default:
		d.refuse(w, "too many configuration dumps are waiting\n")
		return
	}
	patience := time.NewTimer(d.wait)
	defer patience.Stop()
	select {
	case d.turn <- struct{}{}:
		defer func() { <-d.turn }()
	case <-patience.C:
		d.refuse(w, "another configuration dump is still under way\n")
		return
	case <-d.drain:
		d.refuse(w, "shutting down\n")
		return
	case <-r.Context().Done():
		return // the client has left
	}
	ctx, cancel := context.WithTimeout(r.Context(), dumpTime)
	defer cancel()
	out := &chunkWriter{ctx: ctx, w: w, rc: http.NewResponseController(w)}
	out.header = func() { w.Header().Set("Content-Type", "application/json") }
	if err := d.write(ctx, out); err != nil {
		d.failed.Add(1)
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
	d.done.Add(1)
}

func (d *dumper) refuse(w http.ResponseWriter, why string) {
	d.refused.Add(1)
	w.Header().Set("Retry-After", "5")
	plain(w, http.StatusServiceUnavailable, why)
}

func (d *dumper) write(ctx context.Context, out *chunkWriter) error {
	sections := map[string]Section{}
	if d.sections != nil {
		sections = d.sections()
	}
	buf := bufio.NewWriterSize(out, dumpChunk)
	e := NewEncoder(&pausingWriter{buf, &out.pause})
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

// pausingWriter is what a section writes to. Pause is for those that work for long without writing, such as
// on sorting.
type pausingWriter struct {
	*bufio.Writer
	pause *breather
}

// Pause lets others have the processor if it is time for that. It is cheap enough to be called every few
// microseconds.
func (p *pausingWriter) Pause() { p.pause.breathe() }

// chunkWriter passes chunks on, each with its own deadline, and lets others run in between.
type chunkWriter struct {
	ctx     context.Context
	w       http.ResponseWriter
	rc      *http.ResponseController
	header  func()
	started bool
	pause   breather
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
	c.pause.breathe()
	return n, err
}
