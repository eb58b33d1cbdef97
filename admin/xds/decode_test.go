package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/workloadpb"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func workloadAddress(w *workloadpb.Workload) *workloadpb.Address {
	return &workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: w}}
}

func serviceAddress(s *workloadpb.Service) *workloadpb.Address {
	return &workloadpb.Address{Type: &workloadpb.Address_Service{Service: s}}
}

var ignoreServiceInternals = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool {
		return a == b
	}), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.FilterPath(func(p cmp.Path) bool {
		return p.Last().String() == ".seq" || p.Last().String() == ".uniform" || p.Last().String() == ".SANs"
	}, cmp.Ignore()),
	cmp.AllowUnexported(state.Service{}, identity.ID{}),
}

// Every field of a workload.
func TestDecodeWorkload(t *testing.T) {
	x := &workloadpb.Workload{
		Uid: "c//Pod/ns/pod", Name: "pod", Namespace: "ns",
		Addresses: [][]byte{{10, 0, 0, 1}, netip.MustParseAddr("2001:db8::1").AsSlice(),
			netip.MustParseAddr("::ffff:10.0.0.2").AsSlice()},
		Network: "net", TunnelProtocol: workloadpb.TunnelProtocol_HBONE, TrustDomain: "td", ServiceAccount: "sa",
		Waypoint: &workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Hostname{
			Hostname: &workloadpb.NamespacedHostname{Namespace: "ns", Hostname: "wp.ns"}}, HboneMtlsPort: 15008},
		NetworkGateway: &workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Address{
			Address: &workloadpb.NetworkAddress{Network: "other", Address: []byte{9, 9, 9, 9}}}, HboneMtlsPort: 15009},
		Node: "node", CanonicalName: "cn", CanonicalRevision: "v2", WorkloadType: workloadpb.WorkloadType_CRONJOB,
		WorkloadName: "wn", NativeTunnel: true,
		AuthorizationPolicies: []string{"ns/a", "ns/b"}, Status: workloadpb.WorkloadStatus_UNHEALTHY, ClusterId: "c2",
		Hostname: "h.example",
		Services: map[string]*workloadpb.PortList{
			"ns/b.svc": {Ports: []*workloadpb.Port{{ServicePort: 443, TargetPort: 8443}, {ServicePort: 80, TargetPort: 1},
				{ServicePort: 80, TargetPort: 8080}}},
			"ns/a.svc": {},
		},
		ApplicationTunnel: &workloadpb.ApplicationTunnel{Protocol: workloadpb.ApplicationTunnel_PROXY, Port: 7},
		Locality:          &workloadpb.Locality{Region: "r", Zone: "z", Subzone: "s"},
		NetworkMode:       workloadpb.NetworkMode_HOST_NETWORK,
		Capacity:          wrapperspb.UInt32(0), Extensions: []*workloadpb.Extension{{Name: "ignored"}},
	}
	want := &state.Workload{
		UID: "c//Pod/ns/pod", Name: "pod", Namespace: "ns", TrustDomain: "td", ServiceAccount: "sa", Network: "net",
		WorkloadName: "wn", WorkloadType: "cronjob", CanonicalName: "cn", CanonicalRevision: "v2", Hostname: "h.example",
		Node: "node", ClusterID: "c2",
		Locality: state.Locality{Region: "r", Zone: "z", Subzone: "s"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1"),
			netip.MustParseAddr("10.0.0.2")},
		Services: []state.WorkloadService{
			{Service: state.ServiceKey{Namespace: "ns", Hostname: "a.svc"}},
			{Service: state.ServiceKey{Namespace: "ns", Hostname: "b.svc"}, Ports: state.PortMap{{Service: 80, Target: 8080},
				{Service: 443, Target: 8443}}},
		},
		AuthorizationPolicies: []string{"ns/a", "ns/b"},
		Waypoint:              &state.GatewayAddress{Host: state.ServiceKey{Namespace: "ns", Hostname: "wp.ns"}, Port: 15008},
		NetworkGateway: &state.GatewayAddress{Addr: state.NetworkAddress{Network: "other",
			Addr: netip.MustParseAddr("9.9.9.9")}, Port: 15009},
		Tunnel: state.ApplicationTunnel{Protocol: state.TunnelProxy, Port: 7}, Protocol: state.HBONE,
		NetworkMode: state.HostNetwork, Status: state.Unhealthy, NativeTunnel: true,
	}
	var d decoder
	for range 2 { // the second time from the caches
		got, s, err := d.address("c//Pod/ns/pod", marshal(t, workloadAddress(x)))
		if err != nil || s != nil {
			t.Fatal(s, err)
		}
		if diff := cmp.Diff(want, got, ignoreServiceInternals); diff != "" {
			t.Fatal(diff)
		}
	}
}

