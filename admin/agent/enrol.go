package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ztun/admin/zds"
)

// Cluster is what is needed of Kubernetes. All methods may be called at the same time.
type Cluster interface {
	// Pod is a pod of this node and the labels of its namespace as the watch has seen them last.
	Pod(Ref) (Pod, map[string]string, bool)
	// Fetch asks the API server for the same; ErrNotFound if it has no such pod.
	Fetch(context.Context, Ref) (Pod, map[string]string, error)
	// Annotate sets the pod's ambient.istio.io/redirection, or takes it away ("").
	Annotate(ctx context.Context, p Pod, value string) error
	// Warn puts an event on the pod.
	Warn(p Pod, reason, text string)
	// Again has Reconcile called at once, Later after a pause that grows with each time until it succeeds.
	Again(Ref)
	Later(Ref)
}

// ErrNotFound is returned for what the API server does not have.
var ErrNotFound = errors.New("not found")

// Proxies are the node's proxies (zds.Server).
type Proxies interface {
	Put(zds.Pod) error
	Remove(uid string)
	State(uid string) (zds.State, error)
	Await(ctx context.Context, uid string) error
}

// Namespaces finds the network namespace of a running pod by the uid in the names of its cgroups (Procs).
type Namespaces interface {
	Open(uid string) (*os.File, error)
}

// The reasons of events.
const (
	reasonNotCaptured  = "NotCaptured"
	reasonNotSupported = "NotSupported"
)

// Options configure an Enroller.
type Options struct {
	Rules      Rules
	Cluster    Cluster
	Proxies    Proxies
	Namespaces Namespaces
	Logger     *slog.Logger
}

// Enroller has the proxies take those pods of the node that belong to the mesh, and let go of the others.
type Enroller struct {
	o Options

	leaving atomic.Bool

	mu    sync.Mutex
	held  map[Ref]held
	refs  map[string]Ref // by uid, of held
	busy  map[Ref]*turn
	stats Stats
}

// held is a pod that the proxies were told of.
type held struct {
	uid    string
	found  bool // with its namespace; else it is only kept
	unseen bool // the plugin has named it and the watch has not yet
	warned bool // of what is not supported
}

// turn is whose turn it is to deal with a pod.
type turn struct {
	mu     sync.Mutex
	users  int
	adding bool // the plugin waits for it
}

// Stats are an enroller's figures since its start.
type Stats struct {
	Held                                int    // pods now
	Announced, Released                 uint64 // pods
	PluginAdded, PluginLeft, PluginFail uint64 // answers to the plugin: captured, not the mesh's, refused
}

// New makes an Enroller.
func New(o Options) *Enroller {
	return &Enroller{o: o, held: map[Ref]held{}, refs: map[string]Ref{}, busy: map[Ref]*turn{}}
}

// Stats are the figures as they are.
func (e *Enroller) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.stats
	s.Held = len(e.held)
	return s
}

// Leave has every pod be none of the mesh's from now on, and the proxies let go of all: ztun leaves the node for good.
// Reconcile is to be called for each of them after it, for its annotation; the proxies may not have the time for that.
func (e *Enroller) Leave() {
	e.leaving.Store(true)
	e.mu.Lock()
	all := maps.Clone(e.held)
	e.mu.Unlock()
	for ref, h := range all {
		e.let(ref, h.uid)
	}
}

// decide is Decide, by which nobody is the mesh's when ztun leaves.
func (e *Enroller) decide(p Pod, namespaceLabels map[string]string) Verdict {
	if e.leaving.Load() {
		return Verdict{false, "ztun leaves the node"}
	}
	return Decide(p, namespaceLabels, e.o.Rules)
}

// step is what is to be done about a pod.
type step uint8

const (
	rest     step = iota // nothing, or others will say when
	find                 // its namespace, and tell the proxies
	retry                // the same, since the proxies have refused it
	announce             // that it is captured
	release
)

// next decides what is to be done about a pod. found: the proxies were told of it, with its namespace; st is what they
// have said.
func next(p Pod, v Verdict, h held, st zds.State) step {
	mark := p.Annotations[AnnotationRedirected]
	ours := mark == Redirected || mark == "pending" // the latter is istio-cni's, half done
	switch {
	case !v.In && (h.uid != "" || ours):
		return release
	case !v.In:
		return rest
	case !h.found && (p.HasIP || ours):
		return find
	case !h.found:
		return rest // its sandbox is under way: the plugin names it, or the watch says when it has an address
	case st == zds.Refused:
		return retry
	case st == zds.Acked && mark != Redirected:
		return announce
	}
	return rest
}

