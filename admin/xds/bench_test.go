package xds

import (
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/workloadpb"
)

// meshPod is the i-th pod of a large mesh, as istiod describes pods.
func meshPod(i int) *workloadpb.Workload {
	app, ns := i/10, i/200
	name := fmt.Sprintf("app-%d-7c9d8b5f4-%05x", app, i)
	return &workloadpb.Workload{
		Uid:  fmt.Sprintf("Kubernetes//Pod/ns-%d/%s", ns, name),
		Name: name, Namespace: fmt.Sprintf("ns-%d", ns), Network: "net1", ClusterId: "Kubernetes",
		TrustDomain: "cluster.local",
		Addresses:   [][]byte{{10, byte(i >> 16), byte(i >> 8), byte(i)}}, Node: fmt.Sprintf("node-%d", i%500),
		ServiceAccount: fmt.Sprintf("app-%d", app), CanonicalName: fmt.Sprintf("app-%d", app), CanonicalRevision: "v1",
		WorkloadType: workloadpb.WorkloadType_DEPLOYMENT, WorkloadName: fmt.Sprintf("app-%d", app),
		TunnelProtocol: workloadpb.TunnelProtocol_HBONE,
		Locality:       &workloadpb.Locality{Region: "eu-west", Zone: fmt.Sprintf("eu-west-%d", i%3)},
		Services: map[string]*workloadpb.PortList{
			fmt.Sprintf("ns-%d/app-%d.ns-%d.svc.cluster.local", ns, app,
				ns): {Ports: []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}}},
		},
	}
}

// meshService is the service of ten pods.
func meshService(i int) *workloadpb.Service {
	ns := i / 20
	return &workloadpb.Service{
		Name: fmt.Sprintf("app-%d", i), Namespace: fmt.Sprintf("ns-%d", ns),
		Hostname:  fmt.Sprintf("app-%d.ns-%d.svc.cluster.local", i, ns),
		Addresses: []*workloadpb.NetworkAddress{{Network: "net1", Address: []byte{10, 200, byte(i >> 8), byte(i)}}},
		Ports:     []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}}, Canonical: true,
	}
}

func addressResource(a *workloadpb.Address, version string) *discoverypb.Resource {
	name := a.GetWorkload().GetUid()
	if s := a.GetService(); s != nil {
		name = s.Namespace + "/" + s.Hostname
	}
	payload, err := proto.Marshal(a)
	if err != nil {
		panic(err)
	}
	return &discoverypb.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: TypeAddress, Value: payload}}
}

func workloadResource(w *workloadpb.Workload, version string) *discoverypb.Resource {
	return addressResource(&workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: w}}, version)
}

func serviceResource(s *workloadpb.Service, version string) *discoverypb.Resource {
	return addressResource(&workloadpb.Address{Type: &workloadpb.Address_Service{Service: s}}, version)
}

// mesh is the first response of a large mesh.
func mesh(workloads int) []byte {
	r := &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "1"}
	for i := range workloads {
		r.Resources = append(r.Resources, workloadResource(meshPod(i), fmt.Sprintf("%x", 0x9e3779b97f4a7c15*uint64(i+1))))
	}
	for i := range workloads / 10 {
		r.Resources = append(r.Resources, serviceResource(meshService(i), fmt.Sprintf("%x", 0xc2b2ae3d27d4eb4f*uint64(i+1))))
	}
	b, err := proto.Marshal(r)
	if err != nil {
		panic(err)
	}
	return b
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkColdStart takes in the first response of a mesh of 100,000 workloads
// and 10,000 services; B/workload is what stays, all told.
func BenchmarkColdStart(b *testing.B) {
	const n = 100_000
	raw := mesh(n)
	b.SetBytes(int64(len(raw)))
	var rest float64
	for b.Loop() {
		before := heap()
		s := newStore("node-1", nil)
		m, err := parseMessage(raw)
		if err != nil {
			b.Fatal(err)
		}
		if a := s.apply(&m); a.nack != "" {
			b.Fatal(a.nack)
		}
		v := s.b.Build()
		rest = float64(heap()-before) / n
		runtime.KeepAlive(s)
		runtime.KeepAlive(v)
	}
	b.ReportMetric(rest, "B/workload")
	b.ReportMetric(float64(len(raw))/n, "wire-B/workload")
}

// BenchmarkDecode decodes workloads alone.
func BenchmarkDecode(b *testing.B) {
	var d decoder
	rs := make([]*discoverypb.Resource, 1000)
	for i := range rs {
		rs[i] = workloadResource(meshPod(i), "")
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		r := rs[i%len(rs)]
		i++
		if _, _, err := d.address(r.Name, r.Resource.Value); err != nil {
			b.Fatal(err)
		}
	}
}
