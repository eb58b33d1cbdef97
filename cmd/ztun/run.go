package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ztun/admin"
	"ztun/admin/watch"
	"ztun/cmd/attach"
	"ztun/proxy/state"
	"ztun/tun/netns"
)

// capturedServer stands in the resolv.conf of a command with these addresses: the pod's DNS proxy answers for whatever
// address is asked, and asks the host's nameservers where this one was. Nobody has it (192.0.2.0/24 and 2001:db8::/32
// are for documentation, RFC 5737 and 3849). Where there is no IPv4 address there is no way to an IPv4 one.
func capturedServer(ips []netip.Addr) netip.Addr {
	if len(ips) > 0 && !slices.ContainsFunc(ips, netip.Addr.Is4) {
		return netip.MustParseAddr("2001:db8::53")
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, 53})
}

// runLog is RUST_LOG's default for a run, whose log is on the command's standard error: of a control plane or a CA that
// is away there is one line (serverLost), not one for each try.
const runLog = "warn,xds::client=error,ca::client=error,crl::client=error,run=info"

// exitStatus is how the command of `ztun run` ended, as a shell tells it.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

func runCommand() *cobra.Command {
	var who runWho
	var reached runPorts
	var elsewhere runGiven
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
			"with -p. Instead of a COMMAND it serves a namespace (--netns) or a TUN (--tun-fd, --tun-socket) that you have\n" +
			"made. Configured like `ztun proxy`, with quieter logs (RUST_LOG=" + runLog + ") on standard error.",
		Args: func(cmd *cobra.Command, args []string) error {
			if elsewhere.given() {
				if len(args) > 0 {
					return usageError(cmd, errors.New("with --netns, --tun-fd or --tun-socket there is no command"))
				}
				return nil
			}
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
			if elsewhere.given() {
				return runServing(cmd.Context(), &who, &reached, noUDP, &elsewhere)
			}
			inside := os.Getenv(runInside)
			if inside == "" {
				if _, err := findProgram(args[0]); err != nil {
					return err // before anything is waited for
				}
				return runOutside(&who, reached.in.Device)
			}
			os.Unsetenv(runInside)
			life, err := newLifeline(inside)
			if err != nil {
				return err
			}
			defer life.close()
			who.spec.NetNS = "-" // it comes as a descriptor
			if err := who.spec.Validate(); err != nil {
				return err
			}
			return runWorkload(cmd.Context(), life, &who, &reached, noUDP, args)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.IntVar(&who.spec.MTU, "mtu", 0, "MTU in bytes (default ZTUN_MTU)")
	f.StringVar(&reached.in.Device, "tun-device", tunDevice, "device file of TUN devices, where that one is not for you to open")
	f.BoolVar(&noUDP, "no-udp", false, "carry no UDP but DNS, and no ping (as ZTUN_UDP=off)")
	who.bind(cmd)
	reached.bind(cmd)
	elsewhere.bind(cmd)
	return cmd
}

// runWorkload is the daemon of one workload, for as long as its command runs.
func runWorkload(ctx context.Context, life *lifeline, who *runWho, reached *runPorts, noUDP bool,
	command []string) error {
	spec, dir := who.spec, life.dir
	d, err := newRunDaemon(who, reached, noUDP, dir)
	if err != nil {
		return err
	}
	c := d.c
	defer d.log.Close(context.Background())
	ctx, stop := context.WithCancel(watch.WithoutEvents(ctx)) // many on one host, see there
	defer d.work.Wait()
	defer stop()
	defer func() { d.end(c.Process.TerminationDeadline) }()
	if err := d.start(ctx); err != nil {
		return err
	}
	file, err := netns.New()
	if err != nil {
		return fmt.Errorf("%w%s", err, noUserNamespace("/"))
	}
	defer file.Close()
	spec.NetNS = ""
	if err := d.pods.addFile(ctx, spec, file); err != nil {
		return err
	}
	resolv := ""
	if c.DNS.Proxy {
		resolv = filepath.Join(dir, "resolv.conf")
		r := resolvConf()
		text := "nameserver " + capturedServer(spec.IPs).String() + "\n"
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
		for _, err := range ownView(resolv) {
			d.logger.Warn("the command's view of the host is not what it should be", "error", err)
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
		if err := d.hold(ctx, life.interruptible); err != nil {
			return err
		}
		return life.follow(cmd, d.quit, d.logger)
	})
}

// newRunDaemon makes the daemon of one workload, with its files in dir.
func newRunDaemon(who *runWho, reached *runPorts, noUDP bool, dir string) (*daemon, error) {
	lookup, err := who.environment(os.LookupEnv, dir)
	if err != nil {
		return nil, err
	}
	c, err := loadConfig(func(name string) (string, bool) {
		v, ok := lookup(name)
		switch {
		case name == "ZTUN_STATE_DIR":
			return dir, true
		case name == "RUST_LOG" && !ok:
			return runLog, true
		case name == "ZTUN_RUN_WAIT" && who.wait != "":
			return who.wait, true
		}
		return v, ok
	}, os.Environ)
	if err != nil {
		return nil, err
	}
	// Many on one host: none has a port that it was not told to have.
	c.Admin.Own = &reached.own
	c.Mode.Rootless, c.Privileges.Drop = true, false
	if noUDP {
		c.UDP.Mode = udpOff
	}
	c.Mode.Workload = state.WorkloadInfo{Name: who.spec.Name, Namespace: who.spec.Namespace,
		ServiceAccount: who.spec.ServiceAccount}
	d, err := newDaemon(c, os.Stderr)
	if err != nil {
		return nil, err
	}
	d.ports = reached
	return d, nil
}

// addFile attaches a workload whose namespace is a descriptor.
func (m *podManager) addFile(ctx context.Context, spec admin.PodSpec, file *os.File) error {
	m.op.Lock()
	defer m.op.Unlock()
	return m.attach(ctx, attach.Pod{PodSpec: spec, File: file})
}
