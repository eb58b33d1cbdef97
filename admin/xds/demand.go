package xds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"ztun/proxy/state"
)

// Errors of Demand.
var (
	ErrDemandFull = errors.New("too many names wait to be asked of the control plane")
	ErrNoAnswer   = errors.New("the control plane does not answer")
)

const (
	maxUnsent  = 100             // names that wait to be sent, as in ztunnel
	demandWait = 5 * time.Second // as long as ztunnel waits for a workload
	maxKey     = 1024            // bytes
)

// Demand asks the control plane for a name in on-demand mode and waits for the
// answer: "network/ip" ("/ip" in the default network), the uid of a workload, or
// "namespace/hostname". Nil means that the published View says all there is to
// know, which may be that there is nothing of that name. In wildcard mode, and
// for what is known already, that is so at once.
//
// The wait ends with ctx's error, with ErrNoAnswer after 5 s, or at once with
// ErrDemandFull. Many may wait for one name; it is asked for once.
func (c *Client) Demand(ctx context.Context, key string) error {
	if !c.o.OnDemand || known(c.view.Load(), key) {
		return nil
	}
	// Names of all kinds have a slash; "*" would subscribe to everything.
	if len(key) > maxKey || !strings.Contains(key, "/") || !utf8.ValidString(key) {
		return fmt.Errorf("%q is none of network/ip, uid, namespace/hostname", clip(key))
	}
	d := &c.demands
	w, err := d.join(key)
	if w == nil {
		return err
	}
	defer d.leave(key, w)
	// The answer may have come between the look at the View and joining.
	if known(c.view.Load(), key) {
		return nil
	}
	select {
	case d.kick <- struct{}{}:
	default: // the session is told already
	}
	t := time.NewTimer(c.limits.demand)
	defer t.Stop()
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		d.count(&d.unanswered)
		return ctx.Err()
	case <-t.C:
		d.count(&d.unanswered)
		return fmt.Errorf("%w when asked for %q", ErrNoAnswer, key)
	}
}

// known reports whether the View has an answer for a name.
func known(v *state.View, key string) bool {
	if v.WorkloadByUID(key) != nil {
		return true
	}
	k, ok := state.ParseServiceKey(key)
	if !ok {
		return false
	}
	var w *state.Workload
	var s *state.Service
	if ip, ok := parseIP(k.Hostname); ok {
		w, s = v.FindAddress(k.Namespace, ip, "")
	} else {
		w, s = v.FindNSHost(k.Namespace, k.Hostname)
	}
	return w != nil || s != nil
}

// demands is the names that are waited for. Demand and the client's goroutine
// share it.
type demands struct {
	kick chan struct{} // there is something unsent

	mu      sync.Mutex
	waiters map[string]*waiter
	unsent  []string
	// answered holds the aliases under which the control plane has named a
	// resource, and aliases lists them by the resource's name. istiod does not
	// answer again for an alias of what it has sent, and the View does not find
	// everything by its aliases (pods on their host's network).
	answered map[string]struct{}
	aliases  map[string][]string

	full       uint64 // turned away
	unanswered uint64 // gave up
}

// waiter is one name that somebody waits for.
type waiter struct {
	done chan struct{} // closed with the answer
	n    int           // how many wait
	sent bool
}

// join registers a waiter; nil without an error if the name is answered already.
func (d *demands) join(key string) (*waiter, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.answered[key]; ok {
		return nil, nil
	}
	w := d.waiters[key]
	if w == nil {
		if len(d.unsent) >= maxUnsent {
			d.full++
			return nil, ErrDemandFull
		}
		w = &waiter{done: make(chan struct{})}
		d.waiters[key] = w
		d.unsent = append(d.unsent, key)
	}
	w.n++
	return w, nil
}

func (d *demands) leave(key string, w *waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.n--; w.n > 0 || d.waiters[key] != w {
		return
	}
	delete(d.waiters, key)
	if !w.sent {
		d.unsent = slices.DeleteFunc(d.unsent, func(k string) bool { return k == key })
	}
}

func (d *demands) count(n *uint64) {
	d.mu.Lock()
	*n++
	d.mu.Unlock()
}

// take returns the names to be sent now.
func (d *demands) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	keys := d.unsent
	d.unsent = nil
	for _, k := range keys {
		d.waiters[k].sent = true
	}
	return keys
}

// outstanding returns the names that were sent and are still waited for.
func (d *demands) outstanding() (keys []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for k, w := range d.waiters {
		if w.sent {
			keys = append(keys, k)
		}
	}
	return keys
}

// answer releases whoever waits for a name of the message, its aliases or a
// removal.
func (d *demands) answer(m *message) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m.each(func(r resource) {
		d.release(r.name)
		d.forget(r.name)
		r.aliases(func(a string) {
			d.release(a)
			if r.err == nil {
				d.answered[a] = struct{}{}
				d.aliases[r.name] = append(d.aliases[r.name], a)
			}
		})
	})
	m.eachRemoved(func(name string) {
		d.release(name)
		d.forget(name)
	})
}

func (d *demands) release(name string) {
	if w := d.waiters[name]; w != nil {
		close(w.done)
		delete(d.waiters, name)
		if !w.sent {
			d.unsent = slices.DeleteFunc(d.unsent, func(k string) bool { return k == name })
		}
	}
}

// forget drops the aliases of a resource that is replaced or gone.
func (d *demands) forget(name string) {
	for _, a := range d.aliases[name] {
		delete(d.answered, a)
	}
	delete(d.aliases, name)
}
