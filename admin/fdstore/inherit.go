package fdstore

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The environment of both sides.
const (
	// Supervised is set to our supervisor's process id.
	Supervised = "ZTUN_SUPERVISED"
	// Notify is the name of the descriptor by which our supervisor is told.
	Notify = "notify"

	firstFD = 3 // SD_LISTEN_FDS_START
	maxFDs  = 1 << 16
)

// inherited is what the process was started with.
type inherited struct {
	named []namedFile
	path  string // NOTIFY_SOCKET
}

type namedFile struct {
	name string
	file *os.File
}

// IsSupervised says whether the process with this environment and parent was started by our supervisor.
func IsSupervised(getenv func(string) string, parent int) bool {
	return getenv(Supervised) == strconv.Itoa(parent)
}

// inherit reads the environment. Descriptors that are named for another process are left alone.
func inherit(getenv func(string) string, pid, parent int) (in inherited, err error) {
	in.path = getenv("NOTIFY_SOCKET")
	count := getenv("LISTEN_FDS")
	if count == "" || getenv("LISTEN_PID") != strconv.Itoa(pid) && !IsSupervised(getenv, parent) {
		return in, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxFDs {
		return in, fmt.Errorf("LISTEN_FDS=%q: want a number from 0 to %d", count, maxFDs)
	}
	names := strings.Split(getenv("LISTEN_FDNAMES"), ":")
	for i := range n {
		fd := firstFD + i
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return in, fmt.Errorf("descriptor %d of LISTEN_FDS=%d: %w", fd, n, os.NewSyscallError("fcntl", err))
		}
		name := "unknown" // as sd_listen_fds_with_names(3)
		if i < len(names) && names[i] != "" {
			name = names[i]
		}
		in.named = append(in.named, namedFile{name, os.NewFile(uintptr(fd), name)})
	}
	return in, nil
}

// Environ is what a process is started with that is to find descriptors from 3 on, of these names, and that is ours by
// pid. What env has of that is left out.
func Environ(env, names []string, pid int) []string {
	out := make([]string, 0, len(env)+3)
	for _, e := range env {
		key, _, _ := strings.Cut(e, "=")
		switch key {
		case "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", Supervised:
		default:
			out = append(out, e)
		}
	}
	return append(out, Supervised+"="+strconv.Itoa(pid), "LISTEN_FDS="+strconv.Itoa(len(names)),
		"LISTEN_FDNAMES="+strings.Join(names, ":"))
}

// forget takes it out of the environment of whatever this process starts.
func forget() {
	for _, key := range []string{"LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", Supervised} {
		syscall.Unsetenv(key)
	}
}
