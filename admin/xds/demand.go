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

	"ztun/proxy/fair"
	"ztun/proxy/state"
)

// Errors of Demand. Each means that it is not known what the name is: it may well be in the mesh.
var (
	ErrDemandFull = errors.New("too many names wait to be asked of the control plane")
	ErrNoAnswer   = errors.New("the control plane does not answer")
	ErrUnusable   = errors.New("the control plane's answer was refused")
)

const (
	maxWaiting = 1024             // names that wait for an answer, shared by all pods
	demandWait = 5 * time.Second  // as long as ztunnel waits for a workload
	absentFor  = 10 * time.Second // how long "there is no such thing" is believed; see doc.go
	maxKey     = 1024             // bytes
)

// Demand asks the control plane for a name in on-demand mode and waits for the
// answer: "network/ip" ("/ip" in the default network), the uid of a workload, or
// "namespace/hostname". Nil means that the published View says all there is to
// know, which may be that there is nothing of that name. In wildcard mode, for
// what is known already, and for what was said to be absent a moment ago, that is
// so at once.
//
// The wait ends with ctx's error, with ErrNoAnswer after 5 s, with ErrUnusable if
// the answer makes no sense and nothing older is held, or with ErrDemandFull.
// Many may wait for one name; it is asked for once. source is the pod that wants
// to know: the one with the most names waiting makes room for the others.
func (c *Client) Demand(ctx context.Context, source, key string) error {
	if !c.o.OnDemand || known(c.view.Load(), key) {
		return nil
	}
	// Names of all kinds have a slash; "*" would subscribe to everything.
	if len(key) > maxKey || !strings.Contains(key, "/") || !utf8.ValidString(key) {
		return fmt.Errorf("%q is none of network/ip, uid, namespace/hostname", clip(key))
	}
	t := time.NewTimer(c.limits.demand)
	defer t.Stop()
	d := &c.demands
	for {
		w, err := d.join(source, key)
		if w == nil {
			return err
		}
		err = c.await(ctx, w, key, t.C)
		d.leave(key, w)
		// Who made way was the pod that asked first, not we.
		if errors.Is(err, ErrDemandFull) && w.source != source {
			continue
		}
		return err
	}
}

// await waits for the answer to a name that was joined.
func (c *Client) await(ctx context.Context, w *waiter, key string, timeout <-chan time.Time) error {
	// The answer may have come between the look at the View and joining.
	if known(c.view.Load(), key) {
		return nil
	}
	d := &c.demands
	d.poke()
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
		d.count(&d.unanswered)
		return ctx.Err()
	case <-timeout:
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
	kick   chan struct{}        // there is something unsent, or a reason to connect now
	shares *fair.Ledger[string] // of the waiters, by the pod that asked first

	mu      sync.Mutex
	waiters map[string]*waiter
	unsent  []string
	// answered holds the aliases under which the control plane has named a
	// resource, and aliases lists them by the resource's name. istiod does not
	// answer again for an alias of what it has sent, and the View does not find
	// everything by its aliases (pods on their host's network).
	answered map[string]struct{}
	aliases  map[string][]string
	absent   absences
	believed time.Duration // how long
	live     bool          // the present stream has brought a response

	full       uint64 // turned away
	unanswered uint64 // gave up
	recalled   uint64 // answered from absent
}

func newDemands(turned func(source string, evicted bool)) demands {
	return demands{
		kick: make(chan struct{}, 1), shares: fair.NewLedger(fair.LedgerOptions[string]{Limit: maxWaiting, Turned: turned}),
		waiters: map[string]*waiter{}, answered: map[string]struct{}{}, aliases: map[string][]string{}, believed: absentFor,
	}
}

// waiter is one name that somebody waits for.
type waiter struct {
	done   chan struct{} // closed with the answer
	err    error         // of the answer; set before done is closed
	source string        // whose place it takes
	place  *fair.Place[string]
	n      int // how many wait
	sent   bool
}

