package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// Assertions of the dataplane checklist (test/checklist) that no other test of this package proves. Numbers are its.

// opened connects, exchanges a few bytes and leaves the connection open until the test ends it.
func (w *world) opened(src, dst string) (*net.TCPConn, <-chan struct{}) {
	w.t.Helper()
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, src, dst)
	if err != nil {
		w.t.Fatalf("%s: %v", dst, err)
	}
	roundTrip(w.t, app)
	return app, done
}

// lastLine is the newest access line of pod i, without what differs from run to run.
func (w *world) lastLine(i int) string {
	l := w.lines(i)
	if len(l) == 0 {
		w.t.Fatal("no access line")
	}
	return l[len(l)-1]
}

// lineWith is the one access line of pod i with a text in it. Lines stand in the order in which connections end,
// which is not that in which they began.
func (w *world) lineWith(i int, text string) string {
	w.t.Helper()
	var found []string
	for _, l := range w.lines(i) {
		if strings.Contains(l, text) {
			found = append(found, l)
		}
	}
	if len(found) != 1 {
		w.t.Fatalf("%d access lines hold %q:\n%s", len(found), text, strings.Join(w.lines(i), "\n"))
	}
	return found[0]
}

func wantTexts(t *testing.T, line string, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if !strings.Contains(line, s) {
			t.Errorf("%q is not in\n%s", s, line)
		}
	}
}

// seriesWith are the series that hold all texts, with their values.
func seriesWith(t *testing.T, m *Metrics, texts ...string) (found []string) {
	t.Helper()
next:
	for k, v := range gather(t, m) {
		for _, s := range texts {
			if !strings.Contains(k, s) {
				continue next
			}
		}
		found = append(found, k+" "+v)
	}
	return found
}

// TestMappedAddresses: checklist 5, an IPv4 address in IPv6 clothes is that IPv4 address for routing, policy and log.
func TestMappedAddresses(t *testing.T) {
	w := newWorld(t)
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "destinationPorts: [7777]", "sourceIps: [10.91.66.6/32]", 1)
	}))
	w.listen(appB, echo)
	app, done := w.opened("[::ffff:10.91.1.2]:20410", "[::ffff:10.91.2.2]:9000")
	app.Close()
	<-done
	cc := w.peerOfB("[::ffff:10.91.66.6]:4000")
	if _, resp, _ := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"}); resp == nil || resp.Status != 401 {
		t.Errorf("a policy about the source's address: %+v", resp)
	}
	w.settle()
	w.stop()
	wantTexts(t, w.lineWith(0, "src.addr=10.91.1.2:20410 "), "dst.addr=10.91.2.2:15008 dst.hbone_addr=10.91.2.2:9000 ",
		`dst.workload="b"`)
	wantTexts(t, w.lineWith(1, "src.addr=10.91.66.6:4000 "), "explicitly denied by: default/deny-7777")
}

// timedNetwork tells how long each dial may take.
type timedNetwork struct {
	Network
	note func(what string, ctx context.Context)
}

func (n timedNetwork) DialApp(ctx context.Context, src, dst netip.AddrPort) (Conn, error) {
	n.note("application", ctx)
	return n.Network.DialApp(ctx, src, dst)
}
func (n timedNetwork) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	n.note("mesh", ctx)
	return n.Network.DialMesh(ctx, dst)
}
func (n timedNetwork) DialPlain(ctx context.Context, dst netip.AddrPort) (Conn, error) {
	n.note("plain", ctx)
	return n.Network.DialPlain(ctx, dst)
}

// TestConnectTimeout: checklist 8, every connect has 10 s.
func TestConnectTimeout(t *testing.T) {
	var mu sync.Mutex
	left := map[string]time.Duration{}
	w := newWorldWith(t, func(_ *world, _ int, o *Options) {
		o.Network = timedNetwork{o.Network, func(what string, ctx context.Context) {
			mu.Lock()
			defer mu.Unlock()
			if end, ok := ctx.Deadline(); ok {
				left[what] = time.Until(end)
			}
		}}
	})
	w.listen(appB, echo)
	outside := netip.MustParseAddrPort("192.0.2.1:80")
	w.listen(outside, echo)
	for _, dst := range []string{"10.91.2.2:9000", outside.String()} {
		app, done := w.opened(srcA, dst)
		app.Close()
		<-done
	}
	mu.Lock()
	defer mu.Unlock()
	for _, what := range []string{"application", "mesh", "plain"} {
		if d := left[what]; d > 10*time.Second || d < 5*time.Second { // the machine may be slow
			t.Errorf("%s: %v left at the start, want 10 s", what, d)
		}
	}
}

