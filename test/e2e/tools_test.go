package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket/pcapgo"

	"ztun/admin"
	"ztun/proxy"
	"ztun/test/lab"
	"ztun/test/load"
)

// TestTools asks a running pair of nodes with every command of troubleshooting: explain, connections, flows, capture.
func TestTools(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	f := m.DefaultWorld()
	const shop = "default/shop.default.svc.cluster.local"
	for i := range f.Workloads {
		if f.Workloads[i].Name == "c" {
			f.Workloads[i].Services = map[string]map[uint16]uint16{shop: {80: 9001, 81: 9998}}
		}
	}
	sick := lab.Workload{UID: "lab//v1/Pod/default/sick", Name: "sick", Namespace: "default", ServiceAccount: "c",
		TrustDomain: "cluster.local", WorkloadIPs: []string{"10.91.2.250"},
		Protocol: "HBONE", Node: "n2", Status: "Unhealthy", Services: map[string]map[uint16]uint16{shop: {80: 9001}}}
	f.Workloads = append(f.Workloads, sick)
	f.Services = []lab.Service{{Name: "shop", Namespace: "default", Hostname: "shop.default.svc.cluster.local",
		VIPs: []string{"/10.96.0.1"}, Ports: map[uint16]uint16{80: 9001, 81: 9998}}}
	f.Policies = []lab.Policy{{Name: "deny-7777", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"destinationPorts": []int{7777}}}}}}}
	must(t, m.WriteWorld(f))
	for _, n := range m.Nodes() {
		m.start(n, nil)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	m.serve(m.c.NS)
	a, c := m.a.V4(), m.c.V4()
	ask := func(n *lab.Node, args ...string) (string, error) {
		return m.Ztun(m.ctx, nil, append(args, "--socket", n.Daemon.Socket)...)
	}

	t.Run("explain", func(t *testing.T) {
		golden := func(want string, args ...string) {
			t.Helper()
			got, err := ask(m.N1, args...)
			must(t, err)
			for _, r := range [][2]string{{`valid until \S+`, "valid until TIME"}, {`\d+\.\d ms`, "N ms"}, {` +\n`, "\n"}} {
				got = regexp.MustCompile(r[0]).ReplaceAllString(got, r[1])
			}
			if strings.TrimSpace(got) != strings.TrimSpace(want) {
				t.Errorf("%v:\n%s\nwant:\n%s", args, got, want)
			}
		}
		workload := func(name, ips, node string) string {
			return fmt.Sprintf(
				"default/%s (uid lab//v1/Pod/default/%[1]s, %[2]s, identity spiffe://cluster.local/ns/default/sa/%[1]s, node "+
					"%[3]s, HBONE, Healthy)", name, ips, node)
		}
		wa := workload("a", fmt.Sprintf("%s %s", m.a.IPs[0], m.a.IPs[1]), "n1")
		wc := workload("c", fmt.Sprintf("%s %s", m.c.IPs[0], m.c.IPs[1]), "n2")
		golden(fmt.Sprintf(`outbound connection of pod default/a to 10.96.0.1:80

ok  source       %s
ok  called       10.96.0.1:80 is service default/shop.default.svc.cluster.local
ok  endpoints    service default/shop.default.svc.cluster.local has 2 endpoints, 1 usable; lab//v1/Pod/default/c was drawn
                 ENDPOINT                  ADDRESS      HEALTH     LOCALITY  NODE  RANK  WEIGHT  NOTE
                 lab//v1/Pod/default/c     %s    Healthy    -         n2    0     1       drawn
                 lab//v1/Pod/default/sick  10.91.2.250  Unhealthy  -         n2    -1    1       it is not healthy
ok  route        HBONE to %[2]s:15008, CONNECT %[2]s:9001, expecting spiffe://cluster.local/ns/default/sa/c
ok  certificate  spiffe://cluster.local/ns/default/sa/a: valid until TIME
ok  tunnel       none to %[2]s:15008 yet: one is made
ok  policies     no allow policies, allow (at the other end, as this node knows its policies)
                 POLICY             ACTION  SCOPE      MATCHES  RULE
                 default/deny-7777  Deny    Namespace  no       -

goes: connect succeeds if the application listens
probe: connect succeeds (N ms)
`, wa, c), "explain", "a", "shop:80", "--probe")
		golden(fmt.Sprintf(`outbound connection of pod default/a to %[2]s:7777

ok  source       %[1]s
ok  called       %[2]s:7777 is workload %[3]s
ok  route        HBONE to %[2]s:15008, CONNECT %[2]s:7777, expecting spiffe://cluster.local/ns/default/sa/c
ok  certificate  spiffe://cluster.local/ns/default/sa/a: valid until TIME
ok  tunnel       1 to %[2]s:15008, with 0 streams
NO  policies     explicitly denied by default/deny-7777 (at the other end, as this node knows its policies)
                 POLICY             ACTION  SCOPE      MATCHES       RULE
                 default/deny-7777  Deny    Namespace  yes, decides  1: destinationPorts [7777]

REFUSED: connect fails: Connection refused (ECONNREFUSED)
access log: error="http status: 401 Unauthorized: connection closed due to policy rejection: explicitly denied by: default/deny-7777"
`, wa, c, wc), "explain", "--from", "a", "--to", "c:7777")
		golden(fmt.Sprintf(`passthrough connection of pod default/a reaching %[2]s:7777

ok  pod          %[1]s
ok  request      in plaintext from 10.90.0.9 to %[2]s:7777: it proves no identity
NO  policies     explicitly denied by default/deny-7777
                 POLICY             ACTION  SCOPE      MATCHES       RULE
                 default/deny-7777  Deny    Namespace  yes, decides  1: destinationPorts [7777]

REFUSED: connect fails: Connection refused (ECONNREFUSED)
access log: error="connection closed due to policy rejection: explicitly denied by: default/deny-7777"
`, wa, a), "explain", "--inbound", "a", "7777", "--from", "10.90.0.9")
		// A probe meets what this node cannot know: each answer says at which step.
		for _, p := range []struct{ to, step, err string }{
			{"shop:81", "answer", "http status: 503 Service Unavailable: connection failed: Connection refused (os error 111)"},
			{lab.HostPort(c, 7777), "answer",
				"http status: 401 Unauthorized: connection closed due to policy rejection: explicitly denied by: " +
					"default/deny-7777"},
			{lab.HostPort(m.h2.IPs[0], 9998), "connect", "io error: Connection refused (os error 111)"},
		} {
			out, err := ask(m.N1, "explain", "a", p.to, "--probe", "-o", "json")
			var x proxy.Explanation
			if jerr := json.Unmarshal([]byte(out), &x); jerr != nil || lab.ExitCode(err) != 1 || x.Probe == nil || x.Probe.OK ||
				x.Probe.Step != p.step || x.Probe.Error != p.err {
				t.Errorf("probe of %s: %v, %v, %+v, want %s: %s", p.to, err, jerr, x.Probe, p.step, p.err)
			}
		}
		for want, args := range map[string][]string{
			"no pod default/nobody": {"nobody", "shop:80"}, "is not HOST:PORT": {"a", "shop"}, "not a port": {"a", "shop:0"},
			"no workload": {"--from", "a", "--to", "nobody:80"},
		} {
			if _, err := ask(m.N1, append([]string{"explain"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("explain %v: %v, want %q", args, err, want)
			}
		}
	})

	t.Run("connections and flows", func(t *testing.T) {
		idle, err := load.Idle(m.ctx, target(m.a.NS, c), 2)
		must(t, err)
		defer idle.Close()
		for _, e := range []struct {
			n    *lab.Node
			peer string
		}{{m.N1, "default/c"}, {m.N2, "default/a"}} {
			out, err := ask(e.n, "connections", "--peer", e.peer, "-o", "json")
			must(t, err)
			var l admin.Connections
			must(t, json.Unmarshal([]byte(out), &l))
			if len(l.Connections) != 2 || l.Total != 2 {
				t.Fatalf("%s lists %d:\n%s", e.n.Name, len(l.Connections), out)
			}
			for _, x := range l.Connections {
				if x.State != "open" || x.Source.Identity != "spiffe://cluster.local/ns/default/sa/a" ||
					x.Destination.Identity != "spiffe://cluster.local/ns/default/sa/c" ||
					!x.Tunnel.Local.IsValid() || x.Protocol != "HBONE" || x.Age(time.Now()) > 5*time.Minute {
					t.Errorf("%s: %+v", e.n.Name, x)
				}
			}
		}
		// The same over 15000, for whoever looks with curl.
		out, err := m.Run(m.ctx, m.N1.NS, "curl", "-sf", "http://127.0.0.1:15000/ztun/connections?pod=a&peer=default/c")
		if err != nil || strings.Count(out, `"pod":"default/a"`) != 2 {
			t.Errorf("over 15000: %v\n%s", err, out)
		}
		if r := load.DialOnce(m.ctx, load.Target{Addr: lab.HostPort(c, 7777), Dial: m.a.NS.Dial}); r.OK {
			t.Error("7777 is open")
		}
		eventually(t, 20*time.Second, func() error {
			out, err := ask(m.N1, "flows", "--pod", "a", "--outcome", "denied")
			if err != nil ||
				!strings.Contains(out,
					"denied   http status: 401 Unauthorized: connection closed due to policy rejection: explicitly denied by: "+
						"default/deny-7777") {
				return fmt.Errorf("%w\n%s", err, out)
			}
			out, err = ask(m.N2, "flows", "--outcome", "bad", "--peer", "ns/default/sa/a")
			if err != nil || !strings.Contains(out, "explicitly denied by: default/deny-7777") {
				return fmt.Errorf("%w\n%s", err, out)
			}
			return nil
		})
		pods, err := ask(m.N1, "pod", "list", "-o", "yaml")
		if err != nil || !strings.Contains(pods, "  name: a\n  namespace: default\n") {
			t.Errorf("pods as yaml: %v\n%s", err, pods)
		}
	})

	t.Run("capture", func(t *testing.T) {
		file, says := waitFor("denied: http status"), waitFor("capturing")
		p, err := m.Start(nil, lab.Cmd{Args: []string{m.Bin(), "capture", "a", "tcp", "and", "port", "80", "or", "port",
			"7777", "--duration", "30s", "--socket", m.N1.Daemon.Socket}, Stdout: file, Stderr: says})
		must(t, err)
		select {
		case <-says.seen:
		case <-p.Done():
			t.Fatalf("%v: %s", p.Err(), says)
		case <-time.After(30 * time.Second):
			t.Fatal("no capture")
		}
		const clear = "this is to be read on the TUN, and nowhere else"
		ctx, cancel := context.WithTimeout(m.ctx, 30*time.Second)
		defer cancel()
		conn, err := m.a.NS.Dial(ctx, "tcp", "10.96.0.1:80")
		must(t, err)
		io.WriteString(conn, clear)
		io.ReadAll(conn)
		conn.Close()
		load.DialOnce(ctx, load.Target{Addr: lab.HostPort(c, 7777), Dial: m.a.NS.Dial})
		load.DialOnce(ctx, load.Target{Addr: lab.HostPort(c, 9001), Dial: m.a.NS.Dial}) // not asked for
		select {
		case <-file.seen:
		case <-ctx.Done():
			t.Errorf("the capture does not tell of the denied connection: %s", says)
		}
		p.Signal(syscall.SIGINT)
		<-p.Done()
		if p.Err() != nil {
			t.Errorf("interrupted: %v: %s", p.Err(), says)
		}
		r, err := pcapgo.NewNgReader(strings.NewReader(file.String()), pcapgo.NgReaderOptions{})
		must(t, err)
		var comments []string
		read := false
		for {
			data, _, opts, err := r.ReadPacketDataWithOptions()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			comments = append(comments, opts.Comments...)
			read = read || bytes.Contains(data, []byte(clear))
			if bytes.Contains(data, []byte{0x23, 0x29, 0x23, 0x29}) { // no port 9001 at the application's side
				t.Errorf("a packet that was not asked for: %x", data)
			}
		}
		const ids = "outbound HBONE, spiffe://cluster.local/ns/default/sa/a -> spiffe://cluster.local/ns/default/sa/c, by "
		for _, want := range []string{
			ids + fmt.Sprintf("%s:15008, CONNECT %[1]s:9001, service shop.default.svc.cluster.local", c),
			ids + fmt.Sprintf("%s:15008, CONNECT %[1]s:7777, denied: http status: 401 Unauthorized", c),
		} {
			if !slices.ContainsFunc(comments, func(c string) bool { return strings.HasPrefix(c, want) }) {
				t.Errorf("no comment %q among %q", want, comments)
			}
		}
		if len(comments) != 2 || !read {
			t.Errorf("%d comments for two flows, payload read: %v", len(comments), read)
		}
		if text, err := m.RunCmd(m.ctx, nil, lab.Cmd{Args: []string{"tcpdump", "-nr", "-"},
			Stdin: strings.NewReader(file.String())}); err != nil || !strings.Contains(text, "Flags [S]") {
			t.Errorf("tcpdump: %v\n%s", err, text)
		}
		if _, err := ask(m.N1, "capture", "a", "gibberish"); err == nil || !strings.Contains(err.Error(), "no word of it") {
			t.Errorf("gibberish: %v", err)
		}
	})
}
