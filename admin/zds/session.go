package zds

import (
	"fmt"
	"slices"
)

// session is what an agent has said on one connection. It decides and does nothing.
type session struct {
	named    map[string]bool // uids that the snapshot has named so far
	complete bool            // SnapshotSent has come
}

func newSession() *session { return &session{named: map[string]bool{}} }

// maxNamed bounds the pods of a snapshot: a hundred times what Kubernetes runs on a node.
const maxNamed = 1 << 16

// todo is what a request asks for.
type todo struct {
	attach bool     // the pod of the request, in the namespace that came with it
	detach []string // uids
}

// take hears a request and decides what it asks for, where the pods known are attached or waiting to be. An error is
// the reason to refuse it: nothing changes.
func (s *session) take(m message, known []string) (todo, error) {
	uid := m.workload.UID
	switch {
	case m.kind == kindAdd && m.noInfo:
		return todo{}, fmt.Errorf("%s of %s: workload_info is required but not present", m.kind, quote(uid))
	case m.kind == kindKeep && s.complete:
		return todo{}, fmt.Errorf("%s of %s: it belongs into the snapshot, which was sent already", m.kind, quote(uid))
	case m.kind == kindSnapshotSent && s.complete:
		return todo{}, fmt.Errorf("%s: the snapshot was sent already", m.kind)
	case (m.kind == kindAdd || m.kind == kindKeep) && !s.complete && len(s.named) >= maxNamed && !s.named[uid]:
		return todo{}, fmt.Errorf("%s of %s: the snapshot has %d pods already", m.kind, quote(uid), maxNamed)
	}
	switch m.kind {
	case kindAdd:
		if !s.complete {
			s.named[uid] = true // one that cannot be attached, too: the agent has it
		}
		return todo{attach: true}, nil
	case kindKeep:
		s.named[uid] = true
		return todo{}, nil
	case kindDel:
		if s.complete {
			return todo{detach: []string{uid}}, nil
		}
		delete(s.named, uid) // it goes with all that the snapshot does not name
		return todo{}, nil
	}
	s.complete = true
	gone := unnamed(s.named, known)
	s.named = nil
	return todo{detach: gone}, nil
}

// unnamed are the known pods that a snapshot has not named: their ends were missed.
func unnamed(named map[string]bool, known []string) (gone []string) {
	for _, uid := range known {
		if !named[uid] {
			gone = append(gone, uid)
		}
	}
	slices.Sort(gone)
	return gone
}
