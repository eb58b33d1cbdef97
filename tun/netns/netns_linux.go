package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Dir is where `ip netns` keeps its names: one bind mount of a namespace file each.
const Dir = "/var/run/netns"

// ErrNotExist is what Open, OpenPath, OpenName and OpenPID return (wrapped) when there is no such namespace. It
// matches fs.ErrNotExist too.
var ErrNotExist = fmt.Errorf("no such network namespace: %w", os.ErrNotExist)

// ErrNotNamespace is what Open, OpenPath, OpenName and Identify return (wrapped) when the path names something else.
var ErrNotNamespace = errors.New("not a network namespace")

// NS is an open network namespace. Holding it keeps the namespace alive in the kernel, also after its name and its
// last process are gone. It is safe for concurrent use.
type NS struct {
	file *os.File
	rc   syscall.RawConn
	path string
	dev  uint64
	ino  uint64
}

// Open opens a namespace by a reference as an operator writes it: a path (anything with a slash), a name known to `ip
// netns`, or the pid of a process that lives in it, tried in this order. The error says what was tried.
func Open(ref string) (*NS, error) {
	switch {
	case ref == "":
		return nil, fmt.Errorf("%w: empty reference; give a path, a name in %s or a pid", ErrNotExist, Dir)
	case strings.ContainsRune(ref, '/'):
		return OpenPath(ref)
	}
	ns, err := OpenName(ref)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return ns, err
	}
	if pid, perr := strconv.Atoi(ref); perr == nil && pid > 0 {
		ns, err := OpenPID(pid)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %q: neither a name in %s nor the pid of a live process", ErrNotExist, ref, Dir)
		}
		return ns, err
	}
	return nil, fmt.Errorf("%w: %q: is it a path, a name in %s or a pid?", ErrNotExist, ref, Dir)
}

// BootID is the kernel's name for this boot: what is written down of a namespace (Identify) holds no longer.
func BootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// Identify tells which namespace a reference means, as Open takes it, without a descriptor: also when the process has
// none left. ErrNotExist and ErrNotNamespace say that there is none; every other error says nothing about it.
func Identify(ref string) (dev, ino uint64, err error) {
	var paths []string
	switch pid, perr := strconv.Atoi(ref); {
	case ref == "":
	case strings.ContainsRune(ref, '/'):
		paths = []string{ref}
	case ref == "." || ref == "..":
	case perr == nil && pid > 0:
		paths = []string{filepath.Join(Dir, ref), fmt.Sprintf("/proc/%d/ns/net", pid)}
	default:
		paths = []string{filepath.Join(Dir, ref)}
	}
	for _, path := range paths {
		var fs unix.Statfs_t
		var st unix.Stat_t
		if err = unix.Statfs(path, &fs); err == nil {
			err = unix.Stat(path, &st)
		}
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH):
			continue
		case err != nil:
			return 0, 0, fmt.Errorf("cannot look at network namespace %s: %w", path, err)
		case int64(fs.Type) != unix.NSFS_MAGIC:
			return 0, 0, fmt.Errorf("%s is %w (a name that `ip netns` left behind, or some other file)", path, ErrNotNamespace)
		}
		return uint64(st.Dev), st.Ino, nil
	}
	return 0, 0, fmt.Errorf("%w: %q", ErrNotExist, ref)
}

// OpenName opens a namespace by the name that `ip netns` gave it.
func OpenName(name string) (*NS, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsRune(name, '/') {
		return nil, fmt.Errorf("%w: %q is not a name of `ip netns`", ErrNotExist, name)
	}
	return OpenPath(filepath.Join(Dir, name))
}

// OpenPID opens the namespace in which the process pid lives.
func OpenPID(pid int) (*NS, error) {
	ns, err := OpenPath(fmt.Sprintf("/proc/%d/ns/net", pid))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no process %d", ErrNotExist, pid)
	}
	return ns, err
}

// OpenPath opens the namespace file at path (a bind mount, or /proc/PID/ns/net).
func OpenPath(path string) (*NS, error) {
	// O_NONBLOCK so that a path that names a FIFO by mistake is an error below, not a hang.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("%w: %s: is it a path, a name in %s or a pid?", ErrNotExist, path, Dir)
	case errors.Is(err, os.ErrPermission):
		return nil,
			fmt.Errorf("cannot open network namespace %s: %w (root, or CAP_SYS_ADMIN and CAP_SYS_PTRACE for a pid, is needed)",
				path, errnoOf(err))
	case err != nil:
		return nil, fmt.Errorf("cannot open network namespace %s: %w", path, errnoOf(err))
	}
	ns, err := fromFile(file, path)
	if err != nil {
		file.Close()
		return nil, err
	}
	return ns, nil
}

