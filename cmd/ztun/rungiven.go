package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/admin/watch"
	"ztun/cmd/attach"
	"ztun/tun/netns"
)

// runGiven is a workload that lives somewhere else than in a namespace of ours: `ztun run` has no command then, and
// serves it until a signal.
//
// Decisions:
//   - 2026-11-29: util-linux' nsenter enters the user namespace that owns --netns: the kernel lets no process with
//     several threads do so, and a Go program always has several. It is part of every distribution.
//   - 2026-11-29: who hands a TUN over by a socket listens there, as a monitor of VMs does; we call once, and the
//     connection is closed when the descriptor is here.
type runGiven struct {
	netns  string
	fd     int
	socket string
}

func (r *runGiven) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.netns, "netns", "", "serve a network namespace that you have made elsewhere, such as a rootless podman "+
		"pod's, by its path; no COMMAND")
	f.IntVar(&r.fd, "tun-fd", -1, "serve whoever is behind a TUN that is this descriptor (IFF_TUN, IFF_NO_PI, IFF_VNET_HDR); "+
		"no COMMAND")
	f.StringVar(&r.socket, "tun-socket", "", "as --tun-fd, with a descriptor that whoever listens at this Unix socket sends")
	cmd.MarkFlagsMutuallyExclusive("netns", "tun-fd", "tun-socket")
}

// given says whether there is such a place.
func (r *runGiven) given() bool { return r.netns != "" || r.fd >= 0 || r.socket != "" }

// tun is the TUN that was handed over; nil: none was to be.
func (r *runGiven) tun(ctx context.Context) (*os.File, error) {
	switch {
	case r.fd >= 0:
		if _, err := unix.FcntlInt(uintptr(r.fd), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("--tun-fd %d: %w (whoever starts us leaves it open)", r.fd, err)
		}
		unix.CloseOnExec(r.fd)
		return os.NewFile(uintptr(r.fd), "TUN"), nil
	case r.socket != "":
		f, err := receiveFile(ctx, r.socket)
		if err != nil {
			return nil, fmt.Errorf("--tun-socket %s: %w", r.socket, err)
		}
		return f, nil
	}
	return nil, nil
}

// handOverWait is how long who hands a TUN over may take.
const handOverWait = 30 * time.Second

// receiveFile calls a Unix socket and receives one descriptor, with at least a byte of whatever.
func receiveFile(ctx context.Context, path string) (*os.File, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(handOverWait))
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	oob := make([]byte, unix.CmsgSpace(8*4))
	_, n, flags, _, err := c.(*net.UnixConn).ReadMsgUnix(make([]byte, 64), oob)
	if err != nil {
		return nil, fmt.Errorf("no descriptor was sent: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range messages {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	if len(fds) != 1 || flags&unix.MSG_CTRUNC != 0 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("%d descriptors were sent with the first message, want one (SCM_RIGHTS)", len(fds))
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "TUN"), nil
}

// enterOwner returns when this process is in the user namespace that owns the network namespace at path: it executes
// itself there.
func enterOwner(path string) error {
	ns, err := netns.OpenPath(path) // which says what else it is
	if err != nil {
		return err
	}
	defer ns.Close()
	if own, err := netns.Current(); err != nil {
		return err
	} else if own.Close(); ns.Same(own) {
		return errors.New("it is the host's own")
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return fmt.Errorf("the user namespace that owns it is not one of yours: %w", err)
	}
	defer unix.Close(owner)
	var theirs, own unix.Stat_t
	if err := errors.Join(unix.Fstat(owner, &theirs), unix.Stat("/proc/self/ns/user", &own)); err != nil {
		return err
	}
	if theirs.Dev == own.Dev && theirs.Ino == own.Ino {
		held, err := permitted()
		if err == nil && capsOf(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN)&^held != 0 {
			err = errors.New("the user namespace that owns it does not make you root, as those of `unshare -Urn` and podman do")
		}
		return err
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("nsenter, of util-linux, enters the user namespace that owns it: %w", err)
	}
	exe, err := ownProgram()
	if err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(owner), unix.F_SETFD, 0); err != nil {
		return err
	}
	args := append([]string{"nsenter", fmt.Sprintf("--user=/proc/self/fd/%d", owner), "--preserve-credentials", "--", exe},
		os.Args[1:]...)
	return os.NewSyscallError("execve of nsenter", unix.Exec(nsenter, args, os.Environ()))
}

// runServing is the daemon of one workload that lives elsewhere, until a signal.
func runServing(ctx context.Context, who *runWho, reached *runPorts, noUDP bool, at *runGiven) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	if at.netns != "" {
		if err := enterOwner(at.netns); err != nil {
			return fmt.Errorf("--netns %s: %w", at.netns, err)
		}
	}
	spec := who.spec
	if spec.NetNS = at.netns; spec.NetNS == "" {
		spec.NetNS = "-" // nobody knows
	}
	if err := spec.Validate(); err != nil {
		return err
	}
	device, err := at.tun(ctx)
	if err != nil {
		return err
	}
	if device != nil {
		defer device.Close()
	}
	reached.in.TUN = device
	dir, err := newRunDir(runBases(os.Getenv), refOf(who.spec))
	if err != nil {
		return err
	}
	defer dir.remove()
	d, err := newRunDaemon(who, reached, noUDP, dir.path)
	if err != nil {
		return err
	}
	defer d.log.Close(context.Background())
	ctx, stop := context.WithCancel(watch.WithoutEvents(ctx))
	defer d.work.Wait()
	defer stop()
	defer func() { d.end(d.c.Process.TerminationDeadline) }()
	if err := d.start(ctx); err != nil {
		return err
	}
	if spec.NetNS = at.netns; spec.NetNS != "" {
		if spec.NetNS, err = filepath.Abs(spec.NetNS); err != nil {
			return err
		}
	}
	if err := d.pods.addGiven(ctx, spec); err != nil {
		return err
	}
	if err := d.hold(ctx, endedBy(signals)); errors.Is(err, errSignalled) {
		return nil
	} else if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "serving workload %s\n", refOf(spec))
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-signals:
			return nil
		case reason := <-d.quit:
			return errors.New(reason)
		case <-tick.C:
			all := d.pods.all()
			if len(all) == 0 {
				return fmt.Errorf("the namespace %s is gone", at.netns)
			}
			if err := all[0].att.Status().Err; err != nil {
				return fmt.Errorf("the TUN carries nothing any more: %w", err)
			}
		}
	}
}

var errSignalled = errors.New("a signal has come")

// endedBy makes a context that ends with a signal, too, by errSignalled.
func endedBy(signals <-chan os.Signal) func(context.Context) (context.Context, func()) {
	return func(ctx context.Context) (context.Context, func()) {
		ctx, cancel := context.WithCancelCause(ctx)
		var work sync.WaitGroup
		work.Go(func() {
			select {
			case <-signals:
				cancel(errSignalled)
			case <-ctx.Done():
			}
		})
		return ctx, func() { cancel(nil); work.Wait() }
	}
}

// addGiven attaches a workload that lives elsewhere.
func (m *podManager) addGiven(ctx context.Context, spec admin.PodSpec) error {
	m.op.Lock()
	defer m.op.Unlock()
	return m.attach(ctx, attach.Pod{PodSpec: spec})
}
