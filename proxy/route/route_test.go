package route_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"ztun/proxy/route"
	"ztun/proxy/state"
)

func TestCheckOutbound(t *testing.T) {
	illegal := route.IllegalPorts(false)
	for addr, want := range map[string]bool{
		"127.0.0.1:15001": false, "127.9.9.9:15006": false, "[::1]:15008": false, "[::ffff:127.0.0.1]:15001": false,
		"127.0.0.1:15080": true, "127.0.0.1:15020": true, "127.0.0.1:80": true, "10.0.0.1:15001": true,
	} {
		err := route.CheckOutbound(netip.MustParseAddrPort(addr), illegal)
		if (err == nil) != want {
			t.Errorf("%s: %v", addr, err)
		}
	}
	err := route.CheckOutbound(netip.MustParseAddrPort("127.0.0.1:15080"), route.IllegalPorts(true))
	if !errors.Is(err, &route.Error{Code: route.SelfCall}) || err.Error() != "attempted recursive call to ourselves" {
		t.Errorf("SOCKS: %v", err)
	}
}

// Appendix B.
func TestErrorTexts(t *testing.T) {
	info := state.WorkloadInfo{Name: "a", Namespace: "default", ServiceAccount: "sa"}
	for _, tt := range []struct {
		err    route.Error
		text   string
		status int
	}{
		{route.Error{Code: route.SelfCall}, "attempted recursive call to ourselves", 503},
		{route.Error{Code: route.UnknownLocal, Subject: info.String()},
			"failed to fetch information about local workload: sa.default (a)", 503},
		{route.Error{Code: route.NoHealthyUpstream, Subject: "1.2.3.4:80"}, "no healthy upstream: 1.2.3.4:80", 503},
		{route.Error{Code: route.UnknownWaypoint, Subject: "x"}, "unknown waypoint: x", 503},
		{route.Error{Code: route.UnknownNetworkGateway, Subject: "x"}, "unknown network gateway: x", 503},
		{route.Error{Code: route.NoValidDestination, Subject: "x"}, "no valid routing destination for workload: x", 503},
		{route.Error{Code: route.NoService, Subject: "x"}, "no service for target address: x", 503},
		{route.Error{Code: route.NoResolvedAddresses, Subject: "x"}, "no ip addresses were resolved for workload: x", 503},
		{route.Error{Code: route.EmptyResolvedAddresses, Subject: "x"},
			"ip addresses were resolved for workload x, but valid dns response had no A/AAAA records", 503},
		{route.Error{Code: route.BadMethod, Subject: "GET"}, "expected method CONNECT, got GET", 400},
		{route.Error{Code: route.BadAuthority, Subject: "x"}, "no valid authority pseudo header: x", 400},
		{route.Error{Code: route.IPMismatch, Subject: "a", Other: "b"}, "ip mismatch: a != b", 400},
		{route.Error{Code: route.NoHostname, Subject: "x"}, "no service or workload for hostname: x", 503},
		{route.Error{Code: route.NoPort, Subject: "x:1"}, "requested service x:1 found, but cannot resolve port", 503},
		{route.Error{Code: route.NoIPForService, Subject: "x"}, "requested service x found, but has no IP addresses", 503},
	} {
		if got := tt.err.Error(); got != tt.text || tt.err.Status() != tt.status {
			t.Errorf("%d %q, want %d %q", tt.err.Status(), got, tt.status, tt.text)
		}
	}
}

