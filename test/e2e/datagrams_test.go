package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestDatagrams: UDP and ICMP of isolated pods, with tools that know nothing of ztun, over a link of 1400 bytes
// between the nodes. Pod s is strict but for two ports.
func TestDatagrams(t *testing.T) {
	for _, tool := range []string{"ping", "traceroute", "iperf3"} {
		needTool(t, tool)
	}
	m := newMesh(t, meshOptions{noStart: true})
	s, err := m.AddPod(m.N2, lab.Pod{Name: "s", Namespace: "strict"})
	must(t, err)
	f := m.DefaultWorld()
	f.Workloads = append(f.Workloads, user())
	f.Policies = []lab.Policy{{Name: "istio_converted_static_strict", Namespace: "strict", Scope: "Namespace",
		Action: "Deny", Rules: [][][]map[string]any{{
			{{"notPrincipals": []any{map[string]any{"Presence": []any{}}}}}, {{"notDestinationPorts": []any{7101, 4433}}},
		}}}, {Name: "no-7022", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"destinationPorts": []any{7022}}}}}}}
	must(t, m.WriteWorld(f))
	const flows = 2000
	m.start(m.N1, map[string]string{"ZTUN_MAX_UDP_FLOWS": fmt.Sprint(flows)})
	m.start(m.N2, nil)
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	for _, n := range m.Nodes() {
		must(t, m.IP(m.ctx, n.NS, "link set eth0 mtu 1400"))
		// A kernel tells one host of an expired packet once in a second.
		must(t, n.NS.Sysctl("net/ipv4/icmp_ratelimit", "0"))
		must(t, n.NS.Sysctl("net/ipv6/icmp/ratelimit", "0"))
	}
	d := &datagrams{mesh: m, s: s, bin: filepath.Join(t.TempDir(), "quic")}
	d.servers(t) // of more than one part, each of which can be run alone
	t.Run("ping", d.ping)
	t.Run("traceroute", d.traceroute)
	t.Run("errors", d.errors)
	t.Run("path", d.path)
	t.Run("policy", d.policy)
	t.Run("dns", d.dns)
	t.Run("iperf3", d.iperf3)
	t.Run("quic", d.quic)
	t.Run("flows", func(t *testing.T) { d.flows(t, flows) })
	t.Run("rootless", d.rootless)
}

type datagrams struct {
	*mesh
	s   *lab.Pod
	bin string // of test/quic
}

// servers starts those of iperf3 and of the QUIC library.
func (d *datagrams) servers(t *testing.T) {
	t.Helper()
	root, err := lab.Root()
	must(t, err)
	build := exec.Command("go", "build", "-buildvcs=false", "-o", d.bin, ".")
	build.Dir = filepath.Join(root, "test/quic")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	d.background(d.h2.NS, "Server listening", "iperf3", "-s", "--forceflush", "-p", "5201")
	for _, ns := range []*lab.NS{d.h2.NS, d.a.NS, d.s.NS} {
		d.background(ns, "listening", d.bin, "serve", ":4433")
	}
}

// each runs f for both families.
func (d *datagrams) each(t *testing.T, f func(t *testing.T, pick func([]netip.Addr) netip.Addr)) {
	families(t, func(t *testing.T, v4 bool) { f(t, func(ips []netip.Addr) netip.Addr { return pick(ips, v4) }) })
}

// run runs a tool in a pod.
func (d *datagrams) run(t *testing.T, ns *lab.NS, args ...string) string {
	t.Helper()
	out, err := d.Run(d.ctx, ns, args...)
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// Both ways, within a node and across, and not in another's name.
func (d *datagrams) ping(t *testing.T) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		for _, p := range []struct {
			from *lab.NS
			to   []netip.Addr
		}{{d.a.NS, d.h2.IPs}, {d.a.NS, d.h1.IPs}, {d.h2.NS, d.a.IPs}, {d.a.NS, d.b.IPs}, {d.a.NS, d.c.IPs},
			{d.a.NS, d.s.IPs}} {
			d.run(t, p.from, "ping", "-n", "-c", "2", "-i", "0.1", "-W", "10", pick(p.to).String())
		}
	})
}

// The hops are the nodes.
func (d *datagrams) traceroute(t *testing.T) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		to := pick(d.h2.IPs)
		node := pick([]netip.Addr{d.N2.Addr4, d.N2.Addr6})
		for _, how := range []string{"33434", "-I"} { // UDP to ports from this one on, pings
			how := map[bool][]string{true: {"-p", how}, false: {how}}[how != "-I"]
			out := d.run(t, d.a.NS, append(append([]string{"traceroute"}, how...), "-n", "-q", "1", "-N", "1", "-w", "10", "-m",
				"4", to.String())...)
			hops := strings.Split(strings.TrimSpace(out), "\n")[1:]
			if len(hops) != 3 || !strings.Contains(hops[1], " "+node.String()+" ") ||
				!strings.Contains(hops[2], " "+to.String()+" ") || strings.Contains(hops[0], "*") {
				t.Errorf("%s:\n%s", how, out)
			}
		}
	})
}

