package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy/state"
	"ztun/tun/netns"
)

// `ztun run` has three processes: the caller's, which only waits; the daemon of one workload, the same program executed
// again in a user namespace of its own, where it may make devices and enter namespaces but still is in the host's
// network; and the command, in a network namespace whose only way out is the daemon.

const (
	// runInside marks the environment of the daemon, runName that of the command.
	runInside = "ZTUN_RUN_INSIDE"
	runName   = "ZTUN_RUN"
	// capturedServer stands in the command's resolv.conf: the pod's DNS proxy answers for whatever address is asked
	// (192.0.2.0/24 is for documentation, RFC 5737: nobody has it).
	capturedServer = "192.0.2.53"
)

// exitStatus is how the command of `ztun run` ended, as a shell tells it.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

func runCommand() *cobra.Command {
	var who runWho
	var reached runPorts
	var noUDP bool
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENT...]",
		Short: "run a command as a workload of the mesh, without root",
		Long: "Runs COMMAND, as the caller and without any privilege, in a network namespace whose only way out is the " +
			"mesh:\n" +
			"what it calls is reached over HBONE with the workload's identity where the mesh knows it, in plaintext " +
			"elsewhere.\n" +
			"Needs user namespaces that users may make, and a /dev/net/tun that they may open. Peers of the mesh reach\n" +
			"COMMAND at a port of this host that its record announces (meshAddresses), others at ports published\n" +
			"with -p. Configured like `ztun proxy`, with quieter logs (RUST_LOG=warn) on standard error.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, fmt.Errorf("%s wants a command to run", cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := who.resolve(os.LookupEnv); err != nil {
				return err
			}
			if err := reached.resolve(); err != nil {
				return err
			}
			if os.Getenv(runInside) == "" {
				return runOutside()
			}
			os.Unsetenv(runInside)
			who.spec.NetNS = "-" // it comes as a descriptor
			if err := who.spec.Validate(); err != nil {
				return err
			}
			return runWorkload(cmd.Context(), &who, &reached, noUDP, args)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.IntVar(&who.spec.MTU, "mtu", 0, "MTU in bytes (default ZTUN_MTU)")
	f.BoolVar(&noUDP, "no-udp", false, "carry no UDP but DNS, and no ping (as ZTUN_UDP=off)")
	who.bind(cmd)
	reached.bind(cmd)
	return cmd
}

// runOutside executes this program again, with the same arguments, in a user namespace in which the caller is who it is
// and may do what a workload's daemon does.
func runOutside() error {
	if name := os.Getenv(runName); name != "" {
		return fmt.Errorf("this is the workload %s of a `ztun run` already: one within another has no network to call by",
			name)
	}
	if err := unix.Access("/dev/net/tun", unix.R_OK|unix.W_OK); err != nil {
		return fmt.Errorf("/dev/net/tun cannot be opened: %w; as root: modprobe tun && chmod 0666 /dev/net/tun", err)
	}
	exe, err := ownProgram()
	if err != nil {
		return err
	}
	c := exec.Command(exe, os.Args[1:]...)
	c.Args[0] = os.Args[0]
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), runInside+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN},
		Pdeathsig:   unix.SIGKILL,
	}
	return follow(c, func(err error) error {
		return fmt.Errorf("a user namespace cannot be made: %w%s", err, noUserNamespace("/"))
	})
}

