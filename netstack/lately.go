package netstack

import "time"

// lately remembers keys for a while: for span at least since they were last noted, for twice that at most, and no
// more than 2*limit of them. Beyond that the older half is forgotten. It has no timer; its owner's lock guards it.
type lately[K comparable] struct {
	span       time.Duration
	limit      int
	young, old map[K]struct{}
	turned     time.Time // when young was begun
}

// note remembers k from now on.
func (l *lately[K]) note(k K, now time.Time) {
	l.turn(now)
	if len(l.young) >= l.limit {
		l.old, l.young, l.turned = l.young, nil, now
	}
	if l.young == nil {
		l.young = make(map[K]struct{})
	}
	l.young[k] = struct{}{}
}

// has reports whether k is remembered.
func (l *lately[K]) has(k K, now time.Time) bool {
	l.turn(now)
	if _, ok := l.young[k]; ok {
		return true
	}
	_, ok := l.old[k]
	return ok
}

// forget forgets k.
func (l *lately[K]) forget(k K) {
	delete(l.young, k)
	delete(l.old, k)
}

// turn lets the young grow old.
func (l *lately[K]) turn(now time.Time) {
	switch age := now.Sub(l.turned); {
	case age < l.span:
	case age < 2*l.span:
		l.old, l.young, l.turned = l.young, nil, now
	default:
		l.old, l.young, l.turned = nil, nil, now
	}
}
