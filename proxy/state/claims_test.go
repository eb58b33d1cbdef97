package state

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// TestManyClaimants: a name and an address that everybody claims cost an update no more than others. (Quadratic work
// took minutes here.)
func TestManyClaimants(t *testing.T) {
	const n = 50_000
	b := NewBuilder("")
	at := netip.MustParseAddr("10.0.0.1")
	w := func(i int) *Workload {
		return &Workload{UID: fmt.Sprint("w", i), Name: "same", Namespace: "ns", ServiceAccount: "sa",
			Addresses: []netip.Addr{at}}
	}
	start := time.Now()
	for i := range n {
		b.InsertWorkload(w(i))
	}
	for i := range n {
		b.InsertWorkload(w(i)) // again: now the last
	}
	if got := b.Build().WorkloadByAddr("", at); got == nil || got.UID != fmt.Sprint("w", n-1) {
		t.Error(got)
	}
	for i := n - 1; i > 0; i-- {
		b.RemoveWorkload(fmt.Sprint("w", i))
	}
	if got := b.Build().WorkloadByInfo(WorkloadInfo{Name: "same", Namespace: "ns", ServiceAccount: "sa"}); got == nil ||
		got.UID != "w0" {
		t.Error(got)
	}
	if took := time.Since(start); took > time.Minute {
		t.Errorf("%d workloads with one address took %v", n, took)
	}
}
