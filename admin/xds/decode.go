package xds

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/workloadpb"
	"ztun/proxy/state"
)

// decoder turns resources as they are on the wire into state. It has no state
// but the values that it shares between resources. The zero decoder is ready; it
// belongs to one goroutine.
type decoder struct {
	strings  cache[string, string]
	gateways cache[state.GatewayAddress, *state.GatewayAddress]
	services cache[string, []state.WorkloadService]
	scratch  []byte
}

// wireError says that a resource's bytes are not its message. NACKs name such
// resources after those that were understood and refused.
type wireError struct{ text string }

func (e *wireError) Error() string { return e.text }

func unmarshal(payload []byte, m proto.Message) error {
	if err := proto.Unmarshal(payload, m); err != nil {
		// The library varies its spaces on purpose.
		return &wireError{"cannot decode: " + strings.ReplaceAll(err.Error(), "\u00a0", " ")}
	}
	return nil
}

// address reads an istio.workload.Address (spec controlplane 3.2): exactly one
// of the results is not nil. The error says what is wrong with which field; it
// is a *wireError if the bytes are no Address at all.
func (d *decoder) address(name string, payload []byte) (*state.Workload, *state.Service, error) {
	var a workloadpb.Address
	if err := unmarshal(payload, &a); err != nil {
		return nil, nil, err
	}
	switch t := a.Type.(type) {
	case *workloadpb.Address_Workload:
		w, err := d.workload(name, t.Workload)
		return w, nil, err
	case *workloadpb.Address_Service:
		s, err := d.service(t.Service)
		return nil, s, err
	}
	return nil, nil, errors.New("neither a workload nor a service")
}

// workload fills in the defaults of the protocol. name is the resource's name,
// whose memory is shared where possible.
func (d *decoder) workload(name string, x *workloadpb.Workload) (*state.Workload, error) {
	if x.Uid == "" {
		return nil, errors.New("workload without uid")
	}
	w := &state.Workload{
		UID: x.Uid, Name: x.Name, Namespace: d.str(x.Namespace),
		TrustDomain:    d.str(cmp.Or(x.TrustDomain, defaultTrustDomain)),
		ServiceAccount: d.str(cmp.Or(x.ServiceAccount, "default")),
		Network:        d.str(x.Network), WorkloadName: d.str(x.WorkloadName), WorkloadType: workloadType(x.WorkloadType),
		CanonicalName: d.str(x.CanonicalName), CanonicalRevision: d.str(x.CanonicalRevision),
		Hostname: d.str(x.Hostname), Node: d.str(x.Node), ClusterID: d.str(cmp.Or(x.ClusterId, "Kubernetes")),
		Capacity: 1, NativeTunnel: x.NativeTunnel,
	}
	if w.UID == name {
		w.UID = name
	}
	if strings.HasSuffix(w.UID, w.Name) { // "cluster//Pod/namespace/name"
		w.Name = w.UID[len(w.UID)-len(w.Name):]
	}
	if l := x.Locality; l != nil {
		w.Locality = state.Locality{Region: d.str(l.Region), Zone: d.str(l.Zone), Subzone: d.str(l.Subzone)}
	}
	if x.Capacity != nil {
		w.Capacity = x.Capacity.Value
	}
	switch x.TunnelProtocol {
	case workloadpb.TunnelProtocol_NONE:
		w.Protocol = state.TCP
	case workloadpb.TunnelProtocol_HBONE:
		w.Protocol = state.HBONE
	default:
		return nil, fmt.Errorf("tunnel_protocol %v is not supported", x.TunnelProtocol)
	}
	switch x.Status {
	case workloadpb.WorkloadStatus_HEALTHY, workloadpb.WorkloadStatus_UNHEALTHY:
		w.Status = state.Status(x.Status)
	default:
		return nil, fmt.Errorf("unknown status %v", x.Status)
	}
	switch x.NetworkMode {
	case workloadpb.NetworkMode_STANDARD, workloadpb.NetworkMode_HOST_NETWORK:
		w.NetworkMode = state.NetworkMode(x.NetworkMode)
	default:
		return nil, fmt.Errorf("unknown network_mode %v", x.NetworkMode)
	}
	if len(x.Addresses) > 0 {
		w.Addresses = make([]netip.Addr, len(x.Addresses))
		for i, b := range x.Addresses {
			var err error
			if w.Addresses[i], err = addr(b); err != nil {
				return nil, fmt.Errorf("addresses: %w", err)
			}
		}
	}
	if len(x.AuthorizationPolicies) > 0 {
		w.AuthorizationPolicies = make([]string, len(x.AuthorizationPolicies))
		for i, p := range x.AuthorizationPolicies {
			w.AuthorizationPolicies[i] = d.str(p)
		}
	}
	var err error
	if w.Tunnel, err = tunnel(x.ApplicationTunnel); err != nil {
		return nil, fmt.Errorf("application_tunnel: %w", err)
	}
	if w.Waypoint, err = d.gateway(x.Waypoint); err != nil {
		return nil, fmt.Errorf("waypoint: %w", err)
	}
	if w.NetworkGateway, err = d.gateway(x.NetworkGateway); err != nil {
		return nil, fmt.Errorf("network_gateway: %w", err)
	}
	if w.MeshAddresses, err = meshAddresses(x.Extensions); err != nil {
		return nil, fmt.Errorf("extension %s: %w", MeshExtension, err)
	}
	if w.Services, err = d.workloadServices(x.Services); err != nil {
		return nil, fmt.Errorf("services: %w", err)
	}
	return w, nil
}

