package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestUnchanged: only what a file can give back is given up: not what may be written, what a linker has filled in, what
// is swapped, or another file's.
func TestUnchanged(t *testing.T) {
	mapping := func(start, perms, file, anonymous, swap string) string {
		return fmt.Sprintf("%s000-%sfff000 %s 00000000 fe:00 42 %s\nSize: 8 kB\nAnonymous: %s kB\nSwap: %s kB\n"+
			"VmFlags: rd mr\n", start, start, perms, file, anonymous, swap)
	}
	const exe = "/opt/with space/ztun"
	smaps := mapping("1", "r-xp", exe, "0", "0") + mapping("2", "r--p", exe, "0", "0") +
		mapping("3", "rw-p", exe, "0", "0") + mapping("4", "r--p", exe, "4", "0") + mapping("5", "r--p", exe, "0", "4") +
		mapping("6", "r-xp", "/lib/libc.so", "0", "0") + mapping("7", "r--p", "", "0", "0") +
		mapping("8", "r-xp", exe+" (deleted)", "0", "0")
	got := fmt.Sprintf("%x", unchanged(strings.NewReader(smaps), exe))
	if want := "[{1000 1fff000} {2000 2fff000}]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestReleaseProgram: the pages go, and the program goes on.
func TestReleaseProgram(t *testing.T) {
	before := residentFile(t)
	if err := releaseProgram(); err != nil {
		t.Fatal(err)
	}
	if after := residentFile(t); after >= before {
		t.Errorf("%d kB of the program were resident before, %d after", before, after)
	}
}

func residentFile(t *testing.T) (kB int) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(data), "RssFile:")
	if _, err := fmt.Sscan(rest, &kB); !ok || err != nil {
		t.Fatalf("no RssFile in /proc/self/status: %v", err)
	}
	return kB
}