// Where HBONE for a workload arrives is an extension of ours, which is refused where it is nonsense: a workload that
// nobody reaches is no better.
func TestMeshAddresses(t *testing.T) {
	ext := func(m proto.Message) *workloadpb.Extension {
		config, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		return &workloadpb.Extension{Name: MeshExtension, Config: config}
	}
	at := func(ip string, port uint32) *workloadpb.Extension {
		return ext(&workloadpb.GatewayAddress{HboneMtlsPort: port, Destination: &workloadpb.GatewayAddress_Address{
			Address: &workloadpb.NetworkAddress{Address: netip.MustParseAddr(ip).AsSlice()}}})
	}
	for name, c := range map[string]struct {
		in   []*workloadpb.Extension
		want string
	}{
		"both families": {[]*workloadpb.Extension{{Name: "other"}, at("::ffff:192.0.2.7", 15018), at("fd00::7", 1)},
			"[192.0.2.7:15018 [fd00::7]:1]"},
		"without config":      {[]*workloadpb.Extension{{Name: MeshExtension}}, "extension ztun.mesh-address"},
		"another message":     {[]*workloadpb.Extension{ext(&workloadpb.Locality{})}, "extension ztun.mesh-address"},
		"without address":     {[]*workloadpb.Extension{ext(&workloadpb.GatewayAddress{HboneMtlsPort: 1})}, "0 bytes"},
		"port 0":              {[]*workloadpb.Extension{at("192.0.2.7", 0)}, "192.0.2.7:0 is nowhere to connect to"},
		"a port of 17 bits":   {[]*workloadpb.Extension{at("192.0.2.7", 1<<16)}, "hbone_mtls_port"},
		"anywhere":            {[]*workloadpb.Extension{at("::", 1)}, "[::]:1 is nowhere to connect to"},
		"twice in one family": {[]*workloadpb.Extension{at("192.0.2.7", 1), at("192.0.2.8", 1)}, "of one family"},
	} {
		var d decoder
		w, _, err := d.address("u", marshal(t, workloadAddress(&workloadpb.Workload{Uid: "u", Extensions: c.in})))
		got := fmt.Sprint(err)
		if err == nil {
			got = fmt.Sprint(w.MeshAddresses)
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// checklist 39: the defaults.
func TestDecodeWorkloadDefaults(t *testing.T) {
	var d decoder
	got, _, err := d.address("u", marshal(t, workloadAddress(&workloadpb.Workload{Uid: "u"})))
	if err != nil {
		t.Fatal(err)
	}
	want := &state.Workload{UID: "u", TrustDomain: "cluster.local", ServiceAccount: "default", ClusterID: "Kubernetes",
		WorkloadType: "deployment", Capacity: 1}
	if diff := cmp.Diff(want, got, ignoreServiceInternals); diff != "" {
		t.Fatal(diff)
	}
}

// Every field of a service; checklist 40 (VIPs and ranges).
func TestDecodeService(t *testing.T) {
	vip := func(ip string, length ...uint32) *workloadpb.NetworkAddress {
		a := &workloadpb.NetworkAddress{Network: "net", Address: netip.MustParseAddr(ip).AsSlice()}
		if len(length) > 0 {
			a.Length = &length[0]
		}
		return a
	}
	gw := &workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Address{
		Address: &workloadpb.NetworkAddress{Address: []byte{1, 1, 1, 1}}}, HboneMtlsPort: 15008}
	x := &workloadpb.Service{
		Name: "a", Namespace: "ns", Hostname: "a.svc",
		Addresses: []*workloadpb.NetworkAddress{vip("10.1.0.1"), vip("10.1.0.2", 32), vip("10.2.0.0", 24),
			vip("2001:db8::2", 128),
			vip("2001:db8::", 64), vip("0.0.0.0", 0), vip("::ffff:10.3.0.0", 112), vip("::ffff:10.1.0.3", 128)},
		Ports:           []*workloadpb.Port{{ServicePort: 80}, {ServicePort: 443, TargetPort: 8443}},
		SubjectAltNames: []string{"spiffe://td/ns/x/sa/y"},
		Waypoint:        gw, WeightedWaypoints: []*workloadpb.WeightedWaypoint{{Destination: gw, Weight: 3},
			{Destination: gw}},
		LoadBalancing: &workloadpb.LoadBalancing{RoutingPreference: []workloadpb.LoadBalancing_Scope{
			workloadpb.LoadBalancing_NETWORK, workloadpb.LoadBalancing_NODE},
			Mode: workloadpb.LoadBalancing_FAILOVER, HealthPolicy: workloadpb.LoadBalancing_ALLOW_ALL},
		IpFamilies: workloadpb.IPFamilies_DUAL, Canonical: true, IngressUseWaypoint: true,
		Visibility: workloadpb.Service_NAMESPACE,
	}
	addr := func(s string) state.NetworkAddress {
		return state.NetworkAddress{Network: "net", Addr: netip.MustParseAddr(s)}
	}
	cidr := func(s string) state.NetworkPrefix {
		return state.NetworkPrefix{Network: "net", Prefix: netip.MustParsePrefix(s)}
	}
	wantGW := state.GatewayAddress{Addr: state.NetworkAddress{Addr: netip.MustParseAddr("1.1.1.1")}, Port: 15008}
	want := &state.Service{
		Name: "a", Namespace: "ns", Hostname: "a.svc",
		VIPs: []state.NetworkAddress{addr("10.1.0.1"), addr("10.1.0.2"), addr("2001:db8::2"), addr("10.1.0.3")},
		CIDRVIPs: []state.NetworkPrefix{cidr("10.2.0.0/24"), cidr("2001:db8::/64"), cidr("0.0.0.0/0"),
			cidr("10.3.0.0/16")},
		Ports:           state.PortMap{{Service: 80}, {Service: 443, Target: 8443}},
		SubjectAltNames: []string{"spiffe://td/ns/x/sa/y"},
		Waypoint:        &wantGW, WeightedWaypoints: []state.WeightedWaypoint{{Destination: wantGW, Weight: 3},
			{Destination: wantGW}},
		LoadBalancer: &state.LoadBalancer{Preferences: []state.Scope{state.ScopeNetwork, state.ScopeNode},
			Mode: state.LBFailover, HealthPolicy: state.AllowAll},
		IPFamilies: state.FamiliesDual, Canonical: true, Visibility: state.NamespaceOnly,
	}
	var d decoder
	w, got, err := d.address("ns/a.svc", marshal(t, serviceAddress(x)))
	if err != nil || w != nil {
		t.Fatal(w, err)
	}
	if diff := cmp.Diff(want, got, ignoreServiceInternals); diff != "" {
		t.Fatal(diff)
	}
}

// checklist 37: unknown numbers that are taken for something else, as in ztunnel.
func TestDecodeUnknownTaken(t *testing.T) {
	var d decoder
	w, _, err := d.address("u", marshal(t, workloadAddress(&workloadpb.Workload{Uid: "u", WorkloadType: 99})))
	if err != nil || w.WorkloadType != "deployment" {
		t.Error(w, err)
	}
	_, s, err := d.address("n/h",
		marshal(t, serviceAddress(&workloadpb.Service{Namespace: "n", Hostname: "h", Visibility: 9})))
	if err != nil || s.Visibility != state.Public {
		t.Error(s, err)
	}
	_, s, err = d.address("n/h",
		marshal(t,
			serviceAddress(&workloadpb.Service{Namespace: "n", Hostname: "h", LoadBalancing: &workloadpb.LoadBalancing{}})))
	if err != nil || s.LoadBalancer == nil || s.LoadBalancer.Mode != state.LBStandard {
		t.Error(s, err)
	}
}

// What is refused, with a reason that names the field. Checklist 26 (neither
// set), 37, 38, 40.
func TestDecodeRefused(t *testing.T) {
	w := func(change func(*workloadpb.Workload)) *workloadpb.Address {
		x := &workloadpb.Workload{Uid: "u"}
		change(x)
		return workloadAddress(x)
	}
	s := func(change func(*workloadpb.Service)) *workloadpb.Address {
		x := &workloadpb.Service{Namespace: "n", Hostname: "h"}
		change(x)
		return serviceAddress(x)
	}
	gw := func(g *workloadpb.GatewayAddress) *workloadpb.Address {
		return w(func(x *workloadpb.Workload) { x.Waypoint = g })
	}
	vip := func(b []byte, length uint32) *workloadpb.Address {
		return s(func(x *workloadpb.Service) {
			x.Addresses = []*workloadpb.NetworkAddress{{Address: b, Length: &length}}
		})
	}
	for _, c := range []struct {
		name string
		a    *workloadpb.Address
		want string
	}{
		{"26 neither", &workloadpb.Address{}, "neither a workload nor a service"},
		{"no uid", w(func(x *workloadpb.Workload) { x.Uid = "" }), "without uid"},
		{"37 legacy tunnel", w(func(x *workloadpb.Workload) { x.TunnelProtocol = 2 }), "tunnel_protocol LEGACY_ISTIO_MTLS"},
		{"unknown tunnel", w(func(x *workloadpb.Workload) { x.TunnelProtocol = 9 }), "tunnel_protocol 9"},
		{"status", w(func(x *workloadpb.Workload) { x.Status = 7 }), "status 7"},
		{"network mode", w(func(x *workloadpb.Workload) { x.NetworkMode = 2 }), "network_mode 2"},
		{"38 five bytes", w(func(x *workloadpb.Workload) {
			x.Addresses = [][]byte{{1, 2, 3, 4, 5}}
		}), "addresses: an address of 5 bytes"},
		{"no bytes", w(func(x *workloadpb.Workload) { x.Addresses = [][]byte{{}} }), "addresses: an address of 0 bytes"},
		{"38 key without slash", w(func(x *workloadpb.Workload) {
			x.Services = map[string]*workloadpb.PortList{"nohost": {}}
		}), `services: "nohost" is not namespace/hostname`},
		{"big port", w(func(x *workloadpb.Workload) {
			x.Services = map[string]*workloadpb.PortList{"n/h": {Ports: []*workloadpb.Port{{ServicePort: 1, TargetPort: 65536}}}}
		}), `services: "n/h": port 65536 is out of range`},
		{"app tunnel", w(func(x *workloadpb.Workload) {
			x.ApplicationTunnel = &workloadpb.ApplicationTunnel{Protocol: 5}
		}), "application_tunnel: unknown protocol 5"},
		{"app tunnel port", w(func(x *workloadpb.Workload) {
			x.ApplicationTunnel = &workloadpb.ApplicationTunnel{Port: 1 << 20}
		}), "application_tunnel: port 1048576"},
		{"gateway without destination", gw(&workloadpb.GatewayAddress{HboneMtlsPort: 1}), "waypoint: no destination"},
		{"gateway without host",
			gw(
				&workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Hostname{
					Hostname: &workloadpb.NamespacedHostname{Namespace: "n"}}}), "waypoint: empty hostname"},
		{"gateway address",
			gw(
				&workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Address{
					Address: &workloadpb.NetworkAddress{Address: []byte{1}}}}), "waypoint: an address of 1 bytes"},
		{"gateway port", gw(&workloadpb.GatewayAddress{HboneMtlsPort: 99999}), "waypoint: hbone_mtls_port: port 99999"},
		{"network gateway", w(func(x *workloadpb.Workload) {
			x.NetworkGateway = &workloadpb.GatewayAddress{}
		}), "network_gateway: no destination"},
		{"no hostname", s(func(x *workloadpb.Service) { x.Hostname = "" }), "without hostname"},
		{"families", s(func(x *workloadpb.Service) { x.IpFamilies = 4 }), "ip_families 4"},
		{"40 length 33", vip([]byte{1, 2, 3, 4}, 33), "addresses: prefix length 33 of 1.2.3.4 (at most 32)"},
		{"length 256", vip([]byte{1, 2, 3, 4}, 256), "prefix length 256"},
		{"length 129", vip(make([]byte, 16), 129), "prefix length 129"},
		{"mapped and wide", vip(netip.MustParseAddr("::ffff:1.2.3.4").AsSlice(), 90), "at least 96"},
		{"VIP bytes", vip([]byte{1, 2, 3}, 24), "an address of 3 bytes"},
		{"service port", s(func(x *workloadpb.Service) {
			x.Ports = []*workloadpb.Port{{ServicePort: 70000}}
		}), "ports: port 70000"},
		{"service waypoint", s(func(x *workloadpb.Service) {
			x.Waypoint = &workloadpb.GatewayAddress{}
		}), "waypoint: no destination"},
		{"weighted", s(func(x *workloadpb.Service) {
			x.WeightedWaypoints = []*workloadpb.WeightedWaypoint{{Weight: 1}}
		}), "weighted_waypoints: no destination"},
		{"37 health policy", s(func(x *workloadpb.Service) {
			x.LoadBalancing = &workloadpb.LoadBalancing{HealthPolicy: 9}
		}), "load_balancing: unknown health_policy 9"},
		{"mode", s(func(x *workloadpb.Service) {
			x.LoadBalancing = &workloadpb.LoadBalancing{Mode: 9}
		}), "load_balancing: unknown mode 9"},
		{"unspecified scope", s(func(x *workloadpb.Service) {
			x.LoadBalancing = &workloadpb.LoadBalancing{RoutingPreference: []workloadpb.LoadBalancing_Scope{0}}
		}), "unknown routing_preference UNSPECIFIED_SCOPE"},
		{"unknown scope", s(func(x *workloadpb.Service) {
			x.LoadBalancing = &workloadpb.LoadBalancing{RoutingPreference: []workloadpb.LoadBalancing_Scope{7}}
		}), "unknown routing_preference 7"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d decoder
			gotW, gotS, err := d.address("x", marshal(t, c.a))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("%v, want %q", err, c.want)
			}
			if gotW != nil || gotS != nil {
				t.Fatal("a result in spite of the error", gotW, gotS)
			}
		})
	}
}

