package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// netState is what the kernel knows in a namespace: devices, addresses, routes of all tables and rules, without what
// changes by itself.
func netState(m *mesh, ns *lab.NS) string {
	m.t.Helper()
	var all []string
	for _, args := range [][]string{{"ip", "-o", "link"}, {"ip", "-o", "addr"},
		{"ip", "-4", "route", "show", "table", "all"}, {"ip", "-6", "route", "show", "table", "all"}, {"ip", "-4", "rule"},
		{"ip", "-6", "rule"}} {
		out, err := m.Run(m.ctx, ns, args...)
		must(m.t, err)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if !strings.Contains(strings.Join(args, " "), "rule") {
			sort.Strings(lines)
		}
		for _, l := range lines {
			if i := strings.Index(l, " expires "); i >= 0 {
				l = l[:i]
			}
			// An interface index differs from device to device; so do random link-local addresses.
			if strings.Contains(l, "fe80::") && strings.Contains(l, "ztun") {
				continue
			}
			if l = strings.TrimSpace(l); l != "" {
				all = append(all, l)
			}
		}
	}
	return strings.Join(all, "\n")
}

// podAdd runs `ztun pod add` with the usual fields replaced.
func podAdd(m *mesh, n *lab.Node, name, netns, ips string) error {
	_, err := m.PodCmd(m.ctx, n, "add", "--name", name, "--namespace", "default", "--service-account", name, "--netns",
		netns, "--ip", ips)
	return err
}

