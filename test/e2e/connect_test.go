package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// dialAndCapture connects once from pod a with a capture on its TUN, and returns the result beside the packets of
// that destination.
func dialAndCapture(m *mesh, t *testing.T, dst netip.AddrPort, limit time.Duration) (load.DialResult, lab.Packets) {
	t.Helper()
	capt, err := m.Capture(m.a.NS, "ztun0", lab.CaptureOptions{Immediate: true})
	must(t, err)
	ctx, cancel := context.WithTimeout(m.ctx, limit)
	defer cancel()
	r := load.DialOnce(ctx, load.Target{Addr: dst.String(), Dial: m.a.NS.Dial})
	ps := stop(t, capt)
	return r, ps.TCP().Where(func(p lab.Packet) bool { return p.Src == dst || p.Dst == dst })
}

// TestTruthfulRefusal: a closed port of a mesh peer, a policy denial and a closed port of a plaintext peer are
// refused as such: ECONNREFUSED, median of ten under 50 ms, and on the pod's TUN a SYN, then a RST, never a SYN-ACK.
func TestTruthfulRefusal(t *testing.T) {
	m := newMesh(t, meshOptions{policies: []lab.Policy{{
		Name: "deny-7777", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"destinationPorts": []int{7777}}}}},
	}}})
	// 7777 is open, so that only the policy can refuse it.
	m.background(m.c.NS, "listening", bins.ztload, "serve", "-listen", ":7777")
	families(t, func(t *testing.T, v4 bool) {
		for _, c := range []struct {
			name string
			dst  netip.AddrPort
			log  string // in the access log of the source
		}{
			{"mesh peer, other node", netip.AddrPortFrom(pick(m.c.IPs, v4), 9998),
				`error="http status: 503 Service Unavailable: connection failed: Connection refused (os error 111)"`},
			{"mesh peer, same node", netip.AddrPortFrom(pick(m.b.IPs, v4), 9998),
				`error="http status: 503 Service Unavailable: connection failed: Connection refused (os error 111)"`},
			{"denied by policy", netip.AddrPortFrom(pick(m.c.IPs, v4), 7777),
				`error="http status: 401 Unauthorized: connection closed due to policy rejection: explicitly denied by: default/deny-7777"`},
			{"plaintext peer, other node", netip.AddrPortFrom(pick(m.h2.IPs, v4), 9998),
				`error="io error: Connection refused (os error 111)"`},
			{"plaintext peer, same node", netip.AddrPortFrom(pick(m.h1.IPs, v4), 9998),
				`error="io error: Connection refused (os error 111)"`},
		} {
			t.Run(strings.ReplaceAll(strings.ReplaceAll(c.name, ",", ""), " ", "-"), func(t *testing.T) {
				r, ps := dialAndCapture(m, t, c.dst, 20*time.Second)
				if r.OK || r.Errno != econnrefused {
					t.Fatalf("%+v\n%v", r, ps)
				}
				if len(ps.SYNs()) != 1 || len(ps.SYNACKs()) != 0 || len(ps.RSTs()) != 1 || ps[0].Dst != c.dst ||
					ps[len(ps)-1].Src != c.dst || !ps[len(ps)-1].RST {
					t.Errorf("on the pod's TUN:\n%v", ps)
				}
				var ms []float64
				for range 10 {
					r := load.DialOnce(m.ctx, load.Target{Addr: c.dst.String(), Dial: m.a.NS.Dial})
					if r.OK || r.Errno != econnrefused {
						t.Fatalf("%+v", r)
					}
					ms = append(ms, r.Millis)
				}
				sort.Float64s(ms)
				t.Logf("refused in %.1f ms (median of ten; %.1f to %.1f)", ms[5], ms[0], ms[9])
				if ms[5] >= 50 {
					t.Errorf("a refusal takes %v ms", ms)
				}
				eventually(t, 10*time.Second, func() error {
					for _, line := range strings.Split(m.N1.Daemon.Log(), "\n") {
						if strings.Contains(line, "\taccess\t") && strings.Contains(line, c.dst.String()) &&
							strings.Contains(line, c.log) {
							return nil
						}
					}
					return fmt.Errorf("no access log line with %v and %s", c.dst, c.log)
				})
			})
		}
	})
}