// Interned values are shared, and the caches stay within their bounds.
func TestDecodeShares(t *testing.T) {
	var d decoder
	var first *state.Workload
	for i := range 3 {
		x := meshPod(i)
		x.Waypoint = &workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Hostname{
			Hostname: &workloadpb.NamespacedHostname{Hostname: "w"}}}
		w, _, err := d.address(x.Uid, marshal(t, workloadAddress(x)))
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = w
			continue
		}
		if w.Waypoint != first.Waypoint || &w.Services[0] != &first.Services[0] {
			t.Fatal("not shared")
		}
	}
	var c cache[int, int]
	for i := range 5 * cacheMax {
		c.put(i, i)
		if _, ok := c.get(0); !ok && i < cacheMax {
			t.Fatal("forgotten early")
		}
	}
	if n := len(c.young) + len(c.old); n > 2*cacheMax {
		t.Fatalf("%d values", n)
	}
	if v, ok := c.get(0); !ok || v != 0 {
		t.Fatal("a value that is asked for all the time was forgotten")
	}
}

// The hand-written reading of responses agrees with the generated one wherever
// that accepts the bytes, and never reads anything else into them.
func FuzzResponse(f *testing.F) {
	f.Add(marshal(f, &discoverypb.DeltaDiscoveryResponse{
		SystemVersionInfo: "i", TypeUrl: TypeAddress, Nonce: "n", RemovedResources: []string{"a", "n/h"},
		Resources: []*discoverypb.Resource{
			workloadResource(meshPod(1), "1f"), serviceResource(meshService(0), ""),
			{Name: "x", Version: "v", Aliases: []string{"/10.0.0.1", "b"}, Ttl: durationpb.New(5)},
			{Name: "y", Resource: &anypb.Any{}},
		},
	}))
	f.Add(
		marshal(f, &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAuthorization,
			Resources: []*discoverypb.Resource{{Name: "n/p", Resource: &anypb.Any{Value: fullPolicy(f)}}}}))
	f.Add([]byte{0x12, 0x80})
	f.Add(protowire.AppendVarint([]byte{0x12}, 1<<40))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseMessage(raw)
		var want discoverypb.DeltaDiscoveryResponse
		if proto.Unmarshal(raw, &want) == nil {
			if err != nil {
				t.Fatal(err)
			}
			compareMessages(t, &m, &want)
		}
		if err != nil {
			return
		}
		// Whatever it says, taking it in works, and so does what follows.
		s := newStore("", nil)
		if _, ok := s.kept[m.typeURL]; !ok {
			return
		}
		a := s.apply(&m)
		if (a.nack == "") != (a.refused == 0) || strings.Contains(a.nack, "panic") {
			t.Fatal(a)
		}
		s.b.Build()
		if b := s.apply(&m); b.refused != a.refused {
			t.Fatal(a, b)
		}
		s.b.Build()
	})
}

