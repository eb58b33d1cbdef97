package fdstore

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Store is the store of this process. All methods of a nil one do nothing: there is none. It is safe for concurrent
// use.
type Store struct {
	log *slog.Logger

	mu     sync.Mutex
	conn   *net.UnixConn
	left   map[string]*os.File // what an earlier life has left and nobody has taken
	kept   map[string]struct{}
	closed bool // nothing is kept any more, or the store does not listen
	// lasts: the far side holds on to what it has whether we are connected or not (systemd), so that being told late is
	// better than never.
	lasts bool
	deaf  bool // it has not answered the last time, and is hardly waited for until it does

	patience time.Duration
}

// patience is how long the far side may take to read a message or to pass a barrier: systemd may be busy, and a killed
// proxy that loses connections is better than one that stands still.
const patience = 2 * time.Second

// deafly is the part of it that a far side gets to pass a barrier which has not passed the last one.
const deafly = 10

// Open takes what the process was started with; nil: there is no store. It has to come before any other process is
// started, and after the last execve.
func Open(log *slog.Logger) *Store {
	in, err := inherit(os.Getenv, os.Getpid(), os.Getppid())
	forget()
	if err != nil {
		log.Warn("what an earlier run has left in the descriptor store cannot be taken", "error", err)
	}
	s, err := open(in, log)
	if err != nil {
		log.Warn("there is no descriptor store: should this process be killed, connections are refused until the next one "+
			"listens", "error", err)
	}
	return s
}

func open(in inherited, log *slog.Logger) (*Store, error) {
	left := map[string]*os.File{}
	var conn *net.UnixConn
	var err error
	lasts := false
	for _, n := range in.named {
		if n.name != Notify || conn != nil {
			if old := left[n.name]; old != nil {
				old.Close()
			}
			left[n.name] = n.file
			continue
		}
		conn, err = unixConn(n.file)
	}
	if conn == nil && err == nil && in.path != "" {
		conn, err = net.DialUnix("unixgram", nil, &net.UnixAddr{Name: in.path, Net: "unixgram"})
		lasts = true
	}
	if conn == nil {
		for _, f := range left {
			f.Close()
		}
		return nil, err
	}
	s := New(conn, left, log)
	s.lasts = lasts
	return s, nil
}

// unixConn takes f over.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	if u, is := c.(*net.UnixConn); is {
		return u, nil
	}
	c.Close()
	return nil, errors.New("the descriptor " + Notify + " is no Unix socket")
}

// New makes a Store of the socket that the far side reads, and of what an earlier life has left there. Both are its own
// from now on.
func New(conn *net.UnixConn, left map[string]*os.File, log *slog.Logger) *Store {
	return &Store{log: log, conn: conn, left: left, kept: map[string]struct{}{}, patience: patience}
}

// Left is how many descriptors of an earlier life nobody has taken yet.
func (s *Store) Left() int {
	if s == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.left)
}

// Take gives what an earlier life has kept under a name, which stays in the store; nil: nothing.
func (s *Store) Take(name string) *os.File {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.left[name]
	if f != nil {
		delete(s.left, name)
		s.kept[name] = struct{}{}
	}
	return f
}

// Keep puts a socket into the store. What goes wrong is logged: the socket works all the same.
func (s *Store) Keep(name string, socket syscall.Conn) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	rc, err := socket.SyscallConn()
	if err != nil {
		return // closed already
	}
	s.kept[name] = struct{}{}
	if err := rc.Control(func(fd uintptr) { s.send(Message{Store: true, Name: name}, int(fd)) }); err != nil {
		delete(s.kept, name)
	}
}

// Drop has the store forget a name, if it is there. When it has, Flush tells.
func (s *Store) Drop(name string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(name)
}

func (s *Store) drop(name string) {
	if _, is := s.kept[name]; is && s.send(Message{Remove: true, Name: name}) {
		delete(s.kept, name)
	}
}

// Flush returns when the store has done all that it was told, or does not listen, or when that cannot be known now,
// which is logged.
func (s *Store) Flush() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flush()
}

