package ambient

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"

	"ztun/test/istio/fakeistiod"
	"ztun/test/lab"
)

// The daemons of two nodes under Istio's control plane.

// TestObjects: pods and services that are created in the API server arrive and are reachable; deleted, they vanish.
func TestObjects(t *testing.T) {
	m := newMesh(t)
	m.reaches("client", m.client.NS, serverVIP, 80)
	m.knows("Kubernetes//Pod/default/client", "Kubernetes//Pod/default/server", "Kubernetes//Pod/default/outside",
		"server(1)")

	t.Run("certificates are Istio's", func(t *testing.T) { checkCertificates(t, m) })
	t.Run("traffic is HBONE", func(t *testing.T) {
		labels := []string{"connection_security_policy=mutual_tls",
			"source_principal=spiffe://cluster.local/ns/default/sa/client",
			"destination_principal=spiffe://cluster.local/ns/default/sa/server"}
		for n, reporter := range map[*lab.Node]string{m.N1: "source", m.N2: "destination"} {
			eventually(t, 5*time.Second, func() error {
				metrics, err := n.Daemon.Metrics(m.ctx)
				must(t, err)
				if metrics.Sum("istio_tcp_connections_opened_total", append(labels, "reporter="+reporter)...) < 2 {
					return fmt.Errorf("%s: no connections of client to server over HBONE", n.Name)
				}
				return nil
			})
		}
	})
	t.Run("a pod and a service come and go", func(t *testing.T) {
		vip := netip.MustParseAddr("10.92.0.2")
		late := m.pod(m.N2, "late")
		must(t, m.Attach(m.ctx, late))
		m.reaches("client", m.client.NS, late.V4(), 9000)
		m.reaches("client", m.client.NS, late.V6(), 9000)
		m.reaches("late", late.NS, m.client.V4(), 9000)
		m.Apply(serviceYAML("default", "late", vip.String()))
		m.reaches("client", m.client.NS, vip, 80)
		m.knows("late(1)")
		fakeistiod.Delete(m.Cluster, &corev1.Service{}, "default", "late")
		m.knows("-late(1)", "-late(0)", "Kubernetes//Pod/default/late")
		if err := m.ask(m.client.NS, vip, 80); err == nil {
			t.Error("the address of a deleted service still leads somewhere")
		}
		must(t, m.Detach(m.ctx, late))
		fakeistiod.Delete(m.Cluster, &corev1.Pod{}, "default", "late")
		m.knows("-Kubernetes//Pod/default/late")
		eventually(t, 10*time.Second, func() error { // checklist 59
			for _, c := range m.dump(m.N2).Certificates {
				if c.Identity == "spiffe://cluster.local/ns/default/sa/late" {
					return errors.New("the certificate of an identity that has left the node is still there")
				}
			}
			return nil
		})
	})
	t.Run("what was sent is counted", func(t *testing.T) {
		metrics, err := m.N1.Daemon.Metrics(m.ctx)
		must(t, err)
		for _, typeURL := range []string{addressType, policyType} {
			if metrics.Sum("istio_xds_message_total", "url="+typeURL) < 1 {
				t.Errorf("istio_xds_message_total counts no %s", typeURL)
			}
		}
	})
	t.Run("istioctl reads it", func(t *testing.T) {
		ic := m.open(m.client.NS, m.server.V4())
		defer ic.Close()
		out := istioctlAll(t, m.World, m.ctx, m.N1)
		for command, row := range map[string]string{
			"workload":    `(?m)^default +server +10\.91\.2\.2,fd91:0:0:2::2 +n2 +None +HBONE$`,
			"service":     `(?m)^default +server +10\.92\.0\.1 +None +1/1$`,
			"certificate": `(?m)^spiffe://cluster\.local/ns/default/sa/client +Leaf +Available +true `,
			"connections": `(?m)^client\.default +Outbound +client\.default:\d+ +server\.default:15008 +server\.default:9000 +HBONE$`,
		} {
			match(t, command, out[command], row)
			match(t, "all", out["all"], row)
		}
	})
}

