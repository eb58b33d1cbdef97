package control

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"ztun/admin/ca"
	"ztun/admin/watch"
)

// source keeps the newest good snapshot of a directory published.
type source struct {
	reader      reader
	trustDomain string          // the CA's
	limit       int             // bytes of one resource
	joined      map[string]bool // nodes to compare workloads' with, for Check; the status does that by itself
	settle      time.Duration
	poll        time.Duration
	logger      *slog.Logger
	feed        *feed

	last     []*file // as of the last load
	snap     *snapshot
	attempts uint64
	loaded   chan struct{} // closed after the first load, good or bad

	mu     sync.Mutex
	status SnapshotStatus
}

func newSource(root, trustDomain string, limit int, logger *slog.Logger, f *feed) *source {
	return &source{
		reader:      reader{root: root, trustDomain: cmp.Or(trustDomain, defaultTrustDomain)},
		trustDomain: trustDomain, limit: limit, logger: logger, feed: f,
		settle: 200 * time.Millisecond, poll: 5 * time.Second, loaded: make(chan struct{}),
	}
}

// run loads the directory now and whenever it has changed, until ctx ends. A change is read when nothing more has
// changed for settle, at the latest after five times that; every poll the directory is looked at in case a change was
// not reported (network file systems, links into other directories).
func (s *source) run(ctx context.Context) {
	watch.Run(ctx, watch.Options{
		Dirs:     func() []string { return append([]string{s.reader.root}, s.reader.dirs...) },
		Concerns: concerns, Settle: s.settle, Poll: s.poll, Log: s.logger,
	}, func(cause watch.Cause) {
		s.load()
		if cause == watch.Start {
			close(s.loaded)
		}
	})
}

// concerns reports whether an event can have changed what is read: a source file, something that may be a directory,
// or the link by which Kubernetes swaps whole volumes.
func concerns(e fsnotify.Event) bool {
	name := filepath.Base(e.Name)
	if strings.HasPrefix(name, ".") && name != "..data" {
		return false
	}
	return isSource(name) || !e.Has(fsnotify.Write)
}

// load reads what has changed and publishes it if it is good.
func (s *source) load() {
	start := time.Now()
	files, problems := s.reader.read()
	unchanged := s.attempts > 0 && slices.Equal(files, s.last)
	s.mu.Lock()
	unchanged = unchanged && slices.Equal(problems, s.status.directory)
	s.mu.Unlock()
	if unchanged {
		return
	}
	s.attempts++
	s.last = files
	next, errs, warnings := build(files, s.snap, s.trustDomain, s.limit, s.joined)
	for _, p := range problems {
		errs.add(p)
	}
	st := SnapshotStatus{
		Files: len(files), Errors: errs.list, ErrorCount: errs.count,
		Warnings: warnings.list, WarningCount: warnings.count,
		LoadedAt: start.UTC(), LoadSeconds: time.Since(start).Seconds(), directory: problems,
	}
	if errs.count > 0 {
		next = s.snap
		st.FailedSince = start.UTC()
	}
	st.fill(next)
	s.mu.Lock()
	if old := s.status; errs.count > 0 {
		if old.ErrorCount > 0 {
			st.FailedSince = old.FailedSince
		}
		st.Files = old.Files // of the good one
	}
	s.status = st
	s.mu.Unlock()
	s.log(st, warnings)
	if next != s.snap {
		s.snap = next
		s.feed.publish(next)
	}
}

// log says what was loaded, or why not.
func (s *source) log(st SnapshotStatus, warnings report) {
	const most = 10 // lines; the status has more
	if st.ErrorCount > 0 {
		kept := "nothing is served yet"
		if st.Version > 0 {
			kept = fmt.Sprintf("version %d goes on to be served", st.Version)
		}
		s.logger.Error("the directory is not published: "+kept, "errors", st.ErrorCount)
		for _, p := range st.Errors[:min(most, len(st.Errors))] {
			s.logger.Error(p.String())
		}
		return
	}
	for _, p := range st.Warnings[:min(most, len(st.Warnings))] {
		s.logger.Warn(p.String())
	}
	s.logger.Info("published", "version", st.Version, "files", st.Files, "workloads", st.Workloads, "services",
		st.Services,
		"policies", st.Policies, "warnings", warnings.count, "took", time.Duration(st.LoadSeconds*float64(time.Second)).Round(
			time.Millisecond))
}

func (s *source) snapshotStatus() SnapshotStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Check reads the directory of a control plane once as that would: what is wrong with it, and what is doubtful. mesh is
// as in Options.
func Check(dir, mesh string) (SnapshotStatus, error) {
	authority, err := ca.LoadDir(filepath.Join(dir, caDir))
	if err != nil {
		return SnapshotStatus{}, err
	}
	if mesh == "" {
		mesh = filepath.Join(dir, meshDir)
	}
	s := newSource(mesh, authority.TrustDomain(), defaultLimits().message, slog.New(slog.DiscardHandler), newFeed())
	nodes := newNodeStore(filepath.Join(dir, nodesDir))
	nodes.rescan()
	if joined, ok := nodes.members(); ok && len(joined) > 0 { // without any it goes without saying
		s.joined = joined
	}
	s.load()
	return s.snapshotStatus(), nil
}
