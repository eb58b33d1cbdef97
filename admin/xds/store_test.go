package xds

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/anypb"
	"pgregory.net/rapid"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/securitypb"
	"ztun/admin/pb/workloadpb"
	"ztun/proxy/state"
)

// res is a resource as the model server has it.
type res struct {
	name, version string
	payload       []byte
}

// oracle is what the client should know: the last good version of each name, in
// the order in which state counts them.
type oracle struct{ list []res }

func (o *oracle) del(name string) {
	o.list = slices.DeleteFunc(slices.Clone(o.list), func(r res) bool { return r.name == name })
}

// set replaces services in their place, and puts workloads at the end: the last
// of several workloads with an address has it.
func (o *oracle) set(r res) {
	for i, old := range o.list {
		if old.name != r.name {
			continue
		}
		_, a, _ := new(decoder).address(old.name, old.payload)
		_, b, _ := new(decoder).address(r.name, r.payload)
		if a != nil && b != nil && a.Key() == b.Key() {
			o.list[i] = r
			return
		}
	}
	o.del(r.name)
	o.list = append(o.list, r)
}

// view builds the whole from scratch.
func view(addresses, policies *oracle) *state.View {
	b := state.NewBuilder("")
	for _, r := range addresses.list {
		w, s, err := new(decoder).address(r.name, r.payload)
		switch {
		case err != nil:
			panic(err)
		case w != nil:
			b.InsertWorkload(w)
		default:
			b.InsertService(s)
		}
	}
	for _, r := range policies.list {
		p, _, err := new(decoder).policy(r.name, r.payload)
		if err != nil {
			panic(err)
		}
		b.InsertPolicy(p)
	}
	return b.Build()
}

