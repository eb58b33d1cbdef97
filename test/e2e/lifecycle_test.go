package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestDrain: a daemon that is told to go is not ready any more, and serves new connections as long as old ones are in
// flight, since nobody else has its pods. When they have finished it sends GOAWAY and ends with 0, before the deadline.
func TestDrain(t *testing.T) {
	for _, side := range []string{"server", "client"} {
		t.Run("of-the-"+side+"s-node", func(t *testing.T) {
			m := newMesh(t, meshOptions{env: map[string]string{"CONNECTION_TERMINATION_DEADLINE": "60s"}})
			d := m.N2.Daemon
			if side == "client" {
				d = m.N1.Daemon
			}
			ca := loadCA(t, m.Path("ca"))
			var h *h2Client
			if side == "server" {
				c, err := m.h1.NS.Dial(m.ctx, "tcp", lab.HostPort(m.c.V4(), 15008))
				must(t, err)
				h, err = dialH2(t, c, ca.client(t, "spiffe://cluster.local/ns/default/sa/a"))
				must(t, err)
				go h.run()
				defer h.close()
				must(t, h.connect(1, lab.HostPort(m.c.V4(), 9000)))
				eventually(t, 10*time.Second, func() error {
					if got, err := h.of(1); len(got) == 0 || !strings.Contains(got[0], ":status=200") {
						return fmt.Errorf("CONNECT: %q %v", got, err)
					}
					return nil
				})
			}
			ic, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 4)
			must(t, err)
			defer ic.Close()
			plain, err := load.Idle(m.ctx, target(m.a.NS, m.h2.V4()), 4)
			must(t, err)
			defer plain.Close()

			start := time.Now()
			must(t, d.Signal(syscall.SIGTERM))
			eventually(t, 5*time.Second, func() error {
				if status, _, err := d.Get(m.ctx, lab.ReadyPort, "/healthz/ready"); err == nil && status == 200 {
					return fmt.Errorf("still says that it is ready")
				}
				return nil
			})
			for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); {
				for _, to := range []netip.Addr{m.c.V4(), m.h2.V4()} {
					if _, err := load.WhoAmI(m.ctx, target(m.a.NS, to)); err != nil {
						t.Fatalf("a new connection to %v: %v", to, err)
					}
				}
			}
			must(t, ic.Check()) // in flight, and alive
			must(t, plain.Check())
			if !d.Running() {
				t.Fatal("ended with connections in flight")
			}
			ic.Close()
			plain.Close()
			if h != nil {
				must(t, h.reset(1))
				eventually(t, 10*time.Second, func() error {
					got, err := h.of(0)
					for _, e := range got {
						if strings.HasPrefix(e, "GOAWAY") && strings.HasSuffix(e, "NO_ERROR") {
							return nil
						}
					}
					return fmt.Errorf("no GOAWAY: %q %v", got, err)
				})
				h.conn.Close()
			}
			ctx, cancel := context.WithTimeout(m.ctx, 30*time.Second)
			defer cancel()
			code, err := d.Wait(ctx)
			if err != nil {
				t.Fatalf("%v\n%s", err, d.Log())
			}
			if code != 0 {
				t.Errorf("exit code %d", code)
			}
			t.Logf("drained in %v", time.Since(start).Round(time.Millisecond))
		})
	}
}

// TestDrainDeadline: connections that do not end are cut at the deadline, and the exit code is still 0. A second
// signal does not wait.
func TestDrainDeadline(t *testing.T) {
	m := newMesh(t, meshOptions{env: map[string]string{"CONNECTION_TERMINATION_DEADLINE": "2s"}})
	ic, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 4)
	must(t, err)
	defer ic.Close()
	start := time.Now()
	code, err := m.N2.Daemon.Stop(30 * time.Second)
	must(t, err)
	if took := time.Since(start); code != 0 || took < 1500*time.Millisecond || took > 15*time.Second {
		t.Errorf("exit code %d after %v, deadline 2 s", code, took)
	}
	if err := ic.Check(); err == nil {
		t.Error("connections outlived the proxy")
	}
	// The pods' devices stay: fail closed, ready to be taken up again.
	if s := netState(m, m.c.NS); !strings.Contains(s, "ztun0") {
		t.Errorf("the pod has lost its device:\n%s", s)
	}

	d := m.start(m.N2, map[string]string{"CONNECTION_TERMINATION_DEADLINE": "120s"})
	again, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 4)
	must(t, err)
	defer again.Close()
	must(t, d.Signal(syscall.SIGTERM))
	time.Sleep(time.Second)
	if !d.Running() {
		t.Fatal("ended at once, with connections in flight")
	}
	must(t, d.Signal(syscall.SIGTERM))
	ctx, cancel := context.WithTimeout(m.ctx, 10*time.Second)
	defer cancel()
	if code, err := d.Wait(ctx); err != nil {
		t.Errorf("the second signal did not end it: %v", err)
	} else {
		t.Logf("exit code after the second signal: %d", code)
	}
}

