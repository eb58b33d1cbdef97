package envoy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"ztun/test/lab"
)

// world is the usual workload file, changed, with services and policies added.
func (m *mesh) world(change func(w *lab.Workload), services string) string {
	m.t.Helper()
	f := m.DefaultWorld()
	for i := range f.Workloads {
		change(&f.Workloads[i])
	}
	b, err := yaml.Marshal(f)
	must(m.t, err)
	return string(b) + services
}

// TestWaypoint: pod a calls a service whose waypoint is Envoy; Envoy calls pod c. Every hop is HBONE with its own
// identity.
func TestWaypoint(t *testing.T) {
	for _, v4 := range []bool{true, false} {
		t.Run(map[bool]string{true: "v4", false: "v6"}[v4], func(t *testing.T) {
			m := newMesh(t)
			pick := func(ips []netip.Addr) netip.Addr {
				for _, ip := range ips {
					if ip.Is4() == v4 {
						return ip
					}
				}
				return netip.Addr{}
			}
			vip := "10.96.0.7"
			if !v4 {
				vip = "fd96::7"
			}
			gw, c := pick(m.gw.IPs), pick(m.c.IPs)
			m.start(m.world(func(w *lab.Workload) {
				switch w.Name {
				case "gw":
					w.Protocol, w.ServiceAccount, w.TrustDomain = "HBONE", "waypoint", "cluster.local"
				case "c":
					w.Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9000}}
				}
			}, fmt.Sprintf(`
services:
- name: shop
  namespace: default
  hostname: shop.default.svc.cluster.local
  vips: ["/%s"]
  ports: {80: 9000}
  canonical: true
  waypoint: {destination: "/%s", hboneMtlsPort: 15008}
policies:
- name: only-waypoint
  namespace: default
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/default/sa/waypoint]
`, vip, gw)), nil)
			m.startEnvoy(envoyConfig{acnt: "waypoint", Listen: gw.String(), Target: lab.HostPort(c, 9000), Peer: c.String(),
				Client: "spiffe://cluster.local/ns/default/sa/a", Server: "spiffe://cluster.local/ns/default/sa/c"})
			// Nobody listens yet: c's node refuses Envoy's CONNECT and says why (x-ztun-reason), which Envoy does not mind.
			if err := m.exchange(m.a.NS, lab.HostPort(netip.MustParseAddr(vip), 80), 10); err == nil {
				t.Error("a reached what does not listen yet")
			}
			m.access(m.N2, "direction=\"inbound\"", "src.identity=\"spiffe://cluster.local/ns/default/sa/waypoint\"",
				"Connection refused (os error 111)")
			from := m.echo(m.c.NS, ":9000")
			must(t, m.exchange(m.a.NS, lab.HostPort(netip.MustParseAddr(vip), 80), 3<<20))
			if src := (<-from).Addr().Unmap(); src != gw {
				t.Errorf("c saw %v, want the waypoint %v: what Envoy called it with", src, gw)
			}
			// The policy admits the waypoint alone: a straight call to c is refused.
			if err := m.exchange(m.a.NS, lab.HostPort(c, 9000), 10); err == nil {
				t.Error("a reached c past its waypoint")
			}
			var seen lab.EnvoyTunnel
			eventually(t, 10*time.Second, func() error {
				all := m.envoy.Tunnels()
				if len(all) == 0 {
					return errors.New("Envoy logged no tunnel")
				}
				seen = all[0]
				return nil
			})
			if want := lab.HostPort(netip.MustParseAddr(vip), 80); seen.Authority != want {
				t.Errorf("CONNECT %s, want the service's address %s", seen.Authority, want)
			}
			if seen.Peer != "spiffe://cluster.local/ns/default/sa/a" {
				t.Errorf("Envoy saw peer %q", seen.Peer)
			}
			for _, want := range []string{"k8s.namespace.name=default", "service.name=a"} {
				if !strings.Contains(seen.Baggage, want) {
					t.Errorf("baggage %q lacks %s", seen.Baggage, want)
				}
			}
			if !strings.Contains(seen.Forwarded, pick(m.a.IPs).String()) {
				t.Errorf("forwarded %q does not name the client", seen.Forwarded)
			}
			// Both reporters: the client's node names the waypoint as what it reached, and the service.
			m.access(m.N1, "direction=\"outbound\"", "dst.service=\"shop.default.svc.cluster.local\"",
				"dst.identity=\"spiffe://cluster.local/ns/default/sa/waypoint\"", "dst.workload=\"gw\"")
			m.access(m.N2, "direction=\"inbound\"", "src.identity=\"spiffe://cluster.local/ns/default/sa/waypoint\"",
				"dst.workload=\"c\"")
			for _, n := range m.Nodes() {
				mm, err := n.Daemon.Metrics(m.ctx)
				must(t, err)
				if mm.Sum("istio_tcp_connections_opened_total",
					"reporter="+map[bool]string{true: "source", false: "destination"}[n == m.N1],
					"connection_security_policy=mutual_tls") < 1 {
					t.Errorf("%s counted no connection", n.Name)
				}
			}
		})
	}
}

// TestWaypointOfAnotherIdentity: who answers at the waypoint's address has to be the waypoint.
func TestWaypointOfAnotherIdentity(t *testing.T) {
	m := newMesh(t)
	gw := m.gw.V4()
	m.start(m.world(func(w *lab.Workload) {
		if w.Name == "gw" {
			w.Protocol, w.ServiceAccount, w.TrustDomain = "HBONE", "waypoint", "cluster.local"
		}
		if w.Name == "c" {
			w.Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9000}}
		}
	}, fmt.Sprintf(`
services:
- {name: shop, namespace: default, hostname: shop.default.svc.cluster.local, vips: ["/10.96.0.7"], ports: {80: 9000}, waypoint: {destination: "/%s", hboneMtlsPort: 15008}}
`, gw)), nil)
	from := m.echo(m.c.NS, ":9000")
	m.startEnvoy(envoyConfig{acnt: "impostor", Listen: gw.String(), Target: lab.HostPort(m.c.V4(), 9000),
		Peer:   m.c.V4().String(),
		Client: "spiffe://cluster.local/ns/default/sa/a", Server: "spiffe://cluster.local/ns/default/sa/c"})
	if err := m.exchange(m.a.NS, "10.96.0.7:80", 10); err == nil {
		t.Error("a connection to an impostor succeeded")
	}
	select {
	case src := <-from:
		t.Errorf("c was reached from %v", src)
	default:
	}
	m.access(m.N1, "direction=\"outbound\"", "identity verification error")
}

// access wants an access line of a node that holds all texts.
func (m *mesh) access(n *lab.Node, texts ...string) {
	m.t.Helper()
	eventually(m.t, 10*time.Second, func() error {
	lines:
		for _, line := range strings.Split(n.Daemon.Log(), "\n") {
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
		return fmt.Errorf("%s has no access line with %q; it has\n%s", n.Name, texts, grep(n.Daemon.Log(), "\taccess\t"))
	})
}

func grep(text, want string) string {
	var b strings.Builder
	for _, line := range strings.Split(text, "\n") {
		if strings.Contains(line, want) {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}
