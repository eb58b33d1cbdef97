package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/sandwich"
)

// baseDir holds one directory per living world: lock (flock held by the owner), netns (the namespaces, one a line,
// written before each is made), logs and captures.
const baseDir = "/run/ztun-lab"

// claim makes the directory of a new world and locks it.
func claim(prefix string) (id, dir string, lock *os.File, err error) {
	if err := os.MkdirAll(baseDir, 0o755); err != nil {
		return "", "", nil, err
	}
	for seq := 1; seq < 10000; seq++ {
		id = fmt.Sprintf("%s-%d-%d", prefix, os.Getpid(), seq)
		dir = filepath.Join(baseDir, id)
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return "", "", nil, err
		}
		lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
		if err != nil {
			return "", "", nil, err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			lock.Close()
			return "", "", nil, err
		}
		return id, dir, lock, nil
	}
	return "", "", nil, errors.New("lab: no free world name")
}

// reaperScript waits until the last writer of its standard input is gone, which is this process in any way of dying,
// and removes what is left of the world.
const reaperScript = `
trap '' INT TERM HUP QUIT
while read -r _; do :; done
dir=$1
[ -d "$dir" ] || exit 0
for i in 1 2; do
	while read -r ns; do
		for p in $(ip netns pids "$ns" 2>/dev/null); do kill -9 "$p" 2>/dev/null; done
		ip netns del "$ns" 2>/dev/null
	done < "$dir/netns"
done
rm -rf "$dir"
`

// startReaper starts the reaper; closing the returned pipe (or dying) sets it to work. No file of ours but the pipe
// is passed on, so `go test` never waits for it.
func startReaper(dir string) (io.WriteCloser, *exec.Cmd, error) {
	r, pw, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command("/bin/sh", "-c", reaperScript, "ztun-lab-reaper", dir)
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a terminal's SIGINT to our group is not for it
	if err := cmd.Start(); err != nil {
		r.Close()
		pw.Close()
		return nil, nil, err
	}
	r.Close()
	return pw, cmd, nil
}

// Scavenge removes the worlds whose owners died together with their reapers. It never touches a world whose lock is
// held.
func Scavenge(logf func(string, ...any)) error {
	dirs, err := os.ReadDir(baseDir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	var errs []error
	for _, d := range dirs {
		dir := filepath.Join(baseDir, d.Name())
		f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR, 0)
		if err != nil {
			// Between mkdir and lock of a newcomer, or long dead.
			if st, serr := os.Stat(dir); serr != nil || time.Since(st.ModTime()) < time.Minute {
				continue
			}
		} else if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			f.Close()
			continue
		}
		logf("lab: removing the leftovers of %s", d.Name())
		names, _ := os.ReadFile(filepath.Join(dir, "netns"))
		for _, ns := range strings.Fields(string(names)) {
			errs = append(errs, removeNS(ns))
		}
		errs = append(errs, os.RemoveAll(dir))
		if f != nil {
			f.Close()
		}
	}
	return errors.Join(errs...)
}

// removeNS kills what runs inside a namespace of ours and removes it, and with it the namespace that a daemon which has
// ended without letting go of it keeps for the pod that it is (tun/sandwich); one that is gone is no error.
func removeNS(name string) error {
	var st unix.Stat_t
	if err := unix.Stat("/var/run/netns/"+name, &st); err != nil {
		return nil
	}
	return errors.Join(removeOne(name), removeOne(sandwich.Record{Dev: st.Dev, Ino: st.Ino}.Name()))
}

func removeOne(name string) error {
	if _, err := os.Stat("/var/run/netns/" + name); err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "ip", "netns", "pids", name).Output(); err == nil {
		for _, f := range strings.Fields(string(out)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 && pid != os.Getpid() {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	if out, err := exec.CommandContext(ctx, "ip", "netns", "del", name).CombinedOutput(); err != nil {
		if _, serr := os.Stat("/var/run/netns/" + name); serr == nil {
			return fmt.Errorf("remove namespace %s: %w: %s", name, err, out)
		}
	}
	return nil
}