// join registers a waiter; nil without an error if the name is answered already.
func (d *demands) join(source, key string) (*waiter, error) {
	w, answered := d.find(key)
	if answered || w != nil {
		return w, nil
	}
	fresh := &waiter{done: make(chan struct{}), source: source}
	// Outside the lock: it may evict another name's waiter, which takes it.
	place := d.shares.Take(source, 1, func() { d.evict(key, fresh) })
	if place == nil {
		d.count(&d.full)
		return nil, ErrDemandFull
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if w := d.waiters[key]; w != nil || fresh.err != nil { // meanwhile: somebody else asks, or our place was needed
		place.Release()
		if w == nil {
			return nil, fresh.err
		}
		w.n++
		return w, nil
	}
	fresh.place, fresh.n = place, 1
	d.waiters[key] = fresh
	d.unsent = append(d.unsent, key)
	return fresh, nil
}

// find joins those who wait for a name already, or says that it is answered.
func (d *demands) find(key string) (w *waiter, answered bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.answered[key]; ok {
		return nil, true
	}
	// Without a control plane the last it said holds, as all else that it said.
	if said, ok := d.absent.get(key); ok && (!d.live || time.Since(said) < d.believed) {
		d.recalled++
		return nil, true
	}
	if w = d.waiters[key]; w != nil {
		w.n++
	}
	return w, false
}

func (d *demands) leave(key string, w *waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.n--; w.n > 0 || d.waiters[key] != w {
		return
	}
	d.release(key, nil)
}

// evict takes a name's place away.
func (d *demands) evict(key string, w *waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full++
	if d.waiters[key] == w {
		d.release(key, ErrDemandFull)
	} else {
		w.err = ErrDemandFull // it is about to be registered, or was answered already
	}
}

func (d *demands) count(n *uint64) {
	d.mu.Lock()
	*n++
	d.mu.Unlock()
}

// poke tells the client's goroutine that there is something to do, unless it knows.
func (d *demands) poke() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
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

// waited reports whether somebody waits for a name.
func (d *demands) waited(key string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiters[key] != nil
}

// connected notes that the control plane answers on a new stream: what it said on the last one about what there is not
// may have changed meanwhile. disconnected is the end of the stream.
func (d *demands) connected() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.live, d.absent = true, absences{}
}

func (d *demands) disconnected() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.live = false
}

// answer releases whoever waits for a name of the message, its aliases or a
// removal. lost are resources that were refused and of which nothing older is
// held, asked are the names that were asked for on this stream.
func (d *demands) answer(m *message, lost map[string]error, asked map[string]struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m.each(func(r resource) {
		err := lost[r.name]
		if err != nil {
			err = fmt.Errorf("%w: %s: %w", ErrUnusable, clip(r.name), err)
		}
		d.release(r.name, err)
		d.forget(r.name)
		d.absent.del(r.name)
		r.aliases(func(a string) {
			d.release(a, err)
			d.absent.del(a)
			if err == nil {
				d.answered[a] = struct{}{}
				d.aliases[r.name] = append(d.aliases[r.name], a)
			}
		})
	})
	now := time.Now()
	m.eachRemoved(func(name string) {
		d.release(name, nil)
		d.forget(name)
		if _, ok := asked[name]; ok {
			d.absent.set(name, now)
		}
	})
}

// release ends the wait for a name.
func (d *demands) release(name string, err error) {
	w := d.waiters[name]
	if w == nil {
		return
	}
	w.err = err
	close(w.done)
	delete(d.waiters, name)
	w.place.Release()
	if !w.sent {
		d.unsent = slices.DeleteFunc(d.unsent, func(k string) bool { return k == name })
	}
}

// forget drops the aliases of a resource that is replaced or gone.
func (d *demands) forget(name string) {
	for _, a := range d.aliases[name] {
		delete(d.answered, a)
	}
	delete(d.aliases, name)
}

// maxAbsent is how many names each half of absences holds.
const maxAbsent = 4096

// absences are names of which the control plane has said that there is nothing, and when. At the bound the older half
// is forgotten: whoever wants to know asks again.
type absences struct{ young, old map[string]time.Time }

func (a *absences) get(name string) (said time.Time, ok bool) {
	if said, ok = a.young[name]; !ok {
		said, ok = a.old[name]
	}
	return said, ok
}

func (a *absences) set(name string, now time.Time) {
	if a.young == nil || len(a.young) >= maxAbsent {
		a.old, a.young = a.young, map[string]time.Time{}
	}
	a.young[name] = now
	delete(a.old, name)
}

func (a *absences) del(name string) {
	delete(a.young, name)
	delete(a.old, name)
}
