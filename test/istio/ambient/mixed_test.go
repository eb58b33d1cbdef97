package ambient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	"istio.io/istio/security/pkg/pki/ca"
	"istio.io/istio/security/pkg/pki/util"

	"ztun/test/istio/fakeistiod"
	"ztun/test/lab"
	"ztun/test/load"
)

// A mesh of two makes: node n1 is served by ztun, the pod envoy on n2 by Envoy, which ends and begins HBONE there as a
// ztunnel would. Istio's control plane tells ztun of both, and its CA has signed both sides' certificates.

// mixed is such a mesh.
type mixed struct {
	*mesh
	peer  *lab.Host // the pod envoy, with Envoy in its namespace
	envoy *lab.Envoy
}

// out is a loopback port of the peer's that leads to a pod by HBONE.
type out struct {
	Port                 int
	Target, Peer, Server string // CONNECT's authority, where its tunnel goes, and who has to answer there
}

func idOf(account string) string { return "spiffe://cluster.local/ns/default/sa/" + account }

// newMixed has n1's pods captured in the way of ZTUN_STEERING.
func newMixed(t *testing.T, steering string) *mixed {
	t.Helper()
	m := &mixed{mesh: prepare(t)}
	var err error
	m.peer, err = m.AddHost(m.N2, "envoy")
	must(t, err)
	m.Apply(podYAML("default", "envoy", "envoy", "n2", m.peer.V4().String(), m.peer.V6().String()))
	m.serve(m.peer.NS)
	env := m.env(m.N1)
	env["ZTUN_STEERING"], env["INPOD_ENABLED"] = steering, "false"
	_, err = m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{Env: env})
	must(t, err)
	for _, p := range []*lab.Pod{m.client, m.other} {
		if steering == "redirected" {
			must(t, m.CNI(m.ctx, p, true, 1500))
			for _, c := range lab.IstioRules(true) {
				_, err := m.Run(m.ctx, p.NS, c...)
				must(t, err)
			}
		}
		must(t, m.Attach(m.ctx, p))
	}
	m.startEnvoy(m.outs())
	return m
}

// outs are the peer's ways to the pod other, by both families.
func (m *mixed) outs() (all []out) {
	for i, ip := range m.other.IPs {
		all = append(all, out{10000 + i, lab.HostPort(ip, 9000), ip.String(), idOf("other")})
	}
	return all
}

// startEnvoy runs Envoy in the peer's namespace, with a certificate by Istio's CA.
func (m *mixed) startEnvoy(outs []out) {
	m.t.Helper()
	csr, key, err := util.GenCSR(util.CertOptions{Host: idOf("envoy"), ECSigAlg: util.EcdsaSigAlg, PKCS8Key: true})
	must(m.t, err)
	chain, err := m.CA.SignWithCertChain(csr, ca.CertOpts{SubjectIDs: []string{idOf("envoy")}, TTL: time.Hour})
	must(m.t, err)
	write := func(name string, b []byte) string {
		path := m.Path(name)
		must(m.t, os.WriteFile(path, b, 0o600))
		return path
	}
	var listen []string
	for _, ip := range m.peer.IPs {
		listen = append(listen, ip.String())
	}
	m.envoy = m.EnvoyForTest(m.t, m.peer.NS, envoyProgram(m.t), "testdata/envoy.yaml.tmpl", map[string]any{
		"Listen": listen, "Out": outs, "Client": idOf("client"), "IdleTimeout": "1s",
		"Cert": write("envoy-cert.pem", []byte(strings.Join(chain, ""))), "Key": write("envoy-key.pem", key),
		"Root": m.Path("root.pem")}, func() error { return m.admin("/ready", nil) })
}

// envoyProgram is where test/envoy/get-envoy puts it, or ZTUN_ENVOY.
func envoyProgram(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("ZTUN_ENVOY"); path != "" {
		return path
	}
	root, err := filepath.Abs("../../..")
	must(t, err)
	path := filepath.Join(root, "bin/envoy/bin/envoy")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v (run test/envoy/get-envoy bin/envoy, or set ZTUN_ENVOY)", err)
	}
	return path
}