// TestUnknownLocal: checklist 45, a pod without a record waits 5 s for it; then the connection is refused, warned of
// and not counted. Before anything is known it is not answered: its client asks again, and may be served then.
func TestUnknownLocal(t *testing.T) {
	b := state.NewBuilder("")
	b.InsertWorkload(&state.Workload{UID: "other", Name: "other"})
	unknownLocal(t, b.Build(), refusal.Reset)
	unknownLocal(t, new(state.View), refusal.Silent)
}

func unknownLocal(t *testing.T, view *state.View, want refusal.Way) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		m := NewMetrics()
		p := New(Options{
			Info:      state.WorkloadInfo{Name: "pod", Namespace: "ns", ServiceAccount: "sa"},
			Knowledge: &fakeKnowledge{view: view, changed: make(chan struct{})},
			Metrics:   m, Access: slog.New(slog.NewTextHandler(&log, nil)), Log: slog.New(slog.DiscardHandler),
		})
		defer p.Close()
		start := time.Now()
		f := &fakeFlow{t: t, src: netip.MustParseAddrPort(srcA), dst: appB, decided: make(chan struct{})}
		p.ServeOutbound(f)
		<-f.decided
		if d := time.Since(start); d != 5*time.Second || f.app != nil || f.refusal != want {
			t.Errorf("after %v: accepted %v, answered %v, want %v", d, f.app != nil, f.refusal, want)
		}
		wantTexts(t, log.String(), "level=WARN", `msg="connection failed"`,
			`error="failed to fetch information about local workload: sa.ns (pod)"`)
		if got := gather(t, m); len(got) != 0 {
			t.Errorf("counted: %v", got)
		}
	})
}

// TestResponseBaggage: checklist 53 and 89, an answer without baggage changes no label of a single tunnel.
func TestResponseBaggage(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.ResponseBaggage = false })
	w.listen(appB, echo)
	app, done := w.opened(srcA, "10.91.2.2:9000")
	app.Close()
	<-done
	s, resp, err := w.peerOfB("10.91.1.2:4000").Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
	if err != nil || resp.HasBaggage {
		t.Fatalf("%+v, %v", resp, err)
	}
	s.Close()
	w.settle()
	w.stop()
	wantTexts(t, w.lines(0)[0],
		`dst.workload="b" dst.namespace="default" dst.identity="spiffe://cluster.local/ns/default/sa/b"`)
	if got := seriesWith(t, w.metrics[0], "connections_closed", `destination_workload="b-deploy"`,
		`destination_canonical_revision="v2"`, `destination_zone="z1"`); len(got) != 1 {
		t.Errorf("%v", gather(t, w.metrics[0]))
	}
}

// TestOtherStatus: checklist 54, only 200 is success.
func TestOtherStatus(t *testing.T) {
	w := newWorld(t)
	var work sync.WaitGroup
	t.Cleanup(func() { w.stop(); work.Wait() })
	w.dialMesh = func(netip.AddrPort) (net.Conn, error) {
		here, there := tcpPair(t)
		work.Go(func() {
			defer there.Close()
			cert, err := w.certs.Certificate(context.Background(),
				identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: "b"})
			if err != nil {
				t.Error(err)
				return
			}
			conn, _, err := hbone.Server(context.Background(), there, identity.ServerTLS(cert, identity.Params{}), nil)
			if err != nil {
				t.Error(err)
				return
			}
			hbone.NewServerConn(conn, hbone.Config{}, func(s *hbone.ServerStream) { s.Refuse(204) }).Serve(context.Background())
		})
		return here, nil
	}
	if _, r, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000"); err != errRefused ||
		r != refusal.Reset {
		t.Errorf("%v, %d", err, r)
	}
	w.settle()
	w.stop()
	wantTexts(t, w.lastLine(0), "\terror\t", `error="http status: 204 No Content"`)
	if got := seriesWith(t, w.metrics[0], "connections_failed", `response_flags="CONNECT"`); len(got) != 1 {
		t.Errorf("%v", gather(t, w.metrics[0]))
	}
}

