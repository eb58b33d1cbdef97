package envoy

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestEastWestGateway: pod c lives on another network, behind Envoy. Pod a's connection goes through two tunnels, one
// inside the other: the outer one ends at Envoy, the inner one, which Envoy cannot read, at c's node.
func TestEastWestGateway(t *testing.T) {
	m := newMesh(t)
	gw := m.gw.V4()
	m.start(m.world(func(w *lab.Workload) {
		switch w.Name {
		case "gw":
			w.Protocol, w.ServiceAccount, w.TrustDomain = "HBONE", "eastwest", "cluster.local"
		case "c":
			w.Network = "remote"
			w.NetworkGateway = &lab.Gateway{Destination: "/" + gw.String(), Port: 15008}
			w.Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9000}}
		}
	}, `
services:
- name: shop
  namespace: default
  hostname: shop.default.svc.cluster.local
  vips: ["/10.96.0.7", "remote/10.96.0.7"]
  ports: {80: 9000}
  subjectAltNames: ["spiffe://cluster.local/ns/default/sa/c"]
  canonical: true
policies:
- name: only-a
  namespace: default
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/default/sa/a]
`), map[*lab.Node]map[string]string{m.N2: {"NETWORK": "remote"}})
	m.echo(m.c.NS, ":9000")
	m.startEnvoy(envoyConfig{Gateway: true, acnt: "eastwest", Listen: gw.String(), Peer: m.c.V4().String(),
		Client: "spiffe://cluster.local/ns/default/sa/a"})

	must(t, m.exchange(m.a.NS, "10.96.0.7:80", 3<<20))
	must(t, m.exchange(m.a.NS, "10.96.0.7:80", 10))

	var seen lab.EnvoyTunnel
	eventually(t, 10*time.Second, func() error {
		all := m.envoy.Tunnels()
		if len(all) == 0 {
			return errors.New("Envoy logged no tunnel")
		}
		seen = all[0]
		return nil
	})
	if seen.Authority != "shop.default.svc.cluster.local:80" {
		t.Errorf("outer CONNECT %s, want the service's name and port", seen.Authority)
	}
	if seen.Peer != "spiffe://cluster.local/ns/default/sa/a" {
		t.Errorf("Envoy saw peer %q", seen.Peer)
	}
	// c's node saw a itself: the policy that admits a alone says so, and so do the lines.
	m.access(m.N2, "direction=\"inbound\"", "src.identity=\"spiffe://cluster.local/ns/default/sa/a\"",
		"dst.workload=\"c\"", "dst.service=\"shop.default.svc.cluster.local\"")
	m.access(m.N1, "direction=\"outbound\"", "dst.service=\"shop.default.svc.cluster.local\"")
	mm, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	if mm.Sum("istio_tcp_connections_opened_total", "reporter=source",
		"destination_service=shop.default.svc.cluster.local", "connection_security_policy=mutual_tls") < 2 {
		t.Errorf("n1 counted no connections to the service:\n%s", grep(mm.Text, "istio_tcp_connections_opened_total"))
	}
}

// TestEastWestGatewayThatCheats: a gateway that passes the inner tunnel to somebody else than the service's workloads
// gets no byte through.
func TestEastWestGatewayThatCheats(t *testing.T) {
	m := newMesh(t)
	gw := m.gw.V4()
	d, err := m.AddPod(m.N2, lab.Pod{Name: "d"}) // has no part in the service
	must(t, err)
	m.start(m.world(func(w *lab.Workload) {
		switch w.Name {
		case "gw":
			w.Protocol, w.ServiceAccount, w.TrustDomain = "HBONE", "eastwest", "cluster.local"
		case "c":
			w.Network = "remote"
			w.NetworkGateway = &lab.Gateway{Destination: "/" + gw.String(), Port: 15008}
			w.Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9000}}
		case "d":
			w.Network = "remote"
		}
	}, `
services:
- {name: shop, namespace: default, hostname: shop.default.svc.cluster.local, vips: ["/10.96.0.7", "remote/10.96.0.7"], ports: {80: 9000}, subjectAltNames: ["spiffe://cluster.local/ns/default/sa/c"]}
`), map[*lab.Node]map[string]string{m.N2: {"NETWORK": "remote"}})
	from := m.echo(d.NS, ":9000")
	m.startEnvoy(envoyConfig{Gateway: true, acnt: "eastwest", Listen: gw.String(), Peer: d.V4().String(),
		Client: "spiffe://cluster.local/ns/default/sa/a"})
	if err := m.exchange(m.a.NS, lab.HostPort(netip.MustParseAddr("10.96.0.7"), 80), 10); err == nil {
		t.Error("a connection to somebody else succeeded")
	}
	select {
	case src := <-from:
		t.Errorf("d was reached from %v", src)
	default:
	}
	m.access(m.N1, "direction=\"outbound\"", "identity verification error")
}
