package state

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"ztun/proxy/identity"
	"ztun/proxy/rbac"
)

var (
	ip1 = netip.MustParseAddr("10.0.0.1")
	ip2 = netip.MustParseAddr("10.0.0.2")
	svc = ServiceKey{"a", "s.svc"}
)

func backer(uid string, status Status) *Workload {
	return &Workload{UID: uid, Namespace: "a", Addresses: []netip.Addr{ip1}, Capacity: 1, Status: status,
		Services: []WorkloadService{{svc, PortMap{{80, 8080}}}}}
}

func service(p HealthPolicy) *Service {
	return &Service{Name: "s", Namespace: svc.Namespace, Hostname: svc.Hostname,
		LoadBalancer: &LoadBalancer{HealthPolicy: p}}
}

func endpointUIDs(v *View) (l []string) {
	if s := v.ServiceByNSHost(svc.Namespace, svc.Hostname); s != nil {
		for _, e := range s.Endpoints {
			l = append(l, e.UID)
		}
	}
	return l
}

func wantEndpoints(t *testing.T, b *Builder, uids ...string) {
	t.Helper()
	if got := endpointUIDs(b.Build()); !slices.Equal(got, uids) {
		t.Errorf("endpoints %v, want %v", got, uids)
	}
}

// Endpoints before their service are staged, and filtered when it comes.
func TestStaged(t *testing.T) {
	b := NewBuilder("")
	b.InsertWorkload(backer("w1", Healthy))
	b.InsertWorkload(backer("w2", Unhealthy))
	st := b.Build().Staged()
	if len(st) != 1 || st[0].Service != svc || len(st[0].Endpoints) != 2 {
		t.Fatalf("staged: %+v", st)
	}
	b.InsertService(service(OnlyHealthy))
	wantEndpoints(t, b, "w1")
	if st := b.Build().Staged(); len(st) != 0 {
		t.Errorf("still staged: %+v", st)
	}
	// A service that goes and comes back finds its endpoints.
	b.RemoveService(svc)
	if st := b.Build().Staged(); len(st) != 1 {
		t.Errorf("staged: %+v", st)
	}
	b.InsertService(service(OnlyHealthy))
	wantEndpoints(t, b, "w1")
}

func TestHealth(t *testing.T) {
	b := NewBuilder("")
	b.InsertService(service(OnlyHealthy))
	b.InsertWorkload(backer("w1", Healthy))
	wantEndpoints(t, b, "w1")
	b.InsertWorkload(backer("w1", Unhealthy))
	wantEndpoints(t, b)
	b.InsertService(service(AllowAll))
	wantEndpoints(t, b, "w1")
	b.InsertService(service(OnlyHealthy))
	wantEndpoints(t, b)
	b.InsertService(service(AllowAll)) // ztunnel would have forgotten it
	wantEndpoints(t, b, "w1")
	b.RemoveWorkload("w1")
	wantEndpoints(t, b)
}

// Two services of a namespace share a VIP; removing one leaves the other.
func TestSharedVIP(t *testing.T) {
	b := NewBuilder("")
	vip := []NetworkAddress{{"", ip2}}
	b.InsertService(&Service{Namespace: "a", Hostname: "one", VIPs: vip})
	b.InsertService(&Service{Namespace: "a", Hostname: "two", VIPs: vip})
	if s := b.Build().ServiceByVIP("", ip2, "a"); s == nil || s.Hostname != "two" {
		t.Errorf("both there: %+v", s)
	}
	b.RemoveService(ServiceKey{"a", "two"})
	if s := b.Build().ServiceByVIP("", ip2, "a"); s == nil || s.Hostname != "one" {
		t.Errorf("one left: %+v", s)
	}
	b.RemoveService(ServiceKey{"a", "one"})
	if s := b.Build().ServiceByVIP("", ip2, "a"); s != nil {
		t.Errorf("none left: %+v", s)
	}
}

// A service known by range gets new endpoints, and its table does not grow.
func TestCIDREndpoints(t *testing.T) {
	b := NewBuilder("")
	s := service(OnlyHealthy)
	s.CIDRVIPs = []NetworkPrefix{{"", netip.MustParsePrefix("10.9.0.0/16")}}
	b.InsertService(s)
	for i := range 10 {
		b.InsertWorkload(backer(fmt.Sprint("w", i), Healthy))
		v := b.Build()
		got := v.ServiceByVIP("", netip.MustParseAddr("10.9.3.4"), "")
		if got == nil || len(got.Endpoints) != i+1 {
			t.Fatalf("after %d workloads: %+v", i+1, got)
		}
		if l, _ := v.byCIDR.get(NetworkPrefix{"", netip.MustParsePrefix("10.9.0.0/16")}); len(l) != 1 {
			t.Fatalf("%d entries", len(l))
		}
	}
	s2 := *s
	s2.CIDRVIPs = nil
	b.InsertService(&s2)
	if v := b.Build(); v.ServiceByVIP("", netip.MustParseAddr("10.9.3.4"), "") != nil || len(v.bits4) != 0 {
		t.Error("the range is still there")
	}
}