// TestPodCommands: adding twice, a missing namespace, addresses in use and nonsense are clear errors that leave
// nothing behind and the other pods undisturbed; deleting removes every trace; and namespaces may be named by path,
// name or pid.
func TestPodCommands(t *testing.T) {
	m := newMesh(t, meshOptions{})
	ic, err := load.Idle(m.ctx, target(m.b.NS, m.c.V4()), 3) // the other pod of the node
	must(t, err)
	defer ic.Close()
	spare, err := m.AddNS("spare")
	must(t, err)
	extra, err := m.AddPod(m.N1, lab.Pod{Name: "extra"})
	must(t, err)
	must(t, m.WriteWorld(m.DefaultWorld()))

	nodeBefore, spareBefore, aBefore := netState(m, m.N1.NS), netState(m, spare), netState(m, m.a.NS)
	unchanged := func(t *testing.T) {
		t.Helper()
		for _, c := range []struct {
			what     string
			ns       *lab.NS
			expected string
		}{{"the node", m.N1.NS, nodeBefore}, {"the spare namespace", spare, spareBefore}, {"pod a", m.a.NS, aBefore}} {
			if got := netState(m, c.ns); got != c.expected {
				t.Errorf("%s changed:\n%s", c.what, diff(c.expected, got))
			}
		}
	}
	for _, c := range []struct{ name, podName, netns, ips, want string }{
		{"twice", "a", m.a.NS.Path(), m.a.V4().String() + "," + m.a.V6().String(), "already"},
		{"twice under the same name", "a", spare.Path(), "10.91.1.77", "already"},
		{"namespace of another pod", "z", m.a.NS.Path(), "10.91.1.77", ""},
		{"missing namespace by path", "z", "/var/run/netns/does-not-exist", "10.91.1.77", "does-not-exist"},
		{"missing namespace by name", "z", "does-not-exist", "10.91.1.77", "does-not-exist"},
		{"missing namespace by pid", "z", "4194303", "10.91.1.77", "4194303"},
		{"not a namespace", "z", "/etc/hostname", "10.91.1.77", "/etc/hostname"},
		{"the node's own namespace", "z", m.N1.NS.Path(), "10.91.1.77", ""},
		{"address of another pod", "z", spare.Path(), m.b.V4().String(), m.b.V4().String()},
		{"address of the node", "z", spare.Path(), m.N1.Addr4.String(), m.N1.Addr4.String()},
		{"address of a host behind another device", "z", spare.Path(), m.h1.V4().String(), m.h1.V4().String()},
		{"second address in use", "z", spare.Path(), "10.91.1.77," + m.b.V6().String(), m.b.V6().String()},
		{"no address", "z", spare.Path(), "", ""},
		{"nonsense address", "z", spare.Path(), "10.91.1.777", "10.91.1.777"},
		{"loopback address", "z", spare.Path(), "127.0.0.1", "127.0.0.1"},
		{"unspecified address", "z", spare.Path(), "0.0.0.0", "0.0.0.0"},
		{"multicast address", "z", spare.Path(), "224.0.0.1", "224.0.0.1"},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			err := podAdd(m, m.N1, c.podName, c.netns, c.ips)
			if err == nil {
				t.Fatal("was accepted")
			}
			if code := lab.ExitCode(err); code != 1 && code != 2 {
				t.Errorf("exit code %d", code)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("the message does not say %q: %v", c.want, err)
			}
			if strings.Contains(err.Error(), "panic") || strings.Count(strings.TrimSpace(err.Error()), "\n") > 3 {
				t.Errorf("not a clear message: %v", err)
			}
			unchanged(t)
		})
	}
	t.Run("delete-unknown", func(t *testing.T) {
		_, err := m.PodCmd(m.ctx, m.N1, "del", "--name", "nobody", "--namespace", "default")
		if err == nil || !strings.Contains(err.Error(), "nobody") {
			t.Errorf("%v", err)
		}
		unchanged(t)
	})
	t.Run("no-daemon", func(t *testing.T) {
		_, err := m.Ztun(m.ctx, nil, "pod", "list", "--socket", m.Path("no.sock"))
		if err == nil || !strings.Contains(err.Error(), "no.sock") {
			t.Errorf("%v", err)
		}
	})
	t.Run("socket-mode", func(t *testing.T) {
		st, err := os.Stat(m.N1.Daemon.Socket)
		must(t, err)
		if st.Mode().Perm() != 0o600 {
			t.Errorf("mode %v", st.Mode())
		}
	})
	t.Run("name-path-pid", func(t *testing.T) {
		holder, err := m.Start(extra.NS, lab.Cmd{Args: []string{"sleep", "600"}})
		must(t, err)
		ips := extra.V4().String() + "," + extra.V6().String()
		for _, ref := range []string{extra.NS.Name, extra.NS.Path(), fmt.Sprint(holder.Pid())} {
			before := netState(m, extra.NS)
			if err := podAdd(m, m.N1, "extra", ref, ips); err != nil {
				t.Errorf("%s: %v", ref, err)
				continue
			}
			if !strings.Contains(netState(m, extra.NS), "ztun0") {
				t.Errorf("%s: no ztun0 in the pod", ref)
			}
			if w, err := load.WhoAmI(m.ctx, target(extra.NS, m.c.V4())); err != nil {
				t.Errorf("%s: %v %+v", ref, err, w)
			}
			if err := m.Detach(m.ctx, extra); err != nil {
				t.Errorf("%s: %v", ref, err)
			}
			unchanged(t)
			if after := netState(m, extra.NS); strings.Contains(after, "ztun") || !sameButLo(before, after) {
				t.Errorf("%s: the pod keeps traces:\n%s", ref, diff(before, after))
			}
		}
		holder.Kill()
	})
	t.Run("exec", func(t *testing.T) {
		// In the pod's network, with the files that its namespace's name has, and with the command's own exit code.
		inEtc := filepath.Join("/etc/netns", m.a.NS.Name)
		must(t, os.MkdirAll(inEtc, 0o755))
		t.Cleanup(func() { os.RemoveAll(inEtc); os.Remove("/etc/netns") }) // the latter only if it is empty
		must(t, os.WriteFile(filepath.Join(inEtc, "resolv.conf"), []byte("nameserver 192.0.2.53\n"), 0o644))
		host, err := os.ReadFile("/etc/resolv.conf")
		must(t, err)
		out, err := m.PodCmd(m.ctx, m.N1, "exec", "a", "--", "sh", "-c",
			"ip -o address show dev ztun0; cat /etc/resolv.conf; exit 7")
		if lab.ExitCode(err) != 7 || !strings.Contains(out, m.a.V4().String()) || !strings.Contains(out, "192.0.2.53") {
			t.Errorf("%d, %s", lab.ExitCode(err), out)
		}
		out, err = m.PodCmd(m.ctx, m.N1, "exec", "default/b", "ip", "-o", "address")
		if err != nil || !strings.Contains(out, m.b.V4().String()) || strings.Contains(out, m.N1.Addr4.String()) {
			t.Errorf("%v, %s", err, out)
		}
		if after, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(after) != string(host) {
			t.Errorf("the host's resolv.conf is %q, was %q, %v", after, host, err)
		}
		for args, want := range map[string]string{"nobody -- true": "no pod default/nobody",
			"a -- no-such-command": "command not found"} {
			if _, err := m.PodCmd(m.ctx, m.N1, "exec", strings.Fields(args)...); err == nil ||
				!strings.Contains(err.Error(), want) {
				t.Errorf("exec %s: %v", args, err)
			}
		}
		unchanged(t)
	})
	t.Run("list", func(t *testing.T) {
		out, err := m.PodCmd(m.ctx, m.N1, "list", "-o", "json")
		must(t, err)
		var list any
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			t.Errorf("not JSON: %v: %s", err, out)
		}
		text, err := m.PodCmd(m.ctx, m.N1, "list")
		must(t, err)
		for _, want := range []string{m.a.V4().String(), m.a.V6().String(), m.b.V4().String()} {
			if !strings.Contains(out, want) || !strings.Contains(text, want) {
				t.Errorf("%s is missing in:\n%s\n%s", want, out, text)
			}
		}
		if strings.Contains(text, "extra") {
			t.Errorf("a deleted pod is listed:\n%s", text)
		}
	})
	if err := ic.Check(); err != nil {
		t.Errorf("connections of another pod were disturbed: %v", err)
	}
	// A pod that is deleted drains: an open connection is finished or cut by the deadline, and then nothing is left.
	t.Run("delete-with-connections", func(t *testing.T) {
		open, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 3)
		must(t, err)
		defer open.Close()
		must(t, m.Detach(m.ctx, m.a))
		after := netState(m, m.N1.NS)
		for _, trace := range []string{m.a.V4().String() + " ", m.a.V6().String() + " "} {
			if strings.Contains(after, trace) {
				t.Errorf("the node still knows %s:\n%s", trace, after)
			}
		}
		if s := netState(m, m.a.NS); strings.Contains(s, "ztun0") {
			t.Errorf("the pod still has its device:\n%s", s)
		}
		if err := open.Check(); err == nil {
			t.Error("connections of a deleted pod are alive")
		}
		// It can come back, with another namespace even.
		must(t, m.Attach(m.ctx, m.a))
		if _, err := load.WhoAmI(m.ctx, target(m.a.NS, m.c.V4())); err != nil {
			t.Error(err)
		}
	})
}

