package main

import (
	"bufio"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// forgetAfter is how long after its start a process of `ztun run` forgets it. That costs 15 ms of CPU time in each of
// the two, which the first request of the command and others that start have more use for; what ends before never pays.
const forgetAfter = 2 * time.Second

// forgetStart takes out of this process what only its start has needed: garbage, and the pages of the program that
// package initialisation has touched. Those are the page cache's, shared by all copies of the program and back at the
// first access; but each process that maps them is charged with them (a hundred `ztun run` on a host).
func forgetStart() {
	debug.FreeOSMemory()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		start, end, ok := ownPages(sc.Text(), exe)
		if !ok {
			continue
		}
		// Nothing is lost: what cannot be written is the file's. An error leaves them where they are.
		syscall.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED)
	}
}

// ownPages reads a line of /proc/self/maps; false: it is not a part of the program exe that nobody can have changed.
func ownPages(line, exe string) (start, end uintptr, ok bool) {
	f := strings.Fields(line)
	if len(f) < 6 || !strings.HasSuffix(line, " "+exe) || !strings.HasPrefix(f[1], "r-") || f[1][3] != 'p' {
		return 0, 0, false
	}
	from, to, _ := strings.Cut(f[0], "-")
	low, err := strconv.ParseUint(from, 16, strconv.IntSize)
	high, err2 := strconv.ParseUint(to, 16, strconv.IntSize)
	return uintptr(low), uintptr(high), err == nil && err2 == nil && high > low
}
