package proxy

import "sync"

// table is one pod's connections, from when it is known where they go.
type table struct {
	mu     sync.Mutex
	all    map[*connection]struct{}
	idle   chan struct{} // closed when the table is empty; made by empty
	closed *Error        // new ones are cut at once for this reason
}

func (t *table) add(c *connection) {
	t.mu.Lock()
	if t.all == nil {
		t.all = map[*connection]struct{}{}
	}
	t.all[c] = struct{}{}
	closed := t.closed
	t.mu.Unlock()
	if closed != nil {
		c.sever(closed)
	}
}

func (t *table) remove(c *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.all, c)
	if len(t.all) == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}

// severAll cuts every connection, and from now on every new one.
func (t *table) severAll(why *Error) {
	t.mu.Lock()
	t.closed = why
	list := t.list()
	t.mu.Unlock()
	for _, c := range list {
		c.sever(why)
	}
}

func (t *table) list() []*connection {
	out := make([]*connection, 0, len(t.all))
	for c := range t.all {
		out = append(out, c)
	}
	return out
}

func (t *table) snapshot() []*connection {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.list()
}

// any reports whether is is true of a connection.
func (t *table) any(is func(*connection) bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.all {
		if is(c) {
			return true
		}
	}
	return false
}

// none reports whether the table is empty.
func (t *table) none() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.all) == 0
}

// empty returns a channel that is closed when no connection is left.
func (t *table) empty() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if t.idle == nil {
		t.idle = make(chan struct{})
	}
	return t.idle
}
