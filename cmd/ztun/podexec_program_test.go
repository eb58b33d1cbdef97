package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// TestPrograms: a command that is not there, or cannot be run, has a shell's exit codes and no advice to be root; a
// script without an interpreter is the shell's.
func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	for name, mode := range map[string]os.FileMode{"script": 0o755, "text": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("exit $1\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]int{
		"nonesuch": 127, dir + "/nonesuch": 127, "": 127, "text": 127, dir + "/text": 126, dir: 126,
	} {
		_, err := findProgram(name)
		if err == nil || exitCode(err) != want || permissionHint(err) != "" {
			t.Errorf("%q: %v%s, exit code %d, want %d", name, err, permissionHint(err), exitCode(err), want)
		}
	}
	program, err := findProgram("script")
	if err != nil {
		t.Fatal(err)
	}
	c, err := startProgram(exec.Command(program, "7"))
	if err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := c.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("a script without an interpreter: %v", err)
	}
	if _, err := startProgram(exec.Command(dir + "/text")); err == nil || exitCode(err) != 126 ||
		!strings.Contains(err.Error(), "/text cannot be run") || permissionHint(err) != "" {
		t.Errorf("a text: %v", err)
	}
}

// TestUnreadableDirectory: in a working directory that we cannot look into there is no mesh configuration by default; a
// file that is named has to be readable.
func TestUnreadableDirectory(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Chmod(dir, 0); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, 0o700)
	var none, named error
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Geteuid() == 0 { // never unlocked: the thread, which is no root's to the file system, ends with us
			runtime.LockOSThread()
			syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0)
		}
		_, none = readMeshConfig("./etc/istio/config/mesh", false)
		_, named = readMeshConfig("./etc/istio/config/mesh", true)
	}()
	<-done
	if none != nil {
		t.Errorf("by default: %v", none)
	}
	if !errors.Is(named, os.ErrPermission) {
		t.Errorf("named: %v", named)
	}
}
