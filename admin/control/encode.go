package control

import (
	"net/netip"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"ztun/admin/pb/securitypb"
	"ztun/admin/pb/workloadpb"
	"ztun/admin/xds"
	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// What xDS means by an empty field of a workload (spec/controlplane.md 3.2).
const (
	defaultTrustDomain    = "cluster.local"
	defaultServiceAccount = "default"
	defaultCluster        = "Kubernetes"
	defaultWorkloadType   = "deployment"
)

// unless returns s, or nothing if it is what nothing means.
func unless(s, def string) string {
	if s == def {
		return ""
	}
	return s
}

// workloadType returns the number of a type's lower-case name; false: xDS cannot say it.
func workloadType(name string) (workloadpb.WorkloadType, bool) {
	switch name {
	case "", defaultWorkloadType:
		return workloadpb.WorkloadType_DEPLOYMENT, true
	case "cronjob":
		return workloadpb.WorkloadType_CRONJOB, true
	case "pod":
		return workloadpb.WorkloadType_POD, true
	case "job":
		return workloadpb.WorkloadType_JOB, true
	}
	return workloadpb.WorkloadType_DEPLOYMENT, false
}

// EncodeWorkload makes istiod's message of a workload: the inverse of what admin/xds decodes, except that an empty
// field becomes its xDS default on the way and that an unknown WorkloadType is a deployment.
func EncodeWorkload(w *state.Workload) *workloadpb.Address {
	kind, _ := workloadType(w.WorkloadType)
	m := &workloadpb.Workload{
		Uid:                   w.UID,
		Name:                  w.Name,
		Namespace:             w.Namespace,
		Hostname:              w.Hostname,
		Network:               w.Network,
		TunnelProtocol:        workloadpb.TunnelProtocol(w.Protocol),
		TrustDomain:           unless(w.TrustDomain, defaultTrustDomain),
		ServiceAccount:        unless(w.ServiceAccount, defaultServiceAccount),
		Waypoint:              encodeGateway(w.Waypoint),
		NetworkGateway:        encodeGateway(w.NetworkGateway),
		Node:                  w.Node,
		CanonicalName:         w.CanonicalName,
		CanonicalRevision:     w.CanonicalRevision,
		WorkloadType:          kind,
		WorkloadName:          w.WorkloadName,
		NativeTunnel:          w.NativeTunnel,
		AuthorizationPolicies: w.AuthorizationPolicies,
		Status:                workloadpb.WorkloadStatus(w.Status),
		ClusterId:             unless(w.ClusterID, defaultCluster),
		NetworkMode:           workloadpb.NetworkMode(w.NetworkMode),
	}
	for _, a := range w.MeshAddresses {
		config := &anypb.Any{}
		// It cannot fail: the message has nothing but numbers and bytes.
		config.MarshalFrom(encodeGateway(&state.GatewayAddress{Addr: state.NetworkAddress{Addr: a.Addr()}, Port: a.Port()}))
		m.Extensions = append(m.Extensions, &workloadpb.Extension{Name: xds.MeshExtension, Config: config})
	}
	for _, a := range w.Addresses {
		m.Addresses = append(m.Addresses, a.AsSlice())
	}
	switch w.Tunnel.Protocol {
	case state.TunnelNone:
		m.ApplicationTunnel = &workloadpb.ApplicationTunnel{Port: uint32(w.Tunnel.Port)}
	case state.TunnelProxy:
		m.ApplicationTunnel = &workloadpb.ApplicationTunnel{Protocol: workloadpb.ApplicationTunnel_PROXY,
			Port: uint32(w.Tunnel.Port)}
	}
	if len(w.Services) > 0 {
		m.Services = make(map[string]*workloadpb.PortList, len(w.Services))
		for _, s := range w.Services {
			m.Services[s.Service.String()] = &workloadpb.PortList{Ports: encodePorts(s.Ports)}
		}
	}
	if l := w.Locality; l != (state.Locality{}) {
		m.Locality = &workloadpb.Locality{Region: l.Region, Zone: l.Zone, Subzone: l.Subzone}
	}
	if w.Capacity != 1 {
		m.Capacity = wrapperspb.UInt32(w.Capacity)
	}
	return &workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: m}}
}

// EncodeService makes istiod's message of a service. Its Endpoints are not part of it: in xDS workloads name services.
func EncodeService(s *state.Service) *workloadpb.Address {
	m := &workloadpb.Service{
		Name:            s.Name,
		Namespace:       s.Namespace,
		Hostname:        s.Hostname,
		Ports:           encodePorts(s.Ports),
		SubjectAltNames: s.SubjectAltNames,
		Waypoint:        encodeGateway(s.Waypoint),
		IpFamilies:      workloadpb.IPFamilies(s.IPFamilies),
		Canonical:       s.Canonical,
	}
	for _, a := range s.VIPs {
		m.Addresses = append(m.Addresses, encodeAddress(a))
	}
	for _, p := range s.CIDRVIPs {
		a := encodeAddress(state.NetworkAddress{Network: p.Network, Addr: p.Prefix.Addr()})
		bits := uint32(p.Prefix.Bits())
		a.Length = &bits
		m.Addresses = append(m.Addresses, a)
	}
	if lb := s.LoadBalancer; lb != nil {
		m.LoadBalancing = &workloadpb.LoadBalancing{
			Mode:         workloadpb.LoadBalancing_Mode(lb.Mode),
			HealthPolicy: workloadpb.LoadBalancing_HealthPolicy(lb.HealthPolicy),
		}
		for _, scope := range lb.Preferences {
			m.LoadBalancing.RoutingPreference = append(m.LoadBalancing.RoutingPreference, workloadpb.LoadBalancing_Scope(scope))
		}
	}
	for i := range s.WeightedWaypoints {
		w := &s.WeightedWaypoints[i]
		m.WeightedWaypoints = append(m.WeightedWaypoints,
			&workloadpb.WeightedWaypoint{Destination: encodeGateway(&w.Destination), Weight: w.Weight})
	}
	if s.Visibility == state.NamespaceOnly {
		m.Visibility = workloadpb.Service_NAMESPACE
	}
	return &workloadpb.Address{Type: &workloadpb.Address_Service{Service: m}}
}

