package xds

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"ztun/proxy/rescue"
	"ztun/proxy/state"
)

// store is what the client knows: the Builder and the names that it holds. It
// belongs to the client's goroutine and does no I/O.
type store struct {
	node string
	base *Local

	dec     decoder
	address func(name string, payload []byte) (*state.Workload, *state.Service, error) // dec.address

	b    *state.Builder
	kept map[string]*kept // by type
}

// types are the resource types, in the order in which they are asked for.
var types = [...]string{TypeAddress, TypeAuthorization}

// kept is what is known of the resources of one type.
type kept struct {
	retained
	// renamed holds the key (uid, namespace/hostname) of resources that are not
	// named by it. istiod has none such.
	renamed map[string]string
	refused map[string]string // names whose last version was refused, and why; at most maxRefused
	// the next response is the whole, with those that it says follow: what they do not name is gone
	all   bool
	named map[string]struct{}
}

// maxRefused bounds the refused resources that Stats can name.
const maxRefused = 100

func newStore(node string, base *Local) *store {
	s := &store{node: node, base: base, kept: map[string]*kept{}}
	for _, t := range types {
		s.kept[t] = &kept{renamed: map[string]string{}, refused: map[string]string{}}
	}
	s.address = s.dec.address
	s.start()
	return s
}

// start begins with nothing but the base.
func (s *store) start() {
	s.b = state.NewBuilder(s.node)
	if s.base != nil {
		s.base.Insert(s.b)
	}
}

// reset throws away a Builder that may be half changed. The names stay, without
// versions: the server will send what they stand for, or say that it is gone.
func (s *store) reset() {
	s.start()
	for _, k := range s.kept {
		k.forgetVersions()
		clear(k.renamed)
		clear(k.refused)
	}
}

// applied is what came of a message.
type applied struct {
	changed  bool   // there is something to build
	policies bool   // a policy is among it
	bytes    int    // of payload
	refused  int    // resources
	damaged  int    // policies that lost an entry
	nack     string // "": everything was accepted
	warnings []string
	lost     map[string]error // by name: refused, and nothing older is held
}

// maxNack bounds the text of a NACK, in bytes: the server must be able to
// receive it.
const maxNack = 64 << 10

// maxWarnings bounds what is logged of one message.
const maxWarnings = 10

// apply takes over a message of a known type: first its resources, in their
// order, then its removals (spec controlplane 2.4). Resources that make no sense
// are left out and keep what they were before.
func (s *store) apply(m *message) (a applied) {
	k := s.kept[m.typeURL]
	var refused, undecodable reasons
	if k.all && k.named == nil {
		k.named = make(map[string]struct{}, m.resources)
	}
	m.each(func(r resource) {
		a.bytes += len(r.payload)
		if k.all {
			k.named[r.name] = struct{}{}
		}
		err := r.err
		if err == nil {
			err = contained(func() error {
				if m.typeURL == TypeAuthorization {
					return s.insertPolicy(r, &a)
				}
				return s.insertAddress(k, r, &a)
			})
		}
		if err == nil {
			k.set(r.name, r.version)
			k.accepted(r.name)
			return
		}
		a.refused++
		if !k.has(r.name) {
			if a.lost == nil {
				a.lost = map[string]error{}
			}
			a.lost[r.name] = err
		}
		var wire *wireError
		if errors.As(err, &wire) {
			undecodable.add(r.name, err)
		} else {
			refused.add(r.name, err)
		}
		if _, again := k.refused[clip(r.name)]; again || len(k.refused) < maxRefused {
			k.refused[clip(r.name)] = clip(err.Error())
		}
		a.warn("refused %q: %v", r.name, err)
	})
	m.eachRemoved(func(name string) { s.remove(k, m.typeURL, name, &a) })
	if k.all && !m.more {
		for name := range k.retained.all() {
			if _, ok := k.named[name]; !ok {
				s.remove(k, m.typeURL, name, &a)
			}
		}
		k.all, k.named = false, nil
	}
	a.nack = join(&refused, &undecodable)
	return a
}