func TestPolicyScopes(t *testing.T) {
	b := NewBuilder("")
	w := &Workload{UID: "w", Namespace: "a"}
	keys := func() (l []string) {
		for _, p := range b.Build().PoliciesFor(w) {
			l = append(l, p.Key)
		}
		return l
	}
	p := func(key, ns string, s rbac.Scope) *rbac.Policy {
		return &rbac.Policy{Key: key, Namespace: ns, Scope: s}
	}
	b.InsertPolicy(p("root/g", "root", rbac.ScopeGlobal))
	b.InsertPolicy(p("a/n", "a", rbac.ScopeNamespace))
	b.InsertPolicy(p("b/n", "b", rbac.ScopeNamespace))
	b.InsertPolicy(p("a/s", "a", rbac.ScopeWorkloadSelector))
	b.InsertPolicy(p("/n", "", rbac.ScopeNamespace)) // of no namespace: applies to none
	if got := keys(); !slices.Equal(got, []string{"a/n", "root/g"}) {
		t.Errorf("%v", got)
	}
	b.InsertPolicy(p("a/n", "a", rbac.ScopeWorkloadSelector))
	if got := keys(); !slices.Equal(got, []string{"root/g"}) {
		t.Errorf("after the change of scope: %v", got)
	}
	w.AuthorizationPolicies = []string{"a/s", "a/gone"}
	if got := keys(); !slices.Equal(got, []string{"root/g", "a/s", "a/gone"}) {
		t.Errorf("listed: %v", got)
	}
	if v := rbac.Evaluate([]*rbac.Policy{b.Build().PoliciesFor(w)[2]}, rbac.Question{}); !v.Allowed ||
		!slices.Equal(v.Missing, []string{"a/gone"}) {
		t.Errorf("with a policy that is not loaded: %+v", v)
	}
	if b.RemovePolicy("nope") || !b.RemovePolicy("root/g") {
		t.Error("RemovePolicy does not say what it did")
	}
}

func TestNilView(t *testing.T) {
	var v *View
	w, s := v.FindAddress("", ip1, "")
	w2, s2 := v.FindNSHost("a", "b")
	if w != nil || s != nil || w2 != nil || s2 != nil || v.WorkloadByUID("x") != nil ||
		v.WorkloadByInfo(WorkloadInfo{}) != nil ||
		v.ServiceByHost("x", "") != nil || v.Policy("x") != nil || v.Version() != 0 ||
		len(v.Workloads())+len(v.Services())+len(v.Policies())+len(v.Staged()) != 0 || v.PoliciesFor(&Workload{}) != nil {
		t.Error("a nil View is not empty")
	}
	for range v.ServicesOf(&Workload{}) {
		t.Error("a nil View has services")
	}
}

func TestSANs(t *testing.T) {
	b := NewBuilder("")
	b.InsertService(&Service{Namespace: "a", Hostname: "s",
		SubjectAltNames: []string{"nonsense", "spiffe://td/ns/a/sa/b"}})
	got := b.Build().ServiceByNSHost("a", "s").SANs
	if !slices.Equal(got, []identity.ID{{TrustDomain: "td", Namespace: "a", ServiceAccount: "b"}}) {
		t.Errorf("%v", got)
	}
}

func TestSortPorts(t *testing.T) {
	got := SortPorts([]PortPair{{443, 1}, {80, 2}, {443, 3}, {80, 4}, {1, 5}})
	if want := (PortMap{{1, 5}, {80, 4}, {443, 3}}); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if _, ok := got.Lookup(2); ok {
		t.Error("a port that is not there")
	}
}

// world inserts n workloads and n/10 services as istiod would send them.
func world(n int) *Builder {
	b := NewBuilder("node-1")
	for i := range n / 10 {
		name := fmt.Sprint("service-", i)
		b.InsertService(&Service{Name: name, Namespace: "default", Hostname: name + ".default.svc.cluster.local",
			VIPs: []NetworkAddress{{"", addr(11, i)}}, Ports: PortMap{{80, 8080}}, Canonical: true})
	}
	for i := range n {
		b.InsertWorkload(pod(i, n))
	}
	return b
}

