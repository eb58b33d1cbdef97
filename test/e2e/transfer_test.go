package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestTransfers moves 1 GiB each way at once over every pair of {IPv4, IPv6} x {same node, other node} x {HBONE,
// plaintext peer} and compares hashes at both ends. The application must see the client's own address. The wire
// between the nodes must show no byte of the payload of mesh peers, and no port but 15008. Peers of one node are
// relayed in the daemon's memory: neither the wire nor the node's loopback, where they would meet, shows a packet.
func TestTransfers(t *testing.T) {
	size := transferBytes(t)
	m := newMesh(t, meshOptions{})
	for _, peer := range []struct {
		name  string
		ns    *lab.NS
		ips   []netip.Addr
		other bool // on the other node
		mesh  bool
	}{
		{"HBONE other node", m.c.NS, m.c.IPs, true, true},
		{"HBONE same node", m.b.NS, m.b.IPs, false, true},
		{"plaintext other node", m.h2.NS, m.h2.IPs, true, false},
		{"plaintext same node", m.h1.NS, m.h1.IPs, false, false},
	} {
		t.Run(strings.ReplaceAll(peer.name, " ", "-"), func(t *testing.T) {
			families(t, func(t *testing.T, v4 bool) {
				src, dst := pick(m.a.IPs, v4), pick(peer.ips, v4)
				wire, err := m.Capture(m.N1.NS, "eth0", lab.CaptureOptions{})
				must(t, err)
				inner := "lo"
				if !peer.mesh {
					inner = "ztun-node" // where plaintext for and from the outside must pass
				}
				local, err := m.Capture(m.N1.NS, inner, lab.CaptureOptions{})
				must(t, err)
				r := ztload[load.TransferResult](m, m.a.NS, "xfer", "-to", lab.HostPort(dst, 9000), "-up", fmt.Sprint(size),
					"-down", fmt.Sprint(size), "-seed", "3")
				if !r.OK {
					t.Errorf("transfer: %s", r.Error)
				}
				t.Logf("%d MiB each way in %.1f s: %.2f Gb/s both directions together", size>>20, r.Seconds, r.Gbps)
				if got, err := netip.ParseAddrPort(r.Server.Peer); err != nil || got.Addr().Unmap() != src {
					t.Errorf("the application saw %q, not %v", r.Server.Peer, src)
				}
				onWire, onLocal := stop(t, wire), stop(t, local)
				marker := []byte(load.Marker)
				if peer.mesh {
					checkOnlyHBONE(t, "between the nodes", onWire)
					checkOnlyHBONE(t, "on the node's loopback", onLocal)
					if !peer.other { // TestSameNodeByTheWire proves that these captures would have seen it
						if n := len(onWire.Between(src, dst)) + len(onLocal.Between(src, dst)); n != 0 {
							t.Errorf("%d packets between pods of one node were captured", n)
						}
						return
					}
					// The capture must have seen the transfer, or it proves nothing.
					if n := onWire.Between(src, dst).Port(15008).Bytes(); n < size {
						t.Errorf("only %d bytes of %v-%v on 15008 were captured: %d packets", n, src, dst, len(onWire))
					}
				} else {
					seen := onLocal
					if peer.other {
						seen = onWire
					}
					if !seen.Contains(marker) {
						t.Error("the payload to a plaintext peer was not seen: this capture would not have seen a leak either")
					}
					if hbone := onWire.Between(src, dst).Port(15008); len(hbone) != 0 {
						t.Errorf("HBONE towards a plaintext peer:\n%v", hbone)
					}
				}
			})
		})
	}
}

// TestSameNodeByTheWire: with ZTUN_LOCAL_RELAY=false peers of one node meet on port 15008 of the node's loopback, and
// nothing but TLS is seen there.
func TestSameNodeByTheWire(t *testing.T) {
	const size = 8 << 20
	m := newMesh(t, meshOptions{env: map[string]string{"ZTUN_LOCAL_RELAY": "false"}})
	families(t, func(t *testing.T, v4 bool) {
		src, dst := pick(m.a.IPs, v4), pick(m.b.IPs, v4)
		local, err := m.Capture(m.N1.NS, "lo", lab.CaptureOptions{})
		must(t, err)
		r := ztload[load.TransferResult](m, m.a.NS, "xfer", "-to", lab.HostPort(dst, 9000), "-up", fmt.Sprint(size),
			"-down", fmt.Sprint(size), "-seed", "3")
		if !r.OK {
			t.Errorf("transfer: %s", r.Error)
		}
		seen := stop(t, local)
		checkOnlyHBONE(t, "on the node's loopback", seen)
		if n := seen.Between(src, dst).Port(15008).Bytes(); n < size {
			t.Errorf("only %d bytes of %v-%v on 15008 were captured: %d packets", n, src, dst, len(seen))
		}
	})
}

// checkOnlyHBONE fails if a capture holds payload of test/load or TCP of another port than 15008.
func checkOnlyHBONE(t *testing.T, where string, ps lab.Packets) {
	t.Helper()
	if ps.Contains([]byte(load.Marker)) {
		t.Errorf("plaintext %s:\n%v", where, ps.Where(func(p lab.Packet) bool {
			return lab.Packets{p}.Contains([]byte(load.Marker))
		}))
	}
	other := ps.TCP().Where(func(p lab.Packet) bool {
		if p.Src.Addr().IsLoopback() { // the test's own look at the admin ports
			return false
		}
		return p.Src.Port() != 15008 && p.Dst.Port() != 15008
	})
	if len(other) != 0 {
		t.Errorf("TCP on other ports than 15008 %s:\n%v", where, other)
	}
}

// TestInboundPlaintext: a client outside the mesh reaches a pod, on its node and on the other, with its own address;
// bytes hash equal.
func TestInboundPlaintext(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, h := range []*lab.Host{m.h1, m.h2} {
		t.Run("from-"+h.Name, func(t *testing.T) {
			families(t, func(t *testing.T, v4 bool) {
				r := ztload[load.TransferResult](m, h.NS, "xfer", "-to", lab.HostPort(pick(m.a.IPs, v4), 9000), "-up", "67108864",
					"-down", "67108864")
				if !r.OK {
					t.Errorf("transfer: %s", r.Error)
				}
				if got, err := netip.ParseAddrPort(r.Server.Peer); err != nil || got.Addr().Unmap() != pick(h.IPs, v4) {
					t.Errorf("the application saw %q, not %v", r.Server.Peer, pick(h.IPs, v4))
				}
			})
		})
	}
	// A closed port is refused at once to an outsider, too.
	r := load.DialOnce(m.ctx, load.Target{Addr: lab.HostPort(m.a.V4(), 9999), Dial: m.h2.NS.Dial})
	if r.OK || r.Errno != econnrefused {
		t.Errorf("closed port of a pod from outside: %+v", r)
	}
}

// TestServices: a service's address reaches one of its endpoints over HBONE.
func TestServices(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	f := m.DefaultWorld()
	for i := range f.Workloads {
		if n := f.Workloads[i].Name; n == "b" || n == "c" {
			f.Workloads[i].Services = map[string]map[uint16]uint16{"default/web.default.svc.cluster.local": {80: 9000}}
		}
	}
	f.Services = []lab.Service{{Name: "web", Namespace: "default", Hostname: "web.default.svc.cluster.local",
		VIPs: []string{"/10.96.0.10", "/fd96::10"}, Ports: map[uint16]uint16{80: 9000}, Canonical: true}}
	must(t, m.WriteWorld(f))
	for _, n := range m.Nodes() {
		m.start(n, nil)
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
		m.serve(p.NS)
	}
	for _, vip := range []string{"10.96.0.10:80", "[fd96::10]:80"} {
		seen := map[string]int{}
		for range 40 {
			w, err := load.WhoAmI(m.ctx, load.Target{Addr: vip, Dial: m.a.NS.Dial})
			if err != nil {
				t.Fatalf("%s: %v", vip, err)
			}
			local, err := netip.ParseAddrPort(w.Local)
			must(t, err)
			seen[local.Addr().Unmap().String()]++
			if peer, err := netip.ParseAddrPort(w.Peer); err != nil || pick(m.a.IPs, peer.Addr().Unmap().Is4()) !=
				peer.Addr().Unmap() {
				t.Fatalf("the endpoint saw %q (%v)", w.Peer, err)
			}
		}
		// Forty draws from two endpoints: all on one side once in 2^39.
		if len(seen) != 2 {
			t.Errorf("%s: endpoints chosen: %v", vip, seen)
		}
	}
}

const (
	econnrefused = 111
	etimedout    = 110
	ehostunreach = 113
	enetunreach  = 101
)
