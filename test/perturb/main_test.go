package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestFinds: the edits fit this Go's library, and a program that assumes an order fails under one of the first seeds.
func TestFinds(t *testing.T) {
	goroot, err := output(t.Context(), "go", "env", "GOROOT")
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := writeOverlay(strings.TrimSpace(goroot), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "order")
	build := exec.Command("go", "build", "-overlay", overlay, "-o", program, "./testdata/order")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const seeds = 400
	for seed := 1; seed <= seeds; seed++ {
		cmd := exec.Command(program)
		cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "ZTUN_PERTURB="+strconv.Itoa(seed))
		err := cmd.Run()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 3 {
			t.Logf("seed %d shows it", seed)
			return
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Errorf("none of %d seeds showed it", seeds)
}

// TestOtherLibrary: a standard library that the edits do not fit is an error that says where, not tests without delays.
func TestOtherLibrary(t *testing.T) {
	root := t.TempDir()
	for _, e := range edits() {
		file := filepath.Join(root, "src", e.file)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("package other\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, err := writeOverlay(root, t.TempDir())
	if err == nil {
		t.Fatalf("%s fits a library without a single lock", list)
	}
	t.Log(err)
}
