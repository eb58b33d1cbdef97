package state

import (
	"net/netip"
	"slices"
	"strings"

	"ztun/proxy/identity"
)

// Workload is one istio.workload.Workload: a pod, a VM, or a stand-in for a
// remote one. It is immutable once inserted. Where a field repeats over many
// workloads (namespace, node, network ...) decoders should intern its string.
type Workload struct {
	UID               string // primary key, "cluster//Pod/namespace/name"
	Name              string
	Namespace         string
	TrustDomain       string
	ServiceAccount    string
	Network           string // "" is the default network
	WorkloadName      string
	WorkloadType      string // lower case: deployment, cronjob, pod, job
	CanonicalName     string
	CanonicalRevision string
	Hostname          string // to be resolved by DNS if there are no addresses
	Node              string
	ClusterID         string
	Locality          Locality

	Addresses             []netip.Addr // canonical: never an IPv4 address in IPv6 clothes
	Services              []WorkloadService
	AuthorizationPolicies []string // keys of WORKLOAD_SELECTOR policies

	Waypoint       *GatewayAddress // nil: none
	NetworkGateway *GatewayAddress // nil: none
	// MeshAddresses are where its HBONE connections arrive if that is not the mesh's port at its own addresses: sockets
	// of a host, for a workload that has nothing but those. One of each family at most.
	MeshAddresses []netip.AddrPort

	Capacity     uint32 // weight in load balancing; 0: never chosen
	Tunnel       ApplicationTunnel
	Protocol     Protocol // how it receives
	NetworkMode  NetworkMode
	Status       Status
	NativeTunnel bool // speaks HBONE itself; no effect on routing

	// Unlisted: Services link endpoints but are not reported as the workload's
	// own (ServicesOf, config_dump). So it is with ztunnel's local file, where
	// inbound connections therefore have no destination service.
	Unlisted bool
}

// Identity returns the SPIFFE identity of the workload.
func (w *Workload) Identity() identity.ID {
	return identity.ID{TrustDomain: w.TrustDomain, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
}

// Info returns the name under which the node knows the workload.
func (w *Workload) Info() WorkloadInfo {
	return WorkloadInfo{Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
}

// HasAddress reports whether ip is one of the workload's addresses.
func (w *Workload) HasAddress(ip netip.Addr) bool {
	for _, a := range w.Addresses {
		if a == ip {
			return true
		}
	}
	return false
}

// OneOfEachFamily reports whether no two of the addresses are of one family, as MeshAddresses have to be.
func OneOfEachFamily(l []netip.AddrPort) bool {
	return len(l) < 2 || len(l) == 2 && l[0].Addr().Is4() != l[1].Addr().Is4()
}

// PortsFor returns the workload's port mapping for a service that it backs.
func (w *Workload) PortsFor(k ServiceKey) (ports PortMap, ok bool) {
	for i := range w.Services {
		if w.Services[i].Service == k {
			return w.Services[i].Ports, true
		}
	}
	return nil, false
}

// WorkloadService says that a workload backs a service.
type WorkloadService struct {
	Service ServiceKey
	Ports   PortMap // service port to the workload's own port
}

// WorkloadInfo identifies the pod that a proxy serves.
type WorkloadInfo struct {
	Name, Namespace, ServiceAccount string
}

// Caller is who calls from a host's address: a workload whose HBONE arrives there calls from there, too.
type Caller struct {
	Host                      netip.Addr
	Namespace, ServiceAccount string
}

// String prints as ztunnel does: "sa.ns (name)".
func (i WorkloadInfo) String() string {
	return i.ServiceAccount + "." + i.Namespace + " (" + i.Name + ")"
}

// Locality is where a workload runs.
type Locality struct{ Region, Zone, Subzone string }

// ApplicationTunnel is how a workload wants inbound traffic wrapped.
type ApplicationTunnel struct {
	Protocol TunnelProtocol // TunnelAbsent: the workload has no application tunnel
	Port     uint16         // 0: the connection's own port
}

// TunnelProtocol is the protocol of an application tunnel.
type TunnelProtocol uint8

// The tunnel protocols; Absent is no tunnel at all, which differs from a tunnel
// of protocol NONE.
const (
	TunnelAbsent TunnelProtocol = iota
	TunnelNone
	TunnelProxy // PROXY protocol v2
)

// String returns the name used in config_dump and in the local file.
func (p TunnelProtocol) String() string {
	switch p {
	case TunnelNone:
		return "NONE"
	case TunnelProxy:
		return "PROXY"
	}
	return ""
}

// Protocol is how a workload receives connections.
type Protocol uint8

// The protocols, with the numbers of istio.workload.TunnelProtocol.
const (
	TCP   Protocol = 0
	HBONE Protocol = 1
)

// String returns the name used in config_dump and in the local file.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case HBONE:
		return "HBONE"
	}
	return "Unknown"
}

