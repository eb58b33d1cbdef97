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
	"time"

	watching "ztun/admin/watch"
)

const (
	settle = 2 * time.Second  // a file is left alone for that long before it is looked at (spec/controlplane.md 2.7)
	poll   = 10 * time.Second // looked at anyway: links into other directories and network file systems report nothing
)

// watch calls changed, from this goroutine, once at the start, for what happened before nobody saw, and then when the
// content of one of the files has changed: also when a file appears, vanishes, or is replaced by Kubernetes' swap of
// the ..data link in its directory. It returns when ctx ends. limit bounds what is read of a file, in bytes; a larger
// one counts as changed whenever its size or time changes.
func watch(ctx context.Context, files []string, limit int64, log *slog.Logger, settle, poll time.Duration,
	changed func()) {
	var seen [sha256.Size]byte
	watching.Run(ctx, watching.Options{
		Dirs: watching.DirsOf(files...), Concerns: watching.Files(files...), Settle: settle, Poll: poll, Log: log,
	}, func(cause watching.Cause) {
		if now := fingerprints(files, limit); cause == watching.Start || now != seen {
			seen = now
			changed()
		}
	})
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