// checkCertificates: every node has certificates for the identities of its own pods, and they come from Istio's CA.
func checkCertificates(t *testing.T, m *mesh) {
	istio := certificate(t, base64.StdEncoding.EncodeToString(m.Root()))
	roots := x509.NewCertPool()
	roots.AddCert(istio)
	want := map[*lab.Node][]string{m.N1: {"client", "other"}, m.N2: {"server"}}
	for n, accounts := range want {
		have := map[string]int{}
		certs := m.dump(n).Certificates
		for i, c := range certs {
			have[c.Identity] = i
		}
		for _, a := range accounts {
			id := "spiffe://cluster.local/ns/default/sa/" + a
			i, ok := have[id]
			if !ok || certs[i].State != "Available" || len(certs[i].CertChain) != 1 || len(certs[i].RootCerts) != 1 {
				t.Errorf("%s has no certificate for %s: %v", n.Name, id, certs)
				continue
			}
			delete(have, id)
			if root := certificate(t, certs[i].RootCerts[0].PEM); !root.Equal(istio) {
				t.Errorf("%s: the root of %s is %v, not Istio's", n.Name, id, root.Subject)
			}
			leaf := certificate(t, certs[i].CertChain[0].PEM)
			if _, err :=
				leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err !=
				nil {
				t.Errorf("%s: %s: %v", n.Name, id, err)
			}
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != id {
				t.Errorf("%s: the certificate of %s is for %v", n.Name, id, leaf.URIs)
			}
		}
		for id := range have {
			if id != "spiffe://cluster.local/ns/istio-system/sa/ztunnel" { // its own
				t.Errorf("%s has a certificate for %s, of which it has no pod", n.Name, id)
			}
		}
	}
}

// TestPolicies: AuthorizationPolicy and PeerAuthentication are enforced on new and on live connections, as created,
// as changed, and as deleted.
func TestPolicies(t *testing.T) {
	m := newMesh(t)
	const client, other = "cluster.local/ns/default/sa/client", "cluster.local/ns/default/sa/other"
	server := m.server.V4()
	m.reaches("other", m.other.NS, server, 9000)
	m.reaches("outside", m.outside.NS, server, 9000)

	t.Run("deny, changed, deleted", func(t *testing.T) {
		a, b, c := m.open(m.client.NS, server), m.open(m.other.NS, server), m.open(m.outside.NS, server)
		m.Apply(denyYAML("default", "deny", "server", client))
		m.cut("client", a)
		m.refused("client", m.client.NS, server, 9000)
		m.refused("client", m.client.NS, serverVIP, 80)
		m.reaches("other", m.other.NS, server, 9000)
		must(t, b.Check())
		must(t, c.Check())
		m.Apply(denyYAML("default", "deny", "server", other))
		m.cut("other", b)
		m.refused("other", m.other.NS, server, 9000)
		m.reaches("client", m.client.NS, server, 9000)
		m.knows("default/deny")
		fakeistiod.Delete(m.Cluster, &securityv1.AuthorizationPolicy{}, "default", "deny")
		m.reaches("other", m.other.NS, server, 9000)
		m.knows("-default/deny")
		must(t, c.Check())
	})
	t.Run("allow", func(t *testing.T) {
		a, b, c := m.open(m.client.NS, server), m.open(m.other.NS, server), m.open(m.outside.NS, server)
		m.Apply(allowYAML("default", "allow", "server", client))
		m.cut("other", b)
		m.cut("outside", c)
		m.refused("other", m.other.NS, server, 9000)
		m.refused("outside", m.outside.NS, server, 9000)
		m.reaches("client", m.client.NS, server, 9000)
		must(t, a.Check())
		m.reaches("other", m.other.NS, m.client.V4(), 9000) // it selects the server alone
		fakeistiod.Delete(m.Cluster, &securityv1.AuthorizationPolicy{}, "default", "allow")
		m.reaches("other", m.other.NS, server, 9000)
		m.reaches("outside", m.outside.NS, server, 9000)
	})
	for name, scope := range map[string][2]string{"STRICT in the mesh": {"istio-system", ""},
		"STRICT in the namespace": {"default", ""}, "STRICT for the pod": {"default", "server"}} {
		t.Run(name, func(t *testing.T) {
			a, c := m.open(m.client.NS, server), m.open(m.outside.NS, server)
			m.Apply(strictYAML(scope[0], scope[1]))
			m.cut("outside", c)
			m.refused("outside", m.outside.NS, server, 9000)
			m.reaches("client", m.client.NS, server, 9000)
			must(t, a.Check())
			object := "default"
			if scope[1] != "" {
				object = scope[1]
				m.reaches("outside", m.outside.NS, m.client.V4(), 9000)
			}
			fakeistiod.Delete(m.Cluster, &securityv1.PeerAuthentication{}, scope[0], object)
			m.reaches("outside", m.outside.NS, server, 9000)
			must(t, a.Check())
		})
	}
}