// admin asks Envoy; answer, if there is one, gets what it says.
func (m *mixed) admin(path string, answer *string) error {
	resp, err := m.peer.NS.HTTP(10 * time.Second).Get("http://127.0.0.1:19000" + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != 200 {
		return fmt.Errorf("Envoy's %s: %s", path, resp.Status)
	}
	if answer != nil {
		*answer = b.String()
	}
	return nil
}

// stat is a counter of Envoy's.
func (m *mixed) stat(name string) (n int) {
	m.t.Helper()
	var text string
	must(m.t, m.admin("/stats?filter="+name, &text))
	for line := range strings.Lines(text) {
		if _, value, ok := strings.Cut(line, ": "); ok {
			var one int
			fmt.Sscan(value, &one)
			n += one
		}
	}
	return n
}

// way is one direction between the two makes, in one family.
type way struct {
	name   string
	target load.Target
	source netip.Addr // whom the application has to see; not valid: Envoy, which does not keep it
	client string     // account of the caller's identity
	server *lab.Node  // whose line has to say who came; nil: Envoy's
	want   string     // destination as the far end is told of it
}

func (m *mixed) ways() (all []way) {
	for i, ip := range m.peer.IPs {
		family := map[bool]string{true: "IPv4", false: "IPv6"}[ip.Is4()]
		all = append(all,
			way{"ztun to Envoy, " + family, target(m.client.NS, ip, 9000), netip.Addr{}, "client", nil,
				lab.HostPort(ip, 9000)},
			way{"Envoy to ztun, " + family, target(m.peer.NS, netip.MustParseAddr("127.0.0.1"), uint16(10000+i)), ip,
				"envoy", m.N1, lab.HostPort(m.other.IPs[i], 9000)})
	}
	return all
}

func TestMixedMesh(t *testing.T) {
	for _, steering := range []string{"isolated", "redirected"} {
		t.Run(steering, func(t *testing.T) {
			m := newMixed(t, steering)
			for _, w := range m.ways() {
				t.Run(w.name, func(t *testing.T) { m.works(t, w) })
			}
			t.Run("idle tunnels", m.idle)
			t.Run("policy", m.policy)
			t.Run("Envoy drains", m.drains)
		})
	}
}

// works has bytes and ends of all kinds take the way, and both makes say who they saw.
func (m *mixed) works(t *testing.T, w way) {
	ctx, cancel := context.WithTimeout(m.ctx, 60*time.Second)
	defer cancel()
	var seen load.Trailer
	eventually(t, 15*time.Second, func() (err error) {
		one, cancel := context.WithTimeout(ctx, gone)
		defer cancel()
		seen, err = load.WhoAmI(one, w.target)
		return err
	})
	from, err := netip.ParseAddrPort(seen.Peer)
	must(t, err)
	if w.source.IsValid() && from.Addr().Unmap() != w.source {
		t.Errorf("the application saw %v, want %v", from, w.source)
	}
	if w.server != nil {
		if r := load.Transfer(ctx, w.target, 64<<20, 64<<20, 1); !r.OK {
			t.Errorf("64 MiB each way: %s", r.Error)
		}
	} else { // see doc.go
		if r := load.HalfClose(ctx, w.target, 2, 2, 64<<20); r.OK != r.N {
			t.Errorf("up to 64 MiB up: %v", r.Errors)
		}
		if r := load.TransferEnded(ctx, w.target, 0, 64<<20, 1); !r.OK {
			t.Errorf("64 MiB down: %s", r.Error)
		}
	}
	if r := load.HalfClose(ctx, w.target, 20, 20, 1<<20); r.OK != r.N {
		t.Errorf("%d of %d half-closed: %v", r.OK, r.N, r.Errors)
	}
	if w.server != nil {
		// Not towards Envoy, which ends a CONNECT's other direction as soon as the application has ended its own.
		if r := load.Random(ctx, w.target, 60, 3); !r.OK {
			t.Errorf("sessions that end in any way: %v", r.Faults)
		}
		eventually(t, 10*time.Second, func() error {
			return m.line(w.server, `direction="inbound"`, `src.identity="`+idOf(w.client)+`"`,
				`src.workload="envoy"`, "dst.hbone_addr="+w.want)
		})
		return
	}
	eventually(t, 10*time.Second, func() error {
		return m.line(m.N1, `direction="outbound"`, `dst.identity="`+idOf("envoy")+`"`, `dst.workload="envoy"`,
			"dst.hbone_addr="+w.want)
	})
	eventually(t, 10*time.Second, func() error {
		for _, one := range m.envoy.Tunnels() {
			if one.Authority != w.want {
				continue
			}
			if one.Peer != idOf(w.client) || !strings.Contains(one.Baggage, "k8s.deployment.name=client") &&
				!strings.Contains(one.Baggage, "service.name=client") ||
				one.Source != m.client.V4().String() && one.Source != m.client.V6().String() ||
				!strings.Contains(one.Forwarded, one.Source) {
				t.Fatalf("Envoy saw %+v", one)
			}
			return nil
		}
		return errors.New("Envoy logged no tunnel to " + w.want)
	})
	// An application's reset is one to Envoy, too, and to nobody else on the tunnel.
	kept, err := load.Idle(ctx, w.target, 1)
	must(t, err)
	defer kept.Close()
	c, err := w.target.Dial(ctx, "tcp", w.target.Addr)
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = io.WriteString(c, "echo\n!")
	must(t, err)
	_, err = io.ReadFull(c, make([]byte, 1))
	must(t, err)
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	eventually(t, 10*time.Second, func() error {
		for _, one := range m.envoy.Tunnels() {
			if one.Authority == w.want && one.Flags == "DR" { // downstream remote reset
				return nil
			}
		}
		return errors.New("Envoy logged no reset of a stream to " + w.want)
	})
	must(t, kept.Check())
}

// line wants an access line of a node that holds all texts.
func (m *mixed) line(n *lab.Node, texts ...string) error {
lines:
	for line := range strings.Lines(n.Daemon.Log()) {
		if !strings.Contains(line, "\taccess\t") {
			continue
		}
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue lines
			}
		}
		return nil
	}
	return fmt.Errorf("%s has no access line with %q", n.Name, texts)
}

