package main

import (
	"context"
	"sync"

	"ztun/proxy/state"
)

// knowledge is what the proxies see of the admin loop: the newest View, and a signal that there may be
// a newer one.
type knowledge struct {
	view func() *state.View

	mu      sync.Mutex
	changed chan struct{}
	news    chan struct{} // capacity 1: there is something that follow has not seen yet
}

// newKnowledge takes where the newest View is.
func newKnowledge(view func() *state.View) *knowledge {
	return &knowledge{view: view, changed: make(chan struct{}), news: make(chan struct{}, 1)}
}

func (k *knowledge) View() *state.View { return k.view() }

func (k *knowledge) Changed() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changed
}

// published runs on the admin loop: it only signals, so that the loop never waits for connections.
func (k *knowledge) published(_, _ *state.View) {
	k.mu.Lock()
	close(k.changed)
	k.changed = make(chan struct{})
	k.mu.Unlock()
	k.poke()
}

// follow calls f after every published change, until ctx ends. Changes that come while f runs are taken
// together.
func (k *knowledge) follow(ctx context.Context, f func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.news:
			f()
		}
	}
}

// poke makes follow run as after a change: a pod has been attached.
func (k *knowledge) poke() {
	select {
	case k.news <- struct{}{}:
	default:
	}
}
