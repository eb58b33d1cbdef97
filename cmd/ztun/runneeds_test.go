package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoUserNamespace: what keeps users from making namespaces is said by name, with what would help.
func TestNoUserNamespace(t *testing.T) {
	for _, c := range []struct {
		file, content string
		want          []string
	}{
		{"sys/user/max_user_namespaces", "0\n",
			[]string{"user.max_user_namespaces is 0", "as root: sysctl user.max_user_namespaces=10000"}},
		{"sys/user/max_pid_namespaces", "0\n",
			[]string{"user.max_pid_namespaces is 0", "as root: sysctl user.max_pid_namespaces=10000"}},
		{"sys/user/max_net_namespaces", "0\n",
			[]string{"user.max_net_namespaces is 0", "as root: sysctl user.max_net_namespaces=10000"}},
		{"sys/user/max_mnt_namespaces", "0\n",
			[]string{"user.max_mnt_namespaces is 0", "as root: sysctl user.max_mnt_namespaces=10000"}},
		{"sys/kernel/unprivileged_userns_clone", "0\n",
			[]string{"kernel.unprivileged_userns_clone is 0", "as root: sysctl kernel.unprivileged_userns_clone=1"}},
		{"sys/kernel/apparmor_restrict_unprivileged_userns", "1\n",
			[]string{"is 1", "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0"}},
		{"self/status", "Name:\tztun\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n",
			[]string{"seccomp filter is in force", "--security-opt seccomp=unconfined"}},
		{"self/status", "Name:\tztun\nSeccomp:\t0\n", []string{"no sysctl and no seccomp filter", "chroot"}},
		{"sys/user/max_user_namespaces", "15000\n", []string{"no sysctl and no seccomp filter"}},
	} {
		root := t.TempDir()
		path := filepath.Join(root, "proc", c.file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got := noUserNamespace(root)
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s %q: %s; want %q", c.file, c.content, got, want)
			}
		}
	}
}

// TestNoTUN: what keeps somebody from TUN devices is told apart, with what would help.
func TestNoTUN(t *testing.T) {
	for err, want := range map[error]string{
		unix.ENOENT: "modprobe tun; in a container, start it with --device /dev/net/tun",
		unix.ENODEV: "as root: modprobe tun", // the device file is there, its module is not
		unix.EACCES: "as root: chmod 0666 /dev/net/tun",
		unix.EPERM:  "list of devices lacks it",
		unix.EMFILE: "ulimit -n",
	} {
		got := noTUN(tunDevice, err)
		if !errors.Is(got, err) || !strings.Contains(got.Error(), "/dev/net/tun cannot be opened: "+err.Error()+"; ") ||
			!strings.Contains(got.Error(), want) {
			t.Errorf("%v: %v; want %q", err, got, want)
		}
	}
	// Another device file: what is said is about that one.
	for err, want := range map[error]string{unix.ENOENT: "mknod -m 0666 /srv/tun c 10 200", unix.EACCES: "chmod 0666 /srv/tun"} {
		if got := noTUN("/srv/tun", err); !strings.Contains(got.Error(), want) || strings.Contains(got.Error(), tunDevice) {
			t.Errorf("%v: %v; want %q", err, got, want)
		}
	}
}
