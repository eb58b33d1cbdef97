package ambient

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/test/istio/fakeistiod"
	"ztun/test/lab"
	"ztun/test/load"
)

// A refusal has to be seen within noticed of the change in the API server; on an idle machine it takes some 20 ms.
const noticed = 5 * time.Second

// gone ends an attempt that never gets an answer, and is many times what an answer takes.
const gone = 3 * time.Second

// mesh is two nodes whose daemons have their knowledge and their certificates from Istio: pods client and other on
// n1, server on n2, the uncaptured hosts outside on n2 and istiod on n1, where the control plane listens.
type mesh struct {
	*lab.World
	*fakeistiod.Cluster
	t                     *testing.T
	ctx                   context.Context
	istiod                *fakeistiod.Istiod
	address               string // of istiod, host:port
	client, other, server *lab.Pod
	outside               *lab.Host
}

// serverVIP is the service of the pod server: port 80.
var serverVIP = netip.MustParseAddr("10.92.0.1")

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := prepare(t)
	for _, n := range m.Nodes() {
		_, err := m.StartDaemon(m.ctx, n, lab.DaemonOptions{Env: m.env(n)})
		must(t, err)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	m.reaches("client", m.client.NS, m.server.V4(), 9000)
	return m
}

// prepare is newMesh without daemons.
func prepare(t *testing.T) *mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	m := &mesh{t: t, ctx: ctx, World: lab.ForTest(t, lab.Options{Bin: ztun, Prefix: "zi"}), Cluster: fakeistiod.New(t)}
	host, err := m.AddHost(m.N1, "istiod")
	must(t, err)
	m.outside, err = m.AddHost(m.N2, "outside")
	must(t, err)
	m.address = lab.HostPort(host.V4(), 15012)
	m.Apply(namespaces)
	for _, n := range m.Nodes() {
		m.Apply(ztunnelPod(n.Name, n.Addr4.String()))
		must(t, os.WriteFile(m.Path("token-"+n.Name), []byte(m.Token("istio-system", "ztunnel", "ztunnel-"+n.Name)+"\n"),
			0o600))
	}
	must(t, os.WriteFile(m.Path("root.pem"), m.Root(), 0o644))
	m.Apply(plainPod("default", "outside", "n2", m.outside.V4().String(), m.outside.V6().String()))
	m.client, m.other, m.server = m.pod(m.N1, "client"), m.pod(m.N1, "other"), m.pod(m.N2, "server")
	m.Apply(serviceYAML("default", "server", serverVIP.String()))
	m.serve(m.outside.NS)
	m.startIstiod()
	return m
}

// env is what the daemon of a node has where Istio's chart deploys it.
func (m *mesh) env(n *lab.Node) map[string]string {
	return map[string]string{
		"LOCAL_XDS_PATH": lab.Unset, "LOCAL_CA_DIR": lab.Unset,
		"XDS_ADDRESS": "https://" + m.address, "CA_ADDRESS": "https://" + m.address,
		"XDS_ROOT_CA": m.Path("root.pem"), "CA_ROOT_CA": m.Path("root.pem"), "AUTH_TOKEN": m.Path("token-" + n.Name),
		"POD_NAME": "ztunnel-" + n.Name, "POD_NAMESPACE": "istio-system", "SERVICE_ACCOUNT": "ztunnel",
		"INSTANCE_IP": n.Addr4.String(), "CLUSTER_ID": fakeistiod.ClusterID,
	}
}

// pod makes a pod in its namespace and in the API server, with a server on 9000; a daemon that runs is not told.
func (m *mesh) pod(n *lab.Node, name string) *lab.Pod {
	m.t.Helper()
	p, err := m.AddPod(n, lab.Pod{Name: name})
	must(m.t, err)
	m.Apply(podYAML("default", name, name, n.Name, p.V4().String(), p.V6().String()))
	m.serve(p.NS)
	return p
}

func (m *mesh) startIstiod() {
	m.t.Helper()
	var ln net.Listener
	host, _, err := net.SplitHostPort(m.address)
	must(m.t, err)
	for _, h := range m.Hosts() {
		if h.Name == "istiod" {
			ln, err = h.NS.Listen("tcp4", m.address)
		}
	}
	must(m.t, err)
	m.istiod = m.Cluster.Start(ln, "istiod.istio-system.svc", host)
}

// serve answers on port 9000 of a namespace until the test ends.
func (m *mesh) serve(ns *lab.NS) { serve(m.t, ns) }

