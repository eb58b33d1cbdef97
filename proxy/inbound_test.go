package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ztun/admin/zlog"
	"ztun/proxy/brief"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// peerOfB is an HBONE client with a's certificate, connected to b from src.
func (w *world) peerOfB(src string) *hbone.ClientConn {
	w.t.Helper()
	view := w.proxies[1].o.Knowledge.View()
	a, b := identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: "a"},
		view.WorkloadByAddr(w.proxies[1].o.Config.NetworkName, addrB)
	cert, err := w.certs.Certificate(context.Background(), a)
	if err != nil {
		w.t.Fatal(err)
	}
	raw, err := w.dialB(netip.MustParseAddrPort(src))
	if err != nil {
		w.t.Fatal(err)
	}
	conn, _, err := hbone.Client(context.Background(), raw, identity.ClientTLS(cert, []identity.ID{b.Identity()},
		identity.Params{}), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	cc, err := hbone.NewClientConn(conn, hbone.Config{})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { cc.Close() })
	return cc
}

// TestInboundAnswers: the sessions of samples/inbound-answers.txt, and checklist 77, 80, 81, 84, 86, 87, 89, 90.
func TestInboundAnswers(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	cc := w.peerOfB("10.91.1.2:4000")
	const baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=b-deploy,service.name=b,service.version=v2,cloud.region=r1,cloud.availability_zone=z1"
	for _, tt := range []struct {
		authority string
		status    int // 0: reset with PROTOCOL_ERROR
		headers   hbone.Request
	}{
		{authority: "10.91.2.2:9000", status: 200},
		{authority: "10.91.2.2:9998", status: 503},
		{authority: "10.91.2.2:7777", status: 401},
		{authority: "10.91.1.2:9000", status: 400},
		{authority: "10.99.9.9:9000", status: 400},
		{authority: "10.96.0.10:80", status: 400},
		{authority: "10.91.2.2:15008", status: 503},
		{authority: "127.0.0.1:9000", status: 400},
		{authority: "b.default.svc.cluster.local:80", status: 200},
		{authority: "10.91.2.2:0", status: 503},
		{authority: "nope.default.svc.cluster.local:80", status: 503},
		{authority: "10.91.2.2", status: 400},
		{authority: ""},
		{authority: "a b c"},
		{authority: "10.91.2.2:9000", status: 200, headers: hbone.Request{Baggage: "=;,;;x", Forwarded: `for="nonsense`,
			Traceparent: "zz"}},
		{authority: "10.91.2.2:9000", status: 200, headers: hbone.Request{Forwarded: `for="10.1.2.3:44"`}},
	} {
		req := tt.headers
		req.Authority = tt.authority
		s, resp, err := cc.Open(t.Context(), &req)
		var reset *hbone.StreamError
		switch {
		case tt.status == 0:
			if !errors.As(err, &reset) || reset.Code != http2.ErrCodeProtocol {
				t.Errorf("%q: %v", tt.authority, err)
			}
		case resp == nil || resp.Status != tt.status || resp.HasBaggage != (tt.status == 200):
			t.Errorf("%q: %+v, %v", tt.authority, resp, err)
		case tt.status == 200:
			if resp.Baggage != baggage {
				t.Errorf("baggage %q", resp.Baggage)
			}
			roundTrip(t, s)
			s.CloseWrite()
			io.Copy(io.Discard, s)
			s.Close()
		}
	}
	w.settle()
	w.stop()
	lines := strings.Join(w.lines(1), "\n")
	for _, want := range []string{"ip mismatch: 10.91.2.2 != 10.91.1.2",
		"no service or workload for hostname: nope.default.svc.cluster.local", "no valid authority pseudo header: 10.91.2.2",
		"connection failed: Connection refused (os error 111)"} {
		if !strings.Contains(lines, `error="`+want+`"`) {
			t.Errorf("not logged: %s", want)
		}
	}
}

// proxied makes b have an application tunnel with PROXY protocol at 15088.
func proxied(s string) string {
	return strings.Replace(s, `  workloadIps: ["10.91.2.2"]`,
		"  workloadIps: [\"10.91.2.2\"]\n  applicationTunnel: {protocol: PROXY, port: 15088}", 1)
}

