package route_test

import (
	"net/netip"
	"testing"

	"ztun/admin/xds"
	"ztun/proxy/route"
)

// TestSharedAddress: controlplane checklist 46, an address that is a workload's and a service's at once: the
// connection goes to the service's endpoint, whereas what the address is (who calls, whose waypoint) is answered by
// the workload.
func TestSharedAddress(t *testing.T) {
	l, err := xds.ParseLocal([]byte(`
workloads:
- {uid: front, name: front, namespace: a, workloadIps: [10.1.0.1], protocol: HBONE, services: {}}
- {uid: shared, name: shared, namespace: a, workloadIps: [10.1.0.2], protocol: HBONE, services: {}}
- {uid: back, name: back, namespace: a, workloadIps: [10.1.0.3], protocol: HBONE, services: {a/s.svc: {80: 8080}}}
services:
- {name: s, namespace: a, hostname: s.svc, vips: [/10.1.0.2], ports: {80: 8080}}
`))
	if err != nil {
		t.Fatal(err)
	}
	v := l.View("")
	d, err := route.Decide(v, route.Question{Source: v.WorkloadByUID("front"), SrcIP: netip.MustParseAddr("10.1.0.1"),
		Dst: netip.MustParseAddrPort("10.1.0.2:80"), Rand: func(uint64) uint64 { return 0 }})
	if err != nil || workloadName(d.Workload) != "back" || serviceName(d.Service) != "s.svc" ||
		d.Authority() != "10.1.0.3:8080" {
		t.Errorf("%+v, %v", d, err)
	}
	if w, s := v.FindAddress("", netip.MustParseAddr("10.1.0.2"), "a"); workloadName(w) != "shared" || s != nil {
		t.Errorf("%v %v", w, s)
	}
}