// Where nobody listens the sender has an error.
func (d *datagrams) errors(t *testing.T) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		for _, p := range []struct {
			from *lab.NS
			to   []netip.Addr
			want syscall.Errno
		}{{d.a.NS, d.h2.IPs, syscall.ECONNREFUSED}, {d.h2.NS, d.a.IPs, syscall.ECONNREFUSED},
			{d.a.NS, d.c.IPs, syscall.ECONNREFUSED}} {
			c, err := udpFrom(p.from, netip.AddrPortFrom(pick(p.to), 7999))
			must(t, err)
			if _, err := say(c, "x"); !errors.Is(err, p.want) {
				t.Errorf("%v: %v, want %v", c.RemoteAddr(), err, p.want)
			}
			c.Close()
		}
	})
}

// say sends a text until there is an answer or an error: the network may lose datagrams, and neighbours have to be
// found first.
func say(c *net.UDPConn, text string) (string, error) {
	b := make([]byte, 65536)
	for range 20 {
		if _, err := c.Write([]byte(text)); err != nil {
			return "", err
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(b)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return string(b[:n]), err
		}
	}
	return "", errors.New("no answer to 20 datagrams")
}

// echoUDP answers datagrams with themselves until the test ends.
func (m *mesh) echoUDP(t *testing.T, ns *lab.NS, at netip.AddrPort) {
	t.Helper()
	var c *net.UDPConn
	must(t, ns.Do(func() (err error) { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)); return err }))
	c.SetReadBuffer(4 << 20)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
}

// What is too large for the link in the middle is told to the sender, and then fits; what is larger than any packet
// comes in fragments.
func (d *datagrams) path(t *testing.T) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		for _, p := range []struct {
			from, to *lab.NS
			ips      []netip.Addr
		}{{d.a.NS, d.h2.NS, d.h2.IPs}, {d.h2.NS, d.a.NS, d.a.IPs}, {d.a.NS, d.c.NS, d.c.IPs}} {
			at := netip.AddrPortFrom(pick(p.ips), 7010)
			d.echoUDP(t, p.to, at)
			c, err := udpFrom(p.from, at)
			must(t, err)
			defer c.Close()
			for _, n := range []int{1, 1300, 1440, 8000, 40000} {
				text := strings.Repeat("d", n)
				if got, err := sayLarge(c, text); err != nil || got != text {
					t.Errorf("%v: %d bytes: %d came back, %v", at, n, len(got), err)
				}
			}
		}
		// As ping sees it, which asks for no fragments.
		out, err := d.Run(d.ctx, d.b.NS, "ping", "-n", "-M", "do", "-s", "1440", "-c", "2", "-i", "0.2", "-W", "5",
			pick(d.h2.IPs).String())
		if err == nil || !strings.Contains(out, "1400") {
			t.Errorf("%v:\n%s", err, out)
		}
	})
}

// sayLarge is say with a socket that hears of the path's MTU: Linux tells it by EMSGSIZE once, and sends fragments
// after that.
func sayLarge(c *net.UDPConn, text string) (got string, err error) {
	for range 3 {
		if got, err = say(c, text); !errors.Is(err, syscall.EMSGSIZE) {
			break
		}
	}
	return got, err
}

// A strict destination is not reached in the clear, and the sender hears of it at once; its open ports are.
func (d *datagrams) policy(t *testing.T) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		closed, open := netip.AddrPortFrom(pick(d.s.IPs), 7100), netip.AddrPortFrom(pick(d.s.IPs), 7101)
		d.echoUDP(t, d.s.NS, closed)
		d.echoUDP(t, d.s.NS, open)
		wire, err := d.Capture(d.N2.NS, "eth0", lab.CaptureOptions{Filter: "udp port 7100"})
		must(t, err)
		c, err := udpFrom(d.a.NS, closed)
		must(t, err)
		if _, err := say(c, "x"); !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.EACCES) {
			t.Errorf("to a strict port: %v", err)
		}
		c.Close()
		if ps := stop(t, wire); len(ps) != 0 {
			t.Errorf("in the clear:\n%s", ps)
		}
		// From outside: its own node drops it, and says nothing.
		from, err := udpFrom(d.h2.NS, closed)
		must(t, err)
		from.Write([]byte("x"))
		for _, ns := range []*lab.NS{d.a.NS, d.h2.NS} {
			c, err := udpFrom(ns, open)
			must(t, err)
			if got, err := say(c, "open"); got != "open" || err != nil {
				t.Errorf("to an open port: %q, %v", got, err)
			}
			c.Close()
		}
		from.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := from.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("from outside to a strict port: %d bytes, %v", n, err)
		}
		from.Close()
		// The strict pod's own flows have answers.
		at := netip.AddrPortFrom(pick(d.h2.IPs), 7102)
		d.echoUDP(t, d.h2.NS, at)
		own, err := udpFrom(d.s.NS, at)
		must(t, err)
		if got, err := say(own, "own"); got != "own" || err != nil {
			t.Errorf("of its own: %q, %v", got, err)
		}
		own.Close()
	})
	for _, n := range []struct {
		node *lab.Node
		pod  string
	}{{d.N1, "default/a"}, {d.N2, "strict/s"}} {
		ms, err := n.node.Daemon.Metrics(d.ctx)
		must(t, err)
		if ms.Sum("ztun_datagram_denied_total", "pod="+n.pod) < 2 ||
			!strings.Contains(n.node.Daemon.Log(), "UDP dropped: it would go in the clear") {
			t.Errorf("%s: refusals are not counted, or not logged", n.pod)
		}
	}
}

