package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// `ztun run` has three processes: the caller's, which only waits; the daemon of one workload, the same program executed
// again in a user namespace of its own, where it may make devices and enter namespaces but still is in the host's
// network; and the command, in a network namespace whose only way out is the daemon.
//
// The daemon is the first process of a PID namespace, in which the command is, too: when it ends, in whatever way, the
// kernel ends everything that the command has started, and that may have left its session long ago. It inherits those
// whose parents have ended, and reaps them. The caller's process and the daemon share a pipe: the numbers of signals
// for the command go through it, and its end is the end of the caller's process, upon which the daemon ends.
//
// Decisions:
//   - 2026-11-29: the command's end is that of all it has started (bubblewrap and podman do so, too): a daemon that it
//     leaves behind would have a network that nobody serves. A namespace does it rather than a process group, which a
//     daemon leaves, or a cgroup, which a user without a session manager cannot make.
//   - 2026-11-29: the daemon is that namespace's init, rather than a process more between it and the command (a tenth
//     of its memory is not nothing for a hundred of them): the command cannot kill it, it is not traceable as it has
//     capabilities, and getppid is what it was.
//   - 2026-11-29: the pipe, not PR_SET_PDEATHSIG, tells the daemon that the caller's process is gone: it has files to
//     remove. Nor do signals go directly: a terminal sends its own to all of a group, and each of us that sent it on
//     would be one Ctrl-C more for the command.

const (
	// runInside marks the environment of the daemon: descriptors of pipe and lock, and the run's directory.
	runInside = "ZTUN_RUN_INSIDE"
	// runName marks that of the command.
	runName = "ZTUN_RUN"
)

// runSignals are those that go on to the command. What our caller had us ignore (nohup) stays ignored, by the command,
// too.
func runSignals() []os.Signal {
	var all []os.Signal
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1,
		syscall.SIGUSR2} {
		if !signal.Ignored(s) {
			all = append(all, s)
		}
	}
	return all
}

// runOutside executes this program again, with the same arguments, in namespaces in which the caller is who it is and
// may do what a workload's daemon does. It is as good as that one from then on: signals go to it, and its end is the
// result.
func runOutside(who *runWho, device string) error {
	if name := os.Getenv(runName); name != "" {
		return fmt.Errorf("this is the workload %s of a `ztun run` already: one within another has no network to call by",
			name)
	}
	if err := needTUN(device); err != nil {
		return err
	}
	exe, err := ownProgram()
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, runSignals()...)
	defer signal.Stop(signals)
	dir, err := newRunDir(runBases(os.Getenv), refOf(who.spec))
	if err != nil {
		return err
	}
	defer dir.remove()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	orders := os.NewFile(uintptr(pipe[1]), "pipe to the daemon")
	defer orders.Close()
	// By their own numbers, which our caller's descriptors do not have: those are the command's.
	for _, fd := range []int{pipe[0], int(dir.lock.Fd())} {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	c := exec.Command(exe, os.Args[1:]...)
	c.Args[0] = os.Args[0]
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%d,%d,%s", runInside, pipe[0], dir.lock.Fd(), dir.path))
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN},
	}
	giveBack := keepTerminal()
	defer giveBack()
	err = c.Start()
	unix.Close(pipe[0])
	if err != nil {
		return fmt.Errorf("a user namespace cannot be made: %w%s", err, noUserNamespace("/"))
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	settled := time.After(forgetAfter)
	for {
		select {
		case <-settled:
			forgetStart()
		case s := <-signals:
			// A terminal sends its own to all of us.
			if !ofTerminal(s) || !inForeground() {
				orders.Write([]byte{byte(s.(syscall.Signal))})
			}
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				return statusOf(exit.Sys().(syscall.WaitStatus))
			}
			return err
		}
	}
}

// statusOf is how a process has ended, nil for success.
func statusOf(w syscall.WaitStatus) error {
	switch {
	case w.Signaled():
		return exitStatus(128 + int(w.Signal()))
	case w.ExitStatus() != 0:
		return exitStatus(w.ExitStatus())
	}
	return nil
}

// inForeground says whether the terminal's own signals reach our group.
func inForeground() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// keepTerminal returns what gives the terminal back to our group, if that has it now: a shell in another PID namespace
// puts its own job into the foreground, and cannot name the group that was there before.
func keepTerminal() (giveBack func()) {
	if !inForeground() {
		return func() {}
	}
	return func() {
		tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY, 0)
		if err != nil {
			return
		}
		defer tty.Close()
		signal.Ignore(syscall.SIGTTOU) // what a group in the background has for this
		unix.IoctlSetPointerInt(int(tty.Fd()), unix.TIOCSPGRP, unix.Getpgrp())
	}
}

// lifeline is the daemon's end of the pipe from the caller's process.
type lifeline struct {
	dir    string
	orders *os.File
	// signals are for the command; those that come before it runs wait here.
	signals chan syscall.Signal
	own     chan os.Signal // those of a terminal, which the command has itself when it runs
	done    chan struct{}
}

