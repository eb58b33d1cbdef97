package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// How long somebody waits for his turn at the members: others hold it for the writing of a few small files. A control
// plane waits less, since it comes again within seconds.
const (
	membersPatience = 10 * time.Second
	serverPatience  = 200 * time.Millisecond
)

// holdMembers gives the caller, and nobody else in any process, the right to change who is a member together with what
// members have (nodes/ and issued/ of a control plane's directory), until release. What is read within it belongs
// together: without it a control plane that had read who is joined, before a node joined again, revoked the new
// certificate for one of a node that has left.
func holdMembers(dir string, patience time.Duration) (release func(), err error) {
	path := filepath.Join(dir, issuedDir)
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil // the lock goes with the descriptor
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("%s is held by another `ztun control`, join or leave for over %s: %w", path, patience,
				err)
		}
	}
}
