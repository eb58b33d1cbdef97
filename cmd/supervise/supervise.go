package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin/fdstore"
	"ztun/admin/zlog"
)

// Wanted says whether a process of these arguments and environment is to be the parent: that of a node's proxy which
// nobody supervises yet, by ZTUN_SUPERVISE or as process 1. A value that is none is left to the proxy to refuse.
func Wanted(args []string, getenv func(string) string, pid, parent int) bool {
	if len(args) < 2 || args[1] != "proxy" || len(args) > 3 || len(args) == 3 && args[2] != "ztunnel" ||
		fdstore.IsSupervised(getenv, parent) || strings.EqualFold(getenv("PROXY_MODE"), "dedicated") {
		return false
	}
	switch getenv("ZTUN_SUPERVISE") {
	case "true":
		return true
	case "":
		return pid == 1
	}
	return false
}

// Options say what Run starts, and how often. Zero values stand for the defaults.
type Options struct {
	Path    string   // of the program
	Args    []string // its arguments, the first being its name
	Env     []string
	Started func() // called once, when the first child runs

	// Within how long (a minute) how many (5) ends that nobody meant are made good.
	Within time.Duration
	Often  int
	Pause  time.Duration // before the second within that time, doubled for each one more; 100 ms
}

const (
	ownDescriptors = 32 // of this process itself
	// deafFor is how long a child lives on that has given its socket up until what is held for it is let go of: it has
	// closed its own listeners by then, or may, and what is held takes connections that nobody accepts.
	deafFor = 5 * time.Second
)

// EndWithParent has the calling process end with the supervisor that has started it, however that ends. The kernel
// forgets what Run has asked it for when the child executes itself from another thread than its first, as the proxy
// does to give up capabilities: it belongs to a thread. So it is asked again in every life, by an init function: those
// run on the first thread, which is there as long as the process (the signal is sent for a thread that exists). again
// says that this is such a later life: a supervisor that is not our parent any more has ended meanwhile.
func EndWithParent(getenv func(string) string, again bool) {
	if getenv(fdstore.Supervised) == "" {
		return
	}
	ours := fdstore.IsSupervised(getenv, os.Getppid())
	if ours {
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
			fmt.Fprintln(os.Stderr, "ztun: prctl PR_SET_PDEATHSIG:", err) // we live on without it
		}
	}
	if (ours || again) && !fdstore.IsSupervised(getenv, os.Getppid()) {
		fmt.Fprintln(os.Stderr, "ztun: the supervisor has ended")
		os.Exit(1)
	}
}

// forwarded are the signals that are passed on. After any of them the child's end is ours.
var forwarded = []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT}

// Run supervises until the program has ended for good, and returns the code to exit with. The calling goroutine has to
// be the process's first, locked to its thread: with that the child would end.
func Run(o Options) int {
	runtime.GOMAXPROCS(1)
	if o.Within == 0 {
		o.Within = time.Minute
	}
	if o.Often == 0 {
		o.Often = 5
	}
	if o.Pause == 0 {
		o.Pause = 100 * time.Millisecond
	}
	log := zlog.New(zlog.Options{Writer: os.Stderr, JSON: os.Getenv("LOG_FORMAT") == "json", Lines: 100})
	defer log.Close(context.Background())
	p := &parent{o: o, log: log.Logger("ztun"), signals: make(chan os.Signal, 16), reap: make(chan os.Signal, 1)}
	p.shelf = NewShelf(limit(), p.log)
	signal.Notify(p.signals, forwarded...)
	signal.Notify(p.reap, syscall.SIGCHLD)
	signal.Ignore(syscall.SIGPIPE)
	return p.run()
}

// limit is how many descriptors there is room for: twice as many are open for a moment when a child is started, as
// those that stand in the way of another's place in it are moved aside (syscall.StartProcess).
func limit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		l.Cur = 1024
	}
	return max(int(min(l.Cur, 1<<20))-ownDescriptors, 0) / 2
}

// parent is the supervisor.
type parent struct {
	o     Options
	log   *slog.Logger
	shelf *Shelf

	signals, reap chan os.Signal

	asked bool // a signal was passed on
}

