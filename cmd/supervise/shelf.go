package supervise

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin/fdstore"
)

// Shelf is the far side of a fdstore.Store: it holds what a process has given it, by name. The zero value is not
// usable; NewShelf makes one.
type Shelf struct {
	log   *slog.Logger
	limit int // descriptors

	mu       sync.Mutex
	held     map[string]int
	size     int // of all names, with what separates them
	ready    bool
	stopping bool
	refused  uint64
	said     time.Time
}

// maxNames is how long the names of all that is held may be: they become one string of the environment, and Linux has
// 128 KiB for one (MAX_ARG_STRLEN).
const maxNames = 96 << 10

// NewShelf makes one that holds at most limit descriptors.
func NewShelf(limit int, log *slog.Logger) *Shelf {
	return &Shelf{log: log, limit: limit, held: map[string]int{}}
}

// Serve does what the process at the other end of conn asks for, until that ends or closes it.
func (s *Shelf) Serve(conn *net.UnixConn) {
	b, oob := make([]byte, fdstore.MaxMessage+1), make([]byte, unix.CmsgSpace(4*maxRights))
	for {
		n, oobn, flags, _, err := conn.ReadMsgUnix(b, oob)
		if err != nil {
			lost, _ := rights(oob[:oobn]) // an empty message is taken for the end
			closeAll(lost)
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
				s.log.Error("the proxy's messages cannot be read", "error", err)
			}
			return
		}
		fds, err := rights(oob[:oobn])
		var m fdstore.Message
		if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			err = fmt.Errorf("%w: too long", fdstore.ErrMessage)
		}
		if err == nil {
			m, err = fdstore.Parse(b[:n])
		}
		if err == nil {
			fds, err = s.do(m, fds)
		}
		if err != nil {
			s.complain(err)
		}
		closeAll(fds) // also those of a barrier, which is all that it waits for
	}
}

// maxRights is how many descriptors one message carries at most (SCM_MAX_FD).
const maxRights = 253

// rights are the descriptors of a message.
func rights(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range cs {
		if more, err := unix.ParseUnixRights(&cs[i]); err == nil {
			fds = append(fds, more...)
		}
	}
	return fds, nil
}

// do returns the descriptors that are not kept.
func (s *Shelf) do(m fdstore.Message, fds []int) ([]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = s.ready || m.Ready
	s.stopping = s.stopping || m.Stopping
	switch {
	case m.Remove:
		s.drop(m.Name)
	case m.Store && len(fds) != 1:
		return fds, fmt.Errorf("%w: FDSTORE with %d descriptors, want one", fdstore.ErrMessage, len(fds))
	case m.Store && m.Name == fdstore.Notify:
		return fds, fmt.Errorf("%w: FDNAME=%s is taken", fdstore.ErrMessage, m.Name)
	case m.Store:
		s.drop(m.Name)
		if len(s.held) >= s.limit || s.size+len(m.Name)+1 > maxNames {
			s.refused++
			return fds, fmt.Errorf("%d sockets are held, there is no room for %s (%d so far): should the proxy be killed, "+
				"connections to those are refused until it listens again", len(s.held), m.Name, s.refused)
		}
		s.held[m.Name] = fds[0]
		s.size += len(m.Name) + 1
		return nil, nil
	}
	return fds, nil
}

func (s *Shelf) drop(name string) {
	if fd, is := s.held[name]; is {
		unix.Close(fd)
		delete(s.held, name)
		s.size -= len(name) + 1
	}
}

// complain says what is wrong, at most every ten seconds.
func (s *Shelf) complain(err error) {
	s.mu.Lock()
	now := time.Now()
	quiet := now.Sub(s.said) < 10*time.Second
	if !quiet {
		s.said = now
	}
	s.mu.Unlock()
	if !quiet {
		s.log.Warn("a socket is not held", "error", err)
	}
}

// Held are the names and descriptors of what is held, which stay the shelf's, in the order of the names.
func (s *Shelf) Held() (names []string, fds []uintptr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range s.held {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		fds = append(fds, uintptr(s.held[n]))
	}
	return names, fds
}

// Clear lets go of everything.
func (s *Shelf) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range s.held {
		s.drop(n)
	}
}

// begin is for a new life of the process.
func (s *Shelf) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready, s.stopping = false, false
}

// state is what the process has said of itself.
func (s *Shelf) state() (ready, stopping bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready, s.stopping
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Pair makes a socket of the shelf's and its far end, by sequenced packets: they keep messages apart, and end with the
// process that has the far end.
func Pair() (near *net.UnixConn, far *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	far = os.NewFile(uintptr(fds[1]), fdstore.Notify)
	mine := os.NewFile(uintptr(fds[0]), "shelf")
	defer mine.Close()
	c, err := net.FileConn(mine)
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	return c.(*net.UnixConn), far, nil
}