// Reconcile makes true for a pod what its labels say. On an error it is to be called again, later. It is called by one
// goroutine at a time for one pod.
func (e *Enroller) Reconcile(ctx context.Context, ref Ref) error {
	unlock, ok := e.take(ref, false)
	if !ok {
		return nil // the plugin is adding it, and will have this called afterwards
	}
	defer unlock()
	p, labels, ok := e.o.Cluster.Pod(ref)
	h := e.holds(ref)
	if h.uid != "" && (!ok || p.UID != h.uid) {
		if h.unseen {
			if err := e.stillThere(ctx, ref, h.uid); err != nil {
				return err
			}
		}
		e.let(ref, h.uid)
		h = held{}
	}
	if !ok {
		return nil
	}
	if h.unseen {
		h.unseen = false
		e.hold(ref, h)
	}
	v := e.decide(p, labels)
	st, reason := e.o.Proxies.State(p.UID)
	switch next(p, v, h, st) {
	case find:
		return e.find(p, h)
	case retry:
		e.o.Cluster.Warn(p, reasonNotCaptured, "the node proxy refuses the pod: "+reason.Error())
		return errors.Join(fmt.Errorf("the node proxy refuses pod %s: %w", ref, reason), e.find(p, h))
	case announce:
		if err := e.o.Cluster.Annotate(ctx, p, Redirected); err != nil {
			return fmt.Errorf("pod %s: its annotation: %w", ref, err)
		}
		e.count(func(s *Stats) { s.Announced++ })
		e.o.Logger.Info("a pod is captured", "pod", ref.String(), "why", v.Why)
		if a := NotSupported(p); a != "" && !h.warned {
			h.warned = true
			e.hold(ref, h)
			e.o.Cluster.Warn(p, reasonNotSupported, "annotation "+a+" is not supported by ztun and has no effect")
		}
	case release:
		// First, so that peers stop calling it rather before than after nobody listens.
		err := e.o.Cluster.Annotate(ctx, p, "")
		e.let(ref, p.UID)
		e.count(func(s *Stats) { s.Released++ })
		e.o.Logger.Info("a pod is let go", "pod", ref.String(), "why", v.Why)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("pod %s: its annotation: %w", ref, err)
		}
	}
	return nil
}

// stillThere is an error, by which it is asked again, for a pod that the API server has and the watch has not shown.
func (e *Enroller) stillThere(ctx context.Context, ref Ref, uid string) error {
	p, _, err := e.o.Cluster.Fetch(ctx, ref)
	switch {
	case errors.Is(err, ErrNotFound) || err == nil && p.UID != uid:
		return nil
	case err != nil:
		return fmt.Errorf("pod %s, which the plugin has named: %w", ref, err)
	}
	return fmt.Errorf("pod %s, which the plugin has named, has not been seen yet", ref)
}

// find tells the proxies of a running pod.
func (e *Enroller) find(p Pod, h held) error {
	uid := p.UID
	if hash := p.Annotations[annotationHash]; hash != "" {
		uid = hash
	}
	f, err := e.o.Namespaces.Open(uid)
	if err != nil && h.found {
		return fmt.Errorf("pod %s: %w", p.Ref(), err) // what the proxies know may still be right
	}
	h.uid, h.found = p.UID, err == nil
	if putErr := e.put(p, h, f); putErr != nil { // without a namespace proxies keep it, if they have it
		e.o.Cluster.Warn(p, reasonNotCaptured, putErr.Error())
		return putErr
	}
	if err != nil {
		e.o.Cluster.Warn(p, reasonNotCaptured, err.Error())
		return fmt.Errorf("pod %s: %w", p.Ref(), err)
	}
	return nil
}

// put tells the proxies of a pod. It is held before that: an answer may be there before Put returns, and Answered must
// know whose it is.
func (e *Enroller) put(p Pod, h held, netns *os.File) error {
	ref := p.Ref()
	old := e.holds(ref)
	e.hold(ref, h)
	err := e.o.Proxies.Put(zds.Pod{Workload: zds.Workload{UID: p.UID, Name: p.Name, Namespace: p.Namespace,
		ServiceAccount: p.ServiceAccount}, Netns: netns})
	switch {
	case err != nil && old.uid == p.UID:
		e.hold(ref, old)
	case err != nil:
		e.let(ref, p.UID)
	}
	return err
}

// Answered is to be called when a proxy has answered for a pod.
func (e *Enroller) Answered(uid string) {
	e.mu.Lock()
	ref, ok := e.refs[uid]
	e.mu.Unlock()
	if !ok {
		return
	}
	switch st, _ := e.o.Proxies.State(uid); st {
	case zds.Acked:
		e.o.Cluster.Again(ref)
	case zds.Refused:
		e.o.Cluster.Later(ref)
	}
}

