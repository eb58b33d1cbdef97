package proxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ztun/admin/xds"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/refusal"
)

// What each side of two networks knows: a, in n1, of b only that it is behind a gateway; b, in n2, nothing of a.
const (
	nearWorld = `
workloads:
- {uid: c1//Pod/default/a, name: a, namespace: default, serviceAccount: a, trustDomain: cluster.local, workloadIps: [10.91.1.2], protocol: HBONE, network: n1, workloadName: a-deploy, workloadType: deployment, canonicalName: a, canonicalRevision: v1, clusterId: c1, locality: {region: r1, zone: z1, subzone: ""}, services: {}}
- {uid: c2//Split/default/b, name: b-far, namespace: default, serviceAccount: b, trustDomain: cluster.local, workloadIps: [], protocol: HBONE, network: n2, networkGateway: {destination: n2/10.99.0.1, hboneMtlsPort: 15009}, services: {default/b.svc: {}, default/nosans.svc: {}}}
- {uid: c2//Pod/gw/gateway, name: gateway-pod, namespace: gw, serviceAccount: gateway, trustDomain: cluster.local, workloadIps: [10.99.0.1], protocol: HBONE, network: n2, workloadName: gateway, canonicalName: gateway, clusterId: c2, services: {}}
services:
- {name: b, namespace: default, hostname: b.svc, vips: [n1/10.96.0.10], ports: {80: 9000, 81: 9998, 82: 7777}, subjectAltNames: [spiffe://cluster.local/ns/default/sa/b]}
- {name: nosans, namespace: default, hostname: nosans.svc, vips: [n1/10.96.0.11], ports: {80: 9000}}
`
	farWorld = `
workloads:
- {uid: c2//Pod/default/b, name: b, namespace: default, serviceAccount: b, trustDomain: cluster.local, workloadIps: [10.91.2.2], protocol: HBONE, network: n2, workloadName: b-deploy, workloadType: deployment, canonicalName: b, canonicalRevision: v2, clusterId: c2, locality: {region: r2, zone: z2, subzone: ""}, services: {default/b.svc: {}}}
- {uid: c2//Pod/gw/gateway, name: gateway-pod, namespace: gw, serviceAccount: gateway, trustDomain: cluster.local, workloadIps: [10.99.0.1], protocol: HBONE, network: n2, workloadName: gateway, canonicalName: gateway, clusterId: c2, services: {}}
services:
- {name: b, namespace: default, hostname: b.svc, vips: [n2/10.96.0.10], ports: {80: 9000, 81: 9998, 82: 7777}, subjectAltNames: [spiffe://cluster.local/ns/default/sa/b]}
policies:
- name: deny-7777
  namespace: default
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - destinationPorts: [7777]
`
)