// NetworkMode says whether a workload has an address of its own.
type NetworkMode uint8

// The modes. Workloads on the host's network are not found by address.
const (
	StandardNetwork NetworkMode = 0
	HostNetwork     NetworkMode = 1
)

// String returns the name used in config_dump and in the local file.
func (m NetworkMode) String() string {
	switch m {
	case StandardNetwork:
		return "Standard"
	case HostNetwork:
		return "HostNetwork"
	}
	return "Unknown"
}

// Status is a workload's health.
type Status uint8

// The statuses.
const (
	Healthy   Status = 0
	Unhealthy Status = 1
)

// String returns the name used in config_dump and in the local file.
func (s Status) String() string {
	switch s {
	case Healthy:
		return "Healthy"
	case Unhealthy:
		return "Unhealthy"
	}
	return "Unknown"
}

// ServiceKey is a namespaced hostname, the primary key of a service.
type ServiceKey struct{ Namespace, Hostname string }

// String prints "namespace/hostname".
func (k ServiceKey) String() string { return k.Namespace + "/" + k.Hostname }

// ParseServiceKey splits "namespace/hostname" at the first slash.
func ParseServiceKey(s string) (k ServiceKey, ok bool) {
	k.Namespace, k.Hostname, ok = strings.Cut(s, "/")
	return k, ok
}

// NetworkAddress is an address within a network.
type NetworkAddress struct {
	Network string
	Addr    netip.Addr
}

// String prints "network/ip".
func (a NetworkAddress) String() string { return a.Network + "/" + a.Addr.String() }

// NetworkPrefix is a range of addresses within a network.
type NetworkPrefix struct {
	Network string
	Prefix  netip.Prefix
}

// GatewayAddress refers to a waypoint or network gateway, by hostname if
// Host.Hostname is not empty and by address otherwise.
type GatewayAddress struct {
	Host ServiceKey
	Addr NetworkAddress
	Port uint16 // its HBONE port
}

// String prints the destination: "namespace/hostname" or "network/ip".
func (g *GatewayAddress) String() string {
	if g.Host.Hostname != "" {
		return g.Host.String()
	}
	return g.Addr.String()
}

// WeightedWaypoint is one of several waypoints of a service.
type WeightedWaypoint struct {
	Destination GatewayAddress
	Weight      uint32 // 0: never chosen
}

// PortPair maps a service's port to a target port.
type PortPair struct {
	Service uint16
	Target  uint16 // in a Service: 0 means that each endpoint maps it by itself
}

// PortMap is a list of pairs sorted by service port, without repetition
// (SortPorts).
type PortMap []PortPair

// Lookup returns the target of a service port.
func (m PortMap) Lookup(port uint16) (target uint16, ok bool) {
	for _, p := range m { // nearly always one or two
		if p.Service == port {
			return p.Target, true
		}
	}
	return 0, false
}

// SortPorts returns the pairs as a PortMap. Of pairs with one service port the
// last wins. The argument is reordered.
func SortPorts(pairs []PortPair) PortMap {
	slices.SortStableFunc(pairs, func(a, b PortPair) int { return int(a.Service) - int(b.Service) })
	out := pairs[:0]
	for _, p := range pairs {
		if n := len(out); n > 0 && out[n-1].Service == p.Service {
			out[n-1] = p
			continue
		}
		out = append(out, p)
	}
	return slices.Clip(out)
}

// Scope is a step of locality preference.
type Scope uint8

// The scopes, with the numbers of LoadBalancing.Scope.
const (
	ScopeRegion  Scope = 1
	ScopeZone    Scope = 2
	ScopeSubzone Scope = 3
	ScopeNode    Scope = 4
	ScopeCluster Scope = 5
	ScopeNetwork Scope = 6
)

// String returns the name used in config_dump and in the local file.
func (s Scope) String() string {
	switch s {
	case ScopeRegion:
		return "Region"
	case ScopeZone:
		return "Zone"
	case ScopeSubzone:
		return "Subzone"
	case ScopeNode:
		return "Node"
	case ScopeCluster:
		return "Cluster"
	case ScopeNetwork:
		return "Network"
	}
	return "Unknown"
}

// LBMode is how strictly preferences are followed.
type LBMode uint8

// The modes, with the numbers of LoadBalancing.Mode.
const (
	LBStandard    LBMode = 0 // no preference: any endpoint
	LBStrict      LBMode = 1 // only endpoints that match every scope
	LBFailover    LBMode = 2 // the endpoints that match most
	LBPassthrough LBMode = 3 // no balancing: the original destination
)