// answers writes down all that a View says.
func answers(v *state.View) string {
	var b bytes.Buffer
	for _, f := range []func() error{
		func() error { return WriteWorkloads(&b, v) }, func() error { return WriteServices(&b, v) },
		func() error { return WritePolicies(&b, v) }, func() error { return WriteStaged(&b, v) },
	} {
		if err := f(); err != nil {
			panic(err)
		}
		b.WriteByte('\n')
	}
	for i := range 4 {
		for _, ip := range []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}),
			netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})} {
			w, s := v.FindAddress("", ip, "ns0")
			vip := v.ServiceByVIP("", ip, "ns1")
			fmt.Fprintf(&b, "%v: ", ip)
			if w != nil {
				fmt.Fprintf(&b, "workload %s policies %d ", w.UID, len(v.PoliciesFor(w)))
			}
			if s != nil {
				fmt.Fprintf(&b, "service %v ", s.Key())
			}
			if vip != nil {
				fmt.Fprintf(&b, "from ns1 %v", vip.Key())
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// drawAddress makes up a new version of a name; bad ones are refused.
func drawAddress(t *rapid.T, name string) []byte {
	byteIn := func(label string, n int) byte { return byte(rapid.IntRange(0, n-1).Draw(t, label)) }
	if rapid.IntRange(0, 9).Draw(t, "bad") == 0 {
		return rapid.SampledFrom(
			[][]byte{{0xff}, {}, marshal(t0, workloadAddress(&workloadpb.Workload{Uid: name, TunnelProtocol: 2}))}).Draw(t,
			"badness")
	}
	if ns, host, ok := strings.Cut(name, "/"); ok && !strings.Contains(host, "/") {
		s := &workloadpb.Service{Name: host, Namespace: ns, Hostname: host, Canonical: rapid.Bool().Draw(t, "canonical"),
			Addresses:  []*workloadpb.NetworkAddress{{Address: []byte{10, 1, 0, byteIn("vip", 4)}}},
			Visibility: workloadpb.Service_Visibility(byteIn("vis", 2))}
		if rapid.Bool().Draw(t, "cidr") {
			n := uint32(24 + byteIn("bits", 8))
			s.Addresses = append(s.Addresses, &workloadpb.NetworkAddress{Address: []byte{10, 1, 0, 0}, Length: &n})
		}
		if rapid.Bool().Draw(t, "all") {
			s.LoadBalancing = &workloadpb.LoadBalancing{HealthPolicy: 1}
		}
		return marshal(t0, serviceAddress(s))
	}
	uid := name
	if strings.HasPrefix(name, "odd") { // named by something else than its uid
		uid = fmt.Sprintf("c//Pod/%s/%d", name, byteIn("uid", 2))
	}
	w := &workloadpb.Workload{Uid: uid, Name: "w", Namespace: fmt.Sprintf("ns%d", byteIn("ns", 2)),
		Addresses:      [][]byte{{10, 0, 0, byteIn("ip", 4)}},
		TunnelProtocol: workloadpb.TunnelProtocol(byteIn("tunnel", 2)),
		Status:         workloadpb.WorkloadStatus(byteIn("status", 2)), Services: map[string]*workloadpb.PortList{}}
	for range byteIn("services", 3) {
		w.Services[fmt.Sprintf("ns%d/h%d", byteIn("sns", 2), byteIn("sh", 2))] =
			&workloadpb.PortList{Ports: []*workloadpb.Port{{ServicePort: 80, TargetPort: uint32(byteIn("port", 3))}}}
	}
	if rapid.Bool().Draw(t, "selected") {
		w.AuthorizationPolicies = []string{fmt.Sprintf("ns%d/p%d", byteIn("pns", 2), byteIn("p", 2))}
	}
	return marshal(t0, workloadAddress(w))
}

func drawPolicy(t *rapid.T, name string) []byte {
	ns, n, _ := strings.Cut(name, "/")
	x := policyPB(&securitypb.Match{DestinationPorts: []uint32{uint32(rapid.IntRange(1, 3).Draw(t, "port"))}})
	x.Name, x.Namespace = n, ns
	x.Scope = securitypb.Scope(rapid.IntRange(0, 3).Draw(t, "scope")) // 3 is refused
	return marshal(t0, x)
}

// t0 reports nothing: marshalling what the test itself made does not fail.
var t0 = new(testing.T)

var universe = map[string][]string{
	TypeAddress:       {"c//Pod/ns0/a", "c//Pod/ns0/b", "vm", "odd1", "odd2", "ns0/h0", "ns0/h1", "ns1/h0", "ns1/h1"},
	TypeAuthorization: {"ns0/p0", "ns0/p1", "ns1/p0", "ns1/p1"},
}

func good(typeURL string, r res) bool {
	if typeURL == TypeAuthorization {
		_, _, err := new(decoder).policy(r.name, r.payload)
		return err == nil
	}
	_, _, err := new(decoder).address(r.name, r.payload)
	return err == nil
}

// Random sequences of updates, removals, refused resources, reconnects, resets
// and servers that cannot take names, against a model of the server and of the
// client in which everything is rebuilt from scratch.
func TestStoreAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newStore("", nil)
		server := map[string]map[string]res{TypeAddress: {}, TypeAuthorization: {}}
		have := map[string]*oracle{TypeAddress: {}, TypeAuthorization: {}}
		version := 0

		// deliver gives a message to both.
		deliver := func(typeURL string, rs []res, removed []string) {
			r := &discoverypb.DeltaDiscoveryResponse{TypeUrl: typeURL, RemovedResources: removed}
			o, bad := have[typeURL], map[string]int{}
			for _, x := range rs {
				r.Resources = append(r.Resources, &discoverypb.Resource{Name: x.name, Version: x.version,
					Resource: &anypb.Any{Value: x.payload}})
				if good(typeURL, x) {
					o.set(x)
				} else {
					bad[x.name]++
				}
			}
			for _, n := range removed {
				o.del(n)
			}
			m, err := parseMessage(marshal(t0, r))
			if err != nil {
				t.Fatal(err)
			}
			a := s.apply(&m)
			for n := range bad {
				if !strings.Contains(a.nack, n+": ") {
					t.Fatalf("%q does not name %s", a.nack, n)
				}
			}
			if (a.nack != "") != (len(bad) > 0) {
				t.Fatalf("NACK %q, refused %v", a.nack, bad)
			}
		}
		// change draws a change of the server's state.
		change := func(typeURL string) (rs []res, removed []string) {
			for _, name := range rapid.SliceOfNDistinct(rapid.SampledFrom(universe[typeURL]), 0, 4, rapid.ID).Draw(t, "names") {
				if rapid.IntRange(0, 2).Draw(t, "remove") == 0 {
					delete(server[typeURL], name)
					removed = append(removed, name)
					continue
				}
				version++
				x := res{name: name, version: fmt.Sprintf("%x", version)}
				if typeURL == TypeAuthorization {
					x.version, x.payload = "", drawPolicy(t, name)
				} else {
					x.payload = drawAddress(t, name)
				}
				server[typeURL][name] = x
				rs = append(rs, x)
			}
			return rs, removed
		}
		reconnect := func(noNames bool) {
			for _, typeURL := range types {
				k := s.kept[typeURL]
				k.all = noNames
				known := map[string]string{}
				if !noNames {
					known = maps.Collect(k.retained.all())
				}
				var rs []res
				var removed []string
				for _, n := range slices.Sorted(maps.Keys(server[typeURL])) {
					if x := server[typeURL][n]; typeURL == TypeAuthorization || known[n] != x.version {
						rs = append(rs, x)
					}
				}
				for n := range known {
					if _, ok := server[typeURL][n]; !ok {
						removed = append(removed, n)
					}
				}
				if noNames { // what the message does not name is gone
					for _, x := range slices.Clone(have[typeURL].list) {
						if _, ok := server[typeURL][x.name]; !ok {
							have[typeURL].del(x.name)
						}
					}
				}
				deliver(typeURL, rs, removed)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"update": func(t *rapid.T) {
				typeURL := rapid.SampledFrom(types[:]).Draw(t, "type")
				rs, removed := change(typeURL)
				deliver(typeURL, rs, removed)
			},
			"reconnect": func(t *rapid.T) {
				change(TypeAddress)
				change(TypeAuthorization)
				reconnect(false)
			},
			"reconnect without names": func(t *rapid.T) {
				change(TypeAddress)
				reconnect(true)
			},
			"reset": func(t *rapid.T) {
				s.reset()
				for typeURL, o := range have {
					o.list = nil
					for n, v := range s.kept[typeURL].retained.all() {
						if v != "" {
							t.Fatalf("%s keeps version %q", n, v)
						}
					}
				}
				reconnect(false)
			},
			"": func(t *rapid.T) {
				// The client knows what the server has, as far as that is good.
				for typeURL, o := range have {
					got := map[string]string{}
					for _, x := range o.list {
						got[x.name] = x.version
						if now, ok := server[typeURL][x.name]; !ok || good(typeURL, now) && !bytes.Equal(now.payload, x.payload) {
							t.Fatalf("%s is stale or gone", x.name)
						}
					}
					for n, x := range server[typeURL] {
						if _, ok := got[n]; !ok && good(typeURL, x) {
							t.Fatalf("%s is missing", n)
						}
					}
					// and would tell it so. After a reset it also asks for names whose
					// present version it refuses.
					told := maps.Collect(s.kept[typeURL].retained.all())
					maps.DeleteFunc(told, func(n, v string) bool {
						_, known := got[n]
						x, ok := server[typeURL][n]
						return !known && v == "" && ok && !good(typeURL, x)
					})
					if diff := cmp.Diff(got, told); diff != "" {
						t.Fatal("retained:", diff)
					}
				}
				if diff := cmp.Diff(answers(view(have[TypeAddress], have[TypeAuthorization])), answers(s.b.Build())); diff != "" {
					t.Fatal(diff)
				}
			},
		})
	})
}

