package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cmd says what to run and how. A nil Env means PATH and HOME only: nothing of the caller's environment leaks into a
// test.
type Cmd struct {
	Args   []string
	Env    []string
	Dir    string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Process is a child of the world. It dies with the world, and with this process however that ends.
type Process struct {
	Args []string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid once done is closed
}

// spawner is the one thread that starts the world's children: PR_SET_PDEATHSIG fires when the *thread* that forked
// dies.
type spawner struct {
	jobs chan func()
	done chan struct{}
}

func newSpawner() *spawner {
	s := &spawner{jobs: make(chan func()), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		defer close(s.done)
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

func (s *spawner) do(fn func() error) error {
	errc := make(chan error, 1)
	s.jobs <- func() { errc <- fn() }
	return <-errc
}

func (s *spawner) stop() { close(s.jobs); <-s.done }

// outputDelay is how long the end of a process waits for the end of its output, which a child that it has left behind
// may hold open for ever.
const outputDelay = 5 * time.Second

// Start starts a command inside ns (nil: the namespace of the test itself).
func (w *World) Start(ns *NS, c Cmd) (*Process, error) {
	if len(c.Args) == 0 {
		return nil, errors.New("lab: empty command")
	}
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env = c.Env
	if cmd.Env == nil {
		cmd.Env = BaseEnv()
	}
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Dir, c.Stdin, c.Stdout, c.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = outputDelay
	p := &Process{Args: c.Args, cmd: cmd, done: make(chan struct{})}
	start := func() error {
		if ns == nil {
			return cmd.Start()
		}
		back, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer back.Close()
		if err := unix.Setns(int(ns.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", ns.Name, err)
		}
		defer func() {
			if err := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); err != nil {
				panic(fmt.Sprintf("lab: the spawner cannot leave namespace %s: %v", ns.Name, err))
			}
		}()
		return cmd.Start()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil, errors.New("lab: the world is closed")
	}
	if err := w.spawn.do(start); err != nil {
		return nil, fmt.Errorf("start %s: %w", strings.Join(c.Args, " "), err)
	}
	w.procs[p] = struct{}{}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
		w.mu.Lock()
		delete(w.procs, p)
		w.mu.Unlock()
	}()
	return p, nil
}

// BaseEnv is the environment that every child of a world gets.
func BaseEnv() []string {
	path := os.Getenv("PATH")
	if path == "" {
		path = "/usr/sbin:/usr/bin:/sbin:/bin"
	}
	env := []string{"PATH=" + path, "HOME=" + os.Getenv("HOME"), "LC_ALL=C"}
	if v := os.Getenv("GORACE"); v != "" {
		env = append(env, "GORACE="+v)
	}
	if v := os.Getenv("GOCOVERDIR"); v != "" {
		env = append(env, "GOCOVERDIR="+v)
	}
	return env
}

// Pid of the process.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended and its output is complete, or outputDelay has passed since.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal; a process that has ended is no error.
func (p *Process) Signal(s syscall.Signal) error {
	err := p.cmd.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Kill sends SIGKILL and waits for the end.
func (p *Process) Kill() { _ = p.Signal(syscall.SIGKILL); <-p.done }

// killAll is Kill, of the children too that are in the process's group (Setpgid) still.
func (p *Process) killAll() {
	_ = p.Signal(syscall.SIGKILL)
	select {
	case <-p.done:
	default: // the number is the process's, or its group's for as long as a child lives
		_ = syscall.Kill(-p.Pid(), syscall.SIGKILL)
	}
	<-p.done
}

// Wait waits for the end: the exit code (-1 when a signal ended it; Err tells which).
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("%s still runs: %w", p.Args[0], ctx.Err())
	}
}

// Err is what exec said at the end (nil: exit code 0). It waits for the end.
func (p *Process) Err() error { <-p.done; return p.err }

// CPU is the user and system time of an ended process.
func (p *Process) CPU() (user, system time.Duration) {
	<-p.done
	return p.cmd.ProcessState.UserTime(), p.cmd.ProcessState.SystemTime()
}

// Run runs a command inside ns to its end and returns its standard output; the error holds the standard error too.
func (w *World) Run(ctx context.Context, ns *NS, args ...string) (string, error) {
	return w.RunCmd(ctx, ns, Cmd{Args: args})
}

// RunCmd is Run with everything of Cmd; Stdout and Stderr of c are ignored.
func (w *World) RunCmd(ctx context.Context, ns *NS, c Cmd) (string, error) {
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	p, err := w.Start(ns, c)
	if err != nil {
		return "", err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Kill()
		return out.String(), fmt.Errorf("%s: %w; stderr: %s", strings.Join(c.Args, " "), ctx.Err(),
			tail(errOut.String(), 2000))
	}
	if p.err != nil {
		return out.String(), fmt.Errorf("%s: %w; stdout: %s stderr: %s", strings.Join(c.Args, " "), p.err,
			tail(out.String(), 500), tail(errOut.String(), 2000))
	}
	return out.String(), nil
}

// ExitCode digs the exit code out of an error of Run; -1 if there is none.
func ExitCode(err error) int {
	var e *exec.ExitError
	if err == nil {
		return 0
	}
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "..." + s[len(s)-n:]
}

// syncBuffer is a bytes.Buffer that may be read while a child writes to it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