// TestDisconnected: what is removed and made while there is no control plane is learnt when it is back (checklist 25,
// 32); until then the last state holds.
func TestDisconnected(t *testing.T) {
	m := newMesh(t)
	late := m.pod(m.N2, "late")
	must(t, m.Attach(m.ctx, late))
	m.reaches("client", m.client.NS, late.V4(), 9000)
	m.Apply(denyYAML("default", "deny", "server", "cluster.local/ns/default/sa/other"))
	m.refused("other", m.other.NS, m.server.V4(), 9000)
	m.knows("Kubernetes//Pod/default/late", "default/deny", "server(1)")
	held := m.open(m.client.NS, m.server.V4())

	m.istiod.Kill()
	fakeistiod.Delete(m.Cluster, &securityv1.AuthorizationPolicy{}, "default", "deny")
	fakeistiod.Delete(m.Cluster, &corev1.Pod{}, "default", "late")
	fakeistiod.Delete(m.Cluster, &corev1.Service{}, "default", "server")
	m.Apply(serviceYAML("default", "client", "10.92.0.9"))
	m.Apply(strictYAML("default", ""))
	time.Sleep(500 * time.Millisecond) // nothing that could arrive
	m.knows("Kubernetes//Pod/default/late", "default/deny", "server(1)")
	m.reaches("client", m.client.NS, m.server.V4(), 9000)
	m.reaches("client", m.client.NS, serverVIP, 80)
	m.refused("other", m.other.NS, m.server.V4(), 9000)
	must(t, held.Check())
	for _, n := range m.Nodes() {
		must(t, n.Daemon.WaitReady(m.ctx, time.Second)) // readiness is about the node, not about istiod
		metrics, err := n.Daemon.Metrics(m.ctx)
		must(t, err)
		if metrics.Sum("istio_xds_connection_terminations_total") < 1 {
			t.Errorf("%s: no termination is counted", n.Name)
		}
	}

	m.startIstiod()
	m.knows("-Kubernetes//Pod/default/late", "-default/deny", "-server(1)", "client(1)")
	m.reaches("other", m.other.NS, m.server.V4(), 9000)
	m.refused("outside", m.outside.NS, m.server.V4(), 9000)
	m.reaches("server", m.server.NS, netip.MustParseAddr("10.92.0.9"), 80)
	must(t, held.Check())
}

// TestKilledUnderTraffic: the control plane dies and comes back, several times and in several ways, and no connection
// notices.
func TestKilledUnderTraffic(t *testing.T) {
	m := newMesh(t)
	held, plain := m.open(m.client.NS, m.server.V4()), m.open(m.outside.NS, m.server.V4())
	ctx, stop := context.WithCancel(m.ctx)
	var made, failed atomic.Int64
	var first atomic.Value
	var wg sync.WaitGroup
	for _, ip := range []netip.Addr{m.server.V4(), m.server.V6(), serverVIP} {
		wg.Go(func() {
			port := uint16(9000)
			if ip == serverVIP {
				port = 80
			}
			for ctx.Err() == nil {
				if err := m.ask(m.client.NS, ip, port); err != nil {
					failed.Add(1)
					first.CompareAndSwap(nil, fmt.Sprintf("%s: %v", ip, err))
				}
				made.Add(1)
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	t.Cleanup(func() { stop(); wg.Wait() })
	for round := range 3 {
		m.istiod.Drop() // the network fails
		time.Sleep(200 * time.Millisecond)
		m.istiod.Kill()
		time.Sleep(700 * time.Millisecond)
		m.startIstiod()
		// It is listened to again: a pod that was made for this is known, and reached.
		name := fmt.Sprintf("round%d", round)
		p := m.pod(m.N2, name)
		must(t, m.Attach(m.ctx, p))
		m.reaches("client", m.client.NS, p.V4(), 9000)
		must(t, held.Check())
		must(t, plain.Check())
	}
	stop()
	wg.Wait()
	t.Logf("%d connections made meanwhile", made.Load())
	if n := failed.Load(); n > 0 || made.Load() < 50 {
		t.Errorf("%d of %d new connections failed, the first with %v", n, made.Load(), first.Load())
	}
}

// TestRefusedByIstiod: a node that istiod does not know does not become ready and says why; its token is read again
// at each attempt (checklist 34), so that it goes on by itself once it has a good one.
func TestRefusedByIstiod(t *testing.T) {
	m := prepare(t)
	token := m.Path("token-n1")
	good, err := os.ReadFile(token)
	must(t, err)
	must(t, os.WriteFile(token, []byte("nonsense\n"), 0o600))
	d, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{Env: m.env(m.N1), NoWait: true})
	must(t, err)
	eventually(t, 20*time.Second, func() error {
		if !strings.Contains(d.Log(), "authentication failure") {
			return errors.New("the log does not say that istiod refuses the token")
		}
		return nil
	})
	status, body, err := d.Get(m.ctx, lab.ReadyPort, "/healthz/ready")
	if err != nil || status != 500 || !strings.Contains(body, "state manager") {
		t.Errorf("readiness says %d %q %v, want 500 and the state manager as pending", status, body, err) // checklist 80
	}
	if log := d.Log(); saysReady(log) {
		t.Error("the log says ready and 15021 does not:", log)
	}
	must(t, os.WriteFile(token+".new", good, 0o600))
	must(t, os.Rename(token+".new", token))
	must(t, d.WaitReady(m.ctx, 40*time.Second))
	eventually(t, time.Second, func() error {
		if !saysReady(d.Log()) {
			return errors.New("15021 says ready and the log does not")
		}
		return nil
	})
}

func saysReady(log string) bool {
	for line := range strings.Lines(log) {
		if f := strings.Split(line, "\t"); len(f) > 3 && strings.TrimSpace(f[3]) == "ready" {
			return true
		}
	}
	return false
}

// TestNoCA: a node that has its state and cannot reach the CA is not ready, and says why; with a pod that wants a
// certificate it says that of the pod.
func TestNoCA(t *testing.T) {
	m := prepare(t)
	env := m.env(m.N1)
	env["CA_ADDRESS"] = "https://" + lab.HostPort(m.outside.V4(), 1)
	d, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{Env: env, NoWait: true})
	must(t, err)
	says := func(want string) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			status, body, err := d.Get(m.ctx, lab.ReadyPort, "/healthz/ready?verbose")
			if err != nil || status != 500 || !strings.HasPrefix(body, "not ready, pending: certificates\n") ||
				!strings.Contains(body, want) {
				return fmt.Errorf("readiness says %d %q %v, want 500 and %q", status, body, err, want)
			}
			return nil
		})
	}
	says("connection refused")
	must(t, m.Attach(m.ctx, m.client))
	says("spiffe://cluster.local/ns/default/sa/client: ")
	if saysReady(d.Log()) {
		t.Error("the log says ready and 15021 does not")
	}
}

