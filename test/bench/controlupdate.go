package main

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"ztun/admin"
	"ztun/proxy/state"
	"ztun/test/load"
)

// oneUpdate applies single changed workloads to the whole mesh, in this process: the state's Builder, the admin loop,
// and how long until a reader sees the change through the loop's View. Receiving and decoding are not in it.
func (b *bench) oneUpdate(ctx context.Context) (outcome, error) {
	m := &bigMesh{workloads: b.o.Workloads, services: b.o.Services}
	builder := state.NewBuilder("n1")
	for s := range m.services {
		builder.InsertService(m.stateService(s))
	}
	for i := range m.workloads {
		builder.InsertWorkload(m.stateWorkload(i, 0))
	}
	loop := admin.NewLoop(admin.LoopOptions{})
	lctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- loop.Run(lctx) }()
	defer func() { cancel(); <-ended }()
	if err := loop.Post(ctx, admin.StateBuilt{Source: "bench", View: builder.Build()}); err != nil {
		return nil, err
	}
	runtime.GC()
	var h load.Histogram
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const updates = 2000
	for i := range updates {
		if i%50 == 0 { // not in a tight loop: the caches of a daemon that gets an update now and then are cold
			settle(ctx, 5*time.Millisecond)
		}
		w := m.stateWorkload((i*7919)%m.workloads, i+1)
		start := time.Now()
		builder.InsertWorkload(w)
		if err := loop.Post(ctx, admin.StateBuilt{Source: "bench", View: builder.Build()}); err != nil {
			return nil, err
		}
		for loop.View().WorkloadByUID(w.UID) != w {
			runtime.Gosched()
		}
		h.Add(time.Since(start))
	}
	runtime.ReadMemStats(&after)
	l := h.Summary()
	return outcome{"visible after, p50": l.P50, "visible after, p99": l.P99, "visible after, max": l.Max,
		"garbage": float64(after.TotalAlloc-before.TotalAlloc) / updates / kib}, ctx.Err()
}

func (m *bigMesh) stateService(s int) *state.Service {
	return &state.Service{
		Name: fmt.Sprintf("shop-%d", s), Namespace: m.namespace(s), Hostname: m.hostname(s),
		VIPs: []state.NetworkAddress{{Addr: m.serviceIP(s)}}, Ports: state.PortMap{{Service: 80, Target: 8080}},
	}
}

func (m *bigMesh) stateWorkload(i, generation int) *state.Workload {
	s := i % m.services
	return &state.Workload{
		UID: m.uid(i), Name: fmt.Sprintf("shop-%d-%07d", s, i), Namespace: m.namespace(s), TrustDomain: "cluster.local",
		ServiceAccount: "shop",
		WorkloadName:   fmt.Sprintf("shop-%d", s), WorkloadType: "deployment", CanonicalName: fmt.Sprintf("shop-%d", s),
		CanonicalRevision: fmt.Sprintf("v%d", generation+1), Node: fmt.Sprintf("node-%d", i%1000), ClusterID: "Kubernetes",
		Capacity: 1,
		Protocol: state.HBONE, Addresses: []netip.Addr{m.workloadIP(i)},
		Services: []state.WorkloadService{{Service: state.ServiceKey{Namespace: m.namespace(s), Hostname: m.hostname(s)},
			Ports: state.PortMap{{Service: 80, Target: 8080}}}},
	}
}
