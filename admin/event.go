package admin

import (
	"ztun/proxy/state"
)

// Event is something that happened and that the loop must learn of. The set is closed: a reaction is a
// type switch over the types below.
type Event interface{ event() }

type (
	// Closure runs Func on the loop. It is what Do sends; Name appears in logs.
	Closure struct {
		Name string
		Func func()
	}

	// StateBuilt carries a finished view made outside the loop (a source that decodes and builds on its
	// own goroutine). The loop publishes it.
	StateBuilt struct {
		Source string // "file", "xds"
		View   *state.View
	}

	// SourceBroken says that a source has nothing newer that is usable; the last good state stays.
	SourceBroken struct {
		Source string
		Err    error
	}

	// SourceSynced says that a source has delivered its first complete state: the xDS client after the
	// first ACK of every type.
	SourceSynced struct{ Source string }
)

// PodRef names a pod.
type PodRef struct{ Namespace, Name string }

// String is namespace/name.
func (p PodRef) String() string { return p.Namespace + "/" + p.Name }

func (Closure) event()      {}
func (StateBuilt) event()   {}
func (SourceBroken) event() {}
func (SourceSynced) event() {}

// kind is the event's name in metrics and logs.
func kind(e Event) string {
	switch e.(type) {
	case Closure, *closure:
		return "closure"
	case StateBuilt:
		return "state_built"
	case SourceBroken:
		return "source_broken"
	case SourceSynced:
		return "source_synced"
	}
	return "unknown"
}