// pod is made of strings as a decoder that interns would have them: those that
// many pods have in common are constants here.
func pod(i, n int) *Workload {
	name := fmt.Sprint("deployment-5d9f7c8b6-", i)
	w := &Workload{
		UID: "Kubernetes//Pod/default/" + name, Name: name, Namespace: "default", TrustDomain: "cluster.local",
		ServiceAccount: "default",
		WorkloadName:   "deployment", WorkloadType: "deployment", CanonicalName: "deployment", CanonicalRevision: "latest",
		Node: "node-1", ClusterID: "Kubernetes", Locality: Locality{"r", "z", "s"},
		Addresses: []netip.Addr{addr(10, i)}, Capacity: 1, Protocol: HBONE,
	}
	if i%50 != 0 {
		w.Node = "node-2"
	}
	host := fmt.Sprint("service-", i%max(n/10, 1)) + ".default.svc.cluster.local"
	w.Services = []WorkloadService{{ServiceKey{"default", host}, PortMap{{80, 8080}}}}
	return w
}

func addr(net byte, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{net, byte(i >> 16), byte(i >> 8), byte(i)})
}

// A workload, with its indexes and endpoint, costs at most 1 KiB.
func TestMemory(t *testing.T) {
	const n = 20_000
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	b := world(n)
	v := b.Build()
	per := (heap() - before) / n
	runtime.KeepAlive(b)
	runtime.KeepAlive(v)
	t.Logf("%d bytes per workload", per)
	if per > 1024 {
		t.Errorf("%d bytes per workload, want at most 1024", per)
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	b := world(1000)
	b.InsertPolicy(&rbac.Policy{Key: "default/p", Namespace: "default", Scope: rbac.ScopeNamespace})
	b.InsertService(&Service{Namespace: "x", Hostname: "r",
		CIDRVIPs: []NetworkPrefix{{"", netip.MustParsePrefix("12.0.0.0/8")}}})
	v := b.Build()
	w := v.Workloads()[0]
	buf := make([]*rbac.Policy, 0, 8)
	vip, pod, unknown := addr(11, 5), addr(10, 7), addr(12, 7)
	for name, f := range map[string]func(){
		"WorkloadByUID":   func() { v.WorkloadByUID(w.UID) },
		"WorkloadByAddr":  func() { v.WorkloadByAddr("", pod) },
		"WorkloadByInfo":  func() { v.WorkloadByInfo(w.Info()) },
		"ServiceByVIP":    func() { v.ServiceByVIP("", vip, "default") },
		"ServiceByCIDR":   func() { v.ServiceByVIP("", unknown, "default") },
		"ServiceByHost":   func() { v.ServiceByHost("service-1.default.svc.cluster.local", "default") },
		"ServiceByNSHost": func() { v.ServiceByNSHost("default", "service-1.default.svc.cluster.local") },
		"FindAddress":     func() { v.FindAddress("", vip, "default") },
		"AppendPolicies":  func() { v.AppendPolicies(buf, w) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	v := world(100_000).Build()
	vip, pod := addr(11, 5), addr(10, 7)
	b.Run("WorkloadByAddr", func(b *testing.B) {
		for b.Loop() {
			v.WorkloadByAddr("", pod)
		}
	})
	b.Run("ServiceByVIP", func(b *testing.B) {
		for b.Loop() {
			v.ServiceByVIP("", vip, "default")
		}
	})
	b.Run("unknown", func(b *testing.B) {
		ip := addr(99, 1)
		for b.Loop() {
			v.FindAddress("", ip, "default")
		}
	})
}

// BenchmarkUpdate is one pod's change and the View after it, in a mesh of
// 100,000.
func BenchmarkUpdate(b *testing.B) {
	builder := world(100_000)
	builder.Build()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		builder.InsertWorkload(pod(i%100_000, 100_000))
		builder.Build()
		i++
	}
}

// Readers go on while the Builder changes everything that they read. For -race.
func TestReadersWhileBuilding(t *testing.T) {
	b := world(500)
	var current atomic.Pointer[View]
	current.Store(b.Build())
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				v := current.Load()
				if w := v.WorkloadByAddr("", addr(10, i%500)); w == nil {
					t.Error("a workload is gone")
					return
				}
				s := v.ServiceByVIP("", addr(11, i%50), "default")
				if s == nil || len(s.Endpoints) != 10 {
					t.Errorf("a service has lost endpoints: %+v", s)
					return
				}
				if i%100 == 0 && len(v.Workloads()) != 500 {
					t.Error("not 500 workloads")
					return
				}
			}
		})
	}
	for i := range 2000 {
		b.InsertWorkload(pod(i%500, 500))
		current.Store(b.Build())
	}
	stop()
	wg.Wait()
}
