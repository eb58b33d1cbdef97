package ca

import (
	"container/heap"
	"time"
)

// priority orders fetches that are due; a smaller one goes first.
type priority uint8

const (
	realTime   priority = iota // a connection waits for it
	warmup                     // it will be needed soon, or is needed and cannot be had at the moment
	background                 // what it renews is still good
)

// task is an entry's place in the queue.
type task struct {
	entry *entry
	prio  priority
	due   time.Time
	seq   uint64 // ties go to who came first
	heap  *taskHeap
	index int // in heap
}

// queue holds at most one task per entry: those that are due by priority, then due time; the others by due time.
// Not safe for concurrent use.
type queue struct {
	ready, later taskHeap
	seq          uint64
}

func newQueue() queue { return queue{ready: taskHeap{byPriority: true}} }

// push adds an entry that has no task. It is ready if due is not after now.
func (q *queue) push(e *entry, prio priority, due, now time.Time) {
	q.seq++
	e.task = &task{entry: e, prio: prio, due: due, seq: q.seq}
	if due.After(now) {
		q.later.add(e.task)
	} else {
		q.ready.add(e.task)
	}
}

// bump makes an entry's ready task more urgent; it does nothing else.
func (q *queue) bump(e *entry, prio priority) {
	if t := e.task; t != nil && t.heap == &q.ready && prio < t.prio {
		t.prio = prio
		heap.Fix(t.heap, t.index)
	}
}

// remove takes an entry's task out, if it has one.
func (q *queue) remove(e *entry) {
	if e.task != nil {
		heap.Remove(e.task.heap, e.task.index)
		e.task = nil
	}
}

// pop takes the most urgent entry that is due at now, or returns nil.
func (q *queue) pop(now time.Time) *entry {
	for len(q.later.tasks) > 0 && !q.later.tasks[0].due.After(now) {
		q.ready.add(heap.Pop(&q.later).(*task))
	}
	if len(q.ready.tasks) == 0 {
		return nil
	}
	e := heap.Pop(&q.ready).(*task).entry
	e.task = nil
	return e
}

// wait is how long nothing becomes due, at most limit.
func (q *queue) wait(now time.Time, limit time.Duration) time.Duration {
	if len(q.later.tasks) > 0 {
		limit = min(limit, max(q.later.tasks[0].due.Sub(now), 0))
	}
	return limit
}

// taskHeap implements heap.Interface.
type taskHeap struct {
	tasks      []*task
	byPriority bool
}

func (h *taskHeap) add(t *task) {
	t.heap = h
	heap.Push(h, t)
}

func (h *taskHeap) Len() int { return len(h.tasks) }

func (h *taskHeap) Less(i, j int) bool {
	a, b := h.tasks[i], h.tasks[j]
	if h.byPriority && a.prio != b.prio {
		return a.prio < b.prio
	}
	if !a.due.Equal(b.due) {
		return a.due.Before(b.due)
	}
	return a.seq < b.seq
}

func (h *taskHeap) Swap(i, j int) {
	h.tasks[i], h.tasks[j] = h.tasks[j], h.tasks[i]
	h.tasks[i].index, h.tasks[j].index = i, j
}

func (h *taskHeap) Push(x any) {
	t := x.(*task)
	t.index = len(h.tasks)
	h.tasks = append(h.tasks, t)
}

func (h *taskHeap) Pop() any {
	last := len(h.tasks) - 1
	t := h.tasks[last]
	h.tasks[last] = nil
	h.tasks = h.tasks[:last]
	return t
}
