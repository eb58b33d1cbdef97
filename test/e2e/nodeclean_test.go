package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNodeClean: what a killed daemon leaves is told by `ztun node status` and taken away by `ztun node clean`,
// settings of the kernel included: the namespaces are as they were before ztun. While a daemon runs it is refused.
func TestNodeClean(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	forwarding := func() string {
		out, err := m.Run(m.ctx, m.N1.NS, "cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding")
		must(t, err)
		return strings.Join(strings.Fields(out), " ")
	}
	_, err := m.Run(m.ctx, m.N1.NS, "sh", "-c",
		"echo 0 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	must(t, err)
	before, podBefore := netState(m, m.N1.NS), netState(m, m.a.NS)
	dir := m.DaemonEnv(m.N1)["ZTUN_STATE_DIR"]
	node := func(verb string) (string, error) {
		return m.Ztun(m.ctx, m.N1.NS, "node", verb, "--state-dir", dir)
	}

	for range 2 { // the second life finds what the first has set, and must not take it for what was there before
		m.start(m.N1, nil)
		if got := forwarding(); got != "1 1" {
			t.Fatalf("forwarding is %s", got)
		}
		if len(m.N1.Daemon.Log()) == 0 {
			t.Fatal("no log")
		}
		if _, err := m.PodCmd(m.ctx, m.N1, "list"); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(netState(m, m.a.NS), "ztun0") {
			must(t, m.Attach(m.ctx, m.a))
		}
		out, err := node("clean")
		if err == nil {
			t.Fatalf("cleaned beneath a running daemon: %s", out)
		}
		if _, err := m.PodCmd(m.ctx, m.N1, "list"); err != nil {
			t.Fatal(err)
		}
		m.N1.Daemon.Kill()
	}

	out, err := node("status")
	must(t, err)
	for _, want := range []string{"the daemon does not run", "ztun0", "ztun-node", m.a.V4().String(), "15008",
		"sysctl -w net/ipv4/ip_forward=0", "ip rule pref 10 ipproto tcp dport 15008"} {
		if !strings.Contains(out, want) {
			t.Errorf("status does not tell of %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "ipv6.conf.all.forwarding") {
		t.Errorf("status tells of a setting that ztun has not changed:\n%s", out)
	}
	out, err = node("clean")
	must(t, err)
	if !strings.Contains(out, "devices: 2\n") || !strings.Contains(out, "settings set back: 1\n") {
		t.Errorf("clean says:\n%s", out)
	}
	if got := forwarding(); got != "0 1" {
		t.Errorf("forwarding is %s, was 0 1", got)
	}
	if after := netState(m, m.N1.NS); !sameButLo(before, after) {
		t.Errorf("the node is not as it was:\n%s", diff(before, after))
	}
	if after := netState(m, m.a.NS); !sameButLo(podBefore, after) {
		t.Errorf("the pod is not as it was:\n%s", diff(podBefore, after))
	}
	for _, f := range []string{"pods.json", "host.json"} {
		if _, err := os.Stat(filepath.Join(dir, f)); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", f, err)
		}
	}
	for verb, want := range map[string]string{"clean": "there was nothing", "status": "there is nothing"} {
		if out, err := node(verb); err != nil || !strings.Contains(out, want) {
			t.Errorf("%s of a clean host: %v\n%s", verb, err, out)
		}
	}

	// A host that was never told what to serve is not touched.
	out, err = m.Run(m.ctx, m.N1.NS, "env", "-i", m.Bin(), "proxy")
	if err == nil || !strings.Contains(err.Error()+out, "NODE_NAME") {
		t.Errorf("without configuration: %v %s", err, out)
	}
	if after := netState(m, m.N1.NS); !sameButLo(before, after) {
		t.Errorf("a daemon without configuration has touched the host:\n%s", diff(before, after))
	}
}
