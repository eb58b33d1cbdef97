package main

import (
	"bytes"
	"fmt"
	"net/netip"

	"ztun/admin/pb/workloadpb"
	"ztun/test/lab"
)

// bigMesh is a mesh of many workloads and services that nobody runs, beside the few of the world that somebody does.
// Workload i belongs to service i modulo the number of services.
type bigMesh struct {
	workloads, services int
	real                lab.WorldFile // of the world
}

// The ranges of the invented addresses: none of them is one of test/lab's.
func (m *bigMesh) workloadIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})
}

func (m *bigMesh) serviceIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{12, byte(i >> 16), byte(i >> 8), byte(i)})
}

func (m *bigMesh) namespace(service int) string { return fmt.Sprintf("team-%d", service%200) }

func (m *bigMesh) hostname(service int) string {
	return fmt.Sprintf("shop-%d.%s.svc.cluster.local", service, m.namespace(service))
}

func (m *bigMesh) uid(i int) string {
	return fmt.Sprintf("Kubernetes//Pod/%s/shop-%d-%07d", m.namespace(i%m.services), i%m.services, i)
}

// yaml is the mesh in ztunnel's local schema; generation is part of every invented revision, so that two files differ.
func (m *bigMesh) yaml(generation int) ([]byte, error) {
	var b bytes.Buffer
	b.Grow(450 * m.workloads)
	b.WriteString("workloads:\n")
	for i := range m.workloads {
		s := i % m.services
		revision := "v1"
		if i == generation%m.workloads {
			revision = fmt.Sprintf("v%d", generation+1)
		}
		fmt.Fprintf(&b, `- uid: %s
  name: shop-%d-%07d
  namespace: %s
  serviceAccount: shop
  trustDomain: cluster.local
  workloadIps: [%s]
  protocol: HBONE
  node: node-%d
  network: ""
  workloadName: shop-%d
  workloadType: deployment
  canonicalName: shop-%d
  canonicalRevision: %s
  clusterId: Kubernetes
  status: Healthy
  services:
    %s/%s:
      80: 8080
`, m.uid(i), s, i, m.namespace(s), m.workloadIP(i), i%1000, s, s, revision, m.namespace(s), m.hostname(s))
	}
	appendReal(&b, m.real.Workloads)
	b.WriteString("services:\n")
	for s := range m.services {
		fmt.Fprintf(&b, `- name: shop-%d
  namespace: %s
  hostname: %s
  vips: [/%s]
  ports:
    80: 8080
`, s, m.namespace(s), m.hostname(s), m.serviceIP(s))
	}
	return b.Bytes(), nil
}

// appendReal adds the world's own workloads, whose services (they have none in these worlds) are left out.
func appendReal(b *bytes.Buffer, ws []lab.Workload) {
	for _, w := range ws {
		fmt.Fprintf(b, "- uid: %s\n  name: %s\n  namespace: %s\n  serviceAccount: %s\n  trustDomain: %q\n  workloadIps: [",
			w.UID, w.Name, w.Namespace, w.ServiceAccount, w.TrustDomain)
		for i, ip := range w.WorkloadIPs {
			if i > 0 {
				b.WriteString(", ")
			}
			fmt.Fprintf(b, "%q", ip)
		}
		fmt.Fprintf(b, "]\n  protocol: %s\n  node: %s\n  network: \"\"\n  workloadName: %q\n  workloadType: %q\n  "+
			"canonicalName: %q\n  canonicalRevision: %q\n  services: {}\n",
			w.Protocol, w.Node, w.WorkloadName, w.WorkloadType, w.CanonicalName, w.CanonicalRevision)
	}
}

// workload is workload i as the control plane sends it.
func (m *bigMesh) workload(i, generation int) *workloadpb.Address {
	s := i % m.services
	ip := m.workloadIP(i).As4()
	revision := "v1"
	if generation > 0 {
		revision = fmt.Sprintf("v%d", generation+1)
	}
	return &workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: &workloadpb.Workload{
		Uid: m.uid(i), Name: fmt.Sprintf("shop-%d-%07d", s, i), Namespace: m.namespace(s), ServiceAccount: "shop",
		Addresses: [][]byte{ip[:]}, TunnelProtocol: workloadpb.TunnelProtocol_HBONE, Node: fmt.Sprintf("node-%d", i%1000),
		WorkloadName: fmt.Sprintf("shop-%d", s), WorkloadType: workloadpb.WorkloadType_DEPLOYMENT,
		CanonicalName:     fmt.Sprintf("shop-%d", s),
		CanonicalRevision: revision, ClusterId: "Kubernetes",
		Services: map[string]*workloadpb.PortList{m.namespace(s) + "/" +
			m.hostname(s): {Ports: []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}}}},
	}}}
}

// service is service s as the control plane sends it.
func (m *bigMesh) service(s int) *workloadpb.Address {
	ip := m.serviceIP(s).As4()
	return &workloadpb.Address{Type: &workloadpb.Address_Service{Service: &workloadpb.Service{
		Name: fmt.Sprintf("shop-%d", s), Namespace: m.namespace(s), Hostname: m.hostname(s),
		Addresses: []*workloadpb.NetworkAddress{{Address: ip[:]}},
		Ports:     []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}},
	}}}
}

// actual is a workload of the world as the control plane sends it.
func actual(w lab.Workload) (*workloadpb.Address, error) {
	p := &workloadpb.Workload{
		Uid: w.UID, Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, TrustDomain: w.TrustDomain,
		Node:         w.Node,
		WorkloadName: w.WorkloadName, WorkloadType: workloadpb.WorkloadType_DEPLOYMENT, CanonicalName: w.CanonicalName,
		CanonicalRevision: w.CanonicalRevision, ClusterId: w.ClusterID,
	}
	if w.Protocol == "HBONE" {
		p.TunnelProtocol = workloadpb.TunnelProtocol_HBONE
	}
	for _, s := range w.WorkloadIPs {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		p.Addresses = append(p.Addresses, ip.AsSlice())
	}
	return &workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: p}}, nil
}

// resourceName is the xDS name of an address: a workload's uid, a service's "namespace/hostname".
func resourceName(a *workloadpb.Address) string {
	if w := a.GetWorkload(); w != nil {
		return w.Uid
	}
	return a.GetService().Namespace + "/" + a.GetService().Hostname
}
