package xds

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"ztun/admin/watch"
)

// MaxFile is the largest file that is read, in bytes.
const MaxFile = 256 << 20

// File is a source of state: a local file that is watched (LOCAL_XDS_PATH), or
// a text that is given once (LOCAL_XDS).
type File struct {
	Path   string // watched; or
	Inline string // read if Path is ""
	Logger *slog.Logger
	// TrustDomain is what a workload has that names none: the CA's; "": cluster.local, as from a control plane.
	TrustDomain string

	// Settle is how long the file has to be left alone after a change before it is
	// read; 0: 200 ms. A file that keeps changing is read after five times that.
	Settle time.Duration
	// Poll is how often the file is looked at in case a change was not reported
	// (network file systems, a link into another directory); 0: 5 s.
	Poll time.Duration
}

// Load reads and parses once. The error names the file, and for bad content
// wraps a *FileError.
func (f *File) Load() (*Local, error) {
	data, err := f.read()
	if err != nil {
		return nil, err
	}
	return f.parse(data)
}

func (f *File) parse(data []byte) (*Local, error) {
	l, err := ParseLocal(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.name(), err)
	}
	for _, w := range l.Workloads {
		w.TrustDomain = cmp.Or(w.TrustDomain, f.TrustDomain, defaultTrustDomain)
	}
	return l, nil
}

// defaultTrustDomain is that of a workload for which nobody names one.
const defaultTrustDomain = "cluster.local"

func (f *File) name() string {
	if f.Path == "" {
		return "LOCAL_XDS"
	}
	return f.Path
}

func (f *File) read() ([]byte, error) {
	if f.Path == "" {
		return []byte(f.Inline), nil
	}
	r, err := os.Open(f.Path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Path, err)
	}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes", f.Path, MaxFile)
	}
	return data, nil
}

// Run loads the file and calls apply with what it says, and again whenever its
// content has changed. Instead, if it cannot be read or is wrong, broken is
// called with the reason, once per reason and content; what was applied last
// goes on to be valid. Both are called from Run's goroutine, never at once. Run
// returns nil when ctx ends and has no other end.
func (f *File) Run(ctx context.Context, apply func(*Local), broken func(error)) error {
	w := watcher{File: f, apply: apply, broken: broken}
	if f.Path == "" {
		w.reload()
		<-ctx.Done()
		return nil
	}
	watch.Run(ctx, watch.Options{
		Dirs: watch.DirsOf(f.Path), Concerns: watch.Files(f.Path),
		Settle: or(f.Settle, 200*time.Millisecond), Poll: or(f.Poll, 5*time.Second), Log: f.log(),
	}, func(cause watch.Cause) {
		if cause != watch.Polled || w.touched() {
			w.reload()
		}
	})
	return nil
}

func or(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}

func (f *File) log() *slog.Logger {
	if f.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return f.Logger
}

// watcher is what Run remembers.
type watcher struct {
	*File
	apply  func(*Local)
	broken func(error)

	stat    os.FileInfo // of the last look; nil: it could not be seen
	sum     [sha256.Size]byte
	read    bool   // sum is of a file that was read
	problem string // last reason given to broken for something other than content
}

// touched reports whether the file looks different from the last time.
func (w *watcher) touched() bool {
	s, err := os.Stat(w.Path)
	if err != nil || w.stat == nil {
		return (err == nil) != (w.stat != nil)
	}
	return !os.SameFile(s, w.stat) || s.Size() != w.stat.Size() || !s.ModTime().Equal(w.stat.ModTime())
}

// reload reads the file and hands it on if its content is new.
func (w *watcher) reload() {
	w.stat = nil
	if w.Path != "" {
		// Before reading: what changes while we read is seen as a change later.
		if s, err := os.Stat(w.Path); err == nil {
			w.stat = s
		}
	}
	data, err := w.File.read()
	if err != nil {
		if w.problem != err.Error() {
			w.problem = err.Error()
			w.broken(err)
		}
		w.read = false // what comes back counts as new
		return
	}
	w.problem = ""
	sum := sha256.Sum256(data)
	if w.read && sum == w.sum {
		return
	}
	w.sum, w.read = sum, true
	l, err := w.parse(data)
	if err != nil {
		w.broken(err)
		return
	}
	w.apply(l)
}