// TestTunnelSharing: checklist 62, 63 and 70, and 78 on the way: b is the waypoint of two services and an endpoint of
// two.
func TestTunnelSharing(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.SOCKS5 = true })
	const x, y = "spiffe://cluster.local/ns/default/sa/x", "spiffe://cluster.local/ns/default/sa/y"
	w.know.publish(loadView(t, func(s string) string {
		return strings.NewReplacer("      81: 9999\n", "      81: 9999\n    \"default/xy.svc\": {80: 9000}\n    \"default/yx.svc\": {80: 9000}\n", "\nservices:\n", `
services:
- {name: one, namespace: default, hostname: one.svc, vips: ["/10.96.1.1"], ports: {80: 80}, waypoint: {destination: "/10.91.2.2", hboneMtlsPort: 15008}}
- {name: two, namespace: default, hostname: two.svc, vips: ["/10.96.1.2"], ports: {80: 80}, waypoint: {destination: "/10.91.2.2", hboneMtlsPort: 15008}}
- {name: xy, namespace: default, hostname: xy.svc, vips: ["/10.96.1.3"], ports: {80: 9000}, subjectAltNames: [`+x+`, `+y+`]}
- {name: yx, namespace: default, hostname: yx.svc, vips: ["/10.96.1.4"], ports: {80: 9000}, subjectAltNames: [`+y+`, `+x+`]}
`).Replace(s)
	}))
	w.listen(appB, echo)
	w.listen(netip.MustParseAddrPort("10.91.2.2:80"), echo)
	dials := func(why string, want uint64) {
		t.Helper()
		if got := w.proxies[0].pool.Stats().Dials; got != want {
			t.Errorf("%s: %d tunnels, want %d", why, got, want)
		}
	}
	var open []*net.TCPConn
	var over []<-chan struct{}
	add := func(app *net.TCPConn, done <-chan struct{}) { open, over = append(open, app), append(over, done) }
	add(w.opened(srcA, "10.96.1.1:80"))
	add(w.opened(srcA, "10.96.1.2:80"))
	dials("62: one waypoint, two services", 1)
	add(w.opened(srcA, "10.96.1.3:80"))
	dials("63: other identities", 2)
	add(w.opened(srcA, "10.96.1.4:80"))
	dials("63: the same in another order", 3)
	app, done := w.socks("\x05\x01\x00\x01\x0a\x60\x01\x01\x00\x50", "\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
	roundTrip(t, app)
	add(app, done)
	dials("70: by SOCKS5", 3)
	for i, app := range open {
		app.Close()
		<-over[i]
	}
}

// TestNoCertificate: checklist 91, a client that shows none is warned of and not counted.
func TestNoCertificate(t *testing.T) {
	w := newWorld(t)
	raw, err := w.dialB(netip.MustParseAddrPort("10.91.1.2:4000"))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(20 * time.Second))
	c := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err = c.Handshake(); err == nil { // TLS 1.3: the refusal comes with the first read
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || !strings.Contains(err.Error(), "certificate required") {
		t.Errorf("%v", err)
	}
	eventually(t, "the end of the connection", func() bool { return w.tunnels.Load() == 0 })
	w.stop()
	wantTexts(t, w.lastLine(1), "\twarn\taccess\tconnection failed\t", "src.addr=10.91.1.2:4000 ",
		`direction="inbound" error="tls handshake error: `)
	if got := gather(t, w.metrics[1]); len(got) != 0 {
		t.Errorf("counted: %v", got)
	}
}

// TestWhoTheSourceIs: checklist 95 to 97, what the record of an address, a foreign network and baggage count for.
func TestWhoTheSourceIs(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.NetworkName = "Net1" })
	w.know.publish(loadView(t, func(s string) string { return strings.ReplaceAll(s, `network: ""`, `network: "Net1"`) }))
	w.listen(appB, echo)
	const a = `src.identity="spiffe://cluster.local/ns/default/sa/a"`
	for _, c := range []struct {
		name, src string
		network   *string
		want      string
	}{
		{"97: the record wins over baggage", "10.91.1.2:4000", nil, `src.workload="a" src.namespace="default" ` + a},
		{"97: the identity is that of the certificate", "10.91.0.2:4000", nil,
			`src.workload="plain" src.namespace="default" ` + a},
		{"95: our network in other letters", "10.91.1.2:4000", new("nET1"), `src.workload="a" src.namespace="default" ` + a},
		{"96: another network", "10.91.1.2:4000", new("net2"), `src.workload="liar" src.namespace="far" ` + a},
	} {
		req := &hbone.Request{Authority: "10.91.2.2:9000",
			Baggage: "k8s.namespace.name=far,k8s.deployment.name=liar,service.name=liar"}
		if c.network != nil {
			req.ForwardedNetwork, req.SendForwardedNetwork = *c.network, true
		}
		s, _, err := w.peerOfB(c.src).Open(t.Context(), req)
		if err != nil {
			t.Fatal(c.name, err)
		}
		roundTrip(t, s)
		s.Close()
		w.settle()
		if l := w.lastLine(1); !strings.Contains(l, c.want) {
			t.Errorf("%s: %s\nwant %s", c.name, l, c.want)
		}
	}
}

