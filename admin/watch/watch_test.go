package watch

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// watched runs a watch and hands out the causes of its looks.
func watched(t *testing.T, o Options) <-chan Cause {
	t.Helper()
	return watchedIn(t, context.Background(), o)
}

func watchedIn(t *testing.T, ctx context.Context, o Options) <-chan Cause {
	t.Helper()
	looks := make(chan Cause, 100)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	o.Log = slog.New(slog.DiscardHandler)
	go func() {
		defer close(done)
		Run(ctx, o, func(c Cause) { looks <- c })
	}()
	t.Cleanup(func() { cancel(); <-done })
	if c := next(t, looks); c != Start {
		t.Fatalf("the first look is for cause %d, want Start", c)
	}
	return looks
}

func next(t *testing.T, looks <-chan Cause) Cause {
	t.Helper()
	select {
	case c := <-looks:
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("no look")
		return 0
	}
}

func none(t *testing.T, looks <-chan Cause, d time.Duration) {
	t.Helper()
	select {
	case c := <-looks:
		t.Fatalf("a look for cause %d", c)
	case <-time.After(d):
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestReported(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, file, "a")
	looks := watched(t, Options{Dirs: DirsOf(file), Concerns: Files(file), Settle: 100 * time.Millisecond,
		Poll: time.Hour})
	write(t, filepath.Join(dir, "other"), "x")
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	none(t, looks, 300*time.Millisecond)

	write(t, file, "b") // in place
	if c := next(t, looks); c != Reported {
		t.Fatalf("cause %d", c)
	}
	write(t, file+".new", "c") // replaced
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	next(t, looks)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	next(t, looks)
	if err := os.Symlink("elsewhere", filepath.Join(dir, "..data")); err != nil { // Kubernetes' swap of a volume
		t.Fatal(err)
	}
	next(t, looks)
	none(t, looks, 300*time.Millisecond)
}

// A file that is written in pieces is looked at when it is left alone, one that never is after five times that.
func TestSettles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	const settle = 400 * time.Millisecond
	looks := watched(t, Options{Dirs: DirsOf(file), Concerns: Files(file), Settle: settle, Poll: time.Hour})
	// A machine that stands still, for us or for the watcher, leaves the file alone: then once more.
	for tries := 1; ; tries++ {
		start, longest := time.Now(), time.Duration(0)
		for last := start; len(looks) == 0; {
			write(t, file, time.Now().String())
			time.Sleep(settle / 20)
			longest, last = max(longest, time.Since(last)), time.Now()
			if time.Since(start) > time.Minute {
				t.Fatal("what never stops changing is never looked at")
			}
		}
		d := time.Since(start)
		if d >= 4*settle {
			break
		}
		if tries == 20 {
			t.Fatalf("looked at after %v, while it was being written every %v at least", d, longest)
		}
		next(t, looks)
	}
}

func TestPolled(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	looks := watched(t, Options{Dirs: DirsOf(file), Concerns: Files(file), Settle: time.Millisecond,
		Poll: 50 * time.Millisecond})
	for range 3 {
		if c := next(t, looks); c != Polled {
			t.Fatalf("cause %d", c)
		}
	}
}

// A directory that is not there yet is watched once it is found. What happens in it between the look that finds it
// and the watch is looked at, too.
func TestDirectoryComesLater(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	file := filepath.Join(dir, "file")
	looks := watched(t, Options{Dirs: DirsOf(file), Concerns: func(e fsnotify.Event) bool {
		return true
	}, Settle: 10 * time.Millisecond, Poll: 200 * time.Millisecond})
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	reported := func(what string) {
		for end := time.Now().Add(20 * time.Second); next(t, looks) != Reported; {
			if time.Now().After(end) {
				t.Fatalf("%s was not reported", what)
			}
		}
	}
	reported("the directory")
	write(t, file, "a")
	reported("the file")
}

// TestWithoutEvents: whoever watches with none takes no inotify instance, of which a user has few, and looks at
// intervals; the same watch with events takes one.
func TestWithoutEvents(t *testing.T) {
	dir := t.TempDir()
	o := Options{Dirs: func() []string { return []string{dir} }, Concerns: Files("f"), Settle: time.Hour,
		Poll: time.Millisecond}
	looks := watchedIn(t, WithoutEvents(context.Background()), o)
	if c := next(t, looks); c != Polled {
		t.Errorf("a look for cause %d, want Polled", c)
	}
	if n := instances(t); n != 0 {
		t.Errorf("without events there are %d inotify instances", n)
	}
	next(t, watched(t, o)) // after the second look the first is over, and with it what comes before
	if n := instances(t); n != 1 {
		t.Errorf("with events there are %d inotify instances, want 1", n)
	}
}

// instances counts the inotify instances of this process.
func instances(t *testing.T) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(to, "inotify") {
			n++
		}
	}
	return n
}