// String returns the name used in config_dump and in the local file.
func (m LBMode) String() string {
	switch m {
	case LBStandard:
		return "Standard"
	case LBStrict:
		return "Strict"
	case LBFailover:
		return "Failover"
	case LBPassthrough:
		return "Passthrough"
	}
	return "Unknown"
}

// HealthPolicy says which endpoints a service may have.
type HealthPolicy uint8

// The health policies.
const (
	OnlyHealthy HealthPolicy = 0
	AllowAll    HealthPolicy = 1
)

// String returns the name used in config_dump and in the local file.
func (p HealthPolicy) String() string {
	switch p {
	case OnlyHealthy:
		return "OnlyHealthy"
	case AllowAll:
		return "AllowAll"
	}
	return "Unknown"
}

// LoadBalancer is a service's load balancing.
type LoadBalancer struct {
	Preferences  []Scope // most important first
	Mode         LBMode
	HealthPolicy HealthPolicy
}

// IPFamilies restricts which addresses of an endpoint a service uses.
type IPFamilies uint8

// The restrictions, with the numbers of istio.workload.IPFamilies.
const (
	FamiliesAutomatic IPFamilies = 0
	FamiliesIPv4      IPFamilies = 1
	FamiliesIPv6      IPFamilies = 2
	FamiliesDual      IPFamilies = 3
)

// String returns the name used in config_dump and in the local file.
func (f IPFamilies) String() string {
	switch f {
	case FamiliesIPv4:
		return "IPv4"
	case FamiliesIPv6:
		return "IPv6"
	case FamiliesDual:
		return "Dual"
	}
	return ""
}

// Accepts reports whether an address of ip's family may be used.
func (f IPFamilies) Accepts(ip netip.Addr) bool {
	switch f {
	case FamiliesIPv4:
		return ip.Is4()
	case FamiliesIPv6:
		return ip.Is6()
	}
	return true
}

// Visibility says to whom a service exists.
type Visibility uint8

// The visibilities.
const (
	Public        Visibility = 0
	NamespaceOnly Visibility = 1 // clients of its own namespace
)

// String returns the name used in config_dump and in the local file.
func (v Visibility) String() string {
	switch v {
	case Public:
		return "Public"
	case NamespaceOnly:
		return "Namespace"
	}
	return "Unknown"
}

// Service is one istio.workload.Service. It is immutable once inserted; the
// Builder makes a copy when its endpoints change.
type Service struct {
	Name              string
	Namespace         string
	Hostname          string
	VIPs              []NetworkAddress
	CIDRVIPs          []NetworkPrefix
	Ports             PortMap
	SubjectAltNames   []string // further SPIFFE ids that its endpoints may present
	Waypoint          *GatewayAddress
	WeightedWaypoints []WeightedWaypoint
	LoadBalancer      *LoadBalancer // nil: any healthy endpoint
	IPFamilies        IPFamilies
	Canonical         bool // preferred among services that share an address or name
	Visibility        Visibility

	// Endpoints sorted by UID: those that the service was given (local file) when
	// it is inserted; in a View also those of the workloads that list the service.
	// Unhealthy ones appear only under AllowAll.
	Endpoints []Endpoint

	// SANs are the SubjectAltNames that are SPIFFE ids. Filled in by the Builder.
	SANs []identity.ID

	// seq orders services that share an address or a name; see Builder.
	seq uint64
	// uniform: every endpoint is equal (has an address, capacity 1) and nothing of
	// the service calls for a comparison, so that one may be drawn by index.
	uniform bool
}

// Key returns the primary key.
func (s *Service) Key() ServiceKey { return ServiceKey{s.Namespace, s.Hostname} }

// Mode returns the load balancing mode; LBStandard without a LoadBalancer.
func (s *Service) Mode() LBMode {
	if s.LoadBalancer == nil {
		return LBStandard
	}
	return s.LoadBalancer.Mode
}

// VisibleFrom reports whether clients of a namespace see the service; "" sees
// everything.
func (s *Service) VisibleFrom(ns string) bool {
	return ns == "" || s.Visibility == Public || s.Namespace == ns
}

// Uniform reports whether any endpoint is as good as any other whoever asks, so
// that one can be drawn without looking at all of them.
func (s *Service) Uniform() bool { return s.uniform }

// Endpoint returns the endpoint of a workload, or nil.
func (s *Service) Endpoint(uid string) *Endpoint {
	i, ok := slices.BinarySearchFunc(s.Endpoints, uid, func(e Endpoint, uid string) int {
		return strings.Compare(e.UID, uid)
	})
	if !ok {
		return nil
	}
	return &s.Endpoints[i]
}

// Endpoint is a workload that backs a service.
type Endpoint struct {
	UID    string
	Ports  PortMap
	Status Status
	// Workload is the workload of that UID; nil for an endpoint that the service
	// was given, to be looked up by UID (View.EndpointWorkload).
	Workload *Workload
}