// noUserNamespace says what on this machine keeps users from making user namespaces, and what would help. root is "/"
// but in tests.
func noUserNamespace(root string) string {
	for _, s := range []struct{ file, forbids, help string }{
		{"user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"},
		{"kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
	} {
		b, err := os.ReadFile(filepath.Join(root, "proc/sys", s.file))
		if err == nil && strings.TrimSpace(string(b)) == s.forbids {
			return fmt.Sprintf(" (%s is %s); as root: %s", strings.ReplaceAll(s.file, "/", "."), s.forbids, s.help)
		}
	}
	return " (in a container its seccomp profile may forbid it)"
}

// follow starts c and is as good as it from then on: signals go to it, and its end is the result. unable words the
// error of a command that could not be started.
func follow(c *exec.Cmd, unable func(error) error) error {
	// Pdeathsig is sent at the end of the thread that has started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1,
		syscall.SIGUSR2)
	defer signal.Stop(signals)
	if err := c.Start(); err != nil {
		return unable(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	forgetStart()
	_, noTerminal := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS)
	for {
		select {
		case s := <-signals:
			// A terminal sends its own to all of us.
			if noTerminal != nil || s != syscall.SIGINT && s != syscall.SIGQUIT {
				c.Process.Signal(s)
			}
		case err := <-ended:
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				return err
			}
			if w := exit.Sys().(syscall.WaitStatus); w.Signaled() {
				return exitStatus(128 + int(w.Signal()))
			}
			return exitStatus(exit.ExitCode())
		}
	}
}

// runWorkload is the daemon of one workload, for as long as its command runs.
func runWorkload(ctx context.Context, who *runWho, reached *runPorts, noUDP bool, command []string) error {
	spec := who.spec
	dir, err := os.MkdirTemp("", "ztun-run-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	lookup, err := who.environment(os.LookupEnv, dir)
	if err != nil {
		return err
	}
	c, err := loadConfig(func(name string) (string, bool) {
		v, ok := lookup(name)
		switch {
		case name == "ZTUN_STATE_DIR":
			return dir, true
		case name == "RUST_LOG" && !ok:
			return "warn", true
		}
		return v, ok
	}, os.Environ)
	if err != nil {
		return err
	}
	// Many on one host: each has ports of its own.
	c.Admin.Port, c.Admin.StatsPort, c.Admin.ReadinessPort = 0, 0, 0
	c.Mode.Rootless, c.Privileges.Drop = true, false
	if noUDP {
		c.UDP.Mode = udpOff
	}
	c.Mode.Workload = state.WorkloadInfo{Name: spec.Name, Namespace: spec.Namespace, ServiceAccount: spec.ServiceAccount}
	d, err := newDaemon(c, os.Stderr)
	if err != nil {
		return err
	}
	d.ports = reached
	defer d.log.Close(context.Background())
	ctx, stop := context.WithCancel(ctx)
	defer d.work.Wait()
	defer stop()
	defer func() { d.end(c.Process.TerminationDeadline) }()
	if err := d.start(ctx); err != nil {
		return err
	}
	file, err := netns.New()
	if err != nil {
		return err
	}
	defer file.Close()
	spec.NetNS = ""
	if err := d.pods.addFile(ctx, spec, file); err != nil {
		return err
	}
	resolv := filepath.Join(dir, "resolv.conf")
	if c.DNS.Proxy {
		r := resolvConf()
		text := "nameserver " + capturedServer + "\n"
		if len(r.search) > 0 {
			text += "search " + strings.Join(r.search, " ") + "\n"
		}
		if err := os.WriteFile(resolv, []byte(text), 0o644); err != nil {
			return err
		}
	}
	ns, err := netns.FromFile(file)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(func() error {
		if c.DNS.Proxy {
			if err := mountOver(resolv, "/etc/resolv.conf"); err != nil {
				d.logger.Warn("the command's names go to the host's nameservers", "error", err)
			}
		}
		// The command has no more privilege than its caller, in its namespace either.
		held, err := permitted()
		if err == nil {
			err = setCaps(held, held, 0) // what is not inheritable is not ambient either
		}
		if err != nil {
			return err
		}
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), runName+"="+refOf(spec).String())
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		return follow(cmd, func(err error) error { return err })
	})
}

// mountOver has the calling thread, and what it starts, see file in the place of path; nobody else does.
func mountOver(file, path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	return os.NewSyscallError("mount", unix.Mount(file, path, "", unix.MS_BIND, ""))
}

// addFile attaches a workload whose namespace is a descriptor.
func (m *podManager) addFile(ctx context.Context, spec admin.PodSpec, file *os.File) error {
	m.op.Lock()
	defer m.op.Unlock()
	return m.attach(ctx, attach.Pod{PodSpec: spec, File: file})
}