// TestCallerAtItsHost: a peer whose record says that it is at a host's address comes from there: it is who the source
// is, and nothing is amiss. Whoever else comes from an address that the mesh knows as another's is told of.
func TestCallerAtItsHost(t *testing.T) {
	const host = `src.workload="plain" src.namespace="default" src.identity="spiffe://cluster.local/ns/default/sa/a"`
	for _, c := range []struct {
		name, announced, account string
		rewritten                uint64
		want                     string
	}{
		{"the peer's own record", "10.91.0.2:15018", "a", 0,
			`src.workload="run" src.namespace="default" src.identity="spiffe://cluster.local/ns/default/sa/a"`},
		{"another's record", "10.91.0.2:15018", "c", 1, host},
		{"its record has another address", "10.91.0.3:15018", "a", 1, host},
	} {
		w := newWorld(t)
		w.know.publish(loadView(t, func(s string) string {
			return strings.Replace(s, "services:\n- name: b", `- {uid: run, name: run, namespace: default, serviceAccount: `+c.account+
				`, trustDomain: cluster.local, workloadIps: ["10.91.66.4"], protocol: HBONE, meshAddresses: ["`+c.announced+
				`"], services: {}}`+"\nservices:\n- name: b", 1)
		}))
		w.listen(appB, echo)
		s, _, err := w.peerOfB("10.91.0.2:4000").Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
		if err != nil {
			t.Fatal(c.name, err)
		}
		roundTrip(t, s)
		s.Close()
		w.settle()
		if l := w.lastLine(1); !strings.Contains(l, c.want) {
			t.Errorf("%s: %s\nwant %s", c.name, l, c.want)
		}
		if got := w.proxies[1].Stats().SourceRewritten; got != c.rewritten { // what is counted is told
			t.Errorf("%s: counted %d, want %d", c.name, got, c.rewritten)
		}
	}
}

// TestPolicyIsInbound: checklist 124, a policy that denies everything denies nothing on the way out.
func TestPolicyIsInbound(t *testing.T) {
	w := newWorld(t)
	w.know.publish(loadView(t, func(s string) string {
		return s + "- {name: all, namespace: default, scope: Namespace, action: Deny, dryRun: false, rules: [[]]}\n"
	}))
	outside := netip.MustParseAddrPort("10.91.0.2:9000")
	w.listen(outside, echo)
	app, done := w.opened(srcA, outside.String())
	w.proxies[0].Recheck()
	roundTrip(t, app)
	app.Close()
	<-done
	if _, _, _, err := w.connect(w.proxies[1].ServePassthrough, "10.91.2.1:4444", "10.91.2.2:9000"); err != errRefused {
		t.Errorf("and inbound: %v", err)
	}
}

// TestStreamResets: checklist 140 and 141. Unlike ztunnel's, CANCEL is an error as INTERNAL_ERROR is: what was cut
// must not look whole. After END_STREAM it is an end.
func TestStreamResets(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	cc := w.peerOfB("10.91.1.2:4000")
	for i, code := range []http2.ErrCode{http2.ErrCodeCancel, http2.ErrCodeInternal, http2.ErrCodeNo,
		http2.ErrCodeCancel} {
		ended := i == 3
		s, _, err := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, s)
		if ended {
			s.CloseWrite()
			if _, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Error(err) // the echo ends when it has read the end
			}
		}
		s.Reset(code)
		w.settle()
		l := w.lastLine(1)
		if strings.Contains(l, "\terror\t") == ended || strings.Contains(l, "error=") == ended {
			t.Errorf("%v, ended %v: %s", code, ended, l)
		}
	}
}

// TestForcedDrain: checklist 145, a connection that is cut at the deadline is closed without a flag, is an error in
// the log and no failure.
func TestForcedDrain(t *testing.T) {
	w := newWorld(t)
	outside := netip.MustParseAddrPort("192.0.2.1:80")
	w.listen(outside, echo)
	app, done := w.opened(srcA, outside.String())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.proxies[0].Shutdown(ctx)
	<-done
	app.Close()
	w.stop()
	wantTexts(t, w.lastLine(0), "\terror\taccess\tconnection complete\t",
		`error="connection closed due to connection drain"`)
	closed, failed := seriesWith(t, w.metrics[0], "connections_closed", `response_flags="-"`),
		seriesWith(t, w.metrics[0], "connections_failed")
	if len(closed) != 1 || !strings.HasSuffix(closed[0], " 1") || len(failed) != 0 {
		t.Errorf("closed %v, failed %v", closed, failed)
	}
}

// TestInnerTunnels: checklist 44, each connection of a double tunnel has an inner one of its own, and all share the
// outer.
func TestInnerTunnels(t *testing.T) {
	w, g := newDoubleWorld(t, nil)
	w.listen(appB, echo)
	a, aDone := w.opened(srcA, "10.96.0.10:80")
	b, bDone := w.opened(srcA, "10.96.0.10:80")
	g.mu.Lock()
	requests := len(g.requests)
	g.mu.Unlock()
	if outer, inner := g.accepted.Load(), w.tunnels.Load(); outer != 1 || inner != 2 || requests != 2 {
		t.Errorf("%d outer tunnels with %d streams, %d inner tunnels; want 1, 2, 2", outer, requests, inner)
	}
	a.Close()
	b.Close()
	<-aDone
	<-bDone
}