func parseWorld(t *testing.T, text string) *fakeKnowledge {
	t.Helper()
	l, err := xds.ParseLocal([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return &fakeKnowledge{view: l.View(""), changed: make(chan struct{})}
}

// gateway is an east-west gateway: it ends the outer tunnel and passes on the bytes of the inner one.
type gateway struct {
	w        *world
	as       identity.ID
	status   atomic.Int32 // what it refuses with; 0: nothing
	accepted atomic.Int32

	mu       sync.Mutex
	requests []hbone.Request
	work     sync.WaitGroup
}

var gatewayAddr = netip.MustParseAddrPort("10.99.0.1:15009")

// newDoubleWorld is a world of two networks with a gateway between them.
func newDoubleWorld(t *testing.T, change func(i int, o *Options)) (*world, *gateway) {
	id, err := identity.Parse("spiffe://cluster.local/ns/gw/sa/gateway")
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{as: id}
	w := newWorldWith(t, func(w *world, i int, o *Options) {
		o.Knowledge = parseWorld(t, [...]string{nearWorld, farWorld}[i])
		o.Config.NetworkName = [...]string{"n1", "n2"}[i]
		if change != nil {
			change(i, o)
		}
		g.w = w
	})
	w.dialMesh = func(dst netip.AddrPort) (net.Conn, error) {
		if dst != gatewayAddr {
			t.Errorf("mesh connection to %v", dst)
			return nil, syscall.EHOSTUNREACH
		}
		here, there := tcpPair(t)
		g.work.Go(func() { g.serve(there) })
		return here, nil
	}
	t.Cleanup(func() { w.stop(); g.work.Wait() })
	return w, g
}

func (g *gateway) serve(raw net.Conn) {
	defer raw.Close()
	g.accepted.Add(1)
	cert, err := g.w.certs.Certificate(context.Background(), g.as)
	if err != nil {
		g.w.t.Error(err)
		return
	}
	conn, cs, err := hbone.Server(context.Background(), raw, identity.ServerTLS(cert, identity.Params{}), nil)
	if err != nil {
		return // the client did not like who we are
	}
	if peer, _ := identity.PeerID(cs); peer.String() != "spiffe://cluster.local/ns/default/sa/a" {
		g.w.t.Errorf("the outer tunnel is %v's", peer)
	}
	hbone.NewServerConn(conn, hbone.Config{}, g.stream).Serve(context.Background())
}

func (g *gateway) stream(s *hbone.ServerStream) {
	_, network := s.ForwardedNetwork()
	g.mu.Lock()
	g.requests = append(g.requests, hbone.Request{Authority: s.Authority(), Baggage: strings.Join(s.Baggage(), "|"),
		Forwarded: s.Forwarded(), Traceparent: s.Traceparent(), SendForwardedNetwork: network})
	g.mu.Unlock()
	if status := g.status.Load(); status != 0 {
		s.Refuse(int(status))
		return
	}
	up, err := g.w.dialB(netip.AddrPortFrom(gatewayAddr.Addr(), 4711))
	if err != nil {
		g.w.t.Error(err)
		s.Refuse(503)
		return
	}
	defer up.Close()
	down, err := s.Accept(&hbone.Response{Status: 200})
	if err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { io.Copy(up, down); up.(*net.TCPConn).CloseWrite() })
	both.Go(func() { io.Copy(down, up); down.CloseWrite() })
	both.Wait()
}

// TestDoubleHBONE: checklist 41, 42, 44, 53 (by contrast), 96, and the observability of both reporters.
func TestDoubleHBONE(t *testing.T) {
	w, g := newDoubleWorld(t, nil)
	w.listen(appB, func(c net.Conn) {
		h := sha256.New()
		io.Copy(h, c)
		c.Write(h.Sum(nil))
	})
	data := bytes.Repeat([]byte("0123456789abcdef"), 300_000) // more than a stream's window
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80")
			if err != nil {
				t.Error(i, err)
				return
			}
			defer app.Close()
			app.Write(data)
			app.CloseWrite()
			got, err := io.ReadAll(app)
			if want := sha256.Sum256(data); err != nil || !bytes.Equal(got, want[:]) {
				t.Errorf("%d: answer of %d bytes, %v", i, len(got), err)
			}
			<-done
		})
	}
	wg.Wait()
	w.settle()
	eventually(t, "the end of the inner tunnels", func() bool { return w.tunnels.Load() == 0 })
	if n := g.accepted.Load(); n != 1 {
		t.Errorf("%d outer tunnels, want 1", n)
	}
	for _, r := range g.requests {
		if r.Authority != "b.svc:80" || r.SendForwardedNetwork || r.Forwarded != `for="10.91.1.2:20410";host=b.svc` ||
			len(r.Traceparent) != 55 ||
			r.Baggage !=
				"k8s.cluster.name=c1,k8s.namespace.name=default,k8s.deployment.name=a-deploy,service.name=a,service.version=v1,cloud.region=r1,cloud.availability_zone=z1" {
			t.Errorf("outer request %+v", r)
		}
	}
	w.stop()

	const a = `src.addr=10.91.1.2:PORT src.workload="a" src.namespace="default" src.identity="spiffe://cluster.local/ns/default/sa/a" src.cluster="c1" ` +
		`dst.addr=10.99.0.1:15009 dst.hbone_addr=b.svc:80 dst.service="b.svc" dst.workload="b-deploy" dst.namespace="default" dst.identity="spiffe://cluster.local/ns/default/sa/b" dst.cluster="c2" direction="outbound" bytes_sent=4800000 bytes_recv=32`
	// The source is of another network: what it says of itself names it, and its certificate.
	const b = `src.addr=10.99.0.1:PORT src.workload="a" src.namespace="default" src.identity="spiffe://cluster.local/ns/default/sa/a" src.cluster="c1" ` +
		`dst.addr=10.91.2.2:15008 dst.hbone_addr=b.svc:80 dst.service="b.svc" dst.workload="b" dst.namespace="default" dst.identity="spiffe://cluster.local/ns/default/sa/b" dst.cluster="c2" direction="inbound" bytes_sent=32 bytes_recv=4800000`
	for i, want := range []string{a, b} {
		lines := w.lines(i)
		for _, l := range lines {
			if !strings.Contains(stable(l), "\tinfo\taccess\tconnection complete\t"+want) {
				t.Errorf("got\n%s\nwant\n%s", stable(l), want)
			}
		}
		if len(lines) != 2 {
			t.Errorf("%d lines", len(lines))
		}
	}
	for i, want := range []string{
		`{reporter="source",source_workload="a-deploy",source_canonical_service="a",source_canonical_revision="v1",source_workload_namespace="default",source_principal="spiffe://cluster.local/ns/default/sa/a",source_app="a",source_version="v1",source_cluster="c1",` +
			`destination_service="b.svc",destination_service_namespace="default",destination_service_name="b",destination_workload="b-deploy",destination_canonical_service="b",destination_canonical_revision="v2",destination_workload_namespace="default",destination_principal="spiffe://cluster.local/ns/default/sa/b",destination_app="b-deploy",destination_version="v2",destination_cluster="c2",` +
			`request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls",source_region="r1",source_zone="z1",destination_region="r2",destination_zone="z2"}`,
		`{reporter="destination",source_workload="a-deploy",source_canonical_service="a",source_canonical_revision="v1",source_workload_namespace="default",source_principal="spiffe://cluster.local/ns/default/sa/a",source_app="a-deploy",source_version="v1",source_cluster="c1",` +
			`destination_service="b.svc",destination_service_namespace="default",destination_service_name="b",destination_workload="b-deploy",destination_canonical_service="b",destination_canonical_revision="v2",destination_workload_namespace="default",destination_principal="spiffe://cluster.local/ns/default/sa/b",destination_app="b",destination_version="v2",destination_cluster="c2",` +
			`request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls",source_region="r1",source_zone="z1",destination_region="r2",destination_zone="z2"}`,
	} {
		got := gather(t, w.metrics[i])
		for name, value := range map[string]string{"opened_total": "2", "closed_total": "2"} {
			if v := got["istio_tcp_connections_"+name+want]; v != value {
				t.Errorf("%s is %q; have %v", name, v, got)
			}
		}
	}
}

