package replace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// File replaces the file at path, so that a reader sees the old content or the new, after a loss of power as well. Its
// directory must be there. Errors name path.
func File(path string, mode fs.FileMode, data []byte) error {
	return Copy(path, mode, bytes.NewReader(data))
}

// Copy is File for what is read to its end.
func Copy(path string, mode fs.FileMode, from io.Reader) error {
	return replace(path, mode, from, func() error { return nil })
}

// ErrChanged is what Swap says when somebody else was quicker.
var ErrChanged = errors.New("it has changed meanwhile")

// Swap is File for a file that others write, too: it replaces what is still old, and wraps ErrChanged otherwise. The
// look comes last, when all but the new name is done, so that little can happen after it.
func Swap(path string, mode fs.FileMode, old, data []byte) error {
	return replace(path, mode, bytes.NewReader(data), func() error {
		now, err := os.ReadFile(path)
		if err == nil && !bytes.Equal(now, old) {
			err = ErrChanged
		}
		return err
	})
}

// replace is Copy if may allows it in the end.
func replace(path string, mode fs.FileMode, from io.Reader, may func() error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return fmt.Errorf("cannot replace %s: %w", path, err)
	}
	_, werr := io.Copy(f, from)
	err = errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = may()
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("cannot replace %s: %w", path, errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

// JSON replaces the file at path with v, for its owner alone (mode 0600).
func JSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot replace %s: %w", path, err)
	}
	return File(path, 0o600, append(b, '\n'))
}