// TestApplicationTunnel: checklist 100, 101, 103, 104; also any authority is accepted (79).
func TestApplicationTunnel(t *testing.T) {
	const id = "spiffe://cluster.local/ns/default/sa/a"
	header := func(port uint16, dst string) string {
		h := "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00" + string(rune(12+3+len(id))) + string([]byte{10, 91, 1, 2})
		h += string(netip.MustParseAddrPort(dst).Addr().AsSlice()) + string([]byte{byte(port >> 8), byte(port)})
		p := netip.MustParseAddrPort(dst).Port()
		return h + string([]byte{byte(p >> 8), byte(p)}) + "\xd0\x00" + string(rune(len(id))) + id
	}
	for _, local := range []bool{true, false} {
		w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.LocalhostAppTunnel = local })
		w.know.publish(loadView(t, proxied))
		app, client := netip.MustParseAddrPort("127.0.0.1:15088"), netip.MustParseAddr("127.0.0.1")
		if !local {
			app, client = netip.MustParseAddrPort("10.91.2.2:15088"), addrA
		}
		cc := w.peerOfB("10.91.1.2:4000")
		for authority, dst := range map[string]string{
			"10.91.2.2:9000":                 "10.91.2.2:9000",
			"10.99.9.9:1234":                 "10.99.9.9:1234",
			"b.default.svc.cluster.local:80": "10.96.0.10:80",
		} {
			got := make(chan string, 1)
			want := header(4000, dst)
			w.listen(app, func(c net.Conn) {
				b := make([]byte, len(want))
				io.ReadFull(c, b)
				got <- string(b)
				echo(c)
			})
			s, _, err := cc.Open(t.Context(), &hbone.Request{Authority: authority})
			if err != nil {
				t.Fatal(authority, err)
			}
			if h := <-got; h != want {
				t.Errorf("%s: header %q\nwant %q", authority, h, want)
			}
			roundTrip(t, s)
			s.CloseWrite()
			io.Copy(io.Discard, s)
			s.Close()
			w.mu.Lock()
			if c := w.clients[app]; c != client {
				t.Errorf("the application's client is %v", c)
			}
			w.mu.Unlock()
		}
		w.know.publish(loadView(t, func(s string) string {
			return strings.Replace(proxied(s), "destinationPorts: [7777]", "destinationPorts: [15088]", 1)
		}))
		if _, resp, _ := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"}); resp == nil ||
			resp.Status != 401 {
			t.Errorf("policy on the tunnel's port: %+v", resp)
		}
		w.settle()
		w.stop()
		if n := strings.Count(strings.Join(w.lines(1), "\n"), "bytes_sent=4 bytes_recv=4 "); n != 3 {
			t.Errorf("headers are counted as data: %q", w.lines(1))
		}
	}
}

func TestProxyHeader(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("10.0.0.1:258"), netip.MustParseAddrPort("[fd00::1]:772")
	const head = "\r\n\r\n\x00\r\nQUIT\n\x21"
	for _, tt := range []struct {
		src, dst netip.AddrPort
		id, want string
	}{
		{v4, v4, "", head + "\x11\x00\x0c\x0a\x00\x00\x01\x0a\x00\x00\x01\x01\x02\x01\x02"},
		{v6, v6, "x", head + "\x21\x00\x28" + string(v6.Addr().AsSlice()) + string(v6.Addr().AsSlice()) +
			"\x03\x04\x03\x04\xd0\x00\x01x"},
		{v4, v6, "x", head + "\x01\x00\x04\xd0\x00\x01x"},
		{v6, v4, "", head + "\x01\x00\x00"},
	} {
		if got := string(proxyHeader(tt.src, tt.dst, tt.id)); got != tt.want {
			t.Errorf("%v %v %q:\n%q\n%q", tt.src, tt.dst, tt.id, got, tt.want)
		}
	}
}

// TestPeerGivesUp: a peer that resets its stream ends the connect to the application that is under way for it.
func TestPeerGivesUp(t *testing.T) {
	w := newWorld(t)
	dialling, ended := make(chan struct{}), make(chan error, 1)
	w.dialApp = func(ctx context.Context) (Conn, error) {
		close(dialling)
		select {
		case <-ctx.Done():
			ended <- ctx.Err()
		case <-time.After(connectTimeout / 2):
			ended <- nil
		}
		return nil, ctx.Err()
	}
	cc := w.peerOfB("10.91.1.2:4000")
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-dialling; cancel() }()
	if _, _, err := cc.Open(ctx, &hbone.Request{Authority: "10.91.2.2:9000"}); !errors.Is(err, context.Canceled) {
		t.Errorf("open: %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the connect to the application went on")
	}
	w.settle()
	w.stop()
	if l := w.lines(1); len(l) != 1 || !strings.Contains(l[0], "\tinfo\t") {
		t.Errorf("%q", l)
	}
}

// TestApplicationSilent: a connect to the application that ends at its deadline is no peer that has given up.
func TestApplicationSilent(t *testing.T) {
	w := newWorld(t)
	w.dialApp = func(ctx context.Context) (Conn, error) {
		ctx, release := brief.Within(ctx, time.Millisecond) // as dialApp does, with more patience
		defer release()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var answer *hbone.StatusError
	_, _, err := w.peerOfB("10.91.1.2:4000").Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
	if !errors.As(err, &answer) || answer.Status != http.StatusServiceUnavailable {
		t.Errorf("open: %v", err)
	}
	w.settle()
	w.stop()
	if l := w.lines(1); len(l) != 1 || !strings.Contains(l[0], "\terror\t") {
		t.Errorf("%q", l)
	}
}

// TestShutdownCutsRequests: at the deadline a request that still waits for the pod's record is no reason to wait on.
func TestShutdownCutsRequests(t *testing.T) {
	w := newWorld(t)
	cc := w.peerOfB("10.91.1.2:4000")
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "  serviceAccount: b\n", "  serviceAccount: z\n", 1)
	}))
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
	}()
	p := w.proxies[1]
	eventually(t, "the request", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		for s := range p.mesh {
			return s.Streams() == 1
		}
		return false
	})
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	var took time.Duration
	go func() {
		defer close(over)
		<-ctx.Done()
		start := time.Now()
		p.Shutdown(ctx)
		took = time.Since(start)
	}()
	cancel()
	<-over
	if took > workloadWait*3/4 {
		t.Errorf("shutdown took %v", took)
	}
	<-answered
}