// TestDoubleHBONERefused: every way in which it can fail is told before the application's SYN is answered.
func TestDoubleHBONERefused(t *testing.T) {
	w, g := newDoubleWorld(t, nil)
	sayNo := func(status int32) func() { return func() { g.status.Store(status) } }
	other, _ := identity.Parse("spiffe://cluster.local/ns/gw/sa/impostor")
	for _, tt := range []struct {
		name, dst, text, workload string
		prepare                   func()
	}{
		{"the application's port is closed", "10.96.0.10:81", "http status: 503 Service Unavailable", "gateway-pod",
			func() {}},
		{"policy denies", "10.96.0.10:82", "http status: 401 Unauthorized", "gateway-pod", func() {}},
		{"checklist 43: a service without identities", "10.96.0.11:80",
			"io error: identity verification error: peer did not present the expected SAN (), got " +
				"spiffe://cluster.local/ns/default/sa/b", "gateway-pod", func() {}},
		{"the gateway refuses", "10.96.0.10:80", "http status: 503 Service Unavailable", "gateway-pod", sayNo(503)},
		{"the gateway is somebody else", "10.96.0.10:80",
			"io error: identity verification error: peer did not present the expected SAN " +
				"(spiffe://cluster.local/ns/gw/sa/gateway), got spiffe://cluster.local/ns/gw/sa/impostor", "gateway-pod", func() {
				g.status.Store(0)
				g.as = other
				for _, p := range w.proxies { // no tunnel to the true one any more
					p.pool.Shutdown(t.Context())
					p.pool = hbone.NewPool(hbone.PoolOptions{Dial: p.dialTunnel})
				}
			}},
	} {
		tt.prepare()
		_, r, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, tt.dst)
		if err != errRefused || r != refusal.Reset {
			t.Errorf("%s: %v, %d", tt.name, err, r)
		}
		w.settle()
		l := w.lines(0)
		last := l[len(l)-1]
		if !strings.Contains(last, `error="`+tt.text+`"`) || !strings.Contains(last, `dst.workload="`+tt.workload+`"`) ||
			!strings.Contains(last, "\terror\t") {
			t.Errorf("%s:\n%s\nwant %s", tt.name, last, tt.text)
		}
	}
	w.stop()
	flagged := 0
	for k, v := range gather(t, w.metrics[0]) {
		if strings.HasPrefix(k, "istio_tcp_connections_failed_total") && strings.Contains(k, `response_flags="CONNECT"`) &&
			v == "4" {
			flagged++
		}
	}
	if flagged != 1 { // the service without identities has a series of its own
		t.Errorf("%v", gather(t, w.metrics[0]))
	}
}