// MeshExtension names a workload's extension of ours: a GatewayAddress that says where its HBONE connections arrive.
// Others of that protocol pass over it, as over every extension.
const MeshExtension = "ztun.mesh-address"

// meshAddresses reads those extensions; the others are none of ours.
func meshAddresses(l []*workloadpb.Extension) (out []netip.AddrPort, err error) {
	for _, x := range l {
		if x.Name != MeshExtension {
			continue
		}
		var g workloadpb.GatewayAddress
		if err := x.Config.UnmarshalTo(&g); err != nil {
			return nil, err
		}
		ip, err := addr(g.GetAddress().GetAddress())
		if err != nil {
			return nil, err
		}
		n, err := port(g.HboneMtlsPort)
		if err != nil {
			return nil, fmt.Errorf("hbone_mtls_port: %w", err)
		}
		if n == 0 || ip.IsUnspecified() {
			return nil, fmt.Errorf("%v is nowhere to connect to", netip.AddrPortFrom(ip, n))
		}
		if out = append(out, netip.AddrPortFrom(ip, n)); !state.OneOfEachFamily(out) {
			return nil, errors.New("several addresses of one family")
		}
	}
	return out, nil
}

func workloadType(t workloadpb.WorkloadType) string {
	switch t {
	case workloadpb.WorkloadType_CRONJOB:
		return "cronjob"
	case workloadpb.WorkloadType_POD:
		return "pod"
	case workloadpb.WorkloadType_JOB:
		return "job"
	}
	return "deployment" // unknown ones too, as ztunnel
}

// workloadServices reads the services that a workload backs, sorted by name. All
// pods of a deployment have the same: one list serves them all.
func (d *decoder) workloadServices(m map[string]*workloadpb.PortList) ([]state.WorkloadService, error) {
	if len(m) == 0 {
		return nil, nil
	}
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	key := d.scratch[:0]
	for _, n := range names {
		key = fmt.Appendf(key, "%q", n)
		for _, p := range m[n].GetPorts() {
			key = fmt.Appendf(key, ",%d:%d", p.GetServicePort(), p.GetTargetPort())
		}
	}
	if cap(key) < 1<<16 {
		d.scratch = key
	}
	if l, ok := d.services.get(string(key)); ok {
		return l, nil
	}
	l := make([]state.WorkloadService, len(names))
	for i, n := range names {
		k, ok := state.ParseServiceKey(n)
		if !ok {
			return nil, fmt.Errorf("%q is not namespace/hostname", n)
		}
		ports, err := portMap(m[n].GetPorts())
		if err != nil {
			return nil, fmt.Errorf("%q: %w", n, err)
		}
		l[i] = state.WorkloadService{Service: state.ServiceKey{Namespace: d.str(strings.Clone(k.Namespace)),
			Hostname: d.str(strings.Clone(k.Hostname))}, Ports: ports}
	}
	if len(key) <= maxInterned {
		d.services.put(string(key), l)
	}
	return l, nil
}

