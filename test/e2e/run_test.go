package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
)

// rootless is what an ordinary user needs for `ztun run`: the program, a CA and a TUN node where he may read them.
type rootless struct {
	*mesh
	dir string
}

func newRootless(t *testing.T, m *mesh) *rootless {
	t.Helper()
	dir, err := os.MkdirTemp("", "ztun-rootless-") // t.TempDir is root's alone
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	must(t, os.CopyFS(filepath.Join(dir, "ca"), os.DirFS(m.Path("ca"))))
	b, err := os.ReadFile(bins.ztun)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "ztun"), b, 0o755))
	must(t, filepath.WalkDir(filepath.Join(dir, "ca"), func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return os.Chmod(path, 0o644)
	}))
	must(t, os.Mkdir(filepath.Join(dir, "tmp"), 0o755))
	must(t, os.Chmod(filepath.Join(dir, "tmp"), 0o777|os.ModeSticky))
	tun := filepath.Join(dir, "tun")
	must(t, unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))))
	must(t, os.Chmod(tun, 0o666))
	return &rootless{m, dir}
}

// clean says what runs have left.
func (r *rootless) clean() {
	r.t.Helper()
	// The directory of all runs of a user stays.
	left, _ := filepath.Glob(r.dir + "/tmp/*")
	if len(left) > 1 || len(left) == 1 && !strings.HasSuffix(left[0], "-65534") {
		r.t.Errorf("left behind: %q", left)
	}
	if left, _ := filepath.Glob(r.dir + "/tmp/*/*"); len(left) > 0 {
		r.t.Errorf("left behind: %q", left)
	}
}

// run is `ztun run` on a host, by a user without any capability and with no_new_privs; before is done as root in his
// mount namespace.
func (r *rootless) run(ns *lab.NS, before string, args ...string) (string, error) {
	return r.RunCmd(r.ctx, ns, r.cmd(r.knowledge(), before, args...))
}

// knowledge says in the environment that workloads and certificates come from files.
func (r *rootless) knowledge() []string {
	world, err := os.ReadFile(r.WorldPath())
	must(r.t, err)
	return []string{"LOCAL_XDS=" + string(world), "XDS_ADDRESS=", "CA_ADDRESS=", "LOCAL_CA_DIR=" + r.dir + "/ca"}
}

// runWith is run with nothing in the environment that says where workloads and certificates come from, but env.
func (r *rootless) runWith(ns *lab.NS, env []string, before string, args ...string) (string, error) {
	return r.RunCmd(r.ctx, ns, r.cmd(env, before, args...))
}

func (r *rootless) cmd(env []string, before string, args ...string) lab.Cmd {
	return r.asHim(env, before, append([]string{r.dir + "/ztun", "run"}, args...)...)
}

// asHim is any command as that user, without any capability and with no_new_privs.
func (r *rootless) asHim(env []string, before string, args ...string) lab.Cmd {
	script := "mount --bind " + r.dir + `/tun /dev/net/tun && ` + before + "cd / && exec setpriv --reuid 65534 " +
		`--regid 65534 --clear-groups --no-new-privs --bounding-set -all --inh-caps -all "$@"`
	return lab.Cmd{
		Args: append([]string{"unshare", "-m", "sh", "-c", script, "sh"}, args...),
		Env:  append(append(os.Environ(), "TMPDIR="+r.dir+"/tmp"), env...),
	}
}

// user is the record of the workload that he runs.
func user() lab.Workload {
	return lab.Workload{UID: "lab//v1/Pod/default/user", Name: "user", Namespace: "default", ServiceAccount: "user",
		TrustDomain: "cluster.local", WorkloadIPs: []string{"10.91.66.4", "fd91:0:0:66::4"}, Protocol: "TCP",
		Services: map[string]map[uint16]uint16{}}
}

// asUser are the arguments of `ztun run` for it.
func asUser(command ...string) []string {
	return append([]string{"--name", "user", "--service-account", "user", "--ip", "10.91.66.4,fd91:0:0:66::4"}, command...)
}

