package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// What `ztun run` needs of a machine, in words: the two things that it cannot do without, and for each what may be in
// the way, so that whoever may change it knows what to change.

// needTUN says whether the caller can open TUN devices. Only opening tells: a container's cgroup of devices is in no
// permission bit.
func needTUN(device string) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return noTUN(device, err)
	}
	unix.Close(fd)
	return nil
}

const tunDevice = "/dev/net/tun"

// noTUN is what opening a device file has failed with, with what would help.
func noTUN(device string, err error) error {
	help := "as root: modprobe tun"
	switch {
	case errors.Is(err, unix.ENOENT) && device != tunDevice:
		help = fmt.Sprintf("as root: mknod -m 0666 %s c 10 200", device)
	case errors.Is(err, unix.ENOENT):
		help = "as root: modprobe tun; in a container, start it with --device " + tunDevice
	case errors.Is(err, unix.EACCES):
		help = "as root: chmod 0666 " + device
	case errors.Is(err, unix.EPERM):
		help = "the container's list of devices lacks it: start it with --device " + device
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		help = "too many files are open: ulimit -n"
	}
	return fmt.Errorf("%s cannot be opened: %w; %s", device, err, help)
}

// noUserNamespace says what on this machine keeps users from making the namespaces, and what would help. root is "/"
// but in tests.
func noUserNamespace(root string) string {
	for _, s := range []struct{ file, forbids, help string }{
		{"user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"},
		{"user/max_pid_namespaces", "0", "sysctl user.max_pid_namespaces=10000"},
		{"user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=10000"},
		{"user/max_mnt_namespaces", "0", "sysctl user.max_mnt_namespaces=10000"},
		{"kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
	} {
		b, err := os.ReadFile(filepath.Join(root, "proc/sys", s.file))
		if err == nil && strings.TrimSpace(string(b)) == s.forbids {
			return fmt.Sprintf(" (%s is %s); as root: %s", strings.ReplaceAll(s.file, "/", "."), s.forbids, s.help)
		}
	}
	status, _ := os.ReadFile(filepath.Join(root, "proc/self/status"))
	for line := range strings.Lines(string(status)) {
		if name, value, _ := strings.Cut(line, ":"); name == "Seccomp" && strings.TrimSpace(value) == "2" {
			return " (a seccomp filter is in force, as containers have: start it with a profile that allows clone with " +
				"CLONE_NEWUSER, or --security-opt seccomp=unconfined)"
		}
	}
	return " (no sysctl and no seccomp filter forbids it: is this a chroot, or a policy of a security module?)"
}