// TestCertificateRefused: while istiod refuses certificates the daemon says why, the pods that have one go on, and
// one that has none is refused rather than let through in plaintext; it gets its certificate soon after the reason is
// gone. The reason here is a token whose pod is no more.
func TestCertificateRefused(t *testing.T) {
	m := newMesh(t)
	fakeistiod.Delete(m.Cluster, &corev1.Pod{}, "istio-system", "ztunnel-n1")
	late := m.pod(m.N1, "late")
	must(t, m.Attach(m.ctx, late))
	m.knows("Kubernetes//Pod/default/late")
	m.refused("late", late.NS, m.server.V4(), 9000)
	const id = "spiffe://cluster.local/ns/default/sa/late"
	eventually(t, 10*time.Second, func() error {
		if log := m.N1.Daemon.Log(); !strings.Contains(log, "request authenticate failure") {
			return errors.New("the log does not hold what istiod says")
		}
		for _, c := range m.dump(m.N1).Certificates {
			if c.Identity == id && strings.HasPrefix(c.State, "Unavailable: ") &&
				strings.Contains(c.State, "request authenticate failure") {
				return nil
			}
		}
		return fmt.Errorf("/config_dump does not say why there is no certificate for %s", id)
	})
	must(t, m.ask(m.client.NS, m.server.V4(), 9000)) // the others do not notice
	match(t, "certificate", istioctlAll(t, m.World, m.ctx, m.N1)["certificate"],
		`(?m)^`+id+` +NA +Unavailable +false +NA +NA +NA$`)

	m.Apply(ztunnelPod("n1", m.N1.Addr4.String()))
	must(t, os.WriteFile(m.Path("token-n1"), []byte(m.Token("istio-system", "ztunnel", "ztunnel-n1")), 0o600))
	m.reaches("late", late.NS, m.server.V4(), 9000)
	m.reaches("client", m.client.NS, late.V4(), 9000)
}