// sameButLo compares two states without lo, which attaching brings up and which may stay so.
func sameButLo(a, b string) bool {
	strip := func(s string) string {
		var out []string
		for _, l := range strings.Split(s, "\n") {
			if !strings.Contains(l, " lo ") && !strings.Contains(l, " lo:") && !strings.HasSuffix(l, " lo") &&
				!strings.Contains(l, "dev lo") {
				out = append(out, l)
			}
		}
		return strings.Join(out, "\n")
	}
	return strip(a) == strip(b)
}

func diff(a, b string) string {
	in := func(s string) map[string]bool {
		set := map[string]bool{}
		for _, l := range strings.Split(s, "\n") {
			set[l] = true
		}
		return set
	}
	as, bs := in(a), in(b)
	var out strings.Builder
	for _, l := range strings.Split(a, "\n") {
		if !bs[l] {
			fmt.Fprintln(&out, "- "+l)
		}
	}
	for _, l := range strings.Split(b, "\n") {
		if !as[l] {
			fmt.Fprintln(&out, "+ "+l)
		}
	}
	return out.String()
}

// TestVanishedPod: a pod's namespace disappears under the daemon. The other pods go on, the daemon too, and the pod
// can be deleted and added again.
func TestVanishedPod(t *testing.T) {
	m := newMesh(t, meshOptions{})
	ic, err := load.Idle(m.ctx, target(m.b.NS, m.c.V4()), 3)
	must(t, err)
	defer ic.Close()
	must(t, m.RemoveNS(m.a.NS))
	time.Sleep(500 * time.Millisecond)
	must(t, ic.Check())
	if !m.N1.Daemon.Running() {
		t.Fatal("the daemon has ended")
	}
	if r := load.DialOnce(contextFor(t, m, 20*time.Second), target(m.c.NS, m.a.V4())); r.OK {
		t.Errorf("connect to a vanished pod: %+v", r)
	}
	// Whether the daemon has noticed by itself or not, del must end with no trace.
	if _, err := m.PodCmd(m.ctx, m.N1, "del", "--name", "a", "--namespace", "default"); err != nil {
		t.Logf("pod del of a vanished pod: %v", err)
	}
	out, err := m.PodCmd(m.ctx, m.N1, "list")
	must(t, err)
	if strings.Contains(out, m.a.V4().String()) {
		t.Errorf("still listed:\n%s", out)
	}
	if s := netState(m, m.N1.NS); strings.Contains(s, m.a.V4().String()+" ") {
		t.Errorf("the node still knows the pod:\n%s", s)
	}
	again, err := m.AddPod(m.N1, lab.Pod{Name: "a-2", IPs: append([]netip.Addr(nil), m.a.IPs...)})
	must(t, err)
	again.Name, again.ServiceAccount = "a", "a"
	must(t, m.Attach(m.ctx, again))
	if _, err := load.WhoAmI(m.ctx, target(again.NS, m.c.V4())); err != nil {
		t.Errorf("the pod that came back: %v", err)
	}
	must(t, ic.Check())
}