func (d *decoder) service(x *workloadpb.Service) (*state.Service, error) {
	if x.Hostname == "" {
		return nil, errors.New("service without hostname")
	}
	s := &state.Service{
		Name: d.str(x.Name), Namespace: d.str(x.Namespace), Hostname: d.str(x.Hostname),
		SubjectAltNames: x.SubjectAltNames, Canonical: x.Canonical, Visibility: state.Public,
	}
	if x.Visibility == workloadpb.Service_NAMESPACE {
		s.Visibility = state.NamespaceOnly // unknown ones are public, as in ztunnel
	}
	switch x.IpFamilies {
	case workloadpb.IPFamilies_AUTOMATIC, workloadpb.IPFamilies_IPV4_ONLY, workloadpb.IPFamilies_IPV6_ONLY,
		workloadpb.IPFamilies_DUAL:
		s.IPFamilies = state.IPFamilies(x.IpFamilies)
	default:
		return nil, fmt.Errorf("unknown ip_families %v", x.IpFamilies)
	}
	for _, a := range x.Addresses {
		if err := d.vip(s, a); err != nil {
			return nil, fmt.Errorf("addresses: %w", err)
		}
	}
	var err error
	if s.Ports, err = portMap(x.Ports); err != nil {
		return nil, fmt.Errorf("ports: %w", err)
	}
	if s.Waypoint, err = d.gateway(x.Waypoint); err != nil {
		return nil, fmt.Errorf("waypoint: %w", err)
	}
	for _, ww := range x.WeightedWaypoints {
		g, err := d.gateway(ww.GetDestination())
		if err == nil && g == nil {
			err = errors.New("no destination")
		}
		if err != nil {
			return nil, fmt.Errorf("weighted_waypoints: %w", err)
		}
		s.WeightedWaypoints = append(s.WeightedWaypoints, state.WeightedWaypoint{Destination: *g, Weight: ww.Weight})
	}
	if s.LoadBalancer, err = loadBalancer(x.LoadBalancing); err != nil {
		return nil, fmt.Errorf("load_balancing: %w", err)
	}
	return s, nil
}

// vip adds an address of a service: without a length, or with that of a whole
// address, a VIP; otherwise a range.
func (d *decoder) vip(s *state.Service, a *workloadpb.NetworkAddress) error {
	ip, err := addr(a.GetAddress())
	if err != nil {
		return err
	}
	network := d.str(a.GetNetwork())
	if a.Length == nil {
		s.VIPs = append(s.VIPs, state.NetworkAddress{Network: network, Addr: ip})
		return nil
	}
	p, err := prefix(a.Address, *a.Length)
	if err != nil {
		return err
	}
	if p.IsSingleIP() {
		s.VIPs = append(s.VIPs, state.NetworkAddress{Network: network, Addr: ip})
	} else {
		s.CIDRVIPs = append(s.CIDRVIPs, state.NetworkPrefix{Network: network, Prefix: p})
	}
	return nil
}

func loadBalancer(x *workloadpb.LoadBalancing) (*state.LoadBalancer, error) {
	if x == nil {
		return nil, nil
	}
	lb := &state.LoadBalancer{Mode: state.LBMode(x.Mode), HealthPolicy: state.HealthPolicy(x.HealthPolicy)}
	if _, ok := workloadpb.LoadBalancing_Mode_name[int32(x.Mode)]; !ok {
		return nil, fmt.Errorf("unknown mode %v", x.Mode)
	}
	if _, ok := workloadpb.LoadBalancing_HealthPolicy_name[int32(x.HealthPolicy)]; !ok {
		return nil, fmt.Errorf("unknown health_policy %v", x.HealthPolicy)
	}
	for _, p := range x.RoutingPreference {
		if _, ok := workloadpb.LoadBalancing_Scope_name[int32(p)]; !ok || p == workloadpb.LoadBalancing_UNSPECIFIED_SCOPE {
			return nil, fmt.Errorf("unknown routing_preference %v", p)
		}
		lb.Preferences = append(lb.Preferences, state.Scope(p))
	}
	return lb, nil
}