func serve(t *testing.T, ns *lab.NS) {
	t.Helper()
	ln, err := ns.Listen("tcp", ":9000")
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = (&load.Server{}).Serve(ctx, ln) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func target(ns *lab.NS, ip netip.Addr, port uint16) load.Target {
	return load.Target{Addr: lab.HostPort(ip, port), Dial: ns.Dial}
}

// ask makes one new connection and has one answer over it.
func (m *mesh) ask(ns *lab.NS, ip netip.Addr, port uint16) error {
	return m.askWithin(gone, ns, ip, port)
}

func (m *mesh) askWithin(limit time.Duration, ns *lab.NS, ip netip.Addr, port uint16) error {
	ctx, cancel := context.WithTimeout(m.ctx, limit)
	defer cancel()
	_, err := load.WhoAmI(ctx, target(ns, ip, port))
	return err
}

// reaches waits until new connections work; who is for the failure's text.
func (m *mesh) reaches(who string, ns *lab.NS, ip netip.Addr, port uint16) {
	m.t.Helper()
	eventually(m.t, 15*time.Second, func() error {
		if err := m.ask(ns, ip, port); err != nil {
			return fmt.Errorf("%s does not reach %s: %w", who, lab.HostPort(ip, port), err)
		}
		return nil
	})
}

// refused waits until new connections do not work any more, and checks that they do not by an answer rather than by
// silence.
func (m *mesh) refused(who string, ns *lab.NS, ip netip.Addr, port uint16) {
	m.t.Helper()
	eventually(m.t, noticed, func() error {
		err := m.ask(ns, ip, port)
		if err == nil {
			return fmt.Errorf("%s still reaches %s", who, lab.HostPort(ip, port))
		}
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("%s is not refused by %s but left waiting: %w", who, lab.HostPort(ip, port), err)
		}
		return nil
	})
}

// open holds connections to port 9000.
func (m *mesh) open(ns *lab.NS, ip netip.Addr) *load.IdleConns {
	m.t.Helper()
	ic, err := load.Idle(m.ctx, target(ns, ip, 9000), 4)
	must(m.t, err)
	m.t.Cleanup(ic.Close)
	return ic
}

// cut waits until all held connections are dead, and tells how long that took.
func (m *mesh) cut(who string, ic *load.IdleConns) {
	m.t.Helper()
	began := time.Now()
	eventually(m.t, noticed, func() error {
		dead := 0
		if err, ok := ic.Check().(interface{ Unwrap() []error }); ok {
			dead = len(err.Unwrap())
		}
		if dead < ic.Len() {
			return fmt.Errorf("of %d connections of %s %d live on", ic.Len(), who, ic.Len()-dead)
		}
		return nil
	})
	m.t.Logf("connections of %s were seen closed within %v", who, time.Since(began).Round(time.Millisecond))
}

// dump is the part of /config_dump that the tests look at.
type dump struct {
	Workloads []struct {
		UID, Name, Protocol, Node string
		WorkloadIPs               []string `json:"workloadIps"`
	}
	Services []struct {
		Name      string
		VIPs      []string `json:"vips"`
		Endpoints map[string]any
	}
	Policies     []struct{ Namespace, Name, Action, Scope string }
	Certificates []struct {
		Identity, State      string
		CertChain, RootCerts []struct{ PEM string }
	}
}

func (m *mesh) dump(n *lab.Node) dump {
	m.t.Helper()
	status, body, err := n.Daemon.Get(m.ctx, lab.AdminPort, "/config_dump")
	must(m.t, err)
	var d dump
	if err := json.Unmarshal([]byte(body), &d); status != 200 || err != nil {
		m.t.Fatalf("/config_dump of %s: %d %v", n.Name, status, err)
	}
	return d
}

// names lists what a node knows: workloads by uid, services by name, policies by namespace and name.
func (d dump) names() string {
	var s []string
	for _, w := range d.Workloads {
		s = append(s, w.UID)
	}
	for _, v := range d.Services {
		s = append(s, fmt.Sprintf("%s(%d)", v.Name, len(v.Endpoints)))
	}
	for _, p := range d.Policies {
		s = append(s, p.Namespace+"/"+p.Name)
	}
	return " " + strings.Join(s, " ") + " "
}

// knows waits until both nodes know all of the names, and none of those that begin with "-".
func (m *mesh) knows(names ...string) {
	m.t.Helper()
	eventually(m.t, 20*time.Second, func() error {
		for _, n := range m.Nodes() {
			have := m.dump(n).names()
			for _, name := range names {
				bare, absent := strings.CutPrefix(name, "-")
				if strings.Contains(have, " "+bare+" ") == absent {
					return fmt.Errorf("%s: want %s in%s", n.Name, name, have)
				}
			}
		}
		return nil
	})
}

// certificate decodes a certificate of a dump: base64 of PEM.
func certificate(t *testing.T, s string) *x509.Certificate {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	must(t, err)
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("no PEM: %q", b)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	return c
}