// feed applies one response.
func feed(t *testing.T, s *store, r *discoverypb.DeltaDiscoveryResponse) applied {
	t.Helper()
	m, err := parseMessage(marshal(t, r))
	if err != nil {
		t.Fatal(err)
	}
	return s.apply(&m)
}

func addresses(rs ...*discoverypb.Resource) *discoverypb.DeltaDiscoveryResponse {
	return &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n", Resources: rs}
}

// checklist 42, 43, 44: endpoints before their service, health.
func TestEndpointHealth(t *testing.T) {
	s := newStore("", nil)
	pod := func(status workloadpb.WorkloadStatus) *discoverypb.Resource {
		p := meshPod(0)
		p.Status = status
		return workloadResource(p, "1")
	}
	svc := func(all bool) *discoverypb.Resource {
		x := meshService(0)
		if all {
			x.LoadBalancing = &workloadpb.LoadBalancing{HealthPolicy: workloadpb.LoadBalancing_ALLOW_ALL}
		}
		return serviceResource(x, "1")
	}
	key := state.ServiceKey{Namespace: "ns-0", Hostname: "app-0.ns-0.svc.cluster.local"}
	want := func(why string, n int) {
		t.Helper()
		if got := len(s.b.Build().ServiceByNSHost(key.Namespace, key.Hostname).Endpoints); got != n {
			t.Errorf("%s: %d endpoints, want %d", why, got, n)
		}
	}
	healthy, unhealthy := pod(workloadpb.WorkloadStatus_HEALTHY), pod(workloadpb.WorkloadStatus_UNHEALTHY)
	feed(t, s, addresses(unhealthy))
	if st := s.b.Build().Staged(); len(st) != 1 || st[0].Service != key {
		t.Fatal("not staged", st)
	}
	feed(t, s, addresses(svc(false)))
	want("42: filtered on arrival of the service", 0)
	feed(t, s, addresses(healthy))
	want("healthy", 1)
	feed(t, s, addresses(unhealthy))
	want("43: unhealthy", 0)
	feed(t, s, addresses(svc(true)))
	want("allow all", 1)
	feed(t, s, addresses(healthy))
	feed(t, s, addresses(unhealthy))
	want("43: unhealthy, allow all", 1)
	feed(t, s, addresses(svc(false)))
	want("44: only healthy", 0)
	feed(t, s, addresses(svc(true)))
	want("44: allow all again; the endpoint comes back, unlike in ztunnel", 1)
}

