package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestRunTools: what ordinary tools ask of a machine is what they find in a run, in both families: addresses and
// routes, sockets, resolver and hosts, curl, git, ssh, dig, and bytes that arrive as they were sent. Who is called by
// name is pod c, which lets nobody in but the workload; the host h2 is called in plaintext.
func TestRunTools(t *testing.T) {
	for _, tool := range []string{"ip", "ss", "curl", "git", "ssh", "sshd", "ssh-keygen", "dig", "python3"} {
		needTool(t, tool)
	}
	const tools = "tools.default.svc.cluster.local"
	ports := map[uint16]uint16{22: 2222, 80: 8080, 9418: 9418}
	m := newMesh(t, meshOptions{noStart: true})
	f := m.DefaultWorld()
	for i := range f.Workloads {
		if f.Workloads[i].Name == m.c.Name {
			f.Workloads[i].Services = map[string]map[uint16]uint16{"default/" + tools: ports}
		}
	}
	f.Workloads = append(f.Workloads, user())
	f.Services = []lab.Service{{Name: "tools", Namespace: "default", Hostname: tools,
		VIPs: []string{"/10.96.0.9", "/fd96::9"}, Ports: ports}}
	f.Policies = []lab.Policy{{Name: "users-alone", Namespace: "default", Scope: "Namespace", Action: "Allow",
		Rules: [][][]map[string]any{{{{"principals": []map[string]string{{"Exact": "cluster.local/ns/default/sa/user"}}}}}}}}
	must(t, m.WriteWorld(f))
	m.start(m.N2, nil)
	must(t, m.Attach(m.ctx, m.c))
	// The host's nameserver is on its loopback, as systemd-resolved is, where the command's own does not reach.
	hosts := netip.MustParseAddr("127.0.0.53")
	newNameserver(t, m.h1.NS, []netip.Addr{hosts})
	for _, ns := range []*lab.NS{m.c.NS, m.h2.NS} {
		m.serve(ns)
	}
	r := newRootless(t, m)
	key := r.toolServers(t)

	etc := filepath.Join(r.dir, "etc")
	must(t, os.Mkdir(etc, 0o755))
	must(t, os.WriteFile(etc+"/resolv.conf", fmt.Appendf(nil,
		"nameserver %s\nsearch default.svc.cluster.local\noptions ndots:5\n", hosts), 0o644))
	must(t, os.WriteFile(etc+"/hosts", fmt.Appendf(nil, "127.0.0.1 localhost\n::1 localhost\n%s known\n%s known\n",
		m.c.V4(), m.c.V6()), 0o644))
	before := fmt.Sprintf("mount --bind %s/resolv.conf /etc/resolv.conf && mount --bind %[1]s/hosts /etc/hosts && ", etc)
	in := func(t *testing.T, script string) string {
		t.Helper()
		out, err := r.run(m.h1.NS, before, asUser("--", "sh", "-c", "cd "+r.dir+"/tmp && "+script+" 2>&1")...)
		if err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
		return out
	}
	// says runs a tool and wants texts in its output.
	says := func(t *testing.T, script string, want ...string) {
		t.Helper()
		out := in(t, script)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", script, w, out)
			}
		}
	}

	t.Run("addresses", func(t *testing.T) {
		says(t, "ip a && ip route && ip -6 route", "ztun0: <POINTOPOINT", "UP", "inet 127.0.0.1/8", "inet6 ::1/128",
			"inet 10.91.66.4/32", "inet6 fd91:0:0:66::4/128", "default dev ztun0")
	})
	t.Run("sockets", func(t *testing.T) {
		// Who listens and who is connected, with their processes' names; as the application calls them.
		says(t, fmt.Sprintf(`bash -c 'exec 3<>/dev/tcp/fd96::9/80 && exec 4<>/dev/tcp/%s/9000 && ss -Htnp &&
			python3 -c "import socket, subprocess; s = socket.create_server((\"\", 7000)); subprocess.run([\"ss\", \"-Hltnp\"])"'`,
			m.h2.V6()), "[fd91:0:0:66::4]:", "[fd96::9]:80", fmt.Sprintf("[%s]:9000", m.h2.V6()), `"bash",pid=`, "0.0.0.0:7000",
			`"python3",pid=`)
	})
	t.Run("resolver", func(t *testing.T) {
		says(t, "cat /etc/resolv.conf", "nameserver 192.0.2.53\n", "search default.svc.cluster.local")
		says(t, "cat /etc/hosts && getent ahosts known && curl -sS -m 20 http://known:8080/", m.c.V4().String(),
			m.c.V6().String(), "by name")
		says(t, "getent ahostsv4 tools", "10.96.0.9")
		says(t, "getent ahostsv6 tools", "fd96::9")
		says(t, "getent hosts elsewhere.example", "192.0.2.77")
		for _, tcp := range []string{"+notcp", "+tcp"} {
			says(t, "dig +short +time=10 "+tcp+" "+tools+" AAAA && dig +short +time=10 "+tcp+" elsewhere.example", "fd96::9",
				"192.0.2.77")
		}
		says(t, "getent hosts nowhere.example || echo there is none", "there is none")
	})
	families(t, func(t *testing.T, v4 bool) {
		family := map[bool]string{true: "-4", false: "-6"}[v4]
		t.Run("curl", func(t *testing.T) { says(t, "curl -sS -m 20 "+family+" http://tools/", "by name") })
		t.Run("git", func(t *testing.T) {
			for _, url := range []string{"http://tools/repo/.git", "git://" + lab.HostPort(pick(m.h2.IPs, v4), 9418) + "/repo"} {
				says(t, "export HOME=$PWD && rm -rf clone && git clone -q "+family+" "+url+
					" clone && git -C clone fsck --full && git -C clone log --format=%s && wc -c clone/large && rm -rf clone",
					"cloned by everybody", "3000000 clone/large")
			}
		})
		t.Run("ssh", func(t *testing.T) {
			// Who calls is the user's host; a command's input and output are what they were.
			ssh := "ssh " + family + " -F none -i " + key + " -o BatchMode=yes -o StrictHostKeyChecking=no " +
				"-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=20 "
			host := pick(m.h1.IPs, v4).String()
			says(t, ssh+"-p 2222 root@"+pick(m.h2.IPs, v4).String()+" 'echo from $SSH_CONNECTION'", "from "+host+" ")
			says(t, `x=$(head -c 3000000 /dev/urandom | tee sent | `+ssh+`root@tools 'tee /dev/stderr' 2>got | sha256sum) &&
				[ "$x" = "$(sha256sum <sent)" ] && [ "$x" = "$(sha256sum <got)" ] && wc -c <got && rm sent got`, "3000000")
		})
		t.Run("bytes", func(t *testing.T) {
			size := runBytes(t)
			for _, ip := range []netip.Addr{pick(m.c.IPs, v4), pick(m.h2.IPs, v4)} {
				out := in(t, fmt.Sprintf("%s/ztload xfer -to %s -up %d -down %[3]d -seed 7", r.dir, lab.HostPort(ip, 9000), size))
				var x load.TransferResult
				if err := json.Unmarshal([]byte(out), &x); err != nil || !x.OK || x.Sent != size || x.Got != size {
					t.Errorf("to %s: %v: %s", ip, err, out)
				}
			}
		})
	})
	r.clean()
}