// TestRun: without root, a command is a workload of the mesh: it is reached by nobody and reaches pods over HBONE
// with its identity, by address and by name, and plaintext hosts; connect is truthful; it is its caller, without
// capabilities; its end is ours, and nothing is left.
func TestRun(t *testing.T) {
	m := newMesh(t, meshOptions{
		workloads: []lab.Workload{user()},
		services: []lab.Service{{Name: "plain", Namespace: "default", Hostname: "plain.default.svc.cluster.local",
			VIPs: []string{"/10.96.0.9"}, Ports: map[uint16]uint16{80: 9000}}},
		policies: []lab.Policy{{Name: "users-alone", Namespace: "default", Scope: "Namespace", Action: "Allow",
			Rules: [][][]map[string]any{
				{{{"principals": []map[string]string{{"Exact": "cluster.local/ns/default/sa/user"}}}}}}}},
	})
	r := newRootless(t, m)
	as := func(account string, command ...string) []string {
		return append([]string{"--name", "user", "--service-account", account, "--ip", "10.91.66.4,fd91:0:0:66::4", "--"},
			command...)
	}
	whoami := func(host string, port int) []string {
		return as("user", "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%d && echo whoami >&3 && head -n 1 <&3", host, port))
	}
	families(t, func(t *testing.T, v4 bool) {
		got, err := r.run(m.h1.NS, "", whoami(pick(m.c.IPs, v4).String(), 9000)...)
		// The policy lets nobody in but the workload's identity, and the way is by the user's own socket.
		host := pick(m.h1.IPs, v4).String()
		if err != nil || !strings.Contains(got, host) {
			t.Errorf("over HBONE the application sees %q, want the user's host %s (%v)", got, host, err)
		}
		got, err = r.run(m.h1.NS, "", whoami(pick(m.h2.IPs, v4).String(), 9000)...)
		if err != nil || !strings.Contains(got, host) {
			t.Errorf("in plaintext the server sees %q, want the user's host %s (%v)", got, host, err)
		}
		if got, err = r.run(m.h1.NS, "", whoami(pick(m.c.IPs, v4).String(), 9998)...); err == nil ||
			!strings.Contains(err.Error(), "Connection refused") {
			t.Errorf("a closed port: %q, %v", got, err)
		}
	})
	out, err := r.run(m.h1.NS, "",
		as("user", "sh", "-c",
			"getent hosts plain.default.svc.cluster.local; id -u; pwd; grep ^Cap /proc/self/status; kill -TERM $$")...)
	if lab.ExitCode(err) != 128+15 {
		t.Errorf("a command that ends by SIGTERM: %v", err)
	}
	for _, want := range []string{"10.96.0.9", "\n65534\n", "\n/\n", "CapInh:\t0000000000000000",
		"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapAmb:\t0000000000000000"} {
		if !strings.Contains(out, want) {
			t.Errorf("inside there is no %q: %s", want, out)
		}
	}
	// Many on one host: what its daemon keeps in memory is at most 30 MB, once it has started.
	if out, err := r.run(m.h1.NS, "", as("user", "sh", "-c", `for i in $(seq 200); do
		rss=$(sed -n 's/^VmRSS: *\t* *\([0-9]*\) kB/\1/p' /proc/$PPID/status); [ "$rss" -le 30000 ] && exit 0; sleep 0.1
		done; cat /proc/$PPID/status; exit 1`)...); err != nil {
		t.Errorf("resident memory: %v: %s", err, out)
	}
	// Another device file, where that one is not for him.
	if out, err := r.run(m.h1.NS, "mount -t tmpfs none /dev/net && ", append([]string{"--tun-device", r.dir + "/tun"},
		whoami(m.c.V4().String(), 9000)...)...); err != nil || !strings.Contains(out, m.h1.V4().String()) {
		t.Errorf("by another device file: %q, %v", out, err)
	}
	// What it cannot do without, and says so; each where it is found out.
	for _, c := range []struct{ before, inside, say string }{
		{"chmod 0600 " + r.dir + "/tun && ", "true", "/dev/net/tun cannot be opened"},
		{"mount -t tmpfs none /dev/net && ", "true",
			"/dev/net/tun cannot be opened: no such file or directory; as root: modprobe tun; in a container"},
		{"", r.dir + "/ztun run --name x --ip 10.9.9.9 -- true", "this is the workload default/user of a `ztun run` already"},
	} {
		if _, err := r.run(m.h1.NS, c.before, as("user", "sh", "-c", c.inside)...); err == nil ||
			!strings.Contains(err.Error(), c.say) {
			t.Errorf("%v, want %q", err, c.say)
		}
		must(t, os.Chmod(filepath.Join(r.dir, "tun"), 0o666))
	}
	_, err = r.RunCmd(r.ctx, m.h1.NS, lab.Cmd{Env: os.Environ(), Args: append([]string{"unshare", "-Ur", "sh", "-c",
		`echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"`, "sh", r.dir + "/ztun", "run"}, as("user", "true")...)})
	if want := "user.max_user_namespaces is 0"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("without user namespaces: %v, want %q", err, want)
	}
	// As in a container of Docker's.
	own, err := os.Executable()
	must(t, err)
	cmd := r.cmd(r.knowledge(), "", asUser("--", "true")...)
	cmd.Args = append([]string{own, filtered}, cmd.Args...)
	want := "a user namespace cannot be made: fork/exec " + r.dir + "/ztun: operation not permitted (a seccomp filter is in force"
	if _, err = r.RunCmd(r.ctx, m.h1.NS, cmd); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("under a seccomp filter: %v, want %q", err, want)
	}
	askedOfRun(t, r)
	leavesNothing(t, r)
	r.clean()
	if left, err := exec.Command("pgrep", "-f", r.dir+"/ztun").Output(); err == nil {
		t.Errorf("processes are left: %s", left)
	}
}