func compareMessages(t *testing.T, m *message, want *discoverypb.DeltaDiscoveryResponse) {
	t.Helper()
	if m.typeURL != want.TypeUrl || m.nonce != want.Nonce || m.resources != len(want.Resources) ||
		m.removed != len(want.RemovedResources) {
		t.Fatalf("%+v, want %v", m, want)
	}
	i := 0
	m.each(func(r resource) {
		w := want.Resources[i]
		i++
		var aliases []string
		r.aliases(func(a string) { aliases = append(aliases, a) })
		if r.name != w.Name || string(r.version) != w.Version || r.given != (w.Resource != nil) ||
			string(r.payload) != string(w.GetResource().GetValue()) || !cmp.Equal(aliases, w.Aliases) {
			t.Fatalf("%+v, want %v", r, w)
		}
		if r.err != nil && r.name != "" && r.given {
			t.Fatal(r.err)
		}
	})
	i = 0
	m.eachRemoved(func(n string) {
		if n != want.RemovedResources[i] {
			t.Fatal(n, want.RemovedResources)
		}
		i++
	})
}

// An Address decodes to a whole workload or service, or to an error.
func FuzzAddress(f *testing.F) {
	f.Add(marshal(f, workloadAddress(meshPod(7))))
	f.Add(marshal(f, serviceAddress(meshService(7))))
	f.Add(
		marshal(f, workloadAddress(&workloadpb.Workload{Uid: "u", Services: map[string]*workloadpb.PortList{"a/b": nil},
			Capacity: wrapperspb.UInt32(9)})))
	f.Fuzz(func(t *testing.T, payload []byte) {
		var d decoder
		w, s, err := d.address("n/h", payload)
		if n := btoi(w != nil) + btoi(s != nil) + btoi(err != nil); n != 1 {
			t.Fatal(w, s, err)
		}
		switch {
		case w != nil:
			if w.UID == "" || w.TrustDomain == "" || w.ServiceAccount == "" || w.ClusterID == "" || w.WorkloadType == "" {
				t.Fatalf("%+v", w)
			}
			for _, a := range w.Addresses {
				if !a.IsValid() || a.Is4In6() {
					t.Fatal(a)
				}
			}
		case s != nil:
			for _, c := range s.CIDRVIPs {
				if !c.Prefix.IsValid() || c.Prefix.IsSingleIP() {
					t.Fatal(c)
				}
			}
		}
	})
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestMappedPrefix: a range of IPv4 addresses in IPv6 clothes, down to all of them and not beyond.
func TestMappedPrefix(t *testing.T) {
	mapped, plain := netip.MustParseAddr("::ffff:1.2.3.4").AsSlice(), netip.MustParseAddr("2001:db8::1").AsSlice()
	for _, c := range []struct {
		addr   []byte
		length uint32
		want   string // "": refused
	}{
		{mapped, 128, "1.2.3.4/32"}, {mapped, 120, "1.2.3.4/24"}, {mapped, 97, "1.2.3.4/1"}, {mapped, 96, "1.2.3.4/0"},
		{mapped, 95, ""}, {mapped, 0, ""}, {mapped, 129, ""},
		{plain, 128, "2001:db8::1/128"}, {plain, 95, "2001:db8::1/95"}, {plain, 0, "2001:db8::1/0"}, {plain, 129, ""},
		{plain[:4], 32, "32.1.13.184/32"}, {plain[:4], 0, "32.1.13.184/0"}, {plain[:4], 33, ""}, {plain[:5], 0, ""},
		{nil, 0, ""},
	} {
		got, err := prefix(c.addr, c.length)
		if (err == nil) != (c.want != "") || err == nil && got.String() != c.want {
			t.Errorf("%x/%d: %v %v, want %q", c.addr, c.length, got, err, c.want)
		}
	}
}
