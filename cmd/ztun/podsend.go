package main

import (
	"context"
	"slices"
	"sync"
	"time"

	"ztun/admin/fdstore"
)

// shutdown drains all pods at the same time until ctx ends. Devices and routes stay: they hold the pods' traffic back
// until the next life of the daemon takes them over. hangUp ends the connection to the node agent, and is nil where
// there is none. store is emptied before anybody stops accepting: what it holds would take connections in that nobody
// serves, beside a successor that does.
func (m *podManager) shutdown(ctx context.Context, hangUp func(), store *fdstore.Store) {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	outlives := m.kind.Outlives()
	if outlives {
		m.serveOn(ctx, hangUp != nil)
	}
	if hangUp != nil {
		hangUp()
	}
	store.Clear()
	m.kind.Leave()
	all := func(what string, end func(*pod)) {
		var wg sync.WaitGroup
		for _, p := range m.all() {
			wg.Go(m.panics.Func(what, func() { end(p) }, nil))
		}
		if s := m.self.Load(); s != nil {
			wg.Go(m.panics.Func("the end of the own pod", func() { s.proxy.Shutdown(ctx) }, nil))
		}
		wg.Wait()
	}
	drain := func() {
		all("the drain of a pod", func(p *pod) {
			if outlives {
				p.att.Silence() // the successor answers the next SYN
			}
			p.drain(ctx)
		})
	}
	drain() // not behind a change that is under way, which may be the draining of another pod
	// No pod's names end before the last one has drained: nobody else has answers until the process has ended.
	stop := func() {
		last, cancel := context.WithTimeout(ctx, namesGrace)
		defer cancel()
		all("the end of a pod", func(p *pod) { p.stop(last) })
	}
	stop()
	m.op.Lock()
	defer m.op.Unlock()
	drain() // one that was being attached
	stop()
}

// Where nobody can take a pod's new connections before this process has ended (attach.Kind's Outlives), they are served
// on as long as older ones are waited for.
const (
	// lastCall is how long before the deadline no more are taken, so that those of the last moment may finish; a fifth of
	// the whole where that is less.
	lastCall = 3 * time.Second
	// brief is how old connections are that are not waited for in this way: they are likely to end by themselves. It is
	// also for how long connections are served on at least, so that whatever stood at the beginning is older.
	brief = time.Second
	// namesGrace is how long queries may take that are under way when all else has ended.
	namesGrace = time.Second
	lookEvery  = 50 * time.Millisecond
)

// serveOn returns when the pods have no connections but brief ones, or when it is time for the last call before the end
// of ctx. listening: it takes as long as anything brief at least, and as long as pods are let go, since the node agent
// may end with us and does that then: nobody else can give them their network back.
func (m *podManager) serveOn(ctx context.Context, listening bool) {
	end, bounded := ctx.Deadline()
	if !bounded {
		return
	}
	whole := time.Until(end)
	ctx, cancel := context.WithTimeout(ctx, whole-min(whole/5, lastCall))
	defer cancel()
	least := time.Now().Add(min(brief, whole/5))
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for said := false; ; {
		age := time.Duration(0)
		if time.Now().After(least) {
			age = brief
		}
		pods := m.all()
		older := slices.ContainsFunc(pods, func(p *pod) bool { return p.proxy.OlderThan(age) })
		heard := listening && (age == 0 || time.Since(time.Unix(0, m.letGo.Load())) < brief/2)
		if !older && !(heard && len(pods) > 0) {
			return
		}
		if !said && older {
			said = true
			m.log.Info("connections may finish; until then new ones are served, as nobody else can")
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}
