package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestNames: dig, getent and curl by name inside pods, by captured port 53 and by 127.0.0.1:15053, and SOCKS5 by curl.
func TestNames(t *testing.T) {
	needTool(t, "dig")
	needTool(t, "curl")
	m := newMesh(t, meshOptions{noStart: true})
	f := m.DefaultWorld()
	for i := range f.Workloads {
		if f.Workloads[i].Name == "c" {
			f.Workloads[i].Services = map[string]map[uint16]uint16{"default/shop.default.svc.cluster.local": {80: 9100}}
		}
	}
	f.Services = []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local",
		VIPs: []string{"/10.96.0.7", "/fd96::7"}, Ports: map[uint16]uint16{80: 9100}}}
	must(t, m.WriteWorld(f))
	// The pod's nameserver is the host h2, which answers what the mesh does not know.
	upstream := newNameserver(t, m.h2.NS, m.h2.IPs)
	for _, n := range m.Nodes() {
		m.start(n, map[string]string{"UNSTABLE_ENABLE_SOCKS5": "true", "RUST_LOG": "info,dns=debug"})
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	www := m.Path("www")
	must(t, os.Mkdir(www, 0o755))
	must(t, os.WriteFile(www+"/index.html", []byte("by name\n"), 0o644))
	m.background(m.c.NS, "Serving HTTP", "python3", "-u", "-m", "http.server", "9100", "--bind", "::", "--directory", www)
	etc := filepath.Join("/etc/netns", m.a.NS.Name)
	must(t, os.MkdirAll(etc, 0o755))
	t.Cleanup(func() { os.RemoveAll(etc); os.Remove("/etc/netns") })
	must(t,
		os.WriteFile(etc+"/resolv.conf",
			fmt.Appendf(nil, "nameserver %s\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions "+
				"ndots:5\n", m.h2.V4()), 0o644))
	in := func(args ...string) (string, error) { // with the pod's own resolv.conf
		out, err := m.Run(m.ctx, nil, append([]string{"ip", "netns", "exec", m.a.NS.Name}, args...)...)
		return strings.TrimSpace(out), err
	}
	want := func(what, want string, args ...string) {
		t.Helper()
		if got, err := in(args...); err != nil || got != want {
			t.Errorf("%s: %q, want %q (%v)", what, got, want, err)
		}
	}
	for _, server := range []string{"@" + m.h2.V4().String(), "@" + m.h2.V6().String(), "@127.0.0.1 -p 15053",
		"@::1 -p 15053"} {
		for _, tcp := range []string{"+notcp", "+tcp"} {
			dig := append([]string{"dig", tcp, "+time=5", "+tries=1", "+short"}, strings.Fields(server)...)
			want(server+" A", "10.96.0.7", append(dig, "shop.default.svc.cluster.local", "A")...)
			want(server+" AAAA", "fd96::7", append(dig, "SHOP.default", "AAAA")...)
		}
	}
	for _, server := range []string{m.h2.V4().String(), m.h2.V6().String()} {
		for _, tcp := range []string{"+notcp", "+tcp"} {
			want("forwarded to "+server, "192.0.2.77", "dig", tcp, "+time=5", "+tries=1", "+short", "@"+server,
				"elsewhere.example", "A")
		}
	}
	if n := upstream.asked.Load(); n != 4 {
		t.Errorf("the nameserver was asked %d times, want 4: names of the mesh are not its business", n)
	}
	want("getent", "fd96::7         shop.default.svc.cluster.local", "getent", "hosts", "shop")
	want("curl by name", "by name", "curl", "-sS", "-m", "10", "http://shop/")
	want("curl by a name of elsewhere", "by name", "curl", "-sS", "-m", "10", "--resolve", "x.example:80:10.96.0.7",
		"http://x.example/")
	for _, proxy := range []string{"127.0.0.1:15080", "[::1]:15080"} {
		want("SOCKS5 by hostname", "by name", "curl", "-sS", "-m", "10", "--socks5-hostname", proxy,
			"http://shop.default.svc.cluster.local/")
		want("SOCKS5 by address", "by name", "curl", "-sS", "-m", "10", "--socks5", proxy, "http://10.96.0.7/")
	}
	if out, err := in("curl", "-sS", "-m", "10", "--socks5-hostname", "127.0.0.1:15080",
		"http://nowhere.example/"); lab.ExitCode(err) != 97 {
		t.Errorf("SOCKS5 to a name that does not exist: %q %v, want curl's 97", out, err)
	}
	mm, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	for _, p := range []string{"udp", "tcp"} {
		for _, q := range []string{"a", "aaaa"} {
			if mm.Sum("istio_dns_requests_total", "request_query_type="+q, "request_protocol="+p,
				"source_canonical_service=a") < 4 {
				t.Errorf("queries for %s by %s are not counted", q, p)
			}
		}
	}
	if mm.Sum("istio_dns_upstream_requests_total") < 4 {
		t.Error("forwarded queries are not counted")
	}
	if !strings.Contains(m.N1.Daemon.Log(), "dns\t") {
		t.Error("no DNS lines in the log")
	}
	if n := mm.Sum("istio_tcp_connections_opened_total", "reporter=source",
		"destination_service=shop.default.svc.cluster.local", "connection_security_policy=mutual_tls"); n < 6 {
		t.Errorf("%v connections to the service are counted", n)
	}
}

// TestDNSFlood: 10,000 queries per second from one pod, garbage among them: another pod's queries and connections are
// unharmed.
func TestDNSFlood(t *testing.T) {
	m :=
		newMesh(t,
			meshOptions{services: []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local",
				VIPs: []string{"/10.96.0.7"}, Ports: map[uint16]uint16{80: 9000}}}})
	ctx, cancel := context.WithTimeout(m.ctx, 6*time.Second)
	defer cancel()
	sent := flood(ctx, t, m.a.NS, netip.AddrPortFrom(m.h2.V4(), 53), 10_000)
	m.echoServer(m.c.NS, ":9100")
	talk, err := m.talk(ctx, m.b.NS, lab.HostPort(m.c.V4(), 9100), time.Millisecond)
	must(t, err)
	var slowest time.Duration
	asked := 0
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); asked++ {
		took, err := ask(m.b.NS, netip.AddrPortFrom(m.h2.V4(), 53), "shop.default.svc.cluster.local.")
		if err != nil {
			t.Fatalf("query %d of the other pod: %v", asked, err)
		}
		slowest = max(slowest, took)
		time.Sleep(20 * time.Millisecond)
	}
	select {
	case <-talk.end:
		t.Error("the other pod's connection broke:", talk.err)
	default:
	}
	said := talk.n.Load()
	cancel()
	n := <-sent
	t.Logf("%d queries in %v; the other pod's %d were all answered, the slowest after %v; its connection said %d times "+
		"something", n, 6*time.Second, asked, slowest, said)
	if n < 20_000 {
		t.Logf("this machine sent only %d queries", n)
	}
	if said < 100 || asked < 50 {
		t.Errorf("the other pod got only %d answers on its connection, and %d to queries", said, asked)
	}
	mm, err := m.N1.Daemon.Metrics(m.ctx)
	must(t, err)
	if mm.Sum("istio_dns_requests_total") < float64(asked) {
		t.Error("queries are not counted")
	}
}