// newLifeline reads what runOutside has put into the environment. From now on the end of the caller's process is that
// of this one, and of all its namespace.
func newLifeline(value string) (*lifeline, error) {
	var orders, lock int
	parts := strings.SplitN(value, ",", 3)
	var err error
	if len(parts) == 3 {
		orders, err = strconv.Atoi(parts[0])
	}
	if err == nil && len(parts) == 3 {
		lock, err = strconv.Atoi(parts[1])
	}
	if err != nil || len(parts) != 3 || os.Getpid() != 1 {
		return nil, fmt.Errorf("%s is set, which `ztun run` sets for itself", runInside)
	}
	unix.CloseOnExec(orders)
	unix.CloseOnExec(lock) // held until we end
	unix.SetNonblock(orders, true)
	l := &lifeline{dir: parts[2], orders: os.NewFile(uintptr(orders), "pipe from `ztun run`"),
		signals: make(chan syscall.Signal, 16), own: make(chan os.Signal, 4), done: make(chan struct{})}
	// They come through the pipe, see above. Handled and not ignored: the command would inherit that.
	signal.Notify(l.own, runSignals()...)
	go func() {
		defer close(l.done)
		b := make([]byte, 1)
		for {
			_, err := l.orders.Read(b)
			switch {
			case errors.Is(err, io.EOF):
				os.RemoveAll(l.dir)
				os.Exit(exitFailure)
			case err != nil:
				return
			}
			select {
			case l.signals <- syscall.Signal(b[0]):
			default: // nobody waits for that many
			}
		}
	}()
	return l, nil
}

func (l *lifeline) close() {
	l.orders.Close()
	<-l.done
}

// ofTerminal says whether a terminal sends s, to all of a group: it does not come through the pipe as well.
func ofTerminal(s os.Signal) bool { return s == syscall.SIGINT || s == syscall.SIGQUIT }

// interruptible is a context that ends, too, with a signal that would end the command if it ran already: as if it had
// ended by that. Others are kept for it, and that one as well: what is done under the context may have just succeeded,
// and the command starts. stop is to be called.
func (l *lifeline) interruptible(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var work sync.WaitGroup
	work.Go(func() {
		var kept []syscall.Signal
		defer func() {
			for _, s := range kept {
				select {
				case l.signals <- s:
				default: // nobody waits for that many
				}
			}
		}()
		for {
			var s syscall.Signal
			select {
			case <-ctx.Done():
				return
			case s = <-l.signals:
			case o := <-l.own:
				if !ofTerminal(o) {
					continue
				}
				s = o.(syscall.Signal)
			}
			kept = append(kept[max(0, len(kept)+1-cap(l.signals)):], s)
			if s == syscall.SIGUSR1 || s == syscall.SIGUSR2 {
				continue
			}
			cancel(exitStatus(128 + int(s)))
			return
		}
	})
	return ctx, func() { cancel(nil); work.Wait() }
}

// follow starts the command, sends signals on to it, and returns how it ended, when nothing of what it has started is
// left. A reason that comes from quit, to end this process, ends the command first.
func (l *lifeline) follow(c *exec.Cmd, quit <-chan string, log *slog.Logger) error {
	l.keepOwn()
	c, err := startProgram(c)
	if err != nil {
		return err
	}
	type end struct {
		status syscall.WaitStatus
		err    error
	}
	ended := make(chan end, 1)
	go func() {
		for {
			var e end
			pid, err := syscall.Wait4(-1, &e.status, 0, nil)
			if err == syscall.EINTR || err == nil && pid != c.Process.Pid {
				continue // somebody whose parent has ended
			}
			e.err = os.NewSyscallError("wait4", err)
			ended <- e
			return
		}
	}()
	settled := time.After(forgetAfter)
	for {
		select {
		case <-settled:
			forgetStart()
		case s := <-l.signals:
			c.Process.Signal(s)
		case reason := <-quit:
			log.Warn("ending the command", "reason", reason)
			c.Process.Signal(syscall.SIGTERM)
		case e := <-ended:
			syscall.Kill(-1, syscall.SIGKILL) // all of the namespace but us
			c.Process.Release()
			if e.err != nil {
				return e.err
			}
			return statusOf(e.status)
		}
	}
}

// keepOwn has the command get what a terminal has sent before there was a command.
func (l *lifeline) keepOwn() {
	for {
		select {
		case s := <-l.own:
			if !ofTerminal(s) {
				continue
			}
			select {
			case l.signals <- s.(syscall.Signal):
			default: // nobody waits for that many
			}
		default:
			return
		}
	}
}

// nameSockets are where glibc's resolver asks a service of the host instead of a nameserver: that one would answer for
// the host, and say of a name of the mesh that there is none.
var nameSockets = []string{"/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/var/run/nscd/socket"}

// ownView gives the calling thread, and what it starts, a file system of its own, in which /proc is that of the PID
// namespace and resolvConf, if there is one, is /etc/resolv.conf. The error says what of that is not so; what the
// command cannot do without is not among it.
func ownView(resolvConf string) (errs []error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return []error{os.NewSyscallError("unshare of mounts", err)}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return []error{os.NewSyscallError("mount", err)}
	}
	const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", quiet, ""); err != nil {
		// A container that hides parts of its /proc lets nobody have a whole one.
		errs = append(errs, fmt.Errorf("the command sees the host's processes in /proc, under other numbers: %w", err))
	}
	if resolvConf == "" {
		return errs
	}
	path, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err == nil {
		err = unix.Mount(resolvConf, path, "", unix.MS_BIND, "")
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("the command's names go to the host's nameservers: %w", err))
	}
	for _, path := range nameSockets {
		err := unix.Mount(resolvConf, path, "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
			errs = append(errs, fmt.Errorf("the command's names go to the host's resolver at %s: %w", path, err))
		}
	}
	return errs
}
