package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// shell is a shell as the command of a run, which does line by line what it is told.
type shell struct {
	*lab.Process
	t    testing.TB
	in   *os.File
	out  *waiter
	seen int // of out
}

// shell starts one, and waits until it does what it is told.
func (r *rootless) shell(ns *lab.NS, env []string, args ...string) *shell {
	r.t.Helper()
	in, to, err := os.Pipe()
	must(r.t, err)
	defer in.Close()
	s := &shell{t: r.t, in: to, out: waitFor("\x00")}
	cmd := r.cmd(env, "", append(args, "--", "bash", "-c", `while read -r line; do eval "$line"; echo "<status $?>"; done`)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, s.out, s.out
	s.Process, err = r.Start(ns, cmd)
	must(r.t, err)
	r.t.Cleanup(func() {
		to.Close()
		s.Signal(syscall.SIGTERM)
		select {
		case <-s.Done():
		case <-time.After(30 * time.Second):
			s.Kill()
			r.t.Errorf("%v does not end", args)
		}
	})
	if out, ok := s.do("true"); !ok {
		r.t.Fatalf("%v: %s", args, out)
	}
	return s
}

// do has it do a line, and returns what was said meanwhile.
func (s *shell) do(line string) (said string, ok bool) {
	s.t.Helper()
	fmt.Fprintln(s.in, line)
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		all := s.out.String()
		rest := all[s.seen:]
		if said, status, found := strings.Cut(rest, "<status "); found && strings.Contains(status, ">\n") {
			s.seen = len(all)
			return said, strings.HasPrefix(status, "0>")
		}
	}
	s.t.Fatalf("%q has no end: %s", line, s.out)
	return "", false
}

// serve starts the load server, and waits until it is there.
func (s *shell) serve(program string) {
	s.t.Helper()
	if said, ok := s.do(program + ` serve >/dev/null 2>&1 & for i in $(seq 1000); do ` +
		`(exec 3<>/dev/tcp/127.0.0.1/9000) 2>/dev/null && break; sleep 0.02; done; [ $i -lt 1000 ]`); !ok {
		s.t.Fatal(said)
	}
}

// whoami asks a load server who its client is.
func (s *shell) whoami(at netip.Addr, port int) (string, error) {
	said, ok := s.do(fmt.Sprintf("timeout 20 bash -c 'exec 3<>/dev/tcp/%s/%d && echo whoami >&3 && head -n 1 <&3'", at, port))
	if !ok {
		return said, fmt.Errorf("no answer: %s", said)
	}
	return said, nil
}

// bundle has a workload join, for him alone to read.
func (c *controlled) bundle(r *rootless, name string) string {
	c.t.Helper()
	out := filepath.Join(r.dir, name+".json")
	_, err := c.Ztun(c.ctx, nil, "control", "join", "--dir", c.dir, "--workload", "default/"+name, "--out", out, "--host",
		c.N1.Addr4.String(), "--renew")
	must(c.t, err)
	must(c.t, os.Chown(out, 65534, 65534))
	return out
}