func contextFor(t testing.TB, m *mesh, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(m.ctx, d)
	t.Cleanup(cancel)
	return ctx
}

// TestPodWithoutRecord: what `ztun pod` says of a pod that nothing is known of yet is true: its connections wait for
// the record, and go through when it comes in time. A record without a trust domain is of the CA's, so that its pod
// speaks and is spoken to in the mesh.
func TestPodWithoutRecord(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	full := m.DefaultWorld()
	for i := range full.Workloads {
		full.Workloads[i].TrustDomain = ""
	}
	without := full
	without.Workloads = nil
	for _, w := range full.Workloads {
		if w.Name != "a" {
			without.Workloads = append(without.Workloads, w)
		}
	}
	must(t, m.WriteWorld(without))
	for _, n := range m.Nodes() {
		m.start(n, nil)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	m.serve(m.c.NS)
	list, err := m.PodCmd(m.ctx, m.N1, "list")
	must(t, err)
	const says = "no workload record of name a, namespace default, service account a yet: its connections wait for it " +
		"for up to 5s each and are refused then"
	if strings.Count(list, says) != 1 || strings.Count(list, "no workload record") != 1 {
		t.Errorf("ztun pod list:\n%s", list)
	}
	dial := func() (time.Duration, error) {
		start := time.Now()
		c, err := m.a.NS.Dial(m.ctx, "tcp", lab.HostPort(m.c.V4(), 9000))
		if err == nil {
			c.Close()
		}
		return time.Since(start), err
	}
	if took, err := dial(); err == nil || took < 4*time.Second {
		t.Errorf("without a record: %v after %v", err, took)
	}
	time.AfterFunc(time.Second, func() {
		if err := m.WriteWorld(full); err != nil {
			t.Error(err)
		}
	})
	if took, err := dial(); err != nil || took < time.Second {
		t.Errorf("when the record comes: %v after %v", err, took)
	}
	_, dump, err := m.N1.Daemon.Get(m.ctx, lab.AdminPort, "/config_dump")
	must(t, err)
	if !strings.Contains(dump, "spiffe://cluster.local/ns/default/sa/a") || strings.Contains(dump, "spiffe:///") {
		t.Error("the identity of a workload without trustDomain is not the CA's")
	}
}
