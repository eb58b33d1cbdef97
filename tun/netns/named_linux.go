package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Create makes a namespace of a name that `ip netns` knows, and opens it. It lives until Remove, also without a process
// in it. One that has that name already is opened.
func Create(name string) (*NS, error) {
	if name == "" || filepath.Base(name) != name || name == "." || name == ".." {
		return nil, fmt.Errorf("%q is no name for a network namespace", name)
	}
	ns, err := OpenName(name)
	if err == nil || !errors.Is(err, ErrNotExist) && !errors.Is(err, ErrNotNamespace) {
		return ns, err
	}
	path := filepath.Join(Dir, name)
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return nil, err
	}
	// A file that is none yet is left of one who was killed between the two steps.
	file, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return nil, fmt.Errorf("cannot name a network namespace: %w", err)
	}
	file.Close()
	if err := inNew(func() error {
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}); err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("cannot make network namespace %s: %w (CAP_SYS_ADMIN is needed)", path, err)
	}
	return OpenName(name)
}

// Remove takes a namespace's name away: it ends when nobody holds it, and its devices with it. None of that name is
// fine.
func Remove(name string) error {
	path := filepath.Join(Dir, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("cannot remove network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot remove network namespace %s: %w", path, err)
	}
	return nil
}

// Fd lends the namespace's descriptor to f.
func (n *NS) Fd(f func(fd int) error) error {
	var inner error
	err := n.rc.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}