func TestParseAuthority(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1:80": "10.0.0.1:80", "[::1]:80": "[::1]:80", "[::]:80": "[::]:80", "[fd00:0:0::1]:080": "[fd00::1]:80",
		"[::ffff:10.0.0.1]:1": "10.0.0.1:1",
		"a.b:1":               "a.b:1", "A-b_c.d.:65535": "A-b_c.d.:65535", "10.0.0.1:0": "10.0.0.1:0",
		"localhost:0":       "localhost:0",
		"10.0.0.1:00000080": "10.0.0.1:80", "1.2.3:80": "1.2.3:80", "10.0.0.256:80": "10.0.0.256:80",
	} {
		a, err := route.ParseAuthority(in)
		if err != nil || a.String() != want {
			t.Errorf("%q: %v %v, want %s", in, a, err, want)
		}
	}
	for _, in := range []string{
		"", ":", ":80", "a", "a:", "10.0.0.1", "10.0.0.1:", "10.0.0.1:65536", "10.0.0.1:99999", "10.0.0.1:-1", "10.0.0.1:+1",
		"10.0.0.1:0x1",
		"10.0.0.1:8 ", " 10.0.0.1:80", "::1:80", "[::1]", "[::1]80", "[]:80", "[::1:80", "::1]:80", "[10.0.0.1]:80",
		"[fe80::1%eth0]:80", "fe80::1%1:80",
		"user@a:80", "a/b:80", "a b:80", "a:b:80", "http://a:80", "ä:80", "a\x00:80", "a:800000000",
		strings.Repeat("a", 255) + ":80",
	} {
		a, err := route.ParseAuthority(in)
		if !errors.Is(err, &route.Error{Code: route.BadAuthority}) {
			t.Errorf("%q: %v %v", in, a, err)
		}
	}
	// What a peer sends does not get into logs raw or without bound.
	_, err := route.ParseAuthority("\n\x1b[31m" + strings.Repeat("x", 10_000))
	if s := err.Error(); len(s) > 500 || strings.ContainsAny(s, "\n\x1b") {
		t.Errorf("%q", s)
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"10.0.0.1:80", "[::1]:80", "a.b:1", "", "[::ffff:10.0.0.1]:1", "a:b:1",
		"[fe80::1%eth0]:80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := route.ParseAuthority(s)
		if err != nil {
			if a != (route.Authority{}) || !errors.Is(err, &route.Error{Code: route.BadAuthority}) {
				t.Fatalf("%q: %+v %v", s, a, err)
			}
			return
		}
		if a.Addr.IsValid() == (a.Host != "") {
			t.Fatalf("%q: %+v", s, a)
		}
		if b, err := route.ParseAuthority(a.String()); err != nil || b != a {
			t.Fatalf("%q: %+v, again %+v %v", s, a, b, err)
		}
	})
}

// bigMesh has a service of n equal endpoints and one of n endpoints with preferences.
func bigMesh(n int) (*state.View, *state.Workload) {
	b := state.NewBuilder("")
	src := &state.Workload{UID: "c//Pod/a/src", Namespace: "a", Addresses: []netip.Addr{netip.MustParseAddr("10.9.0.1")},
		Protocol: state.HBONE}
	b.InsertWorkload(src)
	b.InsertService(&state.Service{Namespace: "a", Hostname: "plain",
		VIPs:  []state.NetworkAddress{{Addr: netip.MustParseAddr("10.8.0.1")}},
		Ports: state.PortMap{{Service: 80, Target: 8080}}})
	b.InsertService(&state.Service{Namespace: "a", Hostname: "ranked",
		VIPs:  []state.NetworkAddress{{Addr: netip.MustParseAddr("10.8.0.2")}},
		Ports: state.PortMap{{Service: 80, Target: 8080}}, LoadBalancer: &state.LoadBalancer{Mode: state.LBFailover,
			Preferences: []state.Scope{state.ScopeNetwork, state.ScopeRegion, state.ScopeZone}}})
	for i := range n {
		b.InsertWorkload(&state.Workload{UID: fmt.Sprint("c//Pod/a/", i), Namespace: "a", Capacity: 1, Protocol: state.HBONE,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})},
			Services: []state.WorkloadService{{Service: state.ServiceKey{Namespace: "a", Hostname: "plain"}},
				{Service: state.ServiceKey{Namespace: "a", Hostname: "ranked"}}}})
	}
	return b.Build(), src
}