// TestDoubleHBONEWithoutBaggage: a far end that says nothing of itself is known by its certificate only.
func TestDoubleHBONEWithoutBaggage(t *testing.T) {
	w, _ := newDoubleWorld(t, func(_ int, o *Options) { o.Config.ResponseBaggage = false })
	w.listen(appB, echo)
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, app)
	app.Close()
	<-done
	w.settle()
	w.stop()
	want :=
		`dst.hbone_addr=b.svc:80 dst.service="b.svc" dst.identity="spiffe://cluster.local/ns/default/sa/b" direction="outbound"`
	if l := w.lines(0); len(l) != 1 || !strings.Contains(l[0], want) {
		t.Errorf("%q", l)
	}
}

// TestDoubleHBONEReset: a reset is carried through both tunnels, both ways, and a cut does not hang.
func TestDoubleHBONEReset(t *testing.T) {
	w, _ := newDoubleWorld(t, nil)
	got := make(chan error, 1)
	w.listen(appB, func(c net.Conn) {
		io.ReadFull(c, make([]byte, 4))
		io.WriteString(c, "pong")
		_, err := c.Read(make([]byte, 1))
		got <- err
	})
	open := func() (*net.TCPConn, <-chan struct{}) {
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80")
		if err != nil {
			t.Fatal(err)
		}
		app.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(app, "ping")
		if _, err := io.ReadFull(app, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		return app, done
	}
	app, done := open()
	app.SetLinger(0)
	app.Close()
	<-done
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the far application read %v, want a reset", err)
	}
	arrived := make(chan struct{})
	w.listen(appB, func(c net.Conn) {
		io.ReadFull(c, make([]byte, 4))
		io.WriteString(c, "pong")
		<-arrived // a reset overtakes what it finds unsent
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	})
	app, done = open()
	close(arrived)
	if _, err := app.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application read %v, want a reset", err)
	}
	app.Close()
	<-done
	w.settle()

	w.listen(appB, func(c net.Conn) { io.ReadFull(c, make([]byte, 4)); io.WriteString(c, "pong"); io.Copy(io.Discard, c) })
	app, _ = open()
	w.proxies[0].Close() // with the connection open
	app.Close()
}

// TestDoubleHBONEOnDemand: with on-demand look-ups, the gateway of a workload in another network is asked for, too.
func TestDoubleHBONEOnDemand(t *testing.T) {
	cut := func(text, uid string) string {
		var keep []string
		for _, l := range strings.Split(text, "\n") {
			if !strings.Contains(l, uid) {
				keep = append(keep, l)
			}
		}
		return strings.Join(keep, "\n")
	}
	var asked []string
	know := parseWorld(t, cut(nearWorld, "c2//Pod/gw/gateway"))
	w, _ := newDoubleWorld(t, func(i int, o *Options) {
		if i == 0 {
			o.Knowledge = know
			o.Log = slog.New(slog.DiscardHandler)
			o.Demand = func(_ context.Context, key string) error {
				asked = append(asked, key)
				know.publish(parseWorld(t, nearWorld).View())
				return nil
			}
		}
	})
	w.listen(appB, echo)
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, app)
	app.Close()
	<-done
	if strings.Join(asked, " ") != "n2/10.99.0.1" {
		t.Errorf("asked for %q", asked)
	}
}
