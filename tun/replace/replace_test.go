package replace

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestJSON: what cannot be written leaves what there is, and nothing beside it.
func TestJSON(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.json")
	if err := JSON(path, []int{1}); err != nil {
		t.Fatal(err)
	}
	if err := JSON(path, func() {}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a function was written: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "[\n  1\n]\n" {
		t.Errorf("%q, %v", b, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	// A directory cannot be replaced by a file.
	taken := filepath.Join(dir, "taken")
	if err := os.Mkdir(taken, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{taken, filepath.Join(dir, "missing", "a.json")} {
		if err := JSON(p, 1); err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %v", p, err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("%v is left, %v", left, err)
	}
}

// TestFileMode: a file that others may read, whatever was there before.
func TestFileMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cert.pem")
	for _, mode := range []os.FileMode{0o644, 0o600} {
		if err := File(path, mode, []byte("x")); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%v, %v; want %v", info.Mode(), err, mode)
		}
	}
}

// TestSwap: what somebody else has written meanwhile is not lost, and nothing is left beside it.
func TestSwap(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	if err := File(path, 0o600, []byte("theirs")); err != nil {
		t.Fatal(err)
	}
	if err := Swap(path, 0o640, []byte("what was read"), []byte("ours")); !errors.Is(err, ErrChanged) {
		t.Errorf("%v", err)
	}
	if err := Swap(filepath.Join(dir, "none"), 0o640, nil, []byte("ours")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is gone: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "theirs" {
		t.Errorf("%q, %v", b, err)
	}
	if err := Swap(path, 0o640, []byte("theirs"), []byte("ours")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "ours" {
		t.Errorf("%q, %v", b, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}
