package xds

import (
	"cmp"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// The Write functions render the values of config_dump's members as ztunnel does: keys in alphabetical
// order, what is empty omitted where ztunnel omits it, two spaces of indentation, to stand one level deep
// in an object. They write entry by entry and make no garbage, so that a dump of a large mesh needs little
// memory and does not hold anything up; the writer that they are given passes the processor on.

// WriteWorkloads writes the member "workloads": sorted by uid.
func WriteWorkloads(w io.Writer, v *state.View) error {
	j := newJSONWriter(w, 1)
	j.open('[')
	for _, x := range v.WorkloadsPausing(pauseOf(w)) {
		j.next()
		j.workload(x, func() {
			if x.Unlisted || len(x.Services) == 0 {
				return
			}
			j.key("services")
			j.open('[')
			for i := range x.Services {
				j.next()
				j.text(x.Services[i].Service.Namespace, "/", x.Services[i].Service.Hostname)
			}
			j.close(']')
		})
		if !j.pass() {
			break
		}
	}
	j.close(']')
	return j.flush()
}

// pauseOf is how the writer of a dump lets others have the processor, if it does (admin's has Pause).
func pauseOf(w io.Writer) func() {
	if p, ok := w.(interface{ Pause() }); ok {
		return p.Pause
	}
	return nil
}

// WriteServices writes the member "services": sorted by hostname.
func WriteServices(w io.Writer, v *state.View) error {
	j := newJSONWriter(w, 1)
	j.services(v.ServicesPausing(pauseOf(w)))
	return j.flush()
}

// WritePolicies writes the member "policies": sorted by key.
func WritePolicies(w io.Writer, v *state.View) error {
	j := newJSONWriter(w, 1)
	j.policies(v.Policies())
	return j.flush()
}

// WriteStaged writes the member "stagedServices": the endpoints whose services do not exist.
func WriteStaged(w io.Writer, v *state.View) error {
	j := newJSONWriter(w, 1)
	j.open('{')
	for _, s := range v.Staged() {
		j.name(s.Service.Namespace, "/", s.Service.Hostname)
		j.endpoints(s.Endpoints)
		if !j.pass() {
			break
		}
	}
	j.close('}')
	return j.flush()
}

// WriteStatic writes the member "staticConfig": the local file in its own order. Nil is a file without
// content.
func WriteStatic(w io.Writer, l *Local) error {
	if l == nil {
		l = &Local{}
	}
	j := newJSONWriter(w, 1)
	j.open('{')
	j.key("policies")
	j.policies(l.Policies)
	j.key("services")
	j.services(l.Services)
	j.key("workloads")
	j.open('[')
	for _, x := range l.Workloads {
		j.next()
		j.workload(x, func() {
			j.key("services")
			j.open('{')
			for _, s := range byName(x.Services) {
				j.name(s.Service.Namespace, "/", s.Service.Hostname)
				j.ports(s.Ports)
			}
			j.close('}')
		})
		if !j.pass() {
			break
		}
	}
	j.close(']')
	j.close('}')
	return j.flush()
}

// Static is the member "staticConfig" as ztunnel means it, the file as it is at the moment of the dump,
// without the cost of reading it every time: what was loaded last is shown again as long as the file looks
// as it did then. With 100,000 workloads, parsing is seconds of CPU time and hundreds of MiB.
type Static struct {
	file *File

	mu     sync.Mutex
	local  *Local // nil: broken, shown as empty
	stat   os.FileInfo
	loaded bool
}

// NewStatic makes one for a file of which nothing is known yet.
func NewStatic(f *File) *Static { return &Static{file: f} }

// Keep is to be called with every Local that the file's Run or Load gave, and with nil when it was broken.
func (s *Static) Keep(l *Local) {
	stat, _ := os.Stat(s.file.Path) // nil for an inline text and for a file that is gone
	s.mu.Lock()
	defer s.mu.Unlock()
	s.local, s.stat, s.loaded = l, stat, true
}

// Write writes the member. A file that cannot be read or is wrong is shown as one without content.
func (s *Static) Write(w io.Writer) error {
	s.mu.Lock()
	local, kept, loaded := s.local, s.stat, s.loaded
	s.mu.Unlock()
	now, _ := os.Stat(s.file.Path)
	if !loaded || !sameFile(kept, now) {
		local, _ = s.file.Load()
	}
	return WriteStatic(w, local)
}

// sameFile tells whether a file looks as it did.
func sameFile(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// workload writes one; services writes the member of that name, which is a list in the state and a map in
// the file.
func (j *jsonWriter) workload(w *state.Workload, services func()) {
	j.open('{')
	if w.Tunnel.Protocol != state.TunnelAbsent {
		j.key("applicationTunnel")
		j.open('{')
		j.key("port")
		if w.Tunnel.Port != 0 {
			j.number(uint64(w.Tunnel.Port))
		} else {
			j.b = append(j.b, "null"...)
		}
		j.member("protocol", w.Tunnel.Protocol.String())
		j.close('}')
	}
	if len(w.AuthorizationPolicies) > 0 {
		j.key("authorizationPolicies")
		j.strings(w.AuthorizationPolicies)
	}
	j.optional("canonicalName", w.CanonicalName)
	j.optional("canonicalRevision", w.CanonicalRevision)
	j.key("capacity")
	j.number(uint64(w.Capacity))
	j.member("clusterId", w.ClusterID)
	j.optional("hostname", w.Hostname)
	if w.Locality != (state.Locality{}) {
		j.key("locality")
		j.open('{')
		j.member("region", w.Locality.Region)
		j.member("subzone", w.Locality.Subzone)
		j.member("zone", w.Locality.Zone)
		j.close('}')
	}
	if len(w.MeshAddresses) > 0 { // the keys are ztunnel's where there are none
		j.key("meshAddresses")
		j.open('[')
		for _, a := range w.MeshAddresses {
			j.next()
			j.text(a.String())
		}
		j.close(']')
	}
	j.member("name", w.Name)
	j.member("namespace", w.Namespace)
	if w.NativeTunnel {
		j.key("nativeTunnel")
		j.bool(true)
	}
	j.optional("network", w.Network)
	j.gateway("networkGateway", w.NetworkGateway)
	j.member("networkMode", w.NetworkMode.String())
	j.optional("node", w.Node)
	j.member("protocol", w.Protocol.String())
	j.optional("serviceAccount", w.ServiceAccount)
	services()
	j.member("status", w.Status.String())
	j.optional("trustDomain", w.TrustDomain)
	j.optional("uid", w.UID)
	j.gateway("waypoint", w.Waypoint)
	j.key("workloadIps")
	j.open('[')
	for _, a := range w.Addresses {
		j.next()
		j.addr(a)
	}
	j.close(']')
	j.optional("workloadName", w.WorkloadName)
	j.optional("workloadType", w.WorkloadType)
	j.close('}')
}

func (j *jsonWriter) services(l []*state.Service) {
	j.open('[')
	for _, s := range l {
		j.next()
		j.service(s)
		if !j.pass() {
			break
		}
	}
	j.close(']')
}

func (j *jsonWriter) service(s *state.Service) {
	j.open('{')
	j.key("canonical")
	j.bool(s.Canonical)
	if len(s.CIDRVIPs) > 0 {
		j.key("cidrVips")
		j.open('[')
		for _, c := range s.CIDRVIPs {
			j.next()
			j.open('{')
			j.key("cidr")
			j.prefix(c.Prefix)
			j.member("network", c.Network)
			j.close('}')
		}
		j.close(']')
	}
	j.key("endpoints")
	j.endpoints(s.Endpoints)
	j.member("hostname", s.Hostname)
	j.optional("ipFamilies", s.IPFamilies.String())
	if lb := s.LoadBalancer; lb != nil {
		j.key("loadBalancer")
		j.open('{')
		j.member("healthPolicy", lb.HealthPolicy.String())
		j.member("mode", lb.Mode.String())
		j.key("routingPreferences")
		j.open('[')
		for _, p := range lb.Preferences {
			j.next()
			j.text(p.String())
		}
		j.close(']')
		j.close('}')
	}
	j.member("name", s.Name)
	j.member("namespace", s.Namespace)
	j.key("ports")
	j.ports(s.Ports)
	j.key("subjectAltNames")
	j.strings(s.SubjectAltNames)
	j.key("vips")
	j.open('[')
	for _, a := range s.VIPs {
		j.next()
		j.networkAddr(a.Network, a.Addr)
	}
	j.close(']')
	j.member("visibility", s.Visibility.String())
	j.gateway("waypoint", s.Waypoint)
	if len(s.WeightedWaypoints) > 0 {
		j.key("weightedWaypoints")
		j.open('[')
		for i := range s.WeightedWaypoints {
			j.next()
			j.open('{')
			j.gateway("destination", &s.WeightedWaypoints[i].Destination)
			j.key("weight")
			j.number(uint64(s.WeightedWaypoints[i].Weight))
			j.close('}')
		}
		j.close(']')
	}
	j.close('}')
}

// endpoints writes an object by uid. A View's are sorted already; those of a file may not be.
func (j *jsonWriter) endpoints(l []state.Endpoint) {
	byUID := func(a, b state.Endpoint) int { return strings.Compare(a.UID, b.UID) }
	if !slices.IsSortedFunc(l, byUID) {
		l = slices.SortedStableFunc(slices.Values(l), byUID)
	}
	j.open('{')
	for i := range l {
		e := &l[i]
		j.name(e.UID)
		j.open('{')
		j.key("port")
		j.ports(e.Ports)
		j.member("status", e.Status.String())
		j.member("workloadUid", e.UID)
		j.close('}')
		if !j.pass() {
			break
		}
	}
	j.close('}')
}

// ports writes an object whose keys are numbers as text, in the order of texts: "443" before "80".
func (j *jsonWriter) ports(l state.PortMap) {
	var few [8]state.PortPair // on the stack; more than that is rare
	sorted := append(few[:0], l...)
	slices.SortFunc(sorted, func(a, b state.PortPair) int { return compareDecimal(a.Service, b.Service) })
	j.open('{')
	for _, p := range sorted {
		j.next()
		j.b = append(j.b, '"')
		j.number(uint64(p.Service))
		j.b = append(j.b, '"', ':', ' ')
		j.number(uint64(p.Target))
	}
	j.close('}')
}

// compareDecimal compares two numbers as their decimal texts.
func compareDecimal(a, b uint16) int {
	var x, y [5]byte
	return cmp.Compare(string(strconv.AppendUint(x[:0], uint64(a), 10)), string(strconv.AppendUint(y[:0], uint64(b), 10)))
}

// gateway leaves an absent one out.
func (j *jsonWriter) gateway(k string, g *state.GatewayAddress) {
	if g == nil {
		return
	}
	j.key(k)
	j.open('{')
	j.key("destination")
	if g.Host.Hostname != "" {
		j.text(g.Host.Namespace, "/", g.Host.Hostname)
	} else {
		j.networkAddr(g.Addr.Network, g.Addr.Addr)
	}
	j.key("hboneMtlsPort")
	j.number(uint64(g.Port))
	j.close('}')
}

func (j *jsonWriter) policies(l []*rbac.Policy) {
	j.open('[')
	for _, p := range l {
		j.next()
		j.policy(p)
		if !j.pass() {
			break
		}
	}
	j.close(']')
}

func (j *jsonWriter) policy(p *rbac.Policy) {
	j.open('{')
	j.member("action", p.Action.String())
	j.key("dryRun")
	j.bool(p.DryRun)
	j.member("name", p.Name)
	j.member("namespace", p.Namespace)
	j.key("rules")
	j.open('[')
	for _, rule := range p.Rules {
		j.next()
		j.open('[')
		for _, clause := range rule {
			j.next()
			j.open('[')
			for i := range clause {
				j.next()
				j.match(&clause[i])
				j.pass()
			}
			j.close(']')
		}
		j.close(']')
	}
	j.close(']')
	j.member("scope", p.Scope.String())
	j.close('}')
}

// match writes the lists that are not empty.
func (j *jsonWriter) match(m *rbac.Match) {
	j.open('{')
	entries(j, "destinationIps", m.DestinationIPs, j.prefix)
	entries(j, "destinationPorts", m.DestinationPorts, func(p uint16) { j.number(uint64(p)) })
	entries(j, "namespaces", m.Namespaces, j.stringMatch)
	entries(j, "notDestinationIps", m.NotDestinationIPs, j.prefix)
	entries(j, "notDestinationPorts", m.NotDestinationPorts, func(p uint16) { j.number(uint64(p)) })
	entries(j, "notNamespaces", m.NotNamespaces, j.stringMatch)
	entries(j, "notPrincipals", m.NotPrincipals, j.stringMatch)
	entries(j, "notServiceAccounts", m.NotServiceAccounts, j.account)
	entries(j, "notSourceIps", m.NotSourceIPs, j.prefix)
	entries(j, "principals", m.Principals, j.stringMatch)
	entries(j, "serviceAccounts", m.ServiceAccounts, j.account)
	entries(j, "sourceIps", m.SourceIPs, j.prefix)
	j.close('}')
}

func entries[T any](j *jsonWriter, k string, l []T, one func(T)) {
	if len(l) == 0 {
		return
	}
	j.key(k)
	j.open('[')
	for _, x := range l {
		j.next()
		one(x)
	}
	j.close(']')
}

// stringMatch is {"Exact": "x"} or {"Presence": []}.
func (j *jsonWriter) stringMatch(m rbac.StringMatch) {
	j.open('{')
	j.key(m.Kind.String())
	if m.Kind == rbac.Presence {
		j.b = append(j.b, '[', ']')
	} else {
		j.text(m.Value)
	}
	j.close('}')
}

func (j *jsonWriter) account(a rbac.ServiceAccount) {
	j.open('{')
	j.member("namespace", a.Namespace)
	j.member("serviceAccount", a.Name)
	j.close('}')
}

// byName returns the services sorted by "namespace/hostname", as the keys of the file's map are shown.
func byName(l []state.WorkloadService) []state.WorkloadService {
	compare := func(a, b state.WorkloadService) int {
		return strings.Compare(a.Service.String(), b.Service.String())
	}
	if len(l) < 2 {
		return l
	}
	return slices.SortedStableFunc(slices.Values(l), compare)
}
