package watch

import (
	"context"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Options is what a watch is made of.
type Options struct {
	// Dirs lists the directories whose entries are watched; it is asked before the first look and after every
	// look, since what was found may lead to others. One that is not there is tried again.
	Dirs func() []string
	// Concerns reports whether an event can have changed what the owner reads; changes of modes are left out already.
	Concerns func(fsnotify.Event) bool

	Settle time.Duration // how long nothing may happen before a look
	Poll   time.Duration // looked at anyway
	Log    *slog.Logger
}

// Cause is why there is a look.
type Cause uint8

const (
	Start    Cause = iota // for what happened before anybody saw
	Reported              // something has changed, or events may have been lost
	Polled                // it is time
)

// withoutEvents is the key of WithoutEvents.
type withoutEvents struct{}

// WithoutEvents has every Run with the context, or one made of it, look at intervals only, and take none of what the
// kernel gives each user 128 of (fs.inotify.max_user_instances).
func WithoutEvents(ctx context.Context) context.Context {
	return context.WithValue(ctx, withoutEvents{}, true)
}

// Run calls look once now and then whenever something may have changed, until ctx ends. look runs on this goroutine,
// never twice at once.
func Run(ctx context.Context, o Options, look func(Cause)) {
	var events <-chan fsnotify.Event
	var errs <-chan error
	var watcher *fsnotify.Watcher
	if ctx.Value(withoutEvents{}) == nil {
		w, err := fsnotify.NewWatcher()
		if err == nil {
			defer w.Close()
			watcher, events, errs = w, w.Events, w.Errors
		} else {
			o.Log.Warn("cannot watch for changes, looking at intervals only", "error", err.Error())
		}
	}
	said, watched := map[string]bool{}, map[string]bool{} // directories that could not be watched, and those that are
	// add tells whether there is a directory that was not watched before: what has happened there nobody has reported.
	add := func() (fresh bool) {
		if watcher == nil {
			return false
		}
		now := map[string]bool{}
		for _, dir := range o.Dirs() {
			err := watcher.Add(dir) // one that is watched already is no error
			if err == nil {
				now[dir] = true
				fresh = fresh || !watched[dir]
			}
			if err != nil && !said[dir] {
				o.Log.Warn("cannot watch a directory for changes, looking at intervals only", "dir", dir, "error", err.Error())
			}
			said[dir] = err != nil
		}
		watched = now
		return fresh
	}
	// Watching begins before looking, so that no change falls in between.
	add()
	look(Start)
	poll := time.NewTicker(o.Poll)
	defer poll.Stop()
	var timer <-chan time.Time // runs while a change settles
	var since time.Time        // the first change not looked at yet
	lookAgain := func() {
		if add() {
			timer, since = time.After(o.Settle), time.Now()
		}
	}
	lookAgain()
	for {
		cause := Reported
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			if e.Op == fsnotify.Chmod || !o.Concerns(e) {
				continue
			}
			if timer == nil {
				since = time.Now()
			}
			if timer == nil || time.Since(since) < 5*o.Settle {
				timer = time.After(o.Settle)
			}
			continue
		case err, ok := <-errs:
			if !ok {
				errs = nil
				continue
			}
			// Events may have been lost.
			o.Log.Warn("watching for changes", "error", err.Error())
			timer, since = time.After(o.Settle), time.Now()
			continue
		case <-timer:
			timer = nil
		case <-poll.C:
			if timer != nil {
				continue
			}
			cause = Polled
		}
		look(cause)
		lookAgain()
	}
}

// Files is a Concerns for files of known names: an event about one of them, or about the link by which Kubernetes
// swaps whole volumes.
func Files(paths ...string) func(fsnotify.Event) bool {
	return func(e fsnotify.Event) bool {
		name := filepath.Base(e.Name)
		for _, p := range paths {
			if filepath.Base(p) == name {
				return true
			}
		}
		return name == "..data"
	}
}

// DirsOf lists the directories of files, as Options.Dirs wants them.
func DirsOf(paths ...string) func() []string {
	dirs := make([]string, len(paths))
	for i, p := range paths {
		dirs[i] = filepath.Dir(p)
	}
	return func() []string { return dirs }
}