// blackholes makes n1 route a subnet to n2, which drops it silently.
func blackholes(m *mesh) {
	m.t.Helper()
	must(m.t, m.IP(m.ctx, m.N1.NS, fmt.Sprintf("route add 10.91.66.0/24 via %s", m.N2.Addr4),
		fmt.Sprintf("route add fd91:0:0:66::/64 via %s", m.N2.Addr6)))
	must(m.t, m.IP(m.ctx, m.N2.NS, "route add blackhole 10.91.66.0/24", "route add blackhole fd91:0:0:66::/64"))
}

// TestBlackHole: an address that swallows packets is a timeout (or the unreachable that tells it), never a success:
// neither for a mesh peer nor for a plaintext one. ztunnel's connect timeout is 10 s.
func TestBlackHole(t *testing.T) {
	hole := func(name, ip, protocol string) lab.Workload {
		return lab.Workload{UID: "lab//v1/Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name,
			TrustDomain: "cluster.local",
			WorkloadIPs: []string{ip}, Protocol: protocol, Node: "n2", Status: "Healthy",
			Services: map[string]map[uint16]uint16{}}
	}
	m :=
		newMesh(t,
			meshOptions{workloads: []lab.Workload{hole("hole4", "10.91.66.4", "HBONE"), hole("hole6", "fd91:0:0:66::6", "HBONE"),
				hole("holet", "10.91.66.5", "TCP")}})
	blackholes(m)
	cases := []struct{ name, dst, log string }{
		{"mesh v4", "10.91.66.4:9000", "maybe a NetworkPolicy is blocking HBONE port 15008"},
		{"mesh v6", "[fd91:0:0:66::6]:9000", "maybe a NetworkPolicy is blocking HBONE port 15008"},
		{"plaintext workload", "10.91.66.5:9000", "io error: "},
		{"unknown address", "10.91.66.77:9000", "io error: "},
	}
	// All at once, and no longer than ztun's own timeout and a little: they only wait.
	capt, err := m.Capture(m.a.NS, "ztun0", lab.CaptureOptions{Immediate: true})
	must(t, err)
	ctx, cancel := context.WithTimeout(m.ctx, 12*time.Second)
	defer cancel()
	results := make([]load.DialResult, len(cases))
	var dials sync.WaitGroup
	for i, c := range cases {
		dials.Go(func() { results[i] = load.DialOnce(ctx, load.Target{Addr: c.dst, Dial: m.a.NS.Dial}) })
	}
	dials.Wait()
	all := stop(t, capt).TCP()
	for i, c := range cases {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			dst, r := netip.MustParseAddrPort(c.dst), results[i]
			ps := all.Where(func(p lab.Packet) bool { return p.Src == dst || p.Dst == dst })
			t.Logf("%+v", r)
			if r.OK || !(r.Timeout || r.Errno == etimedout || r.Errno == ehostunreach || r.Errno == enetunreach) {
				t.Errorf("connect to a black hole: %+v", r)
			}
			if r.Millis < 5000 {
				t.Errorf("given up after %.0f ms: the packets were not swallowed, or the timeout is too short", r.Millis)
			}
			if len(ps.SYNs()) == 0 || len(ps.SYNACKs()) != 0 {
				t.Errorf("on the pod's TUN:\n%v", ps)
			}
			eventually(t, 20*time.Second, func() error {
				for _, line := range strings.Split(m.N1.Daemon.Log(), "\n") {
					if strings.Contains(line, "\taccess\t") && strings.Contains(line, dst.Addr().String()) &&
						strings.Contains(line, c.log) {
						return nil
					}
				}
				return fmt.Errorf("no access log line with %v and %q", dst, c.log)
			})
		})
	}
}

// TestUnreachable: where the network itself says that there is no way, the application hears it at once.
func TestUnreachable(t *testing.T) {
	m := newMesh(t, meshOptions{noServers: true})
	families(t, func(t *testing.T, v4 bool) {
		dst := netip.MustParseAddrPort(map[bool]string{true: "10.91.2.200:9000", false: "[fd91:0:0:2::200]:9000"}[v4])
		r, ps := dialAndCapture(m, t, dst, 20*time.Second)
		if r.OK || r.Timeout || !(r.Errno == ehostunreach || r.Errno == enetunreach) {
			t.Errorf("%+v\n%v", r, ps)
		}
		if len(ps.SYNACKs()) != 0 {
			t.Errorf("on the pod's TUN:\n%v", ps)
		}
	})
}
