package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Procs finds the network namespaces of running pods by their processes: kubelet's cgroups are named by the pods' uids.
type Procs struct {
	dir string // where a proc file system is that shows the node's processes

	mu      sync.Mutex
	scanned time.Time // when the scan that found has begun
	found   map[string]process
	denied  bool // processes of pods may not be looked at
}

// process is one of a pod's.
type process struct {
	pid   string
	start uint64 // in ticks since boot
	netns fileID
}

// fileID tells namespaces apart.
type fileID struct{ dev, inode uint64 }

// NewProcs looks in dir, which is /proc, or where the node's is mounted.
func NewProcs(dir string) *Procs { return &Procs{dir: dir} }

// fresh is for how long a scan may be asked again: when a namespace of two hundred pods is labelled, one is enough.
const fresh = time.Second

// ErrNoProcess is returned for a pod without a process that has a network of its own.
var ErrNoProcess = errors.New("no process of the pod has a network namespace of its own")

// Open opens the network namespace of the pod with the uid that its cgroups are named by.
func (p *Procs) Open(uid string) (*os.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var last error
	for try := range 2 {
		if try > 0 || time.Since(p.scanned) > fresh {
			if err := p.scan(); err != nil {
				return nil, err
			}
		}
		found, ok := p.found[uid]
		if !ok {
			last = ErrNoProcess
			if p.denied {
				last = fmt.Errorf("%w that may be looked at (CAP_SYS_PTRACE is missing)", last)
			}
			continue
		}
		f, err := p.open(uid, found)
		if err == nil {
			return f, nil
		}
		last = err
	}
	return nil, last
}

// open opens what a scan has found, if it is still the same: numbers of processes are used again.
func (p *Procs) open(uid string, found process) (*os.File, error) {
	f, err := os.Open(filepath.Join(p.dir, found.pid, "ns", "net"))
	if err != nil {
		return nil, err
	}
	got, err := p.look(found.pid)
	id, idErr := idOf(f)
	if err = errors.Join(err, idErr); err != nil || got.uid != uid || id != found.netns {
		f.Close()
		return nil, ErrNoProcess
	}
	return f, nil
}

// scan finds for each pod the oldest of its processes, which is the sandbox's: a younger one may have made itself
// another network namespace.
func (p *Procs) scan() error {
	begun := time.Now()
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return fmt.Errorf("the processes of this node: %w", err)
	}
	host, err := pathID(filepath.Join(p.dir, "1", "ns", "net"))
	if err != nil {
		return fmt.Errorf("the network namespace of the host: %w", err)
	}
	all, denied := map[string]process{}, false
	for _, e := range entries {
		if e.Name()[0] < '0' || e.Name()[0] > '9' {
			continue
		}
		seen, err := p.look(e.Name())
		denied = denied || errors.Is(err, fs.ErrPermission)
		if err != nil || seen.netns == host {
			continue
		}
		if old, ok := all[seen.uid]; !ok || seen.start < old.start {
			all[seen.uid] = seen.process
		}
	}
	p.found, p.scanned, p.denied = all, begun, denied
	return nil
}

// member is a process and the pod that it belongs to.
type member struct {
	process
	uid string
}

// errNoPods is of a process that belongs to no pod.
var errNoPods = errors.New("no process of a pod")

// look looks at one process, which may belong to no pod, or have ended meanwhile.
func (p *Procs) look(pid string) (member, error) {
	dir := filepath.Join(p.dir, pid)
	cgroup, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return member{}, err
	}
	uid := podOf(string(cgroup))
	if uid == "" {
		return member{}, errNoPods
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return member{}, err
	}
	start, ok := startOf(stat)
	if !ok {
		return member{}, fmt.Errorf("%s/stat has no start time", dir)
	}
	id, err := pathID(filepath.Join(dir, "ns", "net"))
	return member{process{pid, start, id}, uid}, err
}

// podOf is the uid of the pod that a process with these cgroups belongs to; "" if none. Kubelet names them
// .../podUID/... or, where systemd makes them, .../kubepods-besteffort-podUID.slice/... with _ for each - of the uid.
func podOf(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		for part := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			name, slice := strings.CutSuffix(part, ".slice")
			if slice {
				if !strings.HasPrefix(name, "kubepods") {
					continue
				}
				_, name, _ = strings.Cut(name, "-pod")
				name = strings.ReplaceAll(name, "_", "-")
			} else {
				var ok bool
				if name, ok = strings.CutPrefix(name, "pod"); !ok {
					continue
				}
			}
			if isUID(name) {
				return name
			}
		}
	}
	return ""
}

// isUID says whether a word is a pod's uid, or the hash that is a static pod's.
func isUID(s string) bool {
	digits := 0
	for i, c := range []byte(s) {
		switch {
		case c >= '0' && c <= '9' || c >= 'a' && c <= 'f':
			digits++
		case c == '-' && (i == 8 || i == 13 || i == 18 || i == 23):
		default:
			return false
		}
	}
	return digits == 32 && (len(s) == 32 || len(s) == 36)
}

// startOf is when a process began, from its stat: the 22nd word, the second being its name in parentheses, which may
// have anything in it.
func startOf(stat []byte) (uint64, bool) {
	words := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(words) < 20 {
		return 0, false
	}
	start, err := strconv.ParseUint(string(words[19]), 10, 64)
	return start, err == nil
}

func pathID(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return fileID{uint64(st.Dev), st.Ino}, nil
}

func idOf(f *os.File) (fileID, error) {
	fi, err := f.Stat()
	if err != nil {
		return fileID{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fileID{}, fmt.Errorf("%s has no inode", f.Name())
	}
	return fileID{uint64(st.Dev), st.Ino}, nil
}

// OpenNetns opens a network namespace by its path.
func OpenNetns(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO would wait for its other end
	if err != nil {
		return nil, err
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("%s is no network namespace", path)
	}
	return f, nil
}