// wideMesh has n workloads, ten to each service; every other service has preferences.
func wideMesh(n int) (*state.View, *state.Workload) {
	b := state.NewBuilder("")
	src := &state.Workload{UID: "c//Pod/a/src", Namespace: "a", Addresses: []netip.Addr{netip.MustParseAddr("10.9.0.1")},
		Protocol: state.HBONE}
	b.InsertWorkload(src)
	for i := range n {
		host := fmt.Sprint("svc", i/10)
		if i%10 == 0 {
			s := &state.Service{Namespace: "a", Hostname: host, VIPs: []state.NetworkAddress{{Addr: wideAddr(8, i/10)}},
				Ports: state.PortMap{{Service: 80, Target: 8080}}}
			if i/10%2 == 1 {
				s.LoadBalancer = &state.LoadBalancer{Mode: state.LBFailover, Preferences: []state.Scope{state.ScopeNetwork,
					state.ScopeRegion, state.ScopeZone}}
			}
			b.InsertService(s)
		}
		b.InsertWorkload(&state.Workload{UID: fmt.Sprint("c//Pod/a/", i), Name: fmt.Sprint(i), Namespace: "a", Capacity: 1,
			Protocol: state.HBONE, Addresses: []netip.Addr{wideAddr(16, i)},
			Services: []state.WorkloadService{{Service: state.ServiceKey{Namespace: "a", Hostname: host}}}})
	}
	return b.Build(), src
}

func wideAddr(net byte, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, net + byte(i>>16), byte(i >> 8), byte(i)})
}