// child is one life of the program.
type child struct {
	pid    int
	near   *net.UnixConn
	served chan struct{} // closed when nothing more will come from near
}

func (p *parent) run() int {
	var ends []time.Time
	for {
		c, err := p.start()
		if err != nil {
			p.log.Error("the proxy cannot be started", "error", err)
			return 1
		}
		if p.o.Started != nil {
			p.o.Started()
			p.o.Started = nil
		}
		status := p.wait(c)
		select {
		case <-c.served: // all that it has said counts
		case <-time.After(deafFor): // somebody else has its end
		}
		c.near.Close()
		<-c.served
		code, why := p.judge(status)
		if why == "" {
			return code
		}
		now := time.Now()
		ends = append(ends, now)
		for now.Sub(ends[0]) > p.o.Within {
			ends = ends[1:]
		}
		names, _ := p.shelf.Held()
		if len(ends) > p.o.Often {
			p.log.Error("the proxy has ended, too often to be started again here", "reason", why, "ends", len(ends), "within",
				p.o.Within)
			return code
		}
		pause := time.Duration(0)
		if n := len(ends); n > 1 {
			pause = p.o.Pause << (n - 2)
		}
		p.log.Error("the proxy has ended, it is started again", "reason", why, "pid", c.pid, "listeners", len(names), "pause",
			pause)
		if p.pause(pause) {
			return code
		}
	}
}

// start starts the program with what is held.
func (p *parent) start() (*child, error) {
	near, far, err := Pair()
	if err != nil {
		return nil, err
	}
	defer far.Close()
	p.shelf.begin()
	names, held := p.shelf.Held()
	files := append([]uintptr{0, 1, 2, far.Fd()}, held...)
	pid, _, err := syscall.StartProcess(p.o.Path, p.o.Args, &syscall.ProcAttr{
		Env: fdstore.Environ(p.o.Env, append([]string{fdstore.Notify}, names...), os.Getpid()), Files: files,
		// A group of its own: a terminal's Ctrl-C comes to us, who pass it on once.
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true},
	})
	if err != nil {
		near.Close()
		return nil, fmt.Errorf("%s: %w", p.o.Path, err)
	}
	c := &child{pid: pid, near: near, served: make(chan struct{})}
	go func() {
		defer close(c.served)
		p.shelf.Serve(near)
	}()
	return c, nil
}

// wait returns how the child has ended. Meanwhile it passes signals on and buries orphans.
func (p *parent) wait(c *child) syscall.WaitStatus {
	served := c.served
	var deaf <-chan time.Time
	for {
		if status, ended := p.bury(c.pid); ended {
			return status
		}
		select {
		case s := <-p.signals:
			p.asked = true
			syscall.Kill(c.pid, s.(syscall.Signal)) // it is not buried yet, so it is that process or nobody
		case <-p.reap:
		case <-served:
			served = nil
			deaf = time.After(deafFor)
		case <-deaf:
			p.log.Warn("the proxy has given up what is held for it: should it be killed, connections are refused until it " +
				"listens again")
			p.shelf.Clear()
		}
	}
}

// bury reaps what has ended.
func (p *parent) bury(child int) (status syscall.WaitStatus, ended bool) {
	for {
		var s syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &s, unix.WNOHANG, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil || pid <= 0:
			return status, ended
		case pid == child:
			status, ended = s, true
		}
	}
}

// judge says which exit code an end is, and why it is to be made good; "": it is not.
func (p *parent) judge(s syscall.WaitStatus) (code int, why string) {
	ready, stopping := p.shelf.state()
	code = s.ExitStatus()
	if s.Signaled() {
		code = 128 + int(s.Signal()) // as shells have it
		why = "signal " + unix.SignalName(s.Signal())
	} else if code == fatal && ready {
		why = "exit code 2, a fatal error of the Go runtime"
	}
	if p.asked || stopping {
		why = ""
	}
	return code, why
}

// fatal is what the Go runtime exits with after a panic or a fatal error.
const fatal = 2

// pause waits; true: a signal came that would have been passed on.
func (p *parent) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-p.signals:
			return true
		case <-p.reap:
			p.bury(0)
		case <-t.C:
			return false
		}
	}
}
