package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ztun/admin"
)

// A `ztun run` has a directory for as long as it lives: its control socket, and what else is to be a file. It is named
// after the process that the caller sees, in one directory for each user. Both of ztun's processes hold its lock, which
// tells a directory of the dead from one in use: whoever of the two outlives the other removes it, and what is left
// when both are killed at once goes with the next `ztun run` (or the next look for a run) of that user.

// runWorkloadFile names the workload in the directory of a run.
const runWorkloadFile = "workload"

// runDir is the directory of one run. The lock is released when all copies of the descriptor are closed.
type runDir struct {
	path string
	lock *os.File
}

// runBases are where runs of this user may be, the most wanted first.
func runBases(getenv func(string) string) []string {
	var all []string
	if d := getenv("XDG_RUNTIME_DIR"); d != "" {
		all = append(all, filepath.Join(d, "ztun"))
	}
	return append(all, filepath.Join(os.TempDir(), fmt.Sprintf("ztun-run-%d", os.Geteuid())))
}

// newRunDir makes the directory of this process's run, in the first base that can be used, and removes those of the
// dead.
func newRunDir(bases []string, workload admin.PodRef) (*runDir, error) {
	var errs []error
	for _, base := range bases {
		if err := ownBase(base); err != nil {
			errs = append(errs, err)
			continue
		}
		sweepRuns(base)
		d, err := makeRunDir(base)
		if err == nil {
			err = os.WriteFile(filepath.Join(d.path, runWorkloadFile), []byte(workload.String()), 0o600)
		}
		if err == nil {
			return d, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("no place for the control socket: %w; set XDG_RUNTIME_DIR or TMPDIR to a directory of your own",
		errors.Join(errs...))
}

// ownBase makes a base, or checks that one which is there is ours alone: its name in /tmp can be guessed.
func ownBase(base string) error {
	if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return isOwn(base)
}

func isOwn(base string) error {
	var st unix.Stat_t
	if err := unix.Lstat(base, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: base, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not a directory that user %d alone may enter", base, os.Geteuid())
	}
	return nil
}

// makeRunDir makes and locks a directory named after our process; another process of that number may be in another
// container.
func makeRunDir(base string) (*runDir, error) {
	for n := range 100 {
		name := strconv.Itoa(os.Getpid())
		if n > 0 {
			name += "-" + strconv.Itoa(n)
		}
		path := filepath.Join(base, name)
		if err := os.Mkdir(path, 0o700); errors.Is(err, fs.ErrExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		lock, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody has taken it for one of the dead before we held the lock
		}
		if err != nil {
			return nil, err
		}
		// They hold it for a moment only.
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
			lock.Close()
			return nil, &os.PathError{Op: "flock", Path: path, Err: err}
		}
		mine, err := lock.Stat()
		there, err2 := os.Lstat(path)
		if err == nil && err2 == nil && os.SameFile(mine, there) {
			return &runDir{path: path, lock: lock}, nil
		}
		lock.Close()
	}
	return nil, fmt.Errorf("%s: a hundred directories of process %d are in use", base, os.Getpid())
}

// remove is the end of the run.
func (d *runDir) remove() {
	os.RemoveAll(d.path)
	d.lock.Close()
}

// liveRun is a run that goes on.
type liveRun struct{ name, workload, socket string }

// sweepRuns removes from a base what the dead have left, and returns the names of what lives.
func sweepRuns(base string) (names []string) {
	entries, _ := os.ReadDir(base) // one that is not there has none
	for _, e := range entries {
		path := filepath.Join(base, e.Name())
		lock, err := os.Open(path)
		if err != nil {
			continue
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.RemoveAll(path)
		} else {
			names = append(names, e.Name())
		}
		lock.Close()
	}
	return names
}

// listRuns are the runs of a base, of which it removes what the dead have left.
func listRuns(base string) (all []liveRun) {
	for _, name := range sweepRuns(base) {
		path := filepath.Join(base, name)
		if b, err := os.ReadFile(filepath.Join(path, runWorkloadFile)); err == nil {
			all = append(all, liveRun{name, string(b), filepath.Join(path, "ztun.sock")})
		}
	}
	return all
}

// liveRuns are the runs of all bases.
func liveRuns(bases []string) (all []liveRun) {
	for _, base := range bases {
		if isOwn(base) == nil {
			all = append(all, listRuns(base)...)
		}
	}
	return all
}

// findRun is the socket of the run that ref names: by the number of its process, or by its workload as NAME or
// NAMESPACE/NAME.
func findRun(bases []string, ref string) (socket string, err error) {
	all := liveRuns(bases)
	var found []liveRun
	for _, r := range all {
		_, short, _ := strings.Cut(r.workload, "/")
		if r.name == ref {
			return r.socket, nil
		}
		if r.workload == ref || short == ref {
			found = append(found, r)
		}
	}
	switch {
	case len(found) == 1:
		return found[0].socket, nil
	case len(found) > 1:
		return "", fmt.Errorf("there are %d runs of %s: say which by its process, %s", len(found), ref, runNames(found))
	case len(all) == 0:
		return "", fmt.Errorf("there is no `ztun run` %s: this user has none", ref)
	}
	return "", fmt.Errorf("there is no `ztun run` %s: there are %s", ref, runNames(all))
}

func runNames(runs []liveRun) string {
	texts := make([]string, len(runs))
	for i, r := range runs {
		texts[i] = r.name + " (" + r.workload + ")"
	}
	slices.Sort(texts)
	if len(texts) > 20 {
		texts = append(texts[:20], "...")
	}
	return strings.Join(texts, ", ")
}
