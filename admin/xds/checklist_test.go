package xds

import "testing"

// TestLocalTrustDomain: a workload of a file without trustDomain is of the CA's trust domain, or of cluster.local as
// if it came from a control plane (39). Controlplane checklist 100 has it empty, as in ztunnel: no certificate and no
// policy knows such an identity.
func TestLocalTrustDomain(t *testing.T) {
	for ca, want := range map[string]string{"": "spiffe://cluster.local/ns/n/sa/s",
		"mesh.example": "spiffe://mesh.example/ns/n/sa/s"} {
		f := &File{Inline: "workloads: [{uid: u, namespace: n, serviceAccount: s, workloadIps: [], services: {}}]",
			TrustDomain: ca}
		l, err := f.Load()
		if err != nil {
			t.Fatal(err)
		}
		if got := l.View("").WorkloadByUID("u").Identity().String(); got != want {
			t.Errorf("CA of %q: %s, want %s", ca, got, want)
		}
	}
}
