package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ztun/admin"
)

// TestRunDirs: runs of a user are found by process and by name, the dead are not and leave nothing, and a directory
// that is another's is not taken.
func TestRunDirs(t *testing.T) {
	base := filepath.Join(t.TempDir(), "runs")
	bases := []string{filepath.Join(base, "not", "there"), base}
	make := func(name string) *runDir {
		t.Helper()
		d, err := newRunDir(bases, admin.PodRef{Namespace: "shop", Name: name})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	find := func(ref, want string) {
		t.Helper()
		got, err := findRun(bases, ref)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", ref, got, want)
		}
	}
	find("till", "this user has none")
	till, front := make("till"), make("front")
	if till.path == front.path {
		t.Fatal("two runs have one directory")
	}
	find("till", till.path+"/ztun.sock")
	find("shop/front", front.path+"/ztun.sock")
	find(filepath.Base(front.path), front.path+"/ztun.sock")
	find("cart", "there are "+filepath.Base(till.path)+" (shop/till), "+filepath.Base(front.path)+" (shop/front)")
	find("bank/till", "there is no")
	second := make("till")
	find("till", "there are 2 runs of till: say which by its process")
	second.remove()
	find("till", till.path)
	till.lock.Close() // killed
	find("till", "there is no")
	if entries, err := os.ReadDir(base); err != nil || len(entries) != 1 {
		t.Errorf("the dead are still there: %v, %v", entries, err)
	}
	front.remove()

	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := newRunDir([]string{base}, admin.PodRef{})
	if err == nil || !strings.Contains(err.Error(), "alone may enter; set XDG_RUNTIME_DIR or TMPDIR") {
		t.Error(err)
	}
	link := base + "-link"
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := newRunDir([]string{link}, admin.PodRef{}); err == nil {
		t.Error("a link is followed")
	}
}

// TestNoLifeline: the mark of the inner process, set by somebody else, ends nothing and kills nobody.
func TestNoLifeline(t *testing.T) {
	for _, value := range []string{"1", "3,4", "3,4,/tmp", "x,y,z"} {
		if _, err := newLifeline(value); err == nil || !strings.Contains(err.Error(), "ZTUN_RUN_INSIDE is set") {
			t.Errorf("%s: %v", value, err)
		}
	}
}
