package zlog

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// handler is one logger's view of the Log: a target, spans and fields already formatted.
type handler struct {
	log    *Log
	target *Target
	name   string // the target as asked for (target.name may stand for many)
	spans  []span
	fields []byte // fields of With outside spans, formatted as they stand in the line
}

type span struct {
	name   string
	fields []byte
}

// pooled buffers larger than this are left to the garbage collector.
const poolBytes = 16 << 10

var pool = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

// Enabled implements slog.Handler by one atomic load.
func (h *handler) Enabled(_ context.Context, level slog.Level) bool { return h.target.Enabled(level) }

// Handle formats the record and queues it. It waits while the queue is full.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	bp := pool.Get().(*[]byte)
	b := (*bp)[:0]
	if h.log.json {
		b = h.appendJSON(b, &r)
	} else {
		b = h.appendText(b, &r)
	}
	h.log.queue.put(b)
	if cap(b) <= poolBytes {
		*bp = b
		pool.Put(bp)
	}
	return nil
}

func (h *handler) when(r *slog.Record) time.Time {
	if r.Time.IsZero() {
		return h.log.now()
	}
	return r.Time
}

// appendText formats <ts>\t<level>\t<target>[:span{fields}...]\t<message>\t<k=v k=v>\n.
func (h *handler) appendText(b []byte, r *slog.Record) []byte {
	b = appendTime(b, h.when(r))
	b = append(b, '\t')
	b = append(b, levelName(min(r.Level, LevelOff-1))...)
	b = append(b, '\t')
	b = h.appendDisplay(b, strings.TrimPrefix(h.name, crate))
	for _, s := range h.spans {
		b = append(b, ':')
		b = append(b, s.name...)
		if len(s.fields) > 0 {
			b = append(b, '{')
			b = append(b, s.fields...)
			b = append(b, '}')
		}
	}
	b = append(b, '\t')
	b = h.appendDisplay(b, r.Message)
	b = append(b, '\t')
	start := len(b)
	b = append(b, h.fields...)
	r.Attrs(func(a slog.Attr) bool {
		b = h.appendTextAttr(b, start, "", a)
		return true
	})
	return append(b, '\n')
}

// appendJSON formats level, time, scope, message, fields, then one object per span.
func (h *handler) appendJSON(b []byte, r *slog.Record) []byte {
	b = append(b, `{"level":"`...)
	b = append(b, levelName(min(r.Level, LevelOff-1))...)
	b = append(b, `","time":"`...)
	b = appendTime(b, h.when(r))
	b = append(b, `","scope":`...)
	b = h.appendJSONString(b, h.name)
	b = append(b, `,"message":`...)
	b = h.appendJSONString(b, r.Message)
	if len(h.fields) > 0 {
		b = append(b, ',')
		b = append(b, h.fields...)
	}
	r.Attrs(func(a slog.Attr) bool {
		b = h.appendJSONAttr(b, -1, "", a)
		return true
	})
	for _, s := range h.spans {
		b = append(b, ',')
		b = h.appendJSONString(b, s.name)
		b = append(b, ':', '{')
		b = append(b, s.fields...)
		b = append(b, '}')
	}
	return append(b, '}', '\n')
}

// WithAttrs formats the attributes once. An attribute "target" of kind string outside every span names
// the target instead.
func (h *handler) WithAttrs(as []slog.Attr) slog.Handler {
	n := *h
	n.spans = slices.Clone(h.spans)
	dst := &n.fields
	if len(n.spans) > 0 {
		dst = &n.spans[len(n.spans)-1].fields
	}
	b := slices.Clone(*dst)
	for _, a := range as {
		if a.Key == "target" && a.Value.Kind() == slog.KindString {
			n.name = a.Value.String()
			n.target = h.log.Target(n.name)
			continue
		}
		if h.log.json {
			b = h.appendJSONAttr(b, 0, "", a)
		} else {
			b = h.appendTextAttr(b, 0, "", a)
		}
	}
	*dst = b
	return &n
}

// WithGroup opens a span.
func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	n := *h
	if !h.log.json {
		name = string(h.appendDisplay(nil, name))
	}
	n.spans = append(slices.Clone(h.spans), span{name: name})
	return &n
}