func encodePorts(m state.PortMap) []*workloadpb.Port {
	var out []*workloadpb.Port
	for _, p := range m {
		out = append(out, &workloadpb.Port{ServicePort: uint32(p.Service), TargetPort: uint32(p.Target)})
	}
	return out
}

func encodeAddress(a state.NetworkAddress) *workloadpb.NetworkAddress {
	return &workloadpb.NetworkAddress{Network: a.Network, Address: a.Addr.AsSlice()}
}

func encodeGateway(g *state.GatewayAddress) *workloadpb.GatewayAddress {
	if g == nil {
		return nil
	}
	m := &workloadpb.GatewayAddress{HboneMtlsPort: uint32(g.Port)}
	if g.Host.Hostname != "" {
		m.Destination = &workloadpb.GatewayAddress_Hostname{
			Hostname: &workloadpb.NamespacedHostname{Namespace: g.Host.Namespace, Hostname: g.Host.Hostname}}
	} else {
		m.Destination = &workloadpb.GatewayAddress_Address{Address: encodeAddress(g.Addr)}
	}
	return m
}

// EncodePolicy makes istiod's message of a policy. Match.Invalid has no place in it: only a decoder sets it.
func EncodePolicy(p *rbac.Policy) *securitypb.Authorization {
	m := &securitypb.Authorization{
		Name:      p.Name,
		Namespace: p.Namespace,
		Scope:     securitypb.Scope(p.Scope),
		Action:    securitypb.Action(p.Action),
		DryRun:    p.DryRun,
	}
	for _, rule := range p.Rules {
		r := &securitypb.Rule{}
		for _, clause := range rule {
			c := &securitypb.Clause{}
			for i := range clause {
				c.Matches = append(c.Matches, encodeMatch(&clause[i]))
			}
			r.Clauses = append(r.Clauses, c)
		}
		m.Rules = append(m.Rules, r)
	}
	return m
}

func encodeMatch(m *rbac.Match) *securitypb.Match {
	return &securitypb.Match{
		Namespaces:          encodeStrings(m.Namespaces),
		NotNamespaces:       encodeStrings(m.NotNamespaces),
		Principals:          encodeStrings(m.Principals),
		NotPrincipals:       encodeStrings(m.NotPrincipals),
		SourceIps:           encodePrefixes(m.SourceIPs),
		NotSourceIps:        encodePrefixes(m.NotSourceIPs),
		DestinationIps:      encodePrefixes(m.DestinationIPs),
		NotDestinationIps:   encodePrefixes(m.NotDestinationIPs),
		DestinationPorts:    encodePortNumbers(m.DestinationPorts),
		NotDestinationPorts: encodePortNumbers(m.NotDestinationPorts),
		ServiceAccounts:     encodeAccounts(m.ServiceAccounts),
		NotServiceAccounts:  encodeAccounts(m.NotServiceAccounts),
	}
}

func encodeStrings(l []rbac.StringMatch) []*securitypb.StringMatch {
	var out []*securitypb.StringMatch
	for _, s := range l {
		m := &securitypb.StringMatch{}
		switch s.Kind {
		case rbac.Exact:
			m.MatchType = &securitypb.StringMatch_Exact{Exact: s.Value}
		case rbac.Prefix:
			m.MatchType = &securitypb.StringMatch_Prefix{Prefix: s.Value}
		case rbac.Suffix:
			m.MatchType = &securitypb.StringMatch_Suffix{Suffix: s.Value}
		case rbac.Presence:
			m.MatchType = &securitypb.StringMatch_Presence{Presence: &emptypb.Empty{}}
		}
		out = append(out, m)
	}
	return out
}

func encodePrefixes(l []netip.Prefix) []*securitypb.Address {
	var out []*securitypb.Address
	for _, p := range l {
		out = append(out, &securitypb.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())})
	}
	return out
}

func encodePortNumbers(l []uint16) []uint32 {
	var out []uint32
	for _, p := range l {
		out = append(out, uint32(p))
	}
	return out
}

func encodeAccounts(l []rbac.ServiceAccount) []*securitypb.ServiceAccountMatch {
	var out []*securitypb.ServiceAccountMatch
	for _, a := range l {
		out = append(out, &securitypb.ServiceAccountMatch{Namespace: a.Namespace, ServiceAccount: a.Name})
	}
	return out
}