// runBytes is what one connection moves each way.
func runBytes(t *testing.T) int64 {
	if os.Getenv("ZTUN_TEST_BYTES") == "" {
		return 64 << 20 // a GiB is TestTransfers' affair
	}
	return transferBytes(t)
}

// toolServers starts what the tools call, in pod c and on the host h2: a web server, git's daemon and sshd, which lets
// root in with the key whose path is returned. The load program is put where the user finds it.
func (r *rootless) toolServers(t *testing.T) (key string) {
	t.Helper()
	b, err := os.ReadFile(bins.ztload)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(r.dir, "ztload"), b, 0o755))
	key = filepath.Join(r.dir, "key")
	www, sshd := filepath.Join(r.dir, "www"), filepath.Join(r.dir, "sshd")
	script := `set -e
		mkdir -p www/repo sshd && echo by name >www/index.html && cd www/repo
		export HOME="$PWD" GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@x GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@x
		git init -q && head -c 3000000 /dev/urandom >large && git add . && git commit -q -m "cloned by everybody"
		git update-server-info && cd ../..
		ssh-keygen -q -t ed25519 -N "" -f key && ssh-keygen -q -t ed25519 -N "" -f sshd/host
		cp key.pub sshd/authorized && chmod -R go+rX . && chmod 0600 key sshd/host && chown 65534 key`
	setup := exec.Command("sh", "-c", script)
	setup.Dir = r.dir
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// Where there is no service of this name the directory that sshd wants is missing. It closes all that it may have.
	serve := fmt.Sprintf(`mount -t tmpfs none /run && mkdir -m 0755 /run/sshd && ulimit -n 1024 && exec "$(command -v sshd)" -D -e -f /dev/null \
		-h %s/host -p 2222 -o AuthorizedKeysFile=%[1]s/authorized -o StrictModes=no -o UsePAM=no -o PidFile=none`, sshd)
	// Not `git daemon`, which would leave that behind.
	const git = `exec "$(git --exec-path)/git-daemon" --verbose --export-all --base-path="$0"`
	for _, ns := range []*lab.NS{r.c.NS, r.h2.NS} {
		r.background(ns, "Serving HTTP", "python3", "-u", "-m", "http.server", "8080", "--bind", "::", "--directory", www)
		r.background(ns, "Ready to rumble", "sh", "-c", git, www)
		r.background(ns, "Server listening on :: port", "unshare", "-m", "sh", "-c", serve)
	}
	return key
}