// TestQuit: POST /quitquitquit ends the daemon as SIGTERM does; a GET does not.
func TestQuit(t *testing.T) {
	m := newMesh(t, meshOptions{noServers: true})
	if status, _, err := m.N1.Daemon.Get(m.ctx, lab.AdminPort, "/quitquitquit"); err != nil || status != 405 {
		t.Errorf("GET: %d %v", status, err)
	}
	status, body, err := m.N1.Daemon.Request(m.ctx, "POST", lab.AdminPort, "/quitquitquit")
	if err != nil || status != 200 || body != "shutdown now\n" {
		t.Errorf("POST: %d %q %v", status, body, err)
	}
	ctx, cancel := context.WithTimeout(m.ctx, 20*time.Second)
	defer cancel()
	if code, err := m.N1.Daemon.Wait(ctx); err != nil || code != 0 {
		t.Errorf("exit code %d, %v", code, err)
	}
}

// TestBadConfiguration: one clear line that names the variable, exit code 2.
func TestBadConfiguration(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	for _, c := range []struct{ name, value string }{
		{"ZTUN_MTU", "abc"}, {"ZTUN_MTU", "12"}, {"ZTUNNEL_WORKER_THREADS", "many"}, {"IPV6_ENABLED", "yes"},
		{"KEEPALIVE_TIME", "soon"},
		{"HTTP2_FRAME_SIZE", "1"}, {"HTTP2_STREAM_WINDOW_SIZE", "-1"}, {"POOL_MAX_STREAMS_PER_CONNECTION", "0"},
		{"CONNECTION_TERMINATION_DEADLINE", "x"},
		{"TERMINATION_GRACE_PERIOD_SECONDS", "x"}, {"SECRET_TTL", "x"}, {"FAKE_CA", "1"}, {"PROXY_CONFIG", "{"},
		{"XDS_ADDRESS", "http://istiod:15010"},
		{"LOCAL_XDS_PATH", lab.Unset}, {"LOCAL_CA_DIR", lab.Unset}, {"ZTUN_MAX_INFLIGHT", "0"}, {"ZTUN_TUN_PLAIN", "1"},
		{"PROXY_MODE", "nonsense"}, {"RUST_LOG", "a=b=c"},
	} {
		t.Run(c.name+"="+strings.TrimPrefix(c.value, "\x00"), func(t *testing.T) {
			d, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{NoWait: true, Env: map[string]string{c.name: c.value}})
			must(t, err)
			ctx, cancel := context.WithTimeout(m.ctx, 15*time.Second)
			defer cancel()
			code, err := d.Wait(ctx)
			if err != nil {
				d.Kill()
				t.Fatalf("it runs with %s=%s\n%s", c.name, c.value, d.Log())
			}
			log := strings.TrimSpace(d.Log())
			if code != 2 || !strings.Contains(log, c.name) || strings.Count(log, "\n") > 0 ||
				strings.Contains(log, "goroutine ") {
				t.Errorf("exit code %d, said:\n%s", code, log)
			}
		})
	}
}

// TestReload: the workload file is followed; a broken one is told with its line, and the last good state stays.
func TestReload(t *testing.T) {
	m := newMesh(t, meshOptions{})
	dst := target(m.a.NS, m.c.V4())
	connect := func() error { _, err := load.WhoAmI(m.ctx, dst); return err }
	refused := func() error {
		if r := load.DialOnce(m.ctx, dst); r.OK || r.Errno != econnrefused {
			return fmt.Errorf("connect: %+v", r)
		}
		return nil
	}
	must(t, connect())
	good := m.DefaultWorld()
	denied := good
	denied.Policies = []lab.Policy{{Name: "deny", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"destinationPorts": []int{9000}}}}}}}
	must(t, m.WriteWorld(denied))
	eventually(t, 15*time.Second, refused)

	// Broken in line 4: the denial stays, and the log names file and line.
	must(t, m.WriteWorldBytes([]byte("workloads:\n- uid: x\n  name: x\n  nonsense: 1\n")))
	for _, n := range m.Nodes() {
		eventually(t, 15*time.Second, func() error {
			for _, l := range strings.Split(n.Daemon.Log(), "\n") {
				if strings.Contains(l, "line 4") && strings.Contains(l, "nonsense") {
					return nil
				}
			}
			return fmt.Errorf("%s does not tell which line is wrong", n.Name)
		})
	}
	must(t, refused())
	must(t, m.WriteWorldBytes([]byte("workloads: [\n")))
	time.Sleep(time.Second)
	must(t, refused())

	must(t, m.WriteWorld(good))
	eventually(t, 15*time.Second, connect)

	// Written in place, as an editor may do, and gone for a moment.
	must(t, os.Remove(m.WorldPath()))
	time.Sleep(500 * time.Millisecond)
	must(t, connect())
	must(t, m.WriteWorld(denied))
	eventually(t, 15*time.Second, refused)
}