// BenchmarkDecide100k: under 2 us each with 100,000 workloads (issue 5). "map" is one look-up in a bare map of them.
func BenchmarkDecide100k(b *testing.B) {
	const n = 100_000
	v, src := wideMesh(n)
	bare := make(map[state.NetworkAddress]*state.Workload, n)
	var dsts [4][]netip.AddrPort
	for i := range n {
		w := v.WorkloadByAddr("", wideAddr(16, i))
		bare[state.NetworkAddress{Addr: w.Addresses[0]}] = w
		dsts[0] = append(dsts[0], netip.AddrPortFrom(w.Addresses[0], 80))
		dsts[1+i/10%2] = append(dsts[1+i/10%2], netip.AddrPortFrom(wideAddr(8, i/10), 80))
		dsts[3] = append(dsts[3], netip.AddrPortFrom(wideAddr(100, i), 80))
	}
	for _, l := range dsts {
		rand.Shuffle(len(l), func(i, j int) { l[i], l[j] = l[j], l[i] })
	}
	b.Run("map", func(b *testing.B) {
		b.ReportAllocs()
		found := 0
		for i := 0; b.Loop(); i++ {
			if bare[state.NetworkAddress{Addr: dsts[0][i%n].Addr()}] != nil {
				found++
			}
		}
		if found == 0 {
			b.Fatal("nothing found")
		}
	})
	for i, name := range []string{"pod", "service", "ranked", "unknown"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			q := route.Question{Source: src, SrcIP: src.Addresses[0], Rand: rand.Uint64N}
			for j := 0; b.Loop(); j++ {
				q.Dst = dsts[i][j%len(dsts[i])]
				if _, err := route.Decide(v, q); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestSpread: over 10,000 connections every endpoint gets its share, within 5 %.
func TestSpread(t *testing.T) {
	b := state.NewBuilder("")
	src := &state.Workload{UID: "src", Namespace: "a", Addresses: []netip.Addr{netip.MustParseAddr("10.9.0.1")}}
	b.InsertWorkload(src)
	b.InsertService(&state.Service{Namespace: "a", Hostname: "svc", VIPs: []state.NetworkAddress{{Addr: wideAddr(8, 0)}},
		Ports: state.PortMap{{Service: 80, Target: 8080}}})
	const endpoints = 4
	for i := range endpoints {
		b.InsertWorkload(&state.Workload{UID: fmt.Sprint(i), Namespace: "a", Capacity: uint32(i + 1),
			Addresses: []netip.Addr{wideAddr(16, i)},
			Services:  []state.WorkloadService{{Service: state.ServiceKey{Namespace: "a", Hostname: "svc"}}}})
	}
	v := b.Build()
	random := rand.New(rand.NewPCG(1, 2)) // always the same draws: no luck involved
	got := map[string]int{}
	const picks = 10_000
	for range picks {
		d, err := route.Decide(v, route.Question{Source: src, Dst: netip.AddrPortFrom(wideAddr(8, 0), 80),
			Rand: random.Uint64N})
		if err != nil {
			t.Fatal(err)
		}
		got[d.Workload.UID]++
	}
	for i := range endpoints {
		want := float64(picks) * float64(i+1) / 10
		if n := float64(got[fmt.Sprint(i)]); n < 0.95*want || n > 1.05*want {
			t.Errorf("endpoint %d got %v connections, want %v within 5 %%", i, n, want)
		}
	}
}

// TestManyEndpoints: beyond those whose ranks are remembered the choice is the same, and what may not be chosen is not.
func TestManyEndpoints(t *testing.T) {
	b := state.NewBuilder("")
	src := &state.Workload{UID: "src", Namespace: "a", Locality: state.Locality{Region: "r1"}}
	b.InsertService(&state.Service{Namespace: "a", Hostname: "svc", VIPs: []state.NetworkAddress{{Addr: wideAddr(8, 0)}},
		Ports:        state.PortMap{{Service: 80, Target: 8080}},
		LoadBalancer: &state.LoadBalancer{Mode: state.LBFailover, Preferences: []state.Scope{state.ScopeRegion}}})
	const endpoints = 300
	want := map[string]bool{}
	for i := range endpoints {
		w := &state.Workload{UID: fmt.Sprintf("%04d", i), Name: fmt.Sprint(i), Namespace: "a", Capacity: 1,
			Addresses: []netip.Addr{wideAddr(16, i)},
			Services:  []state.WorkloadService{{Service: state.ServiceKey{Namespace: "a", Hostname: "svc"}}}}
		switch {
		case i%3 == 0:
			w.Locality.Region = "r1"
			want[w.UID] = true
		case i%3 == 1:
			w.Addresses = nil // nothing to send to
			w.Locality.Region = "r1"
		}
		b.InsertWorkload(w)
	}
	v := b.Build()
	n := uint64(0)
	for range endpoints / 3 {
		d, err := route.Decide(v, route.Question{Source: src, Dst: netip.AddrPortFrom(wideAddr(8, 0), 80),
			Rand: func(total uint64) uint64 {
				if total != uint64(endpoints/3) {
					t.Fatalf("drawn among %d", total)
				}
				n++
				return n - 1
			}})
		if err != nil || !want[d.Workload.UID] {
			t.Fatalf("%v, %+v", err, d.Workload)
		}
		delete(want, d.Workload.UID)
	}
	if len(want) > 0 {
		t.Errorf("never chosen: %v", want)
	}
}

// TestFailover: a locality dies, its traffic goes to the next one; it comes back, and so does the traffic.
func TestFailover(t *testing.T) {
	b := state.NewBuilder("")
	src := &state.Workload{UID: "src", Namespace: "a", Locality: state.Locality{Region: "r1", Zone: "z1"}}
	b.InsertWorkload(src)
	b.InsertService(&state.Service{Namespace: "a", Hostname: "svc", VIPs: []state.NetworkAddress{{Addr: wideAddr(8, 0)}},
		Ports: state.PortMap{{Service: 80, Target: 8080}},
		LoadBalancer: &state.LoadBalancer{Mode: state.LBFailover, Preferences: []state.Scope{state.ScopeNetwork,
			state.ScopeRegion, state.ScopeZone}}})
	put := func(i int, l state.Locality, s state.Status) {
		b.InsertWorkload(&state.Workload{UID: fmt.Sprint(i), Namespace: "a", Capacity: 1, Locality: l, Status: s,
			Addresses: []netip.Addr{wideAddr(16, i)},
			Services:  []state.WorkloadService{{Service: state.ServiceKey{Namespace: "a", Hostname: "svc"}}}})
	}
	near, next, far := state.Locality{Region: "r1", Zone: "z1"}, state.Locality{Region: "r1", Zone: "z2"},
		state.Locality{Region: "r2", Zone: "z1"}
	for i, l := range []state.Locality{near, near, next, next, far, far} {
		put(i, l, state.Healthy)
	}
	expect := func(what string, want ...string) {
		t.Helper()
		v := b.Build()
		got := map[string]bool{}
		for range 200 {
			d, err := route.Decide(v, route.Question{Source: src, Dst: netip.AddrPortFrom(wideAddr(8, 0), 80),
				Rand: rand.Uint64N})
			if err != nil {
				if len(want) > 0 || !errors.Is(err, &route.Error{Code: route.NoHealthyUpstream}) {
					t.Fatal(what, err)
				}
				return
			}
			got[d.Workload.UID] = true
		}
		for _, uid := range want {
			if !got[uid] || len(got) != len(want) {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
	}
	expect("all is well", "0", "1")
	put(0, near, state.Unhealthy)
	expect("one of the zone's endpoints is sick", "1")
	put(1, near, state.Unhealthy)
	expect("the zone is dead", "2", "3")
	b.RemoveWorkload("2")
	b.RemoveWorkload("3")
	expect("the region is dead", "4", "5")
	put(4, far, state.Unhealthy)
	put(5, far, state.Unhealthy)
	expect("all is dead")
	put(2, next, state.Healthy)
	expect("the region is back", "2")
	put(1, near, state.Healthy)
	expect("the zone is back", "1")
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 1000} {
		v, src := bigMesh(n)
		for name, dst := range map[string]string{"pod": "10.1.0.1:80", "service": "10.8.0.1:80", "ranked": "10.8.0.2:80",
			"unknown": "1.2.3.4:80"} {
			q := route.Question{Source: src, SrcIP: src.Addresses[0], Dst: netip.MustParseAddrPort(dst), Rand: rand.Uint64N}
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := route.Decide(v, q); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// A decision costs no memory; what a CONNECT is made of is spelt out when it is asked for.
func TestDecideAllocatesNothing(t *testing.T) {
	v, src := bigMesh(100)
	for _, dst := range []string{"10.1.0.1:80", "10.8.0.1:80", "10.8.0.2:80", "1.2.3.4:80"} {
		q := route.Question{Source: src, SrcIP: src.Addresses[0], Dst: netip.MustParseAddrPort(dst), Rand: rand.Uint64N}
		if n := testing.AllocsPerRun(100, func() { _, _ = route.Decide(v, q) }); n > 0 {
			t.Errorf("%s: %v allocations", dst, n)
		}
	}
}

// TestAvoid: endpoints that are to be avoided are not chosen, whether any is as good as any other or not; when none
// is left there is none.
func TestAvoid(t *testing.T) {
	for _, uniform := range []bool{true, false} {
		b := state.NewBuilder("")
		src := &state.Workload{UID: "src", Name: "src", Namespace: "n",
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Capacity: 1}
		b.InsertWorkload(src)
		key := state.ServiceKey{Namespace: "n", Hostname: "s"}
		ports := state.SortPorts([]state.PortPair{{Service: 80, Target: 8080}})
		b.InsertService(&state.Service{Name: "s", Namespace: "n", Hostname: "s", Ports: ports,
			VIPs: []state.NetworkAddress{{Addr: netip.MustParseAddr("10.9.0.1")}}})
		uids := []string{"e0", "e1", "e2"}
		for i, uid := range uids {
			w := &state.Workload{UID: uid, Name: uid, Namespace: "n",
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})}, Capacity: 1,
				Services: []state.WorkloadService{{Service: key, Ports: ports}}}
			if !uniform && i == 0 {
				w.Capacity = 2
			}
			b.InsertWorkload(w)
		}
		avoided := map[string]bool{}
		q := route.Question{Source: src, SrcIP: src.Addresses[0], Dst: netip.MustParseAddrPort("10.9.0.1:80"),
			Rand:  rand.Uint64N,
			Avoid: func(w *state.Workload) bool { return avoided[w.UID] }}
		v := b.Build()
		for range uids {
			for range 20 {
				d, err := route.Decide(v, q)
				if err != nil || avoided[d.Workload.UID] || !d.Alternatives() {
					t.Fatalf("uniform %v, avoiding %v: %+v, %v", uniform, avoided, d.Workload, err)
				}
			}
			d, _ := route.Decide(v, q)
			avoided[d.Workload.UID] = true
		}
		if d, err := route.Decide(v, q); !errors.Is(err, &route.Error{Code: route.NoHealthyUpstream}) {
			t.Errorf("uniform %v, all avoided: %+v, %v", uniform, d.Workload, err)
		}
		q.Dst = netip.MustParseAddrPort("10.0.1.0:8080")
		if d, err := route.Decide(v, q); err != nil || d.Workload.UID != "e0" || d.Alternatives() {
			t.Errorf("called by its own address: %+v, %v", d.Workload, err)
		}
	}
}
