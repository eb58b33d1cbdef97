package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Least privilege: the daemon keeps the capabilities that what it is configured for needs and gives the rest up, for
// good and on all its threads. Those of the Go runtime exist before main does, and in a program with cgo (the
// resolver's) nothing reaches them all; so the process executes itself once more, from a thread that has given up the
// rest. The process id, the environment and open files of the starter's stay.

// capSet is a set of capabilities, bit by bit.
type capSet uint64

func capsOf(caps ...int) (s capSet) {
	for _, c := range caps {
		s |= 1 << c
	}
	return s
}

var capNames = map[int]string{
	unix.CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE", unix.CAP_NET_BIND_SERVICE: "CAP_NET_BIND_SERVICE",
	unix.CAP_NET_ADMIN:  "CAP_NET_ADMIN",
	unix.CAP_SYS_PTRACE: "CAP_SYS_PTRACE", unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
}

func (s capSet) String() string {
	var names []string
	for c := range 64 {
		if s&(1<<c) == 0 {
			continue
		}
		name := capNames[c]
		if name == "" {
			name = strconv.Itoa(c)
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

// need is a capability and what needs it.
type need struct {
	cap int
	why string
}

// required is how many of needs the daemon cannot do without: the first ones.
const required = 2

// needs lists what a configuration needs. What is not held is not asked for: everything but the first two (required)
// does without, and dedicated mode without any.
func needs(c *Config) []need {
	all := []need{
		{unix.CAP_NET_ADMIN, "TUN devices, addresses, routes and rules, transparent sockets"},
		{unix.CAP_SYS_ADMIN, "entering the pods' network namespaces"},
		{unix.CAP_SYS_PTRACE, "pods given by the id of a process"},
	}
	if c.Attach.Steering == redirectedPods {
		all[0].why = "sockets in the pods with marks and their clients' addresses"
	}
	if c.Mode.Dedicated {
		all = nil
		if c.Net.PacketMark != 0 {
			all = append(all, need{unix.CAP_NET_ADMIN, "PACKET_MARK"})
		}
	}
	ports := []uint16{c.Admin.Port, c.Admin.StatsPort, c.Admin.ReadinessPort}
	if _, p, err := net.SplitHostPort(c.DNS.Addr); err == nil && c.DNS.Proxy {
		if n, err := strconv.ParseUint(p, 10, 16); err == nil {
			ports = append(ports, uint16(n))
		}
	}
	if slices.ContainsFunc(ports, func(p uint16) bool { return p != 0 && p < 1024 }) {
		all = append(all, need{unix.CAP_NET_BIND_SERVICE, "a port below 1024"})
	}
	return all
}

// files are the paths that a configuration reads, and the directories that it writes to.
func (c *Config) files() (read, write []string) {
	for _, p := range []string{
		c.XDS.LocalPath, c.CA.LocalDir, c.CA.CRLPath, c.Control.Token.File, c.Control.Cert, c.Control.Key, c.Control.Dir,
		c.Admin.TokenFile,
		c.XDS.Roots.File, c.CA.Roots.File,
	} {
		if p != "" {
			read = append(read, p)
		}
	}
	for _, dir := range []string{c.CA.LocalDir, c.Control.Dir} {
		if dir != "" {
			inside, _ := filepath.Glob(filepath.Join(dir, "*.pem")) // the pattern is a good one
			read = append(read, inside...)
		}
	}
	return read, []string{c.State.Dir, filepath.Dir(c.State.Socket)}
}

// executedAgain marks, in the environment, that the process has executed itself: once is enough.
const executedAgain = "ZTUN_EXECUTED_AGAIN"

// dropPrivileges gives up what the configuration does not need. It returns what is held, when nothing more is to be
// given up; otherwise it does not return but by an error, upon which the caller may go on with all that it had.
func dropPrivileges(c *Config) (held capSet, err error) {
	again := os.Getenv(executedAgain) != ""
	os.Unsetenv(executedAgain)
	// Capabilities are a thread's. On an error this one has lost some: the runtime throws it away with its goroutine.
	type outcome struct {
		held capSet
		err  error
	}
	done := make(chan outcome)
	go func() {
		runtime.LockOSThread()
		held, err := dropOnThread(c, again)
		done <- outcome{held, err}
	}()
	o := <-done
	return o.held, o.err
}

func dropOnThread(c *Config, again bool) (held capSet, err error) {
	held, err = permitted()
	if err != nil {
		return 0, err
	}
	var keep capSet
	for _, n := range needs(c) {
		keep |= capsOf(n.cap)
	}
	keep &= held
	if modes := capsOf(unix.CAP_DAC_OVERRIDE); held&modes != 0 {
		// Files whose modes do not let us in: in another user's directory, say.
		if err := setCaps(keep, held, 0); err != nil {
			return held, err
		}
		if c.Privileges.ShutOut = c.shutOut(); c.Privileges.ShutOut != "" {
			keep |= modes
		}
		if err := setCaps(held, held, 0); err != nil {
			return held, err
		}
	}
	quiet, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return held, os.NewSyscallError("prctl", err)
	}
	switch {
	case held == keep && quiet == 1:
		return held, nil
	case again:
		return held, fmt.Errorf("still held: %s, wanted: %s", held, keep)
	}
	exe, err := ownProgram()
	if err != nil {
		return held, err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return held, os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", err)
	}
	for b := range 64 {
		if keep&(1<<b) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(b), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // no more of them
		}
		// without CAP_SETPCAP: what is not permitted does not come back either, see above
		if err != nil && !errors.Is(err, unix.EPERM) {
			return held, os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return held, os.NewSyscallError("prctl PR_CAP_AMBIENT", err)
	}
	inheritable := capSet(0)
	if os.Geteuid() != 0 {
		inheritable = keep // root's program gets what is permitted, another user's what is ambient
	}
	if err := setCaps(keep, keep, inheritable); err != nil {
		return held, err
	}
	for b := range 64 {
		if inheritable&(1<<b) != 0 {
			if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(b), 0, 0); err != nil {
				return held, os.NewSyscallError("prctl PR_CAP_AMBIENT_RAISE", err)
			}
		}
	}
	return held, os.NewSyscallError("execve", syscall.Exec(exe, os.Args, append(os.Environ(), executedAgain+"=1")))
}

// shutOut is a path of the configuration that the calling thread may not use; "": there is none.
func (c *Config) shutOut() string {
	denied := func(err error) bool { return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) }
	opens := !c.Mode.Dedicated && c.Attach.Steering != redirectedPods
	if opens && denied(unix.Faccessat(unix.AT_FDCWD, tunDevice, unix.R_OK|unix.W_OK, unix.AT_EACCESS)) {
		return tunDevice
	}
	read, write := c.files()
	for _, p := range read {
		mode := uint32(unix.R_OK)
		if s, err := os.Stat(p); denied(err) || err == nil && s.IsDir() {
			mode |= unix.X_OK
		}
		if denied(unix.Faccessat(unix.AT_FDCWD, p, mode, unix.AT_EACCESS)) {
			return p
		}
	}
	for _, p := range write {
		// It may have to be made first.
		for errors.Is(unix.Faccessat(unix.AT_FDCWD, p, unix.F_OK, unix.AT_EACCESS), unix.ENOENT) && filepath.Dir(p) != p {
			p = filepath.Dir(p)
		}
		if denied(unix.Faccessat(unix.AT_FDCWD, p, unix.W_OK|unix.X_OK, unix.AT_EACCESS)) {
			return p
		}
	}
	return ""
}

// ownProgram is the path to execute this very program by: its own, so that it keeps its name in lists of processes,
// unless another file has taken it.
func ownProgram() (string, error) {
	const self = "/proc/self/exe"
	mine, err := os.Stat(self)
	if err != nil {
		return "", err
	}
	if path, err := os.Executable(); err == nil {
		if s, err := os.Stat(path); err == nil && os.SameFile(s, mine) {
			return path, nil
		}
	}
	return self, nil
}

// permitted is what the calling thread may use.
func permitted() (capSet, error) {
	var data [2]unix.CapUserData
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&h, &data[0]); err != nil {
		return 0, os.NewSyscallError("capget", err)
	}
	return capSet(data[0].Permitted) | capSet(data[1].Permitted)<<32, nil
}

// setCaps sets the calling thread's capabilities.
func setCaps(effective, permitted, inheritable capSet) error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		shift := 32 * i
		data[i] = unix.CapUserData{Effective: uint32(effective >> shift), Permitted: uint32(permitted >> shift),
			Inheritable: uint32(inheritable >> shift)}
	}
	return os.NewSyscallError("capset", unix.Capset(&h, &data[0]))
}