// TestRotation: with certificates that live 10 s, echoes over kept connections and new connections go on for two
// lifetimes without a single failure, and the certificate on the wire changes meanwhile.
func TestRotation(t *testing.T) {
	m := newMesh(t, meshOptions{env: map[string]string{"SECRET_TTL": "10s", "POOL_UNUSED_RELEASE_TIMEOUT": "2s"}})
	ca := loadCA(t, m.Path("ca"))
	serial := func() string {
		c, err := m.h1.NS.Dial(m.ctx, "tcp", lab.HostPort(m.c.V4(), 15008))
		must(t, err)
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		tc := tls.Client(c, ca.client(t, "spiffe://cluster.local/ns/default/sa/a"))
		must(t, tc.Handshake())
		leaf := tc.ConnectionState().PeerCertificates[0]
		if left := time.Until(leaf.NotAfter); left < 0 || left > 15*time.Second {
			t.Errorf("a certificate that lives %v more", left)
		}
		return leaf.SerialNumber.String()
	}
	echo := make(chan *load.EchoResult, 2)
	rate := make(chan *load.RateResult, 1)
	const d = 20 * time.Second
	go func() { echo <- load.OpenLoop(m.ctx, target(m.a.NS, m.c.V4()), 4, 40, 512, d) }()
	go func() { echo <- load.OpenLoop(m.ctx, target(m.c.NS, m.a.V4()), 4, 40, 512, d) }()
	go func() {
		one := target(m.a.NS, m.c.V4())
		one.Addr = lab.HostPort(m.c.V4(), 9001)
		rate <- load.ConnectRate(m.ctx, one, 1, d)
	}()
	seen := map[string]bool{}
	for start := time.Now(); time.Since(start) < d; time.Sleep(2 * time.Second) {
		seen[serial()] = true
	}
	for range 2 {
		if r := <-echo; len(r.Errors) != 0 || r.Lost != 0 {
			t.Errorf("kept connections: %+v", r)
		}
	}
	r := <-rate
	if r.Failed != 0 || r.OK < 10 {
		t.Errorf("new connections: %d ok, %d failed: %q", r.OK, r.Failed, r.Errors)
	}
	if len(seen) < 3 {
		t.Errorf("%d certificates in %v of 10 s each", len(seen), d)
	}
	t.Logf("%d certificates seen, %d new connections", len(seen), r.OK)
}

// TestPlainTUN forces the portable device path: the same bytes, the same refusals.
func TestPlainTUN(t *testing.T) {
	m := newMesh(t, meshOptions{env: map[string]string{"ZTUN_TUN_PLAIN": "true"}})
	out, err := m.PodCmd(m.ctx, m.N1, "list", "-o", "json")
	must(t, err)
	if strings.Contains(out, `"vnetHdr": true`) || !strings.Contains(out, `"vnetHdr": false`) {
		t.Errorf("pod list does not tell that the plain path is used: %s", out)
	}
	families(t, func(t *testing.T, v4 bool) {
		if r := ztload[load.TransferResult](m, m.a.NS, "xfer", "-to", lab.HostPort(pick(m.h2.IPs, v4), 9000), "-up",
			"33554432", "-down", "33554432"); !r.OK {
			t.Errorf("plaintext: %s", r.Error)
		}
		r := ztload[load.TransferResult](m, m.a.NS, "xfer", "-to", lab.HostPort(pick(m.c.IPs, v4), 9000), "-up", "67108864",
			"-down", "67108864")
		if !r.OK {
			t.Errorf("HBONE: %s", r.Error)
		}
		t.Logf("%.2f Gb/s", r.Gbps)
		if d := load.DialOnce(m.ctx, load.Target{Addr: lab.HostPort(pick(m.c.IPs, v4), 9998), Dial: m.a.NS.Dial}); d.OK ||
			d.Errno != econnrefused {
			t.Errorf("closed port: %+v", d)
		}
	})
}

