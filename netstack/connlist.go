package netstack

import "sync"

// connList holds a stack's connections, to be reset when it closes.
type connList struct {
	mu     sync.Mutex
	first  *Conn
	n      int
	closed bool
	// squeezed is set while there may be connections whose buffers were made small.
	squeezed bool
}

func (l *connList) add(c *Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	if c.next = l.first; c.next != nil {
		c.next.prev = c
	}
	l.first = c
	l.n++
	return true
}

func (l *connList) remove(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case c.prev != nil:
		c.prev.next = c.next
	case l.first == c:
		l.first = c.next
	default:
		return
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	c.prev, c.next = nil, nil
	l.n--
}

func (l *connList) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// close resets all connections and refuses new ones.
func (l *connList) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	for {
		l.mu.Lock()
		c := l.first
		l.mu.Unlock()
		if c == nil {
			return
		}
		if c.Reset() != nil {
			l.remove(c) // someone else is closing it
		}
	}
}
