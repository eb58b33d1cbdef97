package xds

import "testing"

// TestLocalTrustDomain: controlplane checklist 100, a workload of a file without trustDomain has an identity with an empty one (from a
// control plane it would be cluster.local: 39).
func TestLocalTrustDomain(t *testing.T) {
	l, err := ParseLocal([]byte("workloads: [{uid: u, namespace: n, serviceAccount: s, workloadIps: [], services: {}}]"))
	if err != nil {
		t.Fatal(err)
	}
	if got := l.View("").WorkloadByUID("u").Identity().String(); got != "spiffe:///ns/n/sa/s" {
		t.Error(got)
	}
}