func (s *Store) flush() {
	if s.closed {
		return
	}
	r, w, err := os.Pipe()
	if err != nil {
		s.fail(err)
		return
	}
	defer r.Close()
	sent := false
	rc, err := w.SyscallConn()
	if err == nil {
		err = rc.Control(func(fd uintptr) { sent = s.send(Message{Barrier: true}, int(fd)) })
	}
	w.Close()
	if err == nil && !sent {
		return // that has been said
	}
	if err == nil {
		wait := s.patience
		if s.deaf {
			wait /= deafly
		}
		r.SetReadDeadline(time.Now().Add(wait))
		if _, err = r.Read(make([]byte, 1)); errors.Is(err, io.EOF) { // the far side has closed it
			if s.deaf {
				s.deaf = false
				s.log.Info("the descriptor store answers again")
			}
			return
		}
	}
	s.fail(fmt.Errorf("it does not answer: %w", err))
}

// Ready tells that the process works: from now on exit code 2 is the Go runtime's (a fatal error), not a bad
// configuration's.
func (s *Store) Ready() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.send(Message{Ready: true})
}

// Sweep lets go of what an earlier life has left and nobody will take, and returns how much that was: connections that
// wait there are reset.
func (s *Store) Sweep() int {
	if s == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.left)
	for name, f := range s.left {
		s.kept[name] = struct{}{}
		s.drop(name)
		f.Close()
	}
	clear(s.left)
	return n
}

// Clear tells that this process is about to end in good order, and returns when the store holds nothing more. Nothing
// is kept from then on.
func (s *Store) Clear() {
	if s == nil {
		return
	}
	s.Sweep()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if s.deaf { // one more chance: there may be thousands of messages to come, which are not waited for one by one
		s.deaf = false
		s.flush()
	}
	s.send(Message{Stopping: true})
	for name := range s.kept {
		s.drop(name)
	}
	s.flush()
	s.closed = true
	s.conn.Close()
}

// send is with mu held, and returns whether the message has gone out.
func (s *Store) send(m Message, fds ...int) bool {
	if s.closed {
		return false
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	// WriteMsgUnix refuses a connected datagram socket.
	rc, err := s.conn.SyscallConn()
	if err == nil {
		s.conn.SetWriteDeadline(time.Now().Add(s.patience))
		var inner error
		err = rc.Write(func(fd uintptr) bool {
			_, inner = unix.SendmsgN(int(fd), []byte(m.String()), oob, nil, unix.MSG_NOSIGNAL)
			return inner != unix.EAGAIN || s.deaf
		})
		if inner == unix.EAGAIN {
			inner = os.ErrDeadlineExceeded
		}
		err = errors.Join(err, os.NewSyscallError("sendmsg", inner))
	}
	if err != nil {
		s.fail(err)
	}
	return err == nil
}

// fail logs what went wrong, and gives the store up but for one moment's trouble: descriptors or memory that this
// process has no more of, or a far side that lasts and may only be slow.
func (s *Store) fail(err error) {
	switch {
	case s.closed:
	case slices.ContainsFunc(passing, func(e error) bool { return errors.Is(err, e) }):
		s.log.Warn("the descriptor store could not be told something", "error", err)
	case s.lasts && errors.Is(err, os.ErrDeadlineExceeded):
		if !s.deaf {
			s.deaf = true
			s.log.Warn("the descriptor store does not answer: while it does not, connections may be refused, or wait in vain "+
				"at listeners that are closed here", "error", err)
		}
	default:
		s.closed = true
		s.conn.Close() // our supervisor then lets go of all
		s.log.Error("the descriptor store does not work: should this process be killed, connections are refused until the "+
			"next one listens", "error", err)
	}
}

// passing is what passes: ETOOMANYREFS is of descriptors under way.
var passing = []error{unix.EMFILE, unix.ENFILE, unix.ETOOMANYREFS, unix.ENOBUFS, unix.ENOMEM}
