package admin

import (
	"slices"
	"strings"
	"sync"
	"time"
)

// Ready knows what must happen before this process calls itself ready (spec controlplane 7.3). It is
// safe for concurrent use.
type Ready struct {
	now func() time.Time

	mu      sync.Mutex
	tasks   map[string]*Task
	changed chan struct{} // closed and replaced at every change
}

// Task is one condition of readiness. A new task is pending; it may become pending again.
type Task struct {
	r       *Ready
	name    string
	pending bool
	since   time.Time // pending since
	err     error
	fails   uint64
}

// PendingTask describes a task that is not done.
type PendingTask struct {
	Name      string
	Since     time.Time
	LastError error  // nil if none was reported since it became pending
	Failures  uint64 // reported since it became pending
}

// NewReady makes an empty set, which is ready. now is time.Now if nil.
func NewReady(now func() time.Time) *Ready {
	if now == nil {
		now = time.Now
	}
	return &Ready{now: now, tasks: map[string]*Task{}, changed: make(chan struct{})}
}

// Register adds a pending task, ztunnel's names being "state manager", "proxy", "dns proxy" and "workload
// proxy manager". Registering a name again returns the same task, pending again.
func (r *Ready) Register(name string) *Task {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.tasks[name]
	if t == nil {
		t = &Task{r: r, name: name}
		r.tasks[name] = t
	}
	t.again()
	return t
}

// again makes the task pending. Called with the lock held.
func (t *Task) again() {
	if t.pending {
		return
	}
	t.pending, t.since, t.err, t.fails = true, t.r.now(), nil, 0
	t.r.signal()
}

func (r *Ready) signal() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// Done marks the task as done. Repeating it is harmless.
func (t *Task) Done() {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	if t.pending {
		t.pending = false
		t.r.signal()
	}
}

// Again makes a done task pending, for instance when the node agent is lost.
func (t *Task) Again() {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	t.again()
}

// Fail records why a pending task is not done yet; a done task stays done.
func (t *Task) Fail(err error) {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	if t.pending {
		t.err = err
		t.fails++
	}
}

// Pending lists what is missing, sorted by name.
func (r *Ready) Pending() []PendingTask {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pending()
}

func (r *Ready) pending() []PendingTask {
	var out []PendingTask
	for _, t := range r.tasks {
		if t.pending {
			out = append(out, PendingTask{t.name, t.since, t.err, t.fails})
		}
	}
	slices.SortFunc(out, func(a, b PendingTask) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// State returns what is missing and a channel that is closed at the next change.
func (r *Ready) State() ([]PendingTask, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pending(), r.changed
}
