package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestDoctor: a healthy node has nothing to say, and each fault planted in a real one is found and mended by the
// command that is given for it, where it is one for a shell.
func TestDoctor(t *testing.T) {
	m := newMesh(t, meshOptions{noServers: true})
	eventually(t, 30*time.Second, func() error { // peers' certificates are there
		if found := m.doctor(m.N1); len(found) > 0 {
			return fmt.Errorf("a healthy node: %+v", found)
		}
		return nil
	})
	pod := m.a.V4().String()
	for _, f := range []struct {
		name  string
		ns    *lab.NS
		plant []string // ip commands
		what  string
		area  string
	}{
		{"default route of the pod", m.a.NS, []string{"route del default dev ztun0"}, "default dev ztun0", "pods"},
		{"route to the pod", m.N1.NS, []string{"route del " + pod + "/32 dev ztun-node"}, pod + "/32 dev ztun-node", "pods"},
		{"the pod's mesh port", m.N1.NS, []string{"route del local " + pod + "/32 table 15008"}, "table 15008", "pods"},
		{"rule to the mesh's table", m.N1.NS, []string{"rule del pref 10"}, "rule add pref 10", "host"},
		{"foreign rule", m.N1.NS, []string{"rule add pref 3 to 10.77.0.0/16 lookup main"}, "not ztun's", "host"},
	} {
		for _, p := range f.plant {
			must(t, m.IP(m.ctx, f.ns, p))
		}
		found := m.doctor(m.N1)
		i := slices.IndexFunc(found, func(g doctorFinding) bool {
			return g.Area == f.area && strings.Contains(g.What, f.what)
		})
		if i < 0 {
			t.Fatalf("%s: found %+v", f.name, found)
		}
		for _, g := range found { // a fault may show in two places
			in := m.N1.NS
			if strings.HasPrefix(g.Mend, "nsenter ") {
				in = nil
			}
			if _, err := m.Run(m.ctx, in, "sh", "-c", g.Mend); err != nil {
				t.Errorf("%s: %q: %v", f.name, g.Mend, err)
			}
		}
		if found := m.doctor(m.N1); len(found) > 0 {
			t.Fatalf("%s: after %+v there is still %+v", f.name, f, found)
		}
	}
	for _, s := range []struct{ key, bad, good, what string }{
		{"net.ipv4.ip_forward", "0", "1", "IPv4 forwarding is off"},
		{"net.ipv4.ip_local_port_range", "1024 65000", "32768 60999", "overlap with the mesh's"},
		{"net.ipv4.conf.all.rp_filter", "1", "0", "strict reverse path filtering"},
	} {
		set := func(v string) {
			t.Helper()
			_, err := m.Run(m.ctx, m.N1.NS, "sh", "-c", "echo '"+v+"' >/proc/sys/"+strings.ReplaceAll(s.key, ".", "/"))
			must(t, err)
		}
		set(s.bad)
		if found := m.doctor(m.N1); len(found) != 1 || !strings.Contains(found[0].What, s.what) {
			t.Errorf("%s: %+v", s.key, found)
		}
		set(s.good)
	}
	if _, err := exec.LookPath("nft"); err == nil {
		_, err := m.Run(m.ctx, m.N1.NS, "sh", "-c",
			"nft add table inet f && nft 'add chain inet f out { type filter hook output priority 0; }' && nft 'add rule inet "+
				"f out tcp dport 15008 reject'")
		must(t, err)
		found := m.doctor(m.N1)
		if !slices.ContainsFunc(found, func(g doctorFinding) bool {
			return strings.Contains(g.What, "refuses a port of the mesh")
		}) ||
			!slices.ContainsFunc(found, func(g doctorFinding) bool { return g.Area == "peers" }) {
			t.Errorf("a filter that refuses 15008: %+v", found)
		}
		_, err = m.Run(m.ctx, m.N1.NS, "nft", "delete", "table", "inet", "f")
		must(t, err)
	}
	_, err := m.N2.Daemon.Stop(30 * time.Second)
	must(t, err)
	if found := m.doctor(m.N1); len(found) != 1 || found[0].Area != "peers" ||
		!strings.Contains(found[0].What, "node n2") {
		t.Errorf("with the peer's daemon down: %+v", found)
	}
	_, err = m.N1.Daemon.Stop(30 * time.Second)
	must(t, err)
	if found := m.doctor(m.N1); !slices.ContainsFunc(found, func(g doctorFinding) bool {
		return strings.Contains(g.What, "the daemon does not answer")
	}) {
		t.Errorf("without a daemon: %+v", found)
	}
}

type doctorFinding struct{ Area, What, Why, Mend string }

// doctor asks `ztun doctor` on a node, which is to see everything.
func (m *mesh) doctor(n *lab.Node) []doctorFinding {
	t := m.t
	t.Helper()
	out, err := m.Ztun(m.ctx, n.NS, "doctor", "-o", "json", "--socket", n.Daemon.Socket)
	var r struct {
		Findings []doctorFinding
		Blind    []struct{ What, Why string }
	}
	start := strings.Index(out, "{")
	if start < 0 {
		t.Fatalf("%v: %s", err, out)
	}
	must(t, json.NewDecoder(strings.NewReader(out[start:])).Decode(&r))
	if len(r.Blind) > 0 {
		t.Errorf("could not look: %+v", r.Blind)
	}
	if (err == nil) != (len(r.Findings) == 0) {
		t.Errorf("%d findings, exit %v", len(r.Findings), err)
	}
	return r.Findings
}
