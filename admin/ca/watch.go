package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	settle = 2 * time.Second  // a file is left alone for that long before it is looked at (spec/controlplane.md 2.7)
	poll   = 10 * time.Second // looked at anyway: links into other directories and network file systems report nothing
)

// watch calls changed, from this goroutine, once at the start, for what happened before nobody saw, and then when the
// content of one of the files has changed: also when a file appears, vanishes, or is replaced by Kubernetes' swap of the
// ..data link in its directory. It returns when ctx ends. limit bounds what is read of a file, in bytes; a larger one counts as changed whenever its
// size or time changes.
func watch(ctx context.Context, files []string, limit int64, log *slog.Logger, settle, poll time.Duration, changed func()) {
	// Watch first and look then, so that no change falls in between.
	var events <-chan fsnotify.Event
	var errs <-chan error
	w, err := fsnotify.NewWatcher()
	if err == nil {
		defer w.Close()
		events, errs = w.Events, w.Errors
		for _, f := range files {
			if err := w.Add(filepath.Dir(f)); err != nil {
				log.Warn("cannot watch a directory for changes, looking at intervals only", "path", f, "error", err.Error())
			}
		}
	} else {
		log.Warn("cannot watch files for changes, looking at intervals only", "error", err.Error())
	}
	seen := fingerprints(files, limit)
	changed()
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	var timer <-chan time.Time // runs while a change settles
	var since time.Time        // the first change not looked at yet
	for {
		look := false
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				events = nil
				break
			}
			if !concerns(e, files) {
				break
			}
			if timer == nil {
				since = time.Now()
			}
			if timer == nil || time.Since(since) < 5*settle { // what never stops changing is looked at all the same
				timer = time.After(settle)
			}
		case _, ok := <-errs: // events may have been lost
			if !ok {
				errs = nil
				break
			}
			look = true
		case <-timer:
			timer, look = nil, true
		case <-ticker.C:
			look = timer == nil
		}
		if !look {
			continue
		}
		if now := fingerprints(files, limit); now != seen {
			seen = now
			changed()
		}
	}
}

// concerns reports whether an event can have changed one of the files.
func concerns(e fsnotify.Event, files []string) bool {
	if e.Op == fsnotify.Chmod {
		return false
	}
	name := filepath.Base(e.Name)
	if name == "..data" {
		return true
	}
	for _, f := range files {
		if filepath.Base(f) == name {
			return true
		}
	}
	return false
}

// fingerprints is a value that differs when the content of a file differs, or why it cannot be read.
func fingerprints(files []string, limit int64) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, f := range files {
		data, err := readBounded(f, limit)
		var big *tooLargeError
		switch {
		case errors.As(err, &big):
			fmt.Fprintf(h, "%d %d\n", big.size, big.time)
		case errors.Is(err, fs.ErrNotExist):
			fmt.Fprintln(h, "missing")
		case err != nil:
			fmt.Fprintln(h, err)
		default:
			fmt.Fprintf(h, "%x\n", sha256.Sum256(data))
		}
	}
	h.Sum(sum[:0])
	return sum
}

// tooLargeError says that a file is larger than it may be.
type tooLargeError struct {
	path              string
	limit, size, time int64
}

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("%s: larger than %d bytes: is this the right file?", e.path, e.limit)
}

// readBounded reads a regular file of at most limit bytes. Errors name it.
func readBounded(path string, limit int64) ([]byte, error) {
	// Not even opened otherwise: a pipe would wait for its other end.
	if s, err := os.Stat(path); err == nil && !s.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if int64(len(data)) > limit {
		e := &tooLargeError{path: path, limit: limit}
		if s, err := f.Stat(); err == nil {
			e.size, e.time = s.Size(), s.ModTime().UnixNano()
		}
		return nil, e
	}
	return data, nil
}