func (s *store) insertAddress(k *kept, r resource, a *applied) error {
	w, svc, err := s.address(r.name, r.payload)
	if err != nil {
		return err
	}
	key := r.name
	if w != nil && w.UID != key {
		key = w.UID
	} else if svc != nil && svc.Key().String() != key {
		key = svc.Key().String()
	}
	// What the name stood for until now, if that was something else.
	before, ok := k.renamed[r.name]
	if !ok && key != r.name && k.has(r.name) {
		before, ok = r.name, true
	}
	if ok && before != key {
		s.drop(before)
	}
	delete(k.renamed, r.name)
	if key != r.name {
		k.renamed[r.name] = key
	}
	if w != nil {
		s.dropService(key)
		s.b.InsertWorkload(w)
	} else {
		s.b.RemoveWorkload(key)
		s.b.InsertService(svc)
	}
	a.changed = true
	return nil
}

// insertPolicy leaves out what is known already: istiod sends all policies at
// every reconnect, and a change of policies has connections checked again. What
// is known is what the Builder has: the last View may lack what waits to be shown.
func (s *store) insertPolicy(r resource, a *applied) error {
	p, damage, err := s.dec.policy(r.name, r.payload)
	if err != nil {
		return err
	}
	if damage != "" {
		a.damaged++
		a.warn("policy %q: %s; it now rejects whatever that could have meant", r.name, damage)
	}
	if old := s.b.Policy(r.name); old != nil && reflect.DeepEqual(old, p) {
		return nil
	}
	s.b.InsertPolicy(p)
	a.changed, a.policies = true, true
	return nil
}

// remove forgets a resource; a name that is not known is ignored.
func (s *store) remove(k *kept, typeURL, name string, a *applied) {
	if typeURL == TypeAuthorization {
		if s.b.RemovePolicy(name) {
			a.changed, a.policies = true, true
		}
	} else {
		key := name
		if other, ok := k.renamed[name]; ok {
			key = other
		}
		if s.drop(key) {
			a.changed = true
		}
	}
	k.del(name)
	delete(k.renamed, name)
	k.accepted(name)
}

func (k *kept) accepted(name string) {
	if len(k.refused) > 0 {
		delete(k.refused, clip(name))
	}
}

// drop removes the workload or service of a key.
func (s *store) drop(key string) bool { return s.b.RemoveWorkload(key) || s.dropService(key) }

func (s *store) dropService(key string) bool {
	k, ok := state.ParseServiceKey(key)
	return ok && !strings.Contains(k.Hostname, "/") && s.b.RemoveService(k)
}

func (a *applied) warn(format string, args ...any) {
	if len(a.warnings) < maxWarnings {
		a.warnings = append(a.warnings, fmt.Sprintf(format, args...))
	}
}

// panicError is a panic that was contained, as the control plane is told of it.
type panicError struct{ caught *rescue.Error }

func (e *panicError) Error() string { return fmt.Sprintf("internal error: panic: %v", e.caught.Value) }

// contained is f's error, or its panic as one.
func contained(f func() error) (err error) {
	if p := rescue.Contain("what the control plane sent", func() { err = f() }); p != nil {
		return &panicError{p}
	}
	return err
}

// reasons collects "name: reason" items of a NACK.
type reasons struct {
	items []string
	size  int
	more  int
}

func (r *reasons) add(name string, err error) {
	if r.size > maxNack/2 {
		r.more++
		return
	}
	item := clip(name) + ": " + clip(err.Error())
	r.items = append(r.items, item)
	r.size += len(item) + 2
}

// join makes the text of a NACK, "" if nothing was refused.
func join(refused, undecodable *reasons) string {
	items := append(refused.items, undecodable.items...)
	if more := refused.more + undecodable.more; more > 0 {
		items = append(items, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(items, "; ")
}

// clip bounds a text that is logged, kept or sent back, and makes it one that
// may be sent.
func clip(s string) string {
	if len(s) > 1024 {
		s = s[:1024] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