// answerWithin is how long the plugin is kept waiting: istio-cni's gives up after 5 s, and its caller must have the
// reason.
const answerWithin = 4500 * time.Millisecond

// errUnknown is returned where nobody can say whether a pod is the mesh's.
var errUnknown = errors.New("whether it is the mesh's cannot be known")

// Add captures a pod whose sandbox has just been made, before anything of it runs; open opens its network namespace,
// uid is the pod's where the plugin knows it. It says whether the pod is the mesh's at all. On an error the pod must
// not start, or is for the plugin to judge (errUnknown).
func (e *Enroller) Add(ctx context.Context, ref Ref, uid string, open func() (*os.File, error)) (in bool, err error) {
	unlock, ok := e.take(ref, true)
	if !ok {
		return true, fmt.Errorf("pod %s is being added already", ref)
	}
	defer e.o.Cluster.Again(ref)
	defer unlock()
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	p, v, err := e.judge(ctx, ref, uid)
	if err != nil {
		return true, err
	}
	if !v.In {
		e.o.Logger.Debug("a pod starts that is not the mesh's", "pod", ref.String(), "why", v.Why)
		return false, nil
	}
	defer func() {
		if err != nil {
			e.o.Cluster.Warn(p, reasonNotCaptured, "the pod is the mesh's and does not start before it is captured: "+
				err.Error())
		}
	}()
	f, err := open()
	if err != nil {
		return true, fmt.Errorf("its network namespace: %w", err)
	}
	old := e.holds(ref)
	if old.uid != "" && old.uid != p.UID {
		e.let(ref, old.uid)
	}
	now, _, seen := e.o.Cluster.Pod(ref)
	if err := e.put(p, held{uid: p.UID, found: true, unseen: !seen || now.UID != p.UID}, f); err != nil {
		return true, err
	}
	if err := e.o.Proxies.Await(ctx, p.UID); err != nil {
		e.let(ref, p.UID) // this sandbox ends; another is made
		return true, fmt.Errorf("the node proxy: %w", err)
	}
	return true, nil
}

// judge decides about a pod that is about to start. What the watch says is good enough only where it says yes.
func (e *Enroller) judge(ctx context.Context, ref Ref, uid string) (Pod, Verdict, error) {
	other := func(p Pod) bool { return uid != "" && p.UID != uid } // a pod made anew has the name of the old one
	p, labels, seen := e.o.Cluster.Pod(ref)
	seen = seen && !other(p)
	v := e.decide(p, labels)
	if seen && v.In {
		return p, v, nil
	}
	now, labels, err := e.o.Cluster.Fetch(ctx, ref)
	switch {
	case err == nil && other(now):
		return Pod{}, Verdict{}, fmt.Errorf("there is another pod of this name by now: %s", now.UID)
	case err == nil:
		return now, e.decide(now, labels), nil
	case errors.Is(err, ErrNotFound):
		return Pod{}, Verdict{}, fmt.Errorf("the API server has no such pod: %w", err)
	case seen:
		e.o.Logger.Warn("the API server cannot be asked about a pod, what was seen of it before decides",
			"pod", ref.String(), "error", err)
		return p, v, nil
	}
	return Pod{}, Verdict{}, fmt.Errorf("%w: %w", errUnknown, err)
}

// take waits for its turn with a pod. It is refused where the plugin is adding the pod.
func (e *Enroller) take(ref Ref, adding bool) (unlock func(), ok bool) {
	e.mu.Lock()
	t := e.busy[ref]
	if t == nil {
		t = &turn{}
		e.busy[ref] = t
	}
	if t.adding {
		e.mu.Unlock()
		return nil, false
	}
	t.adding = adding
	t.users++
	e.mu.Unlock()
	t.mu.Lock()
	return func() {
		t.mu.Unlock()
		e.mu.Lock()
		defer e.mu.Unlock()
		if adding {
			t.adding = false
		}
		if t.users--; t.users == 0 {
			delete(e.busy, ref)
		}
	}, true
}

func (e *Enroller) holds(ref Ref) held {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.held[ref]
}

func (e *Enroller) hold(ref Ref, h held) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held[ref] = h
	e.refs[h.uid] = ref
}

// let has the proxies let go of a pod.
func (e *Enroller) let(ref Ref, uid string) {
	e.mu.Lock()
	if e.held[ref].uid == uid {
		delete(e.held, ref)
	}
	delete(e.refs, uid)
	e.mu.Unlock()
	e.o.Proxies.Remove(uid)
}

func (e *Enroller) count(change func(*Stats)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.stats)
}