// TestRunLives: a run goes on while its control plane is away, and hears of what is new when that is back; it goes on
// when its host has another address, out and in, and hears of its new record from there; and of two runs of one
// bundle both
// call, but one alone is reached.
func TestRunLives(t *testing.T) {
	c := newControlled(t, false, nil)
	r := newRootless(t, c.mesh)
	record := func(host netip.Addr) lab.WorldFile {
		w := user()
		w.Protocol, w.MeshAddresses = "HBONE", []string{lab.HostPort(host, 15018)}
		return lab.WorldFile{Workloads: []lab.Workload{w}}
	}
	own := netip.MustParseAddr(user().WorkloadIPs[0])
	host := c.h1.V4()
	c.write("user.yaml", record(host))
	c.visible(c.N2, "lab//v1/Pod/default/user", true)
	b, err := os.ReadFile(bins.ztload)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(r.dir, "ztload"), b, 0o755))
	bundle := c.bundle(r, "user")
	s := r.shell(c.h1.NS, nil, "--join", bundle)
	s.serve(r.dir + "/ztload")
	calls := func(when string, host netip.Addr) {
		t.Helper()
		for what, to := range map[string]netip.Addr{"over HBONE": c.c.V4(), "in plaintext": c.h2.V4()} {
			if got, err := s.whoami(to, 9000); err != nil || !strings.Contains(got, host.String()+":") {
				t.Errorf("%s, %s: the server sees %q, want %s (%v)", when, what, got, host, err)
			}
		}
	}
	reached := func(when string) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			w, err := load.WhoAmI(c.ctx, load.Target{Addr: lab.HostPort(own, 9000), Dial: c.c.NS.Dial})
			if err != nil || !strings.HasPrefix(w.Peer, c.c.V4().String()) {
				return fmt.Errorf("%s its client is %q (%w)", when, w.Peer, err)
			}
			return nil
		})
	}
	calls("at first", host)
	reached("at first")

	c.process.Kill()
	calls("without a control plane", host)
	reached("without a control plane")
	c.startControl()
	c.write("later.yaml", lab.WorldFile{Workloads: []lab.Workload{}, Services: []lab.Service{{Name: "later",
		Namespace: "default", Hostname: "later.default.svc.cluster.local", VIPs: []string{"/10.96.0.77"},
		Ports: map[uint16]uint16{80: 9000}}}})
	eventually(t, 40*time.Second, func() error {
		if said, _ := s.do("getent ahosts later.default.svc.cluster.local"); !strings.Contains(said, "10.96.0.77") {
			return fmt.Errorf("what came later is not known: %s", said)
		}
		return nil
	})
	calls("with a new control plane", host)

	second := r.shell(c.h1.NS, nil, "--join", bundle)
	if got, err := second.whoami(c.c.V4(), 9000); err != nil || !strings.Contains(got, host.String()+":") {
		t.Errorf("a second run of the bundle calls and gets %q (%v)", got, err)
	}
	if said := second.out.String(); !strings.Contains(said, "15018") {
		t.Errorf("a second run of the bundle does not say that peers reach the first: %s", said)
	}
	reached("beside a second run")
	// It would have the port as likely as the first, when both have heard of another address.
	must(t, second.Signal(syscall.SIGTERM))
	select {
	case <-second.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the second run does not end")
	}

	// What the control plane says of the new address the run can only hear by a connection from that: it does not wait
	// until HTTP/2's PING finds the old one dead.
	next := netip.MustParseAddr("10.91.1.201")
	must(t, c.IP(c.ctx, c.N1.NS, fmt.Sprintf("route add %s/32 dev vhh1", next), fmt.Sprintf("route del %s/32 dev vhh1", host)))
	gw := c.N1.PodNet4.Addr().Next()
	must(t, c.IP(c.ctx, c.h1.NS, fmt.Sprintf("addr add %s/32 dev eth0", next), fmt.Sprintf("addr del %s/32 dev eth0", host),
		fmt.Sprintf("route replace %s dev eth0", gw), fmt.Sprintf("route replace default via %s src %s", gw, next)))
	for _, want := range []string{"this host has other addresses: the control plane is called anew",
		"its record sends them to " + lab.HostPort(host, 15018) + ", an address that this host has lost"} {
		eventually(t, 30*time.Second, func() error {
			if said := s.out.String(); !strings.Contains(said, want) {
				return fmt.Errorf("%q is not said: %s", want, said)
			}
			return nil
		})
	}
	calls("at another address", next)
	c.write("user.yaml", record(next))
	c.visible(c.N2, lab.HostPort(next, 15018), true)
	eventually(t, 30*time.Second, func() error {
		out, err := c.Run(c.ctx, c.h1.NS, "ss", "-ltnH")
		if err == nil && (!strings.Contains(out, next.String()+":15018") || strings.Contains(out, host.String()+":15018")) {
			err = fmt.Errorf("it does not listen where it is: %s", out)
		}
		return err
	})
	reached("at another address")
}