// Two names for one thing and one name for two: nothing is left behind.
func TestNamesThatAreNotKeys(t *testing.T) {
	s := newStore("", nil)
	as := func(name string, r *discoverypb.Resource) *discoverypb.Resource { r.Name = name; return r }
	feed(t, s, addresses(as("x", workloadResource(meshPod(0), "1"))))
	feed(t, s, addresses(as("x", workloadResource(meshPod(1), "2"))))
	if w, _, _ := s.b.Build().Counts(); w != 1 || s.b.Build().WorkloadByUID(meshPod(1).Uid) == nil {
		t.Fatal("the name stands for two workloads")
	}
	feed(t, s, addresses(as("x", serviceResource(meshService(0), "3"))))
	if w, n, _ := s.b.Build().Counts(); w != 0 || n != 1 {
		t.Fatal(w, n)
	}
	feed(t, s, &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, RemovedResources: []string{"x"}})
	if w, n, _ := s.b.Build().Counts(); w != 0 || n != 0 {
		t.Fatal(w, n)
	}
	// A key that changes from workload to service.
	feed(t, s, addresses(as("a/b", workloadResource(&workloadpb.Workload{Uid: "a/b"}, "1"))))
	feed(t, s, addresses(serviceResource(&workloadpb.Service{Namespace: "a", Hostname: "b"}, "2")))
	if w, n, _ := s.b.Build().Counts(); w != 0 || n != 1 {
		t.Fatal(w, n)
	}
	feed(t, s, addresses(as("a/b", workloadResource(&workloadpb.Workload{Uid: "a/b"}, "3"))))
	if w, n, _ := s.b.Build().Counts(); w != 1 || n != 0 {
		t.Fatal(w, n)
	}
}

