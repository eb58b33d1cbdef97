package ambient

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
)

// TestVirtualMachines: two machines that are no pods, each with a WorkloadEntry and a token of its service account in a
// file, as Istio's VMs have them: one is a `ztun run` by an ordinary user, the other has `ztun proxy` in dedicated
// mode. Both have their record and their certificate from istiod's own code, reach a pod that lets nobody else in, and
// the second is reached. With another's token the run is that one, and says so; with none that is good its command
// does not begin.
func TestVirtualMachines(t *testing.T) {
	m := prepare(t)
	user, err := m.AddHost(m.N1, "user")
	must(t, err)
	side, err := m.AddHost(m.N2, "side")
	must(t, err)
	// istiod's record says HBONE where the annotation does, as istio-cni sets it at pods.
	for _, h := range []*lab.Host{user, side} {
		m.Apply(fmt.Sprintf(`apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {namespace: default, name: %s, labels: {app: %s}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {address: %s, serviceAccount: %s}
---
`, h.Name, h.Name, h.V4(), h.Name))
	}
	const td = "cluster.local/ns/default/sa/"
	m.Apply(allowYAML("default", "machines", "server", td+"user", td+"side"))
	for _, n := range m.Nodes() {
		_, err := m.StartDaemon(m.ctx, n, lab.DaemonOptions{Env: m.env(n)})
		must(t, err)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	dir, err := os.MkdirTemp("", "ztun-vm-") // t.TempDir is root's alone
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "tmp"), 0o777))
	must(t, os.Chmod(filepath.Join(dir, "tmp"), 0o777))
	program, err := os.ReadFile(ztun)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "ztun"), program, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "root.pem"), m.Root(), 0o644))
	tun := filepath.Join(dir, "tun")
	must(t, unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))))
	must(t, os.Chmod(tun, 0o666))
	token := func(name string) string {
		path := filepath.Join(dir, "token-"+name)
		must(t, os.WriteFile(path, []byte(m.TokenFor("istio-ca", "default", name, "")+"\n"), 0o644))
		return path
	}
	as := func(h *lab.Host, token string, args ...string) lab.Cmd {
		script := "mount --bind " + tun + " /dev/net/tun && cd / && exec setpriv --reuid 65534 --regid 65534 --clear-groups " +
			`--no-new-privs --bounding-set -all --inh-caps -all "$@"`
		return lab.Cmd{Args: append([]string{"unshare", "-m", "sh", "-c", script, "sh", filepath.Join(dir, "ztun")}, args...),
			Env: append(lab.BaseEnv(), "PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/"+h.Name+"/"+h.Name,
				"XDS_ADDRESS=https://"+m.address, "CA_ADDRESS=https://"+m.address, "XDS_ROOT_CA="+dir+"/root.pem",
				"CA_ROOT_CA="+dir+"/root.pem", "AUTH_TOKEN="+token, "TMPDIR="+dir+"/tmp",
				"ZTUN_STATE_DIR="+dir+"/tmp/state-"+h.Name, "UNSTABLE_ENABLE_SOCKS5=true")}
	}
	question := fmt.Sprintf("exec 3<>/dev/tcp/%s/9000 && echo whoami >&3 && head -n 1 <&3", m.server.V4())
	run := func(token string) (string, error) {
		return m.RunCmd(m.ctx, user.NS, as(user, token, "run", "--ip", user.V4().String(), "--wait", "1s", "--", "bash", "-c",
			question))
	}
	got, err := run(token("user"))
	if err != nil || !strings.Contains(got, `"peer":"`+user.V4().String()) {
		t.Errorf("as a run: %q, %v", got, err)
	}
	// istiod decides by the token whose certificate it is, and the pod does not let that one in.
	if got, err := run(token("stranger")); err == nil || !strings.Contains(err.Error(), "the CA takes this process for another") ||
		!strings.Contains(err.Error(), "onnection refused") {
		t.Errorf("with another's token: %q, %v", got, err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "token-nobody"), []byte("nobody's\n"), 0o644))
	if got, err := run(filepath.Join(dir, "token-nobody")); err == nil || got != "" ||
		!strings.Contains(err.Error(), "it does not take these credentials") {
		t.Errorf("with no good token: %q, %v", got, err)
	}

	_, err = m.World.Start(side.NS, as(side, token("side"), "proxy"))
	must(t, err)
	m.serve(side.NS)
	eventually(t, 20*time.Second, func() error {
		got, err := m.viaSOCKS(side.NS, netip.AddrPortFrom(m.server.V4(), 9000))
		if err == nil && !strings.Contains(got, `"peer":"`+side.V4().String()) {
			err = fmt.Errorf("%q", got)
		}
		return err
	})
	// Over HBONE its application sees its own host as the client, in plaintext the pod.
	eventually(t, 20*time.Second, func() error {
		conn, err := m.client.NS.Dial(m.ctx, "tcp", lab.HostPort(side.V4(), 9000))
		if err != nil {
			return err
		}
		defer conn.Close()
		got, err := whoami(conn)
		if err == nil && !strings.Contains(got, `"peer":"`+side.V4().String()) {
			err = fmt.Errorf("in plaintext: %q", got)
		}
		return err
	})
}

// viaSOCKS asks the server at dst who calls, through SOCKS5 on a namespace's loopback.
func (m *mesh) viaSOCKS(ns *lab.NS, dst netip.AddrPort) (string, error) {
	conn, err := ns.Dial(m.ctx, "tcp", "127.0.0.1:15080")
	if err != nil {
		return "", err
	}
	defer conn.Close()
	must(m.t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	request := append([]byte{5, 1, 0, 5, 1, 0, 1}, dst.Addr().AsSlice()...)
	if _, err := conn.Write(binary.BigEndian.AppendUint16(request, dst.Port())); err != nil {
		return "", err
	}
	answer := make([]byte, 2+10)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return "", err
	}
	if answer[3] != 0 {
		return "", fmt.Errorf("SOCKS5 reply %d", answer[3])
	}
	return whoami(conn)
}

func whoami(conn io.ReadWriter) (string, error) {
	if _, err := io.WriteString(conn, "whoami\n"); err != nil {
		return "", err
	}
	return bufio.NewReader(conn).ReadString('\n')
}
