package xds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// run starts a File's Run and hands out what it reports.
type running struct {
	t       *testing.T
	applied chan *Local
	broken  chan error
}

func start(t *testing.T, f *File) *running {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	r := &running{t: t, applied: make(chan *Local, 100), broken: make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- f.Run(ctx, func(l *Local) { r.applied <- l }, func(err error) { r.broken <- err })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		goleak.VerifyNone(t, leaks)
	})
	return r
}

// quick settles and polls fast. No test depends on how fast.
func quick(path string) *File {
	return &File{Path: path, Settle: 10 * time.Millisecond, Poll: 50 * time.Millisecond}
}

const patience = 30 * time.Second

// wants waits for a file with this one service. Earlier contents may be seen
// first: a reader may meet any state of a file.
func (r *running) wants(name string) {
	r.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case l := <-r.applied:
			if len(l.Services) == 1 && l.Services[0].Name == name {
				return
			}
		case <-timeout:
			r.t.Fatalf("service %s not seen", name)
		}
	}
}

func (r *running) wantsBroken(part string) {
	r.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case err := <-r.broken:
			if strings.Contains(err.Error(), part) {
				return
			}
		case <-timeout:
			r.t.Fatalf("no error with %q", part)
		}
	}
}

func text(name string) string {
	return fmt.Sprintf("services:\n- {name: %s, namespace: n, hostname: h, vips: [], ports: {}}\n", name)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFileRewritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.yaml")
	write(t, path, text("one"))
	r := start(t, quick(path))
	r.wants("one")
	write(t, path, text("two"))
	r.wants("two")
}

func TestFileRenamedOver(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "w.yaml")
	write(t, path, text("one"))
	r := start(t, quick(path))
	r.wants("one")
	write(t, filepath.Join(dir, "new"), text("two"))
	if err := os.Rename(filepath.Join(dir, "new"), path); err != nil {
		t.Fatal(err)
	}
	r.wants("two")
}

// As Kubernetes updates a ConfigMap: w.yaml -> ..data/w.yaml, ..data -> a
// directory, and only ..data is replaced.
func TestFileKubernetes(t *testing.T) {
	dir := t.TempDir()
	swap := func(version string) {
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version, "w.yaml"), text(version))
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap("one")
	path := filepath.Join(dir, "w.yaml")
	if err := os.Symlink("..data/w.yaml", path); err != nil {
		t.Fatal(err)
	}
	f := quick(path)
	f.Poll = time.Hour // the watch alone has to do
	r := start(t, f)
	r.wants("one")
	swap("two")
	r.wants("two")
}

// A link into another directory is not watched, but looked at.
func TestFilePolled(t *testing.T) {
	target := filepath.Join(t.TempDir(), "target")
	path := filepath.Join(t.TempDir(), "w.yaml")
	write(t, target, text("one"))
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	r := start(t, quick(path))
	r.wants("one")
	write(t, target, text("other"))
	r.wants("other")
}

func TestFileBroken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.yaml")
	write(t, path, text("one"))
	r := start(t, quick(path))
	r.wants("one")
	write(t, path, "services:\n- {name: two}\n")
	r.wantsBroken(path + `: line 2: services[0]: "namespace" is missing`)
	if n := len(r.applied); n != 0 {
		t.Errorf("applied %d times", n)
	}
	write(t, path, text("three"))
	r.wants("three")
}

// A file that goes away is a problem, reported once; it counts as new when it
// comes back, even with the same content.
func TestFileGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.yaml")
	r := start(t, quick(path))
	r.wantsBroken("no such file")
	write(t, path, text("one"))
	r.wants("one")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.wantsBroken("no such file")
	time.Sleep(200 * time.Millisecond) // several looks
	if n := len(r.broken); n != 0 {
		t.Errorf("reported %d more times", n)
	}
	write(t, path, text("one"))
	r.wants("one")
}

// Touching a file, or writing what it says already, changes nothing.
func TestFileUnchanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.yaml")
	write(t, path, text("one"))
	r := start(t, quick(path))
	r.wants("one")
	for range 3 {
		// Renamed over, since a truncated file would be seen as broken in between.
		write(t, path+".new", text("one"))
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		if err := os.Chtimes(path, now, now); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if n := len(r.applied); n != 0 {
		t.Errorf("applied %d more times", n)
	}
}

func TestFileDirectoryMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	r := start(t, quick(filepath.Join(dir, "w.yaml")))
	r.wantsBroken("no such file")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "w.yaml"), text("one"))
	r.wants("one")
}

func TestInline(t *testing.T) {
	r := start(t, &File{Inline: text("one")})
	r.wants("one")
	r = start(t, &File{Inline: "x: y"})
	r.wantsBroken("LOCAL_XDS: line 1: x: unknown key; a file has policies, services, workloads")
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "w.yaml")
	f := &File{Path: path}
	if _, err := f.Load(); !errors.Is(err, os.ErrNotExist) || isContent(err) {
		t.Errorf("%v", err)
	}
	write(t, path, "x: y\n")
	if _, err := f.Load(); !isContent(err) ||
		err.Error() != path+": line 1: x: unknown key; a file has policies, services, workloads" {
		t.Errorf("%v", err)
	}
	write(t, path, text("one"))
	if l, err := f.Load(); err != nil || len(l.Services) != 1 {
		t.Errorf("%v", err)
	}
}

// isContent reports whether an error is about what the file says rather than about reading it.
func isContent(err error) bool {
	var fe *FileError
	return errors.As(err, &fe)
}