// A policy that arrives again unchanged is no change: no connection is checked
// again because istiod was restarted.
func TestPolicyAgain(t *testing.T) {
	s := newStore("", nil)
	policy := func(port uint32) *discoverypb.Resource {
		return &discoverypb.Resource{Name: "ns/p",
			Resource: &anypb.Any{Value: marshal(t, policyPB(&securitypb.Match{DestinationPorts: []uint32{port}}))}}
	}
	msg := func(rs ...*discoverypb.Resource) *discoverypb.DeltaDiscoveryResponse {
		return &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAuthorization, Resources: rs}
	}
	if a := feed(t, s, msg(policy(1))); !a.changed || !a.policies {
		t.Fatal(a)
	}
	if a := feed(t, s, msg(policy(1))); a.changed || a.policies {
		t.Fatal(a)
	}
	if a := feed(t, s, msg(policy(2), policy(1))); !a.policies {
		t.Fatal(a)
	}
	if p := s.b.Build().Policy("ns/p"); !slices.Equal(p.Rules[0][0][0].DestinationPorts, []uint16{1}) {
		t.Fatal("the last of a message does not count", p)
	}
	if a := feed(t, s, &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAuthorization,
		RemovedResources: []string{"ns/none"}}); a.changed {
		t.Fatal(a)
	}
}

// A NACK can be received by a server that takes 4 MiB, whatever there is to say.
func TestNackBounded(t *testing.T) {
	s := newStore("", nil)
	r := addresses()
	for i := range 20_000 {
		r.Resources = append(r.Resources, &discoverypb.Resource{Name: fmt.Sprintf("%d-%s", i, strings.Repeat("x", 2000)),
			Resource: &anypb.Any{}})
	}
	a := feed(t, s, r)
	if a.refused != 20_000 || len(a.nack) > maxNack+4096 || !strings.HasSuffix(a.nack, " more") {
		t.Fatal(a.refused, len(a.nack))
	}
	if len(s.kept[TypeAddress].refused) != maxRefused || len(a.warnings) != maxWarnings {
		t.Fatal(len(s.kept[TypeAddress].refused), len(a.warnings))
	}
}

// A resource whose decoding panics is refused like a bad one.
func TestDecodePanicRefuses(t *testing.T) {
	s := newStore("", nil)
	decode := s.address
	s.address = func(name string, payload []byte) (*state.Workload, *state.Service, error) {
		if strings.HasSuffix(name, "00001") {
			panic("boom")
		}
		return decode(name, payload)
	}
	a := feed(t, s, addresses(workloadResource(meshPod(0), "1"), workloadResource(meshPod(1), "1"),
		workloadResource(meshPod(2), "1")))
	if want := meshPod(1).Uid + ": internal error: panic: boom"; a.nack != want {
		t.Fatalf("%q, want %q", a.nack, want)
	}
	if w, _, _ := s.b.Build().Counts(); w != 2 {
		t.Fatal(w)
	}
}

func TestRetained(t *testing.T) {
	var r retained
	want := map[string]string{}
	for i, v := range []string{"", "1f", "0", "00", "1F", "ffffffffffffffff", "10000000000000000", "v1", "-1", "+1"} {
		n := fmt.Sprint(i)
		r.set(n, []byte("a1"))
		r.set(n, []byte(v))
		want[n] = v
	}
	r.set("gone", []byte("1"))
	r.set("gone", []byte("x"))
	r.del("gone")
	if diff := cmp.Diff(want, maps.Collect(r.all())); diff != "" || r.len() != len(want) || r.has("gone") || !r.has("1") ||
		!r.has("3") {
		t.Fatal(diff)
	}
	r.forgetVersions()
	for n, v := range r.all() {
		if v != "" || want[n] == "" && n != "0" {
			t.Fatal(n, v)
		}
	}
	if r.len() != len(want) {
		t.Fatal(r.len())
	}
}