// A private server: its port is captured, and the query passed on to whom it was for.
func (d *datagrams) dns(t *testing.T) {
	newNameserver(t, d.h2.NS, d.h2.IPs)
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		server := netip.AddrPortFrom(pick(d.h2.IPs), 53)
		eventually(t, 20*time.Second, func() error { _, err := ask(d.a.NS, server, "x.example."); return err })
	})
}

// iperf3 both ways: what was sent arrives, but for what a busy machine loses.
func (d *datagrams) iperf3(t *testing.T) { d.iperf3From(t, d.a.NS) }

func (d *datagrams) iperf3From(t *testing.T, from *lab.NS) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		for _, way := range [][]string{nil, {"-R"}} {
			args := append([]string{"iperf3", "-u", "-b", "100M", "-l", "1200", "-t", "1", "-J", "-c", pick(d.h2.IPs).String()},
				way...)
			var r struct {
				End struct {
					Sum struct {
						Packets     int64   `json:"packets"`
						LostPackets int64   `json:"lost_packets"`
						Rate        float64 `json:"bits_per_second"`
					} `json:"sum"`
				} `json:"end"`
			}
			out := d.run(t, from, args...)
			if err := json.Unmarshal([]byte(out), &r); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			t.Logf("%v: %.0f Mbit/s, %d of %d lost", args[6:], r.End.Sum.Rate/1e6, r.End.Sum.LostPackets, r.End.Sum.Packets)
			if got := r.End.Sum.Packets - r.End.Sum.LostPackets; got < 1000 {
				t.Errorf("%v: %d datagrams of %d arrived", way, got, r.End.Sum.Packets)
			}
		}
	})
}

// A QUIC library's client and server: in the pod and outside, and both in pods, one of them strict with this port open.
func (d *datagrams) quic(t *testing.T) {
	d.quicBetween(t, []quicPath{{d.a.NS, d.h2.IPs}, {d.h2.NS, d.a.IPs}, {d.a.NS, d.s.IPs}})
}

type quicPath struct {
	from *lab.NS
	to   []netip.Addr
}

func (d *datagrams) quicBetween(t *testing.T, paths []quicPath) {
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		for _, p := range paths {
			t.Logf("%s", bytes.TrimSpace([]byte(d.run(t, p.from, d.bin, "echo", lab.HostPort(pick(p.to), 4433), "4000000"))))
		}
	})
}

// 10,000 flows of one pod: its bound holds and is counted, and each datagram has its answer all the same.
func (d *datagrams) flows(t *testing.T, bound int) {
	d.manyFlows(t, d.b.NS)
	ms, err := d.N1.Daemon.Metrics(d.ctx)
	must(t, err)
	now, opened := ms.Sum("ztun_datagram_flows", "pod=default/b"),
		ms.Sum("ztun_datagram_flows_opened_total", "pod=default/b")
	evicted := ms.Sum("ztun_datagram_flows_evicted_total", "pod=default/b")
	if int(now) > bound || opened < 10000 || evicted < opened-float64(bound)-10 {
		t.Errorf("%v flows, %v opened, %v evicted", now, opened, evicted)
	}
	if !ms.Has("ztun_bounded_total") {
		t.Error("the bound is not reported")
	}
}

// manyFlows has 10,000 flows answered.
func (d *datagrams) manyFlows(t *testing.T, from *lab.NS) {
	t.Helper()
	const n = 100
	for i := range n {
		d.echoUDP(t, d.h2.NS, netip.AddrPortFrom(d.h2.V4(), uint16(20000+i)))
	}
	var unanswered int
	b := make([]byte, 64)
	for range n {
		var c *net.UDPConn
		must(t, from.Do(func() (err error) { c, err = net.ListenUDP("udp4", nil); return err }))
		defer c.Close() // until all have been: a port that is drawn twice would be the same flows again
		missing := map[uint16]bool{}
		for i := range n {
			missing[uint16(20000+i)] = true
		}
		for try := 0; try < 20 && len(missing) > 0; try++ {
			for port := range missing {
				c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(d.h2.V4(), port))
			}
			c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			for len(missing) > 0 {
				_, from, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					break
				}
				delete(missing, from.Port())
			}
		}
		unanswered += len(missing)
	}
	if unanswered > 0 {
		t.Errorf("%d of %d flows have no answer", unanswered, n*n)
	}
}