// TestRunIPv6Only: control plane and runs on hosts that have no IPv4 at all, workloads without an IPv4 address: names,
// HBONE with identity, plaintext and UDP, past a link of 1400 bytes.
func TestRunIPv6Only(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true, noServers: true})
	one, err := m.AddHost(m.N1, "one", netip.MustParseAddr("fd91:0:0:1::a1"))
	must(t, err)
	two, err := m.AddHost(m.N2, "two", netip.MustParseAddr("fd91:0:0:2::a2"))
	must(t, err)
	for _, n := range m.Nodes() {
		must(t, m.IP(m.ctx, n.NS, "link set eth0 mtu 1400"))
	}
	host := one.V6()
	dir := m.Path("control")
	_, err = m.Ztun(m.ctx, nil, "control", "init", dir)
	must(t, err)
	old, err := filepath.Glob(filepath.Join(dir, "mesh", "*"))
	must(t, err)
	for _, f := range old { // the example
		must(t, os.Remove(f))
	}
	caller, served := user(), user()
	caller.WorkloadIPs = []string{"fd91:0:0:66::4"}
	served.UID, served.Name, served.ServiceAccount = "lab//v1/Pod/default/served", "served", "served"
	served.WorkloadIPs, served.Protocol = []string{"fd91:0:0:66::5"}, "HBONE"
	served.MeshAddresses = []string{lab.HostPort(two.V6(), 15018)}
	served.Services = map[string]map[uint16]uint16{"default/served.default.svc.cluster.local": {80: 9000}}
	c := &controlled{mesh: m, dir: dir}
	c.write("world.yaml", lab.WorldFile{Workloads: []lab.Workload{caller, served}, Services: []lab.Service{{Name: "served",
		Namespace: "default", Hostname: "served.default.svc.cluster.local", VIPs: []string{"/fd91:0:0:96::5"},
		Ports: map[uint16]uint16{80: 9000}}}})
	c.write("policy.yaml", policy("users-alone", "Allow", "cluster.local/ns/default/sa/user"))
	m.background(one.NS, "15012", m.Bin(), "control", "--dir", dir, "--listen", lab.HostPort(host, 15012), "--host",
		host.String(), "--admin", "")
	_, err = m.CADir(m.ctx) // which newRootless copies
	must(t, err)
	r := newRootless(t, m)
	b, err := os.ReadFile(bins.ztload)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(r.dir, "ztload"), b, 0o755))
	bundle := func(name string) string {
		out := filepath.Join(r.dir, name+".json")
		_, err := m.Ztun(m.ctx, nil, "control", "join", "--dir", dir, "--workload", "default/"+name, "--out", out, "--host",
			host.String())
		must(t, err)
		must(t, os.Chown(out, 65534, 65534))
		return out
	}
	server := r.shell(two.NS, nil, "--join", bundle("served"))
	server.serve(r.dir + "/ztload")
	m.serve(two.NS)
	must(t, one.NS.Sysctl("net/ipv4/ping_group_range", "0 2147483647")) // of both families
	s := r.shell(one.NS, nil, "--join", bundle("user"))
	if said, _ := s.do("getent ahosts served.default.svc.cluster.local"); !strings.Contains(said, "fd91:0:0:96::5") {
		t.Errorf("the name of a service: %s", said)
	}
	for what, server := range map[string]string{"over HBONE": "[fd91:0:0:96::5]:80", "in plaintext": lab.HostPort(two.V6(), 9000)} {
		forgetPath(m, one.NS, two.NS)
		said, ok := s.do(fmt.Sprintf("timeout 60 %s/ztload xfer -to %s -up 4000000 -down 4000000", r.dir, server))
		if !ok || !strings.Contains(said, `"ok":true`) || strings.Count(said, "4000000") < 2 {
			t.Errorf("%s past a link of 1400 bytes: %s", what, said)
		}
		toldPath(m, what, one.NS, two.V6())
	}
	// A ping that may not be divided is told what does not fit; a socket's datagrams are, and then do.
	if said, ok := s.do("ping -n -c 2 -i 0.2 -W 10 " + two.V6().String()); !ok {
		t.Errorf("ping: %s", said)
	}
	// 1448 bytes with both headers: more than the link takes, and less than the TUN.
	if said, ok := s.do("ping -n -M do -s 1440 -c 3 -i 0.3 -W 5 " + two.V6().String()); ok || !strings.Contains(said, "1400") {
		t.Errorf("a ping larger than the path: %s", said)
	}
	_, command, err := inside(s.Process)
	must(t, err)
	in, err := m.NameNS("user", command)
	must(t, err)
	at := netip.AddrPortFrom(two.V6(), 7010)
	m.echoUDP(t, two.NS, at)
	u, err := udpFrom(in, at)
	must(t, err)
	defer u.Close()
	for _, n := range []int{1, 1300, 1440, 8000} {
		text := strings.Repeat("d", n)
		if got, err := sayLarge(u, text); err != nil || got != text {
			t.Errorf("UDP of %d bytes: %d came back, %v", n, len(got), err)
		}
	}
	if said, err := s.whoami(netip.MustParseAddr("fd91:0:0:66::5"), 9000); err != nil || !strings.Contains(said, host.String()) {
		t.Errorf("its peer sees %q (%v)", said, err)
	}
}

// forgetPath has hosts forget what they were told of paths: both ends of one, since each says in its SYN what it can
// take, by what it knows.
func forgetPath(m *mesh, hosts ...*lab.NS) {
	m.t.Helper()
	for _, host := range hosts {
		for _, family := range []string{"-4", "-6"} {
			_, err := m.Run(m.ctx, host, "ip", family, "route", "flush", "cache")
			must(m.t, err)
		}
	}
}

// toldPath: the host has been told that 1400 bytes are what the way to an address takes.
func toldPath(m *mesh, what string, host *lab.NS, to netip.Addr) {
	m.t.Helper()
	if route, err := m.Run(m.ctx, host, "ip", "route", "get", to.String()); err != nil || !strings.Contains(route, "mtu 1400") {
		m.t.Errorf("%s: the host has not been told of the link: %v %s", what, err, route)
	}
}
