package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"
)

// WorldFile is the workload file in ztunnel's LOCAL_XDS schema, the part of it that tests need.
type WorldFile struct {
	Workloads []Workload `yaml:"workloads"`
	Services  []Service  `yaml:"services,omitempty"`
	Policies  []Policy   `yaml:"policies,omitempty"`
}

type Workload struct {
	UID               string                       `yaml:"uid"`
	Name              string                       `yaml:"name"`
	Namespace         string                       `yaml:"namespace"`
	ServiceAccount    string                       `yaml:"serviceAccount,omitempty"`
	TrustDomain       string                       `yaml:"trustDomain,omitempty"`
	WorkloadIPs       []string                     `yaml:"workloadIps"`
	Protocol          string                       `yaml:"protocol"`
	Node              string                       `yaml:"node,omitempty"`
	Network           string                       `yaml:"network"`
	WorkloadName      string                       `yaml:"workloadName,omitempty"`
	WorkloadType      string                       `yaml:"workloadType,omitempty"`
	CanonicalName     string                       `yaml:"canonicalName,omitempty"`
	CanonicalRevision string                       `yaml:"canonicalRevision,omitempty"`
	ClusterID         string                       `yaml:"clusterId,omitempty"`
	Status            string                       `yaml:"status,omitempty"`
	Services          map[string]map[uint16]uint16 `yaml:"services"`
	NetworkGateway    *Gateway                     `yaml:"networkGateway,omitempty"`
	MeshAddresses     []string                     `yaml:"meshAddresses,omitempty"`
	Hostname          string                       `yaml:"hostname,omitempty"`
	NetworkMode       string                       `yaml:"networkMode,omitempty"` // Standard, HostNetwork
	Capacity          *uint32                      `yaml:"capacity,omitempty"`    // nil: 1
	Locality          *Locality                    `yaml:"locality,omitempty"`
	Waypoint          *Gateway                     `yaml:"waypoint,omitempty"`
	ApplicationTunnel *Tunnel                      `yaml:"applicationTunnel,omitempty"`
	NativeTunnel      bool                         `yaml:"nativeTunnel,omitempty"`
}

// Locality is where a workload runs.
type Locality struct {
	Region  string `yaml:"region"`
	Zone    string `yaml:"zone"`
	Subzone string `yaml:"subzone"`
}

// Tunnel is how a workload, such as a waypoint, takes what comes by HBONE: protocol NONE or PROXY, on a port of its
// own or the called one (0).
type Tunnel struct {
	Protocol string `yaml:"protocol"`
	Port     uint16 `yaml:"port,omitempty"`
}

// Gateway is how to reach a waypoint or a network: "network/ip" or "namespace/hostname", and its HBONE port.
type Gateway struct {
	Destination string `yaml:"destination"`
	Port        uint16 `yaml:"hboneMtlsPort"`
}

type Service struct {
	Name      string            `yaml:"name"`
	Namespace string            `yaml:"namespace"`
	Hostname  string            `yaml:"hostname"`
	VIPs      []string          `yaml:"vips"`
	Ports     map[uint16]uint16 `yaml:"ports"`
	Canonical bool              `yaml:"canonical,omitempty"`

	CIDRVIPs          []CIDR             `yaml:"cidrVips,omitempty"`
	SubjectAltNames   []string           `yaml:"subjectAltNames,omitempty"`
	Waypoint          *Gateway           `yaml:"waypoint,omitempty"`
	WeightedWaypoints []WeightedWaypoint `yaml:"weightedWaypoints,omitempty"`
	LoadBalancer      *LoadBalancer      `yaml:"loadBalancer,omitempty"`
	IPFamilies        string             `yaml:"ipFamilies,omitempty"` // IPv4, IPv6, Dual
	Visibility        string             `yaml:"visibility,omitempty"` // Public, Namespace
}

// CIDR is a range of addresses that belong to a service.
type CIDR struct {
	Network string `yaml:"network"`
	CIDR    string `yaml:"cidr"`
}

// WeightedWaypoint is one of several waypoints.
type WeightedWaypoint struct {
	Destination Gateway `yaml:"destination"`
	Weight      uint32  `yaml:"weight"`
}

// LoadBalancer says which endpoints of a service are preferred: Mode Standard, Strict, Failover or Passthrough;
// HealthPolicy OnlyHealthy or AllowAll.
type LoadBalancer struct {
	Preferences  []string `yaml:"routingPreferences"`
	Mode         string   `yaml:"mode"`
	HealthPolicy string   `yaml:"healthPolicy"`
}

// Policy's rules are a list of rules, each a list of clauses, each a list of matches: `- - - destinationPorts: [7777]`.
type Policy struct {
	Name      string               `yaml:"name"`
	Namespace string               `yaml:"namespace"`
	Scope     string               `yaml:"scope"`
	Action    string               `yaml:"action"`
	Rules     [][][]map[string]any `yaml:"rules"`
	DryRun    bool                 `yaml:"dryRun"`
}

// WorldPath is the workload file that both daemons read.
func (w *World) WorldPath() string { return w.Path("world.yaml") }

// DefaultWorld describes the pods (HBONE, unless Pod.Protocol says otherwise) and the hosts (TCP) that exist now.
func (w *World) DefaultWorld() WorldFile {
	var f WorldFile
	for _, p := range w.Pods() {
		f.Workloads = append(f.Workloads, p.Workload())
	}
	for _, h := range w.Hosts() {
		f.Workloads = append(f.Workloads, Workload{
			UID: "lab//v1/Pod/default/" + h.Name, Name: h.Name, Namespace: "default", ServiceAccount: "default",
			WorkloadIPs: addrStrings(h.IPs), Protocol: "TCP", Node: h.Node.Name, Services: map[string]map[uint16]uint16{},
		})
	}
	return f
}

// Workload is the pod's entry of the world file.
func (p *Pod) Workload() Workload {
	services := p.Services
	if services == nil {
		services = map[string]map[uint16]uint16{}
	}
	return Workload{
		UID: fmt.Sprintf("lab//v1/Pod/%s/%s", p.Namespace, p.Name), Name: p.Name, Namespace: p.Namespace,
		ServiceAccount: p.ServiceAccount,
		TrustDomain:    "cluster.local", WorkloadIPs: addrStrings(p.IPs), Protocol: p.Protocol, Node: p.Node.Name,
		WorkloadName: p.Name + "-deploy", WorkloadType: "deployment", CanonicalName: p.Name, CanonicalRevision: "v1",
		ClusterID: "Kubernetes", Status: "Healthy", Services: services,
	}
}

func addrStrings(ips []netip.Addr) []string {
	s := make([]string, len(ips))
	for i, ip := range ips {
		s[i] = ip.String()
	}
	return s
}

// WriteWorld replaces the workload file (by a rename, as an editor or a config map would).
func (w *World) WriteWorld(f WorldFile) error {
	b, err := yaml.Marshal(f)
	if err != nil {
		return err
	}
	return w.WriteWorldBytes(b)
}

// WriteWorldBytes is WriteWorld with any content.
func (w *World) WriteWorldBytes(b []byte) error {
	tmp := filepath.Join(w.Dir, ".world.yaml.new")
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, w.WorldPath())
}
