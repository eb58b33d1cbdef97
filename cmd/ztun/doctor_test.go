package main

import (
	"net/netip"
	"slices"
	"testing"

	"ztun/cmd/doctor"
)

// The doctor calls a node by a pod of it, and a workload that is announced elsewhere where that is; none on a loopback.
func TestDoctorPeers(t *testing.T) {
	_, peers, err := fromDump([]byte(`{"workloads": [
		{"name": "a", "namespace": "n", "node": "n1", "protocol": "HBONE", "workloadIps": ["10.0.0.1"]},
		{"name": "b", "namespace": "n", "node": "n2", "protocol": "HBONE", "workloadIps": ["10.0.0.2"]},
		{"name": "r", "namespace": "n", "protocol": "HBONE", "workloadIps": ["10.0.0.3"], "meshAddresses": ["192.0.2.7:15018"]},
		{"name": "s", "namespace": "n", "protocol": "HBONE", "workloadIps": ["10.0.0.4"], "meshAddresses": ["127.0.0.1:15018"]},
		{"name": "t", "namespace": "n", "protocol": "TCP", "workloadIps": ["10.0.0.5"], "meshAddresses": ["192.0.2.8:15018"]}
	]}`), "n1", "")
	want := []doctor.Peer{{Node: "n2", Addr: netip.MustParseAddrPort("10.0.0.2:15008")},
		{Workload: "n/r", Addr: netip.MustParseAddrPort("192.0.2.7:15018")}}
	if err != nil || !slices.Equal(peers, want) {
		t.Errorf("%+v, %v; want %+v", peers, err, want)
	}
}