// checkOutside: connections to addresses that nothing in the mesh has, again and again: at the second istiod used to
// be told to forget a name and nothing else, which it answers with the removal of everything it knows that the node
// has.
func checkOutside(t *testing.T, m *mesh) {
	stranger, err := m.AddHost(m.N2, "stranger")
	must(t, err)
	m.serve(stranger.NS)
	before := m.dump(m.N1)
	lookups := func() float64 {
		metrics, err := m.N1.Daemon.Metrics(m.ctx)
		must(t, err)
		return metrics.Sum("istio_xds_message_total", "url="+addressType)
	}
	must(t, m.ask(m.client.NS, stranger.V4(), 9000))
	n := lookups()
	for range 20 {
		must(t, m.ask(m.client.NS, stranger.V4(), 9000))
	}
	if asked := lookups() - n; asked > 2 {
		t.Errorf("istiod answered %v times for one address", asked)
	}
	time.Sleep(11 * time.Second) // what was said is believed for 10 s
	for range 3 {
		must(t, m.ask(m.client.NS, stranger.V4(), 9000))
		must(t, m.ask(m.client.NS, stranger.V6(), 9000))
	}
	if lookups() == n {
		t.Error("what istiod said of an address is believed for ever")
	}
	after := m.dump(m.N1)
	for _, name := range strings.Fields(before.names()) {
		if !strings.Contains(after.names(), " "+name+" ") {
			t.Errorf("n1 does not know %s any more:%s", name, after.names())
		}
	}
	if len(after.Certificates) < len(before.Certificates) {
		t.Errorf("n1 had %d certificates and has %d", len(before.Certificates), len(after.Certificates))
	}
	m.reaches("client", m.client.NS, m.server.V4(), 9000)
	must(t, m.ask(m.client.NS, serverVIP, 80))
	// What comes after its address was asked for in vain is found when that is not believed any more.
	late := m.pod(m.N2, "came")
	must(t, m.Attach(m.ctx, late))
	m.reaches("client", m.client.NS, late.V4(), 9000)
}

// TestOnDemand: a daemon that asks for addresses as they are needed has the same mesh, and does not know what nobody
// asked for (checklist 21).
func TestOnDemand(t *testing.T) {
	m := prepare(t)
	for i := range 20 {
		m.Apply(podYAML("default", fmt.Sprintf("far%d", i), "far", "n3", fmt.Sprintf("10.91.3.%d", i+1)))
	}
	for _, n := range m.Nodes() {
		env := m.env(n)
		env["XDS_ON_DEMAND"], env["ISTIO_META_DNS_CAPTURE"] = "true", "false"
		_, err := m.StartDaemon(m.ctx, n, lab.DaemonOptions{Env: env})
		must(t, err)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	m.reaches("client", m.client.NS, m.server.V4(), 9000)
	m.reaches("client", m.client.NS, serverVIP, 80)
	m.reaches("client", m.client.NS, m.outside.V4(), 9000)
	metrics, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	if metrics.Sum("istio_tcp_connections_opened_total", "reporter=source", "connection_security_policy=mutual_tls",
		"destination_workload=server") < 2 {
		t.Error("the connections to the server were not HBONE")
	}
	d := m.dump(m.N1)
	if have := d.names(); strings.Contains(have, "/far") || !strings.Contains(have, " Kubernetes//Pod/default/server ") {
		t.Errorf("n1 knows%s", have)
	}
	t.Run("outside the mesh", func(t *testing.T) { checkOutside(t, m) })
	// What was asked for follows its changes, also over a reconnection, and policies are not on demand.
	m.Apply(denyYAML("default", "deny", "server", "cluster.local/ns/default/sa/other"))
	m.refused("other", m.other.NS, m.server.V4(), 9000)
	m.istiod.Kill()
	m.reaches("client", m.client.NS, serverVIP, 80)
	must(t, m.ask(m.client.NS, m.outside.V4(), 9000)) // of which istiod has said that it is not captured
	// What nobody can be asked about may be in the mesh: it is refused, not sent in plaintext.
	late := m.pod(m.N2, "late")
	if err := m.askWithin(8*time.Second, m.client.NS, late.V4(), 9000); err == nil ||
		errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a pod that cannot be looked up: %v, want a refusal", err)
	}
	if log := m.N1.Daemon.Log(); !strings.Contains(log, "failed to look up the destination") {
		t.Error("the log does not say why")
	}
	fakeistiod.Delete(m.Cluster, &corev1.Service{}, "default", "server")
	fakeistiod.Delete(m.Cluster, &securityv1.AuthorizationPolicy{}, "default", "deny")
	m.startIstiod()
	m.reaches("other", m.other.NS, m.server.V4(), 9000)
	eventually(t, 10*time.Second, func() error {
		if have := m.dump(m.N1).names(); strings.Contains(have, " server(") {
			return fmt.Errorf("n1 still knows the deleted service:%s", have)
		}
		return nil
	})
}
