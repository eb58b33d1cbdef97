package xds

import (
	"bytes"
	"encoding/json"
	"io"
	"net/netip"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// The Write functions render the values of config_dump's members as ztunnel
// does: keys in alphabetical order, what is empty omitted where ztunnel omits
// it, two spaces of indentation, to stand one level deep in an object. They
// write entry by entry, so that a dump of a large mesh needs little memory and
// does not hold anything up.

// WriteWorkloads writes the member "workloads": sorted by uid.
func WriteWorkloads(w io.Writer, v *state.View) error {
	a := array{w: w, prefix: "  "}
	for _, x := range v.Workloads() {
		j := newWorkloadJSON(x)
		if !x.Unlisted && len(x.Services) > 0 {
			names := make([]string, len(x.Services))
			for i := range x.Services {
				names[i] = x.Services[i].Service.String()
			}
			j.Services = names
		}
		a.add(j)
	}
	return a.end()
}

// WriteServices writes the member "services": sorted by hostname.
func WriteServices(w io.Writer, v *state.View) error {
	a := array{w: w, prefix: "  "}
	for _, s := range v.Services() {
		a.add(newServiceJSON(s))
	}
	return a.end()
}

// WritePolicies writes the member "policies": sorted by key.
func WritePolicies(w io.Writer, v *state.View) error {
	a := array{w: w, prefix: "  "}
	for _, p := range v.Policies() {
		a.add(newPolicyJSON(p))
	}
	return a.end()
}

// WriteStaged writes the member "stagedServices": the endpoints whose services
// do not exist.
func WriteStaged(w io.Writer, v *state.View) error {
	m := make(map[string]map[string]endpointJSON)
	for _, s := range v.Staged() {
		m[s.Service.String()] = newEndpointsJSON(s.Endpoints)
	}
	return writeJSON(w, m, "  ")
}

// WriteStatic writes the member "staticConfig": the local file as it is read
// now, in its own order. Nil is a file without content.
func WriteStatic(w io.Writer, l *Local) error {
	if l == nil {
		l = &Local{}
	}
	s := staticWriter{w: w}
	s.text("{\n    \"policies\": ")
	a := array{w: w, prefix: "    "}
	for _, p := range l.Policies {
		a.add(newPolicyJSON(p))
	}
	s.done(a.end())
	s.text(",\n    \"services\": ")
	a = array{w: w, prefix: "    "}
	for _, x := range l.Services {
		a.add(newServiceJSON(x))
	}
	s.done(a.end())
	s.text(",\n    \"workloads\": ")
	a = array{w: w, prefix: "    "}
	for _, x := range l.Workloads {
		j := newWorkloadJSON(x)
		ports := make(map[string]map[uint16]uint16, len(x.Services))
		for i := range x.Services {
			ports[x.Services[i].Service.String()] = newPortsJSON(x.Services[i].Ports)
		}
		j.Services = ports
		a.add(j)
	}
	s.done(a.end())
	s.text("\n  }")
	return s.err
}

// staticWriter remembers the first error.
type staticWriter struct {
	w   io.Writer
	err error
}

func (s *staticWriter) text(t string) {
	if s.err == nil {
		_, s.err = io.WriteString(s.w, t)
	}
}

func (s *staticWriter) done(err error) {
	if s.err == nil {
		s.err = err
	}
}

// array writes a JSON array entry by entry. prefix is the indentation of the
// line that it starts on.
type array struct {
	w      io.Writer
	prefix string
	n      int
	err    error
}

func (a *array) add(x any) {
	if a.err != nil {
		return
	}
	sep := ",\n"
	if a.n == 0 {
		sep = "[\n"
	}
	a.n++
	if _, a.err = io.WriteString(a.w, sep+a.prefix+"  "); a.err == nil {
		a.err = writeJSON(a.w, x, a.prefix+"  ")
	}
}

func (a *array) end() error {
	if a.err == nil {
		s := "\n" + a.prefix + "]"
		if a.n == 0 {
			s = "[]"
		}
		_, a.err = io.WriteString(a.w, s)
	}
	return a.err
}

func writeJSON(w io.Writer, x any, prefix string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // as ztunnel's
	e.SetIndent(prefix, "  ")
	if err := e.Encode(x); err != nil {
		return err
	}
	_, err := w.Write(bytes.TrimRight(b.Bytes(), "\n"))
	return err
}

// The fields of the following types are in alphabetical order of their keys.

type workloadJSON struct {
	ApplicationTunnel     *tunnelJSON   `json:"applicationTunnel,omitempty"`
	AuthorizationPolicies []string      `json:"authorizationPolicies,omitempty"`
	CanonicalName         string        `json:"canonicalName,omitempty"`
	CanonicalRevision     string        `json:"canonicalRevision,omitempty"`
	Capacity              uint32        `json:"capacity"`
	ClusterID             string        `json:"clusterId"`
	Hostname              string        `json:"hostname,omitempty"`
	Locality              *localityJSON `json:"locality,omitempty"`
	Name                  string        `json:"name"`
	Namespace             string        `json:"namespace"`
	NativeTunnel          bool          `json:"nativeTunnel,omitempty"`
	Network               string        `json:"network,omitempty"`
	NetworkGateway        *gatewayJSON  `json:"networkGateway,omitempty"`
	NetworkMode           string        `json:"networkMode"`
	Node                  string        `json:"node,omitempty"`
	Protocol              string        `json:"protocol"`
	ServiceAccount        string        `json:"serviceAccount,omitempty"`
	Services              any           `json:"services,omitempty"` // []string, or the file's map
	Status                string        `json:"status"`
	TrustDomain           string        `json:"trustDomain,omitempty"`
	UID                   string        `json:"uid,omitempty"`
	Waypoint              *gatewayJSON  `json:"waypoint,omitempty"`
	WorkloadIPs           []netip.Addr  `json:"workloadIps"`
	WorkloadName          string        `json:"workloadName,omitempty"`
	WorkloadType          string        `json:"workloadType,omitempty"`
}

type tunnelJSON struct {
	Port     *uint16 `json:"port"`
	Protocol string  `json:"protocol"`
}

type localityJSON struct {
	Region  string `json:"region"`
	Subzone string `json:"subzone"`
	Zone    string `json:"zone"`
}

type gatewayJSON struct {
	Destination   string `json:"destination"`
	HBONEMTLSPort uint16 `json:"hboneMtlsPort"`
}

type serviceJSON struct {
	Canonical         bool                    `json:"canonical"`
	CIDRVIPs          []cidrJSON              `json:"cidrVips,omitempty"`
	Endpoints         map[string]endpointJSON `json:"endpoints"`
	Hostname          string                  `json:"hostname"`
	IPFamilies        string                  `json:"ipFamilies,omitempty"`
	LoadBalancer      *loadBalancerJSON       `json:"loadBalancer,omitempty"`
	Name              string                  `json:"name"`
	Namespace         string                  `json:"namespace"`
	Ports             map[uint16]uint16       `json:"ports"`
	SubjectAltNames   []string                `json:"subjectAltNames"`
	VIPs              []string                `json:"vips"`
	Visibility        string                  `json:"visibility"`
	Waypoint          *gatewayJSON            `json:"waypoint,omitempty"`
	WeightedWaypoints []weightedJSON          `json:"weightedWaypoints,omitempty"`
}

type cidrJSON struct {
	CIDR    netip.Prefix `json:"cidr"`
	Network string       `json:"network"`
}

type endpointJSON struct {
	Port        map[uint16]uint16 `json:"port"`
	Status      string            `json:"status"`
	WorkloadUID string            `json:"workloadUid"`
}

type loadBalancerJSON struct {
	HealthPolicy       string   `json:"healthPolicy"`
	Mode               string   `json:"mode"`
	RoutingPreferences []string `json:"routingPreferences"`
}

type weightedJSON struct {
	Destination gatewayJSON `json:"destination"`
	Weight      uint32      `json:"weight"`
}

type policyJSON struct {
	Action    string          `json:"action"`
	DryRun    bool            `json:"dryRun"`
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Rules     [][][]matchJSON `json:"rules"`
	Scope     string          `json:"scope"`
}

type matchJSON struct {
	DestinationIPs      []netip.Prefix    `json:"destinationIps,omitempty"`
	DestinationPorts    []uint16          `json:"destinationPorts,omitempty"`
	Namespaces          []stringMatchJSON `json:"namespaces,omitempty"`
	NotDestinationIPs   []netip.Prefix    `json:"notDestinationIps,omitempty"`
	NotDestinationPorts []uint16          `json:"notDestinationPorts,omitempty"`
	NotNamespaces       []stringMatchJSON `json:"notNamespaces,omitempty"`
	NotPrincipals       []stringMatchJSON `json:"notPrincipals,omitempty"`
	NotServiceAccounts  []accountJSON     `json:"notServiceAccounts,omitempty"`
	NotSourceIPs        []netip.Prefix    `json:"notSourceIps,omitempty"`
	Principals          []stringMatchJSON `json:"principals,omitempty"`
	ServiceAccounts     []accountJSON     `json:"serviceAccounts,omitempty"`
	SourceIPs           []netip.Prefix    `json:"sourceIps,omitempty"`
}

type accountJSON struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// stringMatchJSON is {"Exact": "x"} or {"Presence": []}.
type stringMatchJSON rbac.StringMatch

func (m stringMatchJSON) MarshalJSON() ([]byte, error) {
	var x any = m.Value
	if m.Kind == rbac.Presence {
		x = []string{}
	}
	return json.Marshal(map[string]any{m.Kind.String(): x})
}

func newWorkloadJSON(w *state.Workload) workloadJSON {
	j := workloadJSON{
		AuthorizationPolicies: w.AuthorizationPolicies,
		CanonicalName:         w.CanonicalName, CanonicalRevision: w.CanonicalRevision,
		Capacity: w.Capacity, ClusterID: w.ClusterID, Hostname: w.Hostname,
		Name: w.Name, Namespace: w.Namespace, NativeTunnel: w.NativeTunnel,
		Network: w.Network, NetworkGateway: newGatewayJSON(w.NetworkGateway), NetworkMode: w.NetworkMode.String(),
		Node: w.Node, Protocol: w.Protocol.String(), ServiceAccount: w.ServiceAccount,
		Status: w.Status.String(), TrustDomain: w.TrustDomain, UID: w.UID,
		Waypoint: newGatewayJSON(w.Waypoint), WorkloadIPs: list(w.Addresses),
		WorkloadName: w.WorkloadName, WorkloadType: w.WorkloadType,
	}
	if w.Locality != (state.Locality{}) {
		j.Locality = &localityJSON{w.Locality.Region, w.Locality.Subzone, w.Locality.Zone}
	}
	if w.Tunnel.Protocol != state.TunnelAbsent {
		j.ApplicationTunnel = &tunnelJSON{Protocol: w.Tunnel.Protocol.String()}
		if w.Tunnel.Port != 0 {
			j.ApplicationTunnel.Port = &w.Tunnel.Port
		}
	}
	return j
}

func newServiceJSON(s *state.Service) serviceJSON {
	j := serviceJSON{
		Canonical: s.Canonical, Endpoints: newEndpointsJSON(s.Endpoints), Hostname: s.Hostname,
		IPFamilies: s.IPFamilies.String(), Name: s.Name, Namespace: s.Namespace,
		Ports: newPortsJSON(s.Ports), SubjectAltNames: list(s.SubjectAltNames), VIPs: make([]string, len(s.VIPs)),
		Visibility: s.Visibility.String(), Waypoint: newGatewayJSON(s.Waypoint),
	}
	for i, a := range s.VIPs {
		j.VIPs[i] = a.String()
	}
	for _, c := range s.CIDRVIPs {
		j.CIDRVIPs = append(j.CIDRVIPs, cidrJSON{c.Prefix, c.Network})
	}
	for i := range s.WeightedWaypoints {
		ww := &s.WeightedWaypoints[i]
		j.WeightedWaypoints = append(j.WeightedWaypoints, weightedJSON{*newGatewayJSON(&ww.Destination), ww.Weight})
	}
	if lb := s.LoadBalancer; lb != nil {
		j.LoadBalancer = &loadBalancerJSON{lb.HealthPolicy.String(), lb.Mode.String(), make([]string, len(lb.Preferences))}
		for i, p := range lb.Preferences {
			j.LoadBalancer.RoutingPreferences[i] = p.String()
		}
	}
	return j
}

func newEndpointsJSON(l []state.Endpoint) map[string]endpointJSON {
	m := make(map[string]endpointJSON, len(l))
	for _, e := range l {
		m[e.UID] = endpointJSON{newPortsJSON(e.Ports), e.Status.String(), e.UID}
	}
	return m
}

func newPortsJSON(l state.PortMap) map[uint16]uint16 {
	m := make(map[uint16]uint16, len(l))
	for _, p := range l {
		m[p.Service] = p.Target
	}
	return m
}

func newGatewayJSON(g *state.GatewayAddress) *gatewayJSON {
	if g == nil {
		return nil
	}
	return &gatewayJSON{g.String(), g.Port}
}

func newPolicyJSON(p *rbac.Policy) policyJSON {
	j := policyJSON{
		Action: p.Action.String(), DryRun: p.DryRun, Name: p.Name, Namespace: p.Namespace,
		Rules: make([][][]matchJSON, len(p.Rules)), Scope: p.Scope.String(),
	}
	for i, rule := range p.Rules {
		j.Rules[i] = make([][]matchJSON, len(rule))
		for k, clause := range rule {
			j.Rules[i][k] = make([]matchJSON, len(clause))
			for n := range clause {
				j.Rules[i][k][n] = newMatchJSON(&clause[n])
			}
		}
	}
	return j
}

func newMatchJSON(m *rbac.Match) matchJSON {
	return matchJSON{
		DestinationIPs: m.DestinationIPs, NotDestinationIPs: m.NotDestinationIPs,
		SourceIPs: m.SourceIPs, NotSourceIPs: m.NotSourceIPs,
		DestinationPorts: m.DestinationPorts, NotDestinationPorts: m.NotDestinationPorts,
		Namespaces: newStringsJSON(m.Namespaces), NotNamespaces: newStringsJSON(m.NotNamespaces),
		Principals: newStringsJSON(m.Principals), NotPrincipals: newStringsJSON(m.NotPrincipals),
		ServiceAccounts: newAccountsJSON(m.ServiceAccounts), NotServiceAccounts: newAccountsJSON(m.NotServiceAccounts),
	}
}

func newStringsJSON(l []rbac.StringMatch) (out []stringMatchJSON) {
	for _, m := range l {
		out = append(out, stringMatchJSON(m))
	}
	return out
}

func newAccountsJSON(l []rbac.ServiceAccount) (out []accountJSON) {
	for _, a := range l {
		out = append(out, accountJSON{a.Namespace, a.Name})
	}
	return out
}

// list makes an empty list of a nil one: [] rather than null.
func list[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}