// idle: Envoy closes a tunnel that has had no stream for a while, whichever end began it. Nobody notices.
func (m *mixed) idle(t *testing.T) {
	for _, w := range m.ways() {
		stat := "downstream_cx_idle_timeout"
		if w.server != nil {
			stat = "upstream_cx_idle_timeout"
		}
		before := m.stat(stat)
		must(t, ask(m.ctx, w.target))
		eventually(t, 15*time.Second, func() error {
			if m.stat(stat) == before {
				return errors.New("Envoy closes no tunnel")
			}
			return nil
		})
		if err := ask(m.ctx, w.target); err != nil {
			t.Errorf("%s: after an idle tunnel was closed: %v", w.name, err)
		}
	}
}

func ask(ctx context.Context, to load.Target) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := load.WhoAmI(ctx, to)
	return err
}

// policy: an AuthorizationPolicy that denies the identity of Envoy's pod is in force for what Envoy carries, new and
// old connections alike, and for nobody else.
func (m *mixed) policy(t *testing.T) {
	byFamily := map[string]*load.IdleConns{}
	for _, w := range m.ways() {
		if w.server == nil {
			continue
		}
		ic, err := load.Idle(m.ctx, w.target, 4)
		must(t, err)
		defer ic.Close()
		byFamily[w.name] = ic
	}
	kept := m.open(m.client.NS, m.other.V4())
	m.Apply(denyYAML("default", "no-envoy", "other", "cluster.local/ns/default/sa/envoy"))
	for _, w := range m.ways() {
		if w.server == nil {
			continue
		}
		m.cut(w.name, byFamily[w.name])
		if err := ask(m.ctx, w.target); err == nil || errors.Is(err, context.DeadlineExceeded) ||
			errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a denied identity got %v, want a refusal", w.name, err)
		}
	}
	eventually(t, 10*time.Second, func() error {
		return m.line(m.N1, `direction="inbound"`, `src.identity="`+idOf("envoy")+`"`, "default/no-envoy")
	})
	if err := kept.Check(); err != nil {
		t.Errorf("another identity's connections: %v", err)
	}
	must(t, m.ask(m.client.NS, m.other.V4(), 9000))
	fakeistiod.Delete(m.Cluster, &securityv1.AuthorizationPolicy{}, "default", "no-envoy")
	for _, w := range m.ways() {
		eventually(t, 15*time.Second, func() error { return ask(m.ctx, w.target) })
	}
}

// drains: Envoy says GOAWAY while connections are open. They go on, and new ones have new tunnels.
func (m *mixed) drains(t *testing.T) {
	ip := m.peer.V4()
	old := m.open(m.client.NS, ip)
	resp, err := m.peer.NS.HTTP(10*time.Second).Post("http://127.0.0.1:19000/drain_listeners?graceful&skip_exit", "", nil)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	for range 20 {
		if err := ask(m.ctx, target(m.client.NS, ip, 9000)); err != nil {
			t.Fatalf("while Envoy drains: %v", err)
		}
		must(t, old.Check())
	}
}