// FromFile opens the namespace that a descriptor refers to, however it was come by; f stays the caller's.
func FromFile(f *os.File) (*NS, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var inner error
	err = rc.Control(func(old uintptr) { fd, inner = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, inner); err != nil {
		return nil, fmt.Errorf("cannot duplicate the descriptor of network namespace %s: %w", f.Name(), err)
	}
	file := os.NewFile(uintptr(fd), f.Name())
	ns, err := fromFile(file, f.Name())
	if err != nil {
		file.Close()
		return nil, err
	}
	return ns, nil
}

// New makes a namespace that nobody lives in, of the user namespace that the process is in, and returns a descriptor
// of it: it is gone when that and all that lives there are.
func New() (*os.File, error) {
	var file *os.File
	err := inNew(func() (err error) {
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot make a network namespace: %w", err)
	}
	return file, nil
}

// inNew runs f on a thread in a new namespace, and takes the thread back. One that cannot be dies with its goroutine,
// but for the process's first: that one stays where it is for good, and whoever enters the process's namespace by its
// number (kubectl exec does) comes there.
func inNew(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(home)
			err = os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET))
		}
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		err = f()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Current opens the namespace of the calling thread: the process's own, except inside Do.
func Current() (*NS, error) { return OpenPath("/proc/thread-self/ns/net") }

// fromFile checks that file is a network namespace and wraps it.
func fromFile(file *os.File, path string) (*NS, error) {
	rc, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	ns := &NS{file: file, rc: rc, path: path}
	var inner error
	err = rc.Control(func(fd uintptr) {
		var fs unix.Statfs_t
		if inner = unix.Fstatfs(int(fd), &fs); inner != nil {
			return
		}
		// A name whose bind mount is gone is an empty file of another file system; setns would say EINVAL, which helps
		// nobody.
		if int64(fs.Type) != unix.NSFS_MAGIC {
			inner = fmt.Errorf("%s is %w (a name that `ip netns` left behind, or some other file)", path, ErrNotNamespace)
			return
		}
		if kind, err := unix.IoctlRetInt(int(fd), unix.NS_GET_NSTYPE); err == nil && kind != unix.CLONE_NEWNET {
			inner = fmt.Errorf("%s is a namespace, but %w", path, ErrNotNamespace)
			return
		}
		var st unix.Stat_t
		if inner = unix.Fstat(int(fd), &st); inner == nil {
			ns.dev, ns.ino = uint64(st.Dev), st.Ino
		}
	})
	if err = errors.Join(err, inner); err != nil {
		return nil, err
	}
	return ns, nil
}

// ID identifies the namespace: two NS with equal IDs are the same namespace, whatever their paths. An inode may be
// used again after the namespace is gone, but not while an NS holds it.
func (n *NS) ID() (dev, ino uint64) { return n.dev, n.ino }

// Same says whether both are the same namespace.
func (n *NS) Same(o *NS) bool { return o != nil && n.dev == o.dev && n.ino == o.ino }

// Path returns the path by which the namespace was opened.
func (n *NS) Path() string { return n.path }

// String returns the path, for messages.
func (n *NS) String() string { return n.path }

// Dup opens the namespace a second time, so that both can be closed independently.
func (n *NS) Dup() (*NS, error) {
	var fd int
	var inner error
	err := n.rc.Control(func(old uintptr) { fd, inner = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, inner); err != nil {
		return nil, fmt.Errorf("cannot duplicate network namespace %s: %w", n.path, err)
	}
	file := os.NewFile(uintptr(fd), n.path)
	rc, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &NS{file: file, rc: rc, path: n.path, dev: n.dev, ino: n.ino}, nil
}

// Close lets go of the namespace.
func (n *NS) Close() error { return n.file.Close() }

// Do runs f inside the namespace, on a thread that nothing else uses meanwhile, and waits for it. Sockets, device
// files and sysctls that f opens belong to the namespace; goroutines that f starts do not run in it. f should be
// brief: it holds a thread. A panic in f is raised again in the caller. Errors are f's own, or say why the namespace
// could not be entered (then f has not run).
func (n *NS) Do(f func() error) error {
	type outcome struct {
		err      error
		panicked any
		returned bool
	}
	done := make(chan outcome, 1)
	go func() {
		var out outcome
		home := -1
		defer func() {
			if !out.returned {
				out.panicked = recover()
			}
			// Restore, or leave the goroutine locked: then the thread dies with it.
			if home == -1 || unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			if home != -1 {
				unix.Close(home)
			}
			done <- out
		}()
		runtime.LockOSThread()
		var err error
		if home, err = enter(n); err != nil {
			out.err, out.returned = err, true
			return
		}
		out.err = f()
		out.returned = true
	}()
	out := <-done
	switch {
	case out.panicked != nil:
		panic(out.panicked)
	case !out.returned:
		return fmt.Errorf("function in network namespace %s ended its goroutine without returning", n.path)
	}
	return out.err
}

// enter moves the calling thread into n and returns a descriptor of the namespace it came from. On an error the
// thread has not moved.
func enter(n *NS) (home int, err error) {
	home, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("cannot open the thread's own network namespace: %w", err)
	}
	var inner error
	err = n.rc.Control(func(fd uintptr) { inner = unix.Setns(int(fd), unix.CLONE_NEWNET) })
	if err == nil {
		err = inner
	}
	if err == nil {
		return home, nil
	}
	unix.Close(home)
	if errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("cannot enter network namespace %s: %w (CAP_SYS_ADMIN is needed)", n.path, err)
	}
	return -1, fmt.Errorf("cannot enter network namespace %s: %w", n.path, err)
}

// in runs f in ns, or right here when ns is nil (the process's own namespace).
func in(ns *NS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

// errnoOf strips os's decoration ("open PATH:") from an error, since our message names the path already.
func errnoOf(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