// TestMTU: pods with small and large devices carry the same bytes.
func TestMTU(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, mtu := range []int{1280, 9000, 65535} {
		p, err := m.AddPod(m.N1, lab.Pod{Name: fmt.Sprintf("m%d", mtu), MTU: mtu})
		must(t, err)
		must(t, m.WriteWorld(m.DefaultWorld()))
		must(t, m.Attach(m.ctx, p))
		link, err := m.Run(m.ctx, p.NS, "ip", "-o", "link", "show", "ztun0")
		must(t, err)
		if !strings.Contains(link, fmt.Sprintf("mtu %d ", mtu)) {
			t.Errorf("wanted MTU %d: %s", mtu, link)
		}
		eventually(t, 10*time.Second, func() error { _, err := load.WhoAmI(m.ctx, target(p.NS, m.c.V4())); return err })
		for _, dst := range []string{lab.HostPort(m.c.V6(), 9000), lab.HostPort(m.h2.V4(), 9000)} {
			if r := ztload[load.TransferResult](m, p.NS, "xfer", "-to", dst, "-up", "33554432", "-down", "33554432"); !r.OK {
				t.Errorf("MTU %d to %s: %s", mtu, dst, r.Error)
			}
		}
	}
}

// TestPorts: admin answers on localhost only, stats and readiness everywhere, with what is promised there.
func TestPorts(t *testing.T) {
	m := newMesh(t, meshOptions{})
	_, err := load.WhoAmI(m.ctx, target(m.a.NS, m.c.V4()))
	must(t, err)
	d := m.N1.Daemon
	status, body, err := d.Get(m.ctx, lab.AdminPort, "/config_dump")
	var dump map[string]any
	if err != nil || status != 200 || json.Unmarshal([]byte(body), &dump) != nil {
		t.Errorf("config_dump: %d %v %.200s", status, err, body)
	}
	for _, key := range []string{"workloads", "services", "policies", "certificates", "config"} {
		if _, ok := dump[key]; !ok {
			t.Errorf("config_dump has no %s", key)
		}
	}
	for _, path := range []string{"/debug/pprof/profile?seconds=1", "/debug/pprof/heap"} {
		if status, body, err := d.Get(m.ctx, lab.AdminPort, path); err != nil || status != 200 || len(body) == 0 {
			t.Errorf("%s: %d %v", path, status, err)
		}
	}
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		status, body, err := d.Get(m.ctx, lab.StatsPort, path)
		if err != nil || status != 200 || !strings.HasSuffix(body, "# EOF\n") ||
			!strings.Contains(body, "istio_tcp_connections_opened_total{") || !strings.Contains(body, "istio_build{") {
			t.Errorf("%s: %d %v", path, status, err)
		}
	}
	// From the other node.
	hc := m.N2.NS.HTTP(5 * time.Second)
	for port, want := range map[int]bool{lab.AdminPort: false, lab.StatsPort: true, lab.ReadyPort: true} {
		path := map[int]string{lab.StatsPort: "metrics", lab.ReadyPort: "healthz/ready", lab.AdminPort: "config_dump"}[port]
		resp, err := hc.Get(fmt.Sprintf("http://%v:%d/%s", m.N1.Addr4, port, path))
		if err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if ok := err == nil && resp.StatusCode == 200; ok != want {
			t.Errorf("port %d from another machine: reachable %v, want %v (%v)", port, ok, want, err)
		}
	}
	// Not in the pods: their loopback and addresses have none of the three.
	for _, port := range []uint16{lab.AdminPort, lab.StatsPort, lab.ReadyPort} {
		if r := load.DialOnce(m.ctx, load.Target{Addr: fmt.Sprintf("127.0.0.1:%d", port), Dial: m.a.NS.Dial}); r.OK {
			t.Errorf("port %d answers inside a pod", port)
		}
	}
	// The log level can be changed at run time.
	if status, body, err := d.Request(m.ctx, "POST", lab.AdminPort, "/logging?level=debug"); err != nil || status != 200 ||
		!strings.Contains(body, "debug") {
		t.Errorf("POST /logging: %d %q %v", status, body, err)
	}
	_, err = load.WhoAmI(m.ctx, target(m.a.NS, m.c.V4()))
	must(t, err)
	eventually(t, 10*time.Second, func() error {
		if !strings.Contains(d.Log(), "\tdebug\taccess\tconnection opened\t") {
			return fmt.Errorf("no debug access line after the level was changed")
		}
		return nil
	})
}

// TestMissingWorld: a daemon whose workload file does not exist at the start ends with a message that names it, as
// ztunnel does.
func TestMissingWorld(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	d, err := m.StartDaemon(m.ctx, m.N1,
		lab.DaemonOptions{NoWait: true, Env: map[string]string{"LOCAL_XDS_PATH": m.Path("later.yaml")}})
	must(t, err)
	ctx, cancel := context.WithTimeout(m.ctx, 15*time.Second)
	defer cancel()
	code, err := d.Wait(ctx)
	if err != nil || code == 0 || !strings.Contains(d.Log(), "later.yaml") {
		t.Errorf("exit code %d, %v:\n%s", code, err, d.Log())
	}
	if s := netState(m, m.N1.NS); strings.Contains(s, "ztun") || strings.Contains(s, "15008") {
		t.Errorf("it left traces:\n%s", s)
	}
}