// gateway reads a reference to a gateway; nil for none.
func (d *decoder) gateway(x *workloadpb.GatewayAddress) (*state.GatewayAddress, error) {
	if x == nil {
		return nil, nil
	}
	port, err := port(x.HboneMtlsPort)
	if err != nil {
		return nil, fmt.Errorf("hbone_mtls_port: %w", err)
	}
	g := state.GatewayAddress{Port: port}
	switch t := x.Destination.(type) {
	case *workloadpb.GatewayAddress_Hostname:
		if t.Hostname.GetHostname() == "" {
			return nil, errors.New("empty hostname")
		}
		g.Host = state.ServiceKey{Namespace: d.str(t.Hostname.Namespace), Hostname: d.str(t.Hostname.Hostname)}
	case *workloadpb.GatewayAddress_Address:
		ip, err := addr(t.Address.GetAddress())
		if err != nil {
			return nil, err
		}
		g.Addr = state.NetworkAddress{Network: d.str(t.Address.Network), Addr: ip}
	default:
		return nil, errors.New("no destination")
	}
	return d.shared(g), nil
}

func tunnel(x *workloadpb.ApplicationTunnel) (t state.ApplicationTunnel, err error) {
	if x == nil {
		return t, nil
	}
	switch x.Protocol {
	case workloadpb.ApplicationTunnel_NONE:
		t.Protocol = state.TunnelNone
	case workloadpb.ApplicationTunnel_PROXY:
		t.Protocol = state.TunnelProxy
	default:
		return t, fmt.Errorf("unknown protocol %v", x.Protocol)
	}
	t.Port, err = port(x.Port)
	return t, err
}

// portMap reads service ports and their targets. Of a port given twice the last
// counts.
func portMap(l []*workloadpb.Port) (state.PortMap, error) {
	if len(l) == 0 {
		return nil, nil
	}
	pairs := make([]state.PortPair, len(l))
	for i, p := range l {
		var err error
		if pairs[i].Service, err = port(p.GetServicePort()); err != nil {
			return nil, err
		}
		if pairs[i].Target, err = port(p.GetTargetPort()); err != nil {
			return nil, err
		}
	}
	return state.SortPorts(pairs), nil
}

func port(n uint32) (uint16, error) {
	if n > 65535 {
		return 0, fmt.Errorf("port %d is out of range", n)
	}
	return uint16(n), nil
}

// addr reads an address of 4 or 16 bytes, in canonical form.
func addr(b []byte) (netip.Addr, error) {
	ip, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("an address of %d bytes (want 4 or 16)", len(b))
	}
	return ip.Unmap(), nil
}

// prefix reads an address range, in canonical form but for host bits. A range of
// IPv4 addresses in IPv6 clothes that is wider than all of IPv4 is refused:
// nothing in canonical form would ever be in it.
func prefix(b []byte, length uint32) (netip.Prefix, error) {
	ip, ok := netip.AddrFromSlice(b)
	switch {
	case !ok:
		return netip.Prefix{}, fmt.Errorf("an address of %d bytes (want 4 or 16)", len(b))
	case length > uint32(ip.BitLen()):
		return netip.Prefix{}, fmt.Errorf("prefix length %d of %v (at most %d)", length, ip, ip.BitLen())
	case !ip.Is4In6():
		return netip.PrefixFrom(ip, int(length)), nil
	case length < 96:
		return netip.Prefix{}, fmt.Errorf("prefix length %d of %v (at least 96)", length, ip)
	}
	return netip.PrefixFrom(ip.Unmap(), int(length)-96), nil
}
