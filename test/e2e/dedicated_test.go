package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// viaSOCKS asks the load server at dst who calls, through SOCKS5 on a namespace's loopback.
func viaSOCKS(ctx context.Context, ns *lab.NS, dst netip.AddrPort) (string, error) {
	conn, err := ns.Dial(ctx, "tcp", "127.0.0.1:15080")
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	request := append([]byte{5, 1, 0, 5, 1, 0, 1}, dst.Addr().AsSlice()...)
	request = binary.BigEndian.AppendUint16(request, dst.Port())
	if _, err := conn.Write(request); err != nil {
		return "", err
	}
	in := bufio.NewReader(conn)
	answer := make([]byte, 2+10)
	if _, err := io.ReadFull(in, answer); err != nil {
		return "", err
	}
	if answer[3] != 0 {
		return "", fmt.Errorf("SOCKS5 reply %d", answer[3])
	}
	if _, err := io.WriteString(conn, "whoami\n"); err != nil {
		return "", err
	}
	return in.ReadString('\n')
}

// TestDedicated: `ztun proxy` in dedicated mode, by an ordinary user without capabilities, is the proxy of the host
// that it runs on: peers reach the host's applications over HBONE, by its policies; what comes by SOCKS5, or by
// somebody else's redirect, goes out with the workload's identity; it holds that one's certificate alone and takes no
// pods; a port that is taken ends the start.
func TestDedicated(t *testing.T) {
	m := newMesh(t, meshOptions{})
	f := m.DefaultWorld()
	for i := range f.Workloads {
		if w := &f.Workloads[i]; w.Name == m.h2.Name {
			w.Protocol, w.ServiceAccount, w.TrustDomain, w.Node = "HBONE", "side", "cluster.local", ""
		}
	}
	f.Policies = []lab.Policy{{Name: "a-and-side", Namespace: "default", Scope: "Namespace", Action: "Allow",
		Rules: [][][]map[string]any{{{{"principals": []map[string]string{
			{"Exact": "cluster.local/ns/default/sa/" + m.a.ServiceAccount}, {"Exact": "cluster.local/ns/default/sa/side"}}}}}}}}
	m.teach(f)
	r := newRootless(t, m)
	world, err := os.ReadFile(m.WorldPath())
	must(t, err)
	command := func(state string) []string {
		return []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs",
			"--bounding-set", "-all", "--inh-caps", "-all", "env", "PROXY_MODE=dedicated",
			"PROXY_WORKLOAD_INFO=default/" + m.h2.Name + "/side", "LOCAL_XDS=" + string(world), "XDS_ADDRESS=", "CA_ADDRESS=",
			"LOCAL_CA_DIR=" + r.dir + "/ca", "ZTUN_STATE_DIR=" + r.dir + "/tmp/" + state, "UNSTABLE_ENABLE_SOCKS5=true",
			r.dir + "/ztun", "proxy"}
	}
	m.background(m.h2.NS, "pod attached", command("state")...)
	ask := func(ns *lab.NS, host netip.Addr) (string, error) {
		conn, err := ns.Dial(m.ctx, "tcp", netip.AddrPortFrom(host, 9000).String())
		if err != nil {
			return "", err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, "whoami\n"); err != nil {
			return "", err
		}
		return bufio.NewReader(conn).ReadString('\n')
	}
	// The nodes take the new world within a moment; h2's application sees its own host once it is reached over HBONE.
	eventually(t, 20*time.Second, func() error {
		got, err := ask(m.a.NS, m.h2.V4())
		if err == nil && !strings.Contains(got, `"peer":"`+m.h2.V4().String()) {
			err = fmt.Errorf("in plaintext: %q", got)
		}
		return err
	})
	if got, err := ask(m.b.NS, m.h2.V4()); err == nil {
		t.Errorf("b, which the policy does not name, gets %q", got)
	}
	got, err := viaSOCKS(m.ctx, m.h2.NS, netip.AddrPortFrom(m.a.V4(), 9000))
	if err != nil || !strings.Contains(got, `"peer":"`+m.h2.V4().String()) {
		t.Errorf("by SOCKS5: %q, %v", got, err)
	}
	// What somebody else redirects there goes where it was going.
	redirect := []string{"iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", m.a.V4().String(), "--dport", "9000",
		"-m", "owner", "!", "--uid-owner", "65534", "-j", "REDIRECT", "--to-ports", "15001"}
	if _, err := m.RunCmd(m.ctx, m.h2.NS, lab.Cmd{Args: redirect}); err != nil {
		t.Logf("no redirect can be made here, and none is tested: %v", err)
	} else if got, err := ask(m.h2.NS, m.a.V4()); err != nil || !strings.Contains(got, `"peer":"`+m.h2.V4().String()) {
		t.Errorf("redirected: %q, %v", got, err)
	}
	// One that is not redirected was going to our own port: it is refused, and no loop.
	if conn, err := m.h2.NS.Dial(m.ctx, "tcp", "127.0.0.1:15001"); err == nil {
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		if n, err := conn.Read(make([]byte, 1)); n > 0 || os.IsTimeout(err) {
			t.Errorf("to 15001 itself: %d bytes, %v", n, err)
		}
		conn.Close()
	}
	out, err := m.RunCmd(m.ctx, m.h2.NS, lab.Cmd{Args: []string{"curl", "-sS", "http://127.0.0.1:15000/config_dump"}})
	if n := strings.Count(out, `"identity": "spiffe://`); err != nil || n != 1 ||
		!strings.Contains(out, `"identity": "spiffe://cluster.local/ns/default/sa/side"`) ||
		!strings.Contains(out, `"proxyMode": "Dedicated"`) {
		t.Errorf("%d certificates, %v: %.2000s", n, err, out)
	}
	_, err = m.Ztun(m.ctx, nil, "pod", "add", "--socket", r.dir+"/tmp/state/ztun.sock", "--name", "x",
		"--netns", "/proc/1/ns/net", "--ip", "10.9.9.9")
	if err == nil || !strings.Contains(err.Error(), "this is the proxy of side.default (h2) alone") {
		t.Errorf("a pod: %v", err)
	}
	_, err = m.RunCmd(m.ctx, m.h2.NS, lab.Cmd{Args: command("other")})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a second one: %v", err)
	}
}