// TestPolicyLog: spec 7.3, and the text of strict mTLS (checklist 108).
func TestPolicyLog(t *testing.T) {
	const dryRun = `
- {name: would-deny, namespace: default, scope: Namespace, action: Deny, dryRun: true, rules: [[[{destinationPorts: [9000]}]]]}
- {name: would-allow, namespace: default, scope: Namespace, action: Allow, dryRun: true, rules: [[[{destinationPorts: [1]}]]]}
- {name: istio_converted_static_strict, namespace: istio-system, scope: WorkloadSelector, action: Deny, dryRun: false, rules: [[[{notPrincipals: [!Presence []]}]]]}
`
	for _, info := range []bool{true, false} {
		var out bytes.Buffer
		log := zlog.New(zlog.Options{Writer: &out})
		w := newWorldWith(t, func(_ *world, i int, o *Options) {
			if i == 1 {
				o.Log, o.Config.PolicyInfoLogging = log.Logger("proxy"), info
			}
		})
		w.listen(appB, echo)
		with := func(change func(string) string) {
			w.know.publish(loadView(t, func(s string) string { return change(s) + dryRun }))
		}
		strict := func(s string) string {
			return strings.Replace(s, `  workloadIps: ["10.91.2.2"]`,
				"  workloadIps: [\"10.91.2.2\"]\n  authorizationPolicies: [istio-system/istio_converted_static_strict]", 1)
		}
		cc := w.peerOfB("10.91.1.2:4000")
		open := func(port string) {
			s, _, err := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:" + port,
				Traceparent: "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00"})
			if err == nil {
				s.Close()
			}
		}
		with(strict)
		open("9000")
		open("7777")
		with(func(s string) string {
			return strings.Replace(strict(s), "action: Allow\n  dryRun: false", "action: Allow\n  dryRun: true", 1)
		})
		open("9001")
		with(func(s string) string {
			return strings.Replace(strict(s), "notDestinationPorts: [1]", "destinationPorts: [1]", 1)
		})
		open("9000")
		if _, _, _, err := w.connect(w.proxies[1].ServePassthrough, "10.91.2.1:4444", "10.91.2.2:9000"); err != errRefused {
			t.Errorf("plaintext under strict mTLS: %v", err)
		}
		w.settle()
		w.stop()
		log.Close(context.Background())
		wantTexts(t, w.lineWith(1, "src.addr=10.91.2.1:4444 "),
			`error="connection closed due to policy rejection: explicitly denied by: istio-system/istio_converted_static_strict"`)
		if !info {
			if out.Len() != 0 {
				t.Errorf("logged at info:\n%s", &out)
			}
			continue
		}
		const hbone = "state:proxy{wl=default/b}:inbound{id=0123456789abcdef0123456789abcdef peer=10.91.1.2:4000}\t"
		var want, got []string
		for _, w := range []string{
			`dry-run deny policy match	policy="default/would-deny"`, `allow policy match	policy="default/allow-all"`,
			`deny policy match	policy="default/deny-7777"`,
			`dry-run allow policy match	policy="default/allow-all"`, `no allow policies, allow	`,
			`dry-run deny policy match	policy="default/would-deny"`, `no allow policies matched	`,
		} {
			want = append(want, "info\t"+hbone+w)
		}
		for _, l := range strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n") {
			_, rest, _ := strings.Cut(l, "\t")
			if strings.Contains(rest, "peer=10.91.2.1:4444") {
				if !strings.HasSuffix(rest, `dry-run deny policy match	policy="default/would-deny"`) &&
					!strings.HasSuffix(rest, `}	deny policy match	policy="istio-system/istio_converted_static_strict"`) {
					t.Errorf("plaintext: %s", rest)
				}
				continue
			}
			if strings.HasPrefix(rest, "info\tstate") {
				got = append(got, rest)
			}
		}
		if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
			t.Errorf("got\n%s\nwant\n%s", g, w)
		}
	}
}

// An empty logger is cheap: nothing is made of what is not logged.
func TestPolicyLogOff(t *testing.T) {
	p := New(Options{Info: state.WorkloadInfo{Name: "x"}, Log: slog.New(slog.DiscardHandler)})
	defer p.Close()
	if n := testing.AllocsPerRun(100, func() { p.policyLog(netip.AddrPort{}, "") }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
