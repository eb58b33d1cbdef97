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
	recheck chan struct{} // capacity 1: policies or workloads changed since the last re-check
}

func newKnowledge() *knowledge {
	return &knowledge{changed: make(chan struct{}), recheck: make(chan struct{}, 1)}
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
	select {
	case k.recheck <- struct{}{}:
	default:
	}
}

// recheckLoop cuts live connections that a published change forbids, until ctx ends.
func (k *knowledge) recheckLoop(ctx context.Context, pods *podManager) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.recheck:
			for _, p := range pods.all() {
				p.proxy.Recheck()
			}
		}
	}
}
