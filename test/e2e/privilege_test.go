package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
	"ztun/test/load"
)

// threads reads a line of /proc/PID/task/*/status of every thread; the value has to be the same in all.
func threads(t *testing.T, pid int, key string) string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("no threads of %d: %v", pid, err)
	}
	seen := map[string]bool{}
	var value string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if os.IsNotExist(err) {
			continue // the thread has ended
		}
		must(t, err)
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && k == key {
				value = strings.TrimSpace(v)
				seen[value] = true
			}
		}
	}
	if len(seen) != 1 {
		t.Errorf("%s differs among the threads of %d: %v", key, pid, seen)
	}
	return value
}

// TestLeastPrivilege: a daemon that was started as root keeps what it needs, on all threads; one that has nothing but
// CAP_NET_ADMIN and CAP_SYS_ADMIN, whoever its user is, does all the same: pods attached, named, adopted and let go
// of, both ways to the mesh, to hosts outside, names.
func TestLeastPrivilege(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	const least = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN
	_, err := m.CADir(m.ctx)
	must(t, err)
	// Of another user: root's daemon needs a capability for it, and another user's daemon none.
	theirs := m.Path("theirs")
	must(t, exec.Command("cp", "-r", m.Path("ca"), theirs).Run())
	must(t, exec.Command("chown", "-R", "65534:65534", theirs).Run())
	env := func(more ...string) map[string]string {
		all := map[string]string{"RUST_LOG": "info,ztun=debug"}
		for i := 0; i < len(more); i += 2 {
			all[more[i]] = more[i+1]
		}
		return all
	}
	few, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{Env: env(), Wrap: []string{
		"setpriv", "--inh-caps=-all", "--bounding-set=-all,+net_admin,+sys_admin", "--no-new-privs"}})
	must(t, err)
	root, err := m.StartDaemon(m.ctx, m.N2, lab.DaemonOptions{Env: env("LOCAL_CA_DIR", theirs)})
	must(t, err)
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	for _, ns := range []*lab.NS{m.a.NS, m.b.NS, m.c.NS, m.h1.NS} {
		m.serve(ns)
	}
	works := func() {
		t.Helper()
		for _, way := range []struct {
			from *lab.NS
			to   []netip.Addr
		}{{m.a.NS, m.c.IPs}, {m.c.NS, m.a.IPs}, {m.a.NS, m.b.IPs}, {m.a.NS, m.h1.IPs}, {m.h1.NS, m.a.IPs},
			{m.a.NS, m.a.IPs}} {
			for _, to := range way.to {
				if _, err := load.WhoAmI(m.ctx, target(way.from, to)); err != nil {
					t.Errorf("%s to %s: %v", way.from.Name, to, err)
				}
			}
		}
	}
	works()
	holds := func(d *lab.Daemon, want uint64) {
		t.Helper()
		for _, key := range []string{"CapPrm", "CapEff", "CapBnd"} {
			got, err := strconv.ParseUint(threads(t, d.Pid(), key), 16, 64)
			if err != nil || got != want {
				t.Errorf("%s of %s: %#x (%v), want %#x", key, d.Node.Name, got, err, want)
			}
		}
		if v := threads(t, d.Pid(), "NoNewPrivs"); v != "1" {
			t.Errorf("NoNewPrivs of %s: %s", d.Node.Name, v)
		}
		log := d.Log()
		if !strings.Contains(log, `capability held	capability="CAP_SYS_ADMIN"`) ||
			strings.Contains(log, "could not be given up") {
			t.Errorf("%s does not say what it holds, or could not give up the rest", d.Node.Name)
		}
		if strings.Contains(log, "CAP_DAC_OVERRIDE is kept") != (want&(1<<unix.CAP_DAC_OVERRIDE) != 0) {
			t.Errorf("%s does not say why it holds %#x", d.Node.Name, want)
		}
	}
	holds(few, least)
	holds(root, least|1<<unix.CAP_SYS_PTRACE|1<<unix.CAP_DAC_OVERRIDE)
	// Again, as another user, who has what he has as ambient capabilities. The device file is root's on some machines.
	few.Kill()
	root.Kill()
	state := root.StateDir
	must(t, exec.Command("chown", "-R", "65534:65534", state).Run())
	must(t, os.Chmod(m.Dir, 0o755))
	caps := "-all,+net_admin,+sys_admin,+dac_override,+chown,+net_raw"
	user, err := m.StartDaemon(m.ctx, m.N2, lab.DaemonOptions{Env: env("LOCAL_CA_DIR", theirs), Wrap: []string{
		"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=" + caps, "--ambient-caps=" + caps,
		"--bounding-set=" + caps}})
	must(t, err)
	_, err = m.StartDaemon(m.ctx, m.N1,
		lab.DaemonOptions{Wrap: []string{"setpriv", "--inh-caps=-all", "--bounding-set=-all,+net_admin,+sys_admin"}})
	must(t, err)
	works()
	want := uint64(least)
	if info, err := os.Stat("/dev/net/tun"); err != nil || info.Mode().Perm()&0o006 != 0o006 {
		want |= 1 << unix.CAP_DAC_OVERRIDE
	}
	// Without CAP_SETPCAP the bounding set stays; with no_new_privs it gives nothing back.
	for _, key := range []string{"CapPrm", "CapEff"} {
		if got, err := strconv.ParseUint(threads(t, user.Pid(), key), 16, 64); err != nil || got != want {
			t.Errorf("%s as another user: %#x (%v), want %#x", key, got, err, want)
		}
	}
	must(t, m.Detach(m.ctx, m.b))
	must(t, m.Detach(m.ctx, m.c))
}

// TestSystemdUnit: systemd takes the unit without a remark, and every part of it is one that it knows.
func TestSystemdUnit(t *testing.T) {
	needTool(t, "systemd-analyze")
	repo, err := lab.Root()
	must(t, err)
	b, err := os.ReadFile(repo + "/scripts/systemd/ztun.service")
	must(t, err)
	const installed = "/usr/local/bin/ztun "
	if !strings.Contains(string(b), "ExecStart="+installed) {
		t.Fatalf("the unit does not start %s", installed)
	}
	unit := filepath.Join(t.TempDir(), "ztun.service")
	must(t, os.WriteFile(unit, []byte(strings.ReplaceAll(string(b), installed, bins.ztun+" ")), 0o644))
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", unit).CombinedOutput(); err != nil ||
		len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
	// What the fence must let through.
	for _, want := range []string{"CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN CAP_SYS_PTRACE\n",
		"NoNewPrivileges=yes\n", "RuntimeDirectoryPreserve=yes\n",
		"DeviceAllow=/dev/net/tun rw\n", "RestrictNamespaces=net\n",
		"RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK\n"} {
		if !strings.Contains(string(b), "\n"+want) {
			t.Errorf("the unit has no line %q", want)
		}
	}
}
