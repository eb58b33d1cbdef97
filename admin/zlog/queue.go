package zlog

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

const (
	queueLines = 10000     // lines that may wait, as in ztunnel
	batchLines = 64        // lines per write, as in ztunnel
	keepBytes  = 256 << 10 // a buffer that a burst has made larger than this is given back
	linger     = time.Millisecond
	busyWithin = 5 * time.Millisecond
)

// ErrUnfinished is returned by Flush and Close when lines were still unwritten at the end of the wait.
var ErrUnfinished = errors.New("log lines were not written in time")

// Stats counts what went through a Log.
type Stats struct {
	Queued      int    // lines waiting or being written now
	Lines       uint64 // lines accepted
	Written     uint64 // lines given to the writer
	Batches     uint64 // write calls
	Waits       uint64 // times that a caller had to wait because the queue was full
	Dropped     uint64 // lines that came after Close
	WriteErrors uint64 // write calls that failed; their lines are lost
	Cut         uint64 // values cut because they were longer than 8 KiB
}

// queue is the bounded buffer between the callers and the one goroutine that writes.
type queue struct {
	w   io.Writer
	max int

	mu       sync.Mutex
	room     sync.Cond // waited on by callers while the queue is full
	buf      []byte    // lines not yet taken by the writer
	ends     []int     // where each of them ends in buf
	inflight int       // lines taken and not yet written
	closed   bool
	asleep   bool // the writer waits for wake
	stats    Stats
	waiters  []waiter // flushes, in order of their line

	wake chan struct{}
	done chan struct{} // closed when the writer goroutine has ended
}

type waiter struct {
	line uint64 // satisfied once this many lines are written
	ch   chan struct{}
}

func newQueue(w io.Writer, lines int) *queue {
	q := &queue{w: w, max: lines, wake: make(chan struct{}, 1), done: make(chan struct{})}
	q.room.L = &q.mu
	go q.run()
	return q
}

// put appends one line, which ends in a newline. It waits while the queue is full; after close the line
// is counted and dropped.
func (q *queue) put(line []byte) {
	q.mu.Lock()
	if len(q.ends)+q.inflight >= q.max && !q.closed {
		q.stats.Waits++
		for len(q.ends)+q.inflight >= q.max && !q.closed {
			q.room.Wait()
		}
	}
	if q.closed {
		q.stats.Dropped++
		q.mu.Unlock()
		return
	}
	q.buf = append(q.buf, line...)
	q.ends = append(q.ends, len(q.buf))
	q.stats.Lines++
	wake := q.asleep
	q.asleep = false
	q.mu.Unlock()
	if wake {
		q.wake <- struct{}{} // never blocks: asleep is set once per receive
	}
}

// run is the writer goroutine: it ends when the queue is closed and empty.
func (q *queue) run() {
	defer close(q.done)
	var buf []byte
	var ends []int
	var last time.Time
	for {
		q.mu.Lock()
		for len(q.ends) == 0 {
			if q.closed {
				q.mu.Unlock()
				return
			}
			q.asleep = true
			q.mu.Unlock()
			<-q.wake
			// Busy a moment ago: more is likely to come, so let some gather first.
			if time.Since(last) < busyWithin {
				time.Sleep(linger)
			}
			q.mu.Lock()
		}
		buf, q.buf = q.buf, buf[:0]
		ends, q.ends = q.ends, ends[:0]
		q.inflight = len(ends)
		q.mu.Unlock()

		q.write(buf, ends)
		last = time.Now()
		if cap(buf) > keepBytes {
			buf = nil
		}
	}
}

// write hands the lines over in batches and reports each batch as done, so that callers waiting for room
// go on as early as possible.
func (q *queue) write(buf []byte, ends []int) {
	start := 0
	for len(ends) > 0 {
		n := min(batchLines, len(ends))
		end := ends[n-1]
		_, err := q.w.Write(buf[start:end])
		start, ends = end, ends[n:]

		q.mu.Lock()
		q.inflight -= n
		q.stats.Batches++
		q.stats.Written += uint64(n)
		if err != nil {
			q.stats.WriteErrors++
		}
		for len(q.waiters) > 0 && q.waiters[0].line <= q.stats.Written {
			close(q.waiters[0].ch)
			q.waiters = q.waiters[1:]
		}
		q.room.Broadcast()
		q.mu.Unlock()
	}
}

// flush waits until every line accepted before the call is written.
func (q *queue) flush(ctx context.Context) error {
	q.mu.Lock()
	if q.stats.Written >= q.stats.Lines {
		q.mu.Unlock()
		return nil
	}
	w := waiter{q.stats.Lines, make(chan struct{})}
	q.waiters = append(q.waiters, w) // in order, because Lines only grows
	q.mu.Unlock()
	select {
	case <-w.ch:
		return nil
	case <-ctx.Done():
		return ErrUnfinished
	}
}

// close refuses further lines, lets waiting callers go and waits for the writer to end.
func (q *queue) close(ctx context.Context) error {
	q.mu.Lock()
	q.closed = true
	wake := q.asleep
	q.asleep = false
	q.room.Broadcast()
	q.mu.Unlock()
	if wake {
		q.wake <- struct{}{}
	}
	select {
	case <-q.done:
		return nil
	case <-ctx.Done():
		return ErrUnfinished
	}
}

func (q *queue) snapshot() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.stats
	s.Queued = len(q.ends) + q.inflight
	return s
}
