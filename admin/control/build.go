package control

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztun/proxy/identity"
	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// maxReported is how many errors, and how many warnings, are reported at most; the rest is counted.
const maxReported = 100

// place is an entry of a file: the i-th of its resources.
type place struct {
	file *file
	i    int
}

func (p place) resource() *resource { return p.file.encoded[p.i] }

// position names the list of the file and the index in it.
func (p place) position() (section string, index int) {
	i, l := p.i, p.file.local
	if i < len(l.Workloads) {
		return "workloads", i
	}
	if i -= len(l.Workloads); i < len(l.Services) {
		return "services", i
	}
	return "policies", i - len(l.Services)
}

// where prints "a.yaml:12".
func (p place) where() string {
	if line := p.file.line(p.position()); line > 0 {
		return fmt.Sprintf("%s:%d", p.file.path, line)
	}
	return p.file.path
}

// report collects problems up to a bound and counts all.
type report struct {
	list  []Problem
	count int
}

func (r *report) add(p Problem) {
	r.count++
	if len(r.list) < maxReported {
		r.list = append(r.list, p)
	}
}

func (r *report) at(p place, field, format string, args ...any) {
	if r.count++; len(r.list) >= maxReported {
		return // finding the line is not free
	}
	section, index := p.position()
	key := fmt.Sprintf("%s[%d]", section, index)
	if field != "" {
		key += "." + field
	}
	r.list = append(r.list, Problem{File: p.file.path, Line: p.file.line(section, index), Key: key,
		Text: fmt.Sprintf(format, args...)})
}

// build makes a snapshot of files, sharing with prev (nil at first) what has not changed; prev itself if nothing has.
// With errors there is no snapshot. trustDomain is the CA's ("": it signs for any), limit the largest resource in
// bytes. joined are the nodes that there are; nil: workloads' nodes are not looked at.
func build(files []*file, prev *snapshot, trustDomain string, limit int, joined map[string]bool) (s *snapshot, errors,
	warnings report) {
	b := &builder{
		trustDomain: trustDomain, limit: limit, names: make(map[string]place), policies: make(map[string]place),
		joined: joined, selected: make(map[string]bool), addresses: make(map[state.NetworkAddress]place),
		mesh: make(map[meshAddress]place),
	}
	for _, f := range files {
		if f.local == nil {
			for _, p := range f.problems {
				b.errors.add(p)
			}
			continue
		}
		for i := range f.encoded {
			b.enter(place{f, i})
		}
	}
	if b.errors.count > 0 {
		return nil, b.errors, b.warnings
	}
	for _, p := range b.order {
		if w := p.resource().workload; w != nil {
			for _, key := range w.AuthorizationPolicies {
				b.selected[key] = true
			}
		}
	}
	for _, p := range b.order {
		b.check(p)
	}
	s = b.assemble(prev)
	if b.errors.count > 0 {
		return nil, b.errors, b.warnings
	}
	return s, b.errors, b.warnings
}

type builder struct {
	trustDomain      string
	limit            int
	order            []place          // all, in order
	names            map[string]place // workloads and services
	policies         map[string]place
	hostnames        map[state.ServiceKey]struct{}      // of workloads; made when first needed
	extra            map[string][]state.WorkloadService // uid -> services that name it as an endpoint
	joined           map[string]bool                    // nodes; nil: not looked at
	selected         map[string]bool                    // policies that a workload lists
	addresses        map[state.NetworkAddress]place     // of workloads and services
	mesh             map[meshAddress]place              // where workloads' HBONE arrives elsewhere
	errors, warnings report
}

// enter checks what an entry is called.
func (b *builder) enter(p place) {
	r := p.resource()
	known := b.names
	switch {
	case r.workload != nil:
		if r.name == "" {
			b.errors.at(p, "uid", `is missing: it is the workload's name for the nodes, like "cluster//Pod/namespace/name"`)
			return
		}
	case r.service != nil:
		if k := r.service.Key(); k.Hostname == "" || strings.Contains(k.Namespace, "/") || strings.Contains(k.Hostname, "/") {
			b.errors.at(p, "", "namespace %q and hostname %q: want a hostname, and no slash in either", k.Namespace, k.Hostname)
			return
		}
	default:
		known = b.policies
		if r.policy.Name == "" {
			b.errors.at(p, "name", "is missing")
			return
		}
	}
	if n := r.size(); n > b.limit {
		b.errors.at(p, "", "takes %d bytes on the wire, more than the %d of one message", n, b.limit)
		return
	}
	if first, ok := known[r.name]; ok {
		b.errors.at(p, "", "%s is already in %s", r.title(), first.where())
		return
	}
	known[r.name] = p
	b.order = append(b.order, p)
}

// title names a resource in messages.
func (r *resource) title() string {
	switch {
	case r.workload != nil:
		return fmt.Sprintf("workload %q", r.name)
	case r.service != nil:
		return fmt.Sprintf("service %q", r.name)
	}
	return fmt.Sprintf("policy %q", r.name)
}

// check warns of what an entry refers to and is not there, and notes endpoints that services were given.
func (b *builder) check(p place) {
	r := p.resource()
	switch {
	case r.workload != nil:
		w := r.workload
		if b.trustDomain != "" && w.TrustDomain != b.trustDomain {
			b.warnings.at(p, "trustDomain", "%q is not the CA's %q: %s gets no certificate", w.TrustDomain,
				b.trustDomain, r.name)
		}
		if _, ok := workloadType(w.WorkloadType); !ok {
			b.warnings.at(p, "workloadType", "%q is not one of deployment, cronjob, pod, job: sent as deployment",
				w.WorkloadType)
		}
		for _, e := range w.Services {
			if b.service(e.Service) == nil {
				b.warnings.at(p, "services", "there is no service %q", e.Service)
			}
		}
		for _, key := range w.AuthorizationPolicies {
			if q, ok := b.policies[key]; !ok {
				b.warnings.at(p, "authorizationPolicies",
					"there is no policy %q: nodes hold connections to %s for a while and then decide without it, or refuse them "+
						"with ZTUN_UNKNOWN_POLICY=deny", key, r.name)
			} else if q.resource().policy.Scope != rbac.ScopeWorkloadSelector {
				b.warnings.at(p, "authorizationPolicies", "policy %q is not of scope WorkloadSelector", key)
			}
		}
		b.gateway(p, "waypoint", w.Waypoint)
		b.gateway(p, "networkGateway", w.NetworkGateway)
		if w.Node != "" && b.joined != nil && !b.joined[w.Node] && !b.joined[workloadMember(w)] {
			b.warnings.at(p, "node", "no node %q has joined: nobody serves %s or gets its certificate", w.Node, r.name)
		}
		if w.NetworkMode != state.HostNetwork { // those have their node's addresses
			for _, a := range w.Addresses {
				b.claim(p, "workloadIps", state.NetworkAddress{Network: w.Network, Addr: a})
			}
		}
		b.meshAddresses(p, w)
	case r.service != nil:
		b.gateway(p, "waypoint", r.service.Waypoint)
		for i := range r.service.WeightedWaypoints {
			b.gateway(p, "weightedWaypoints", &r.service.WeightedWaypoints[i].Destination)
		}
		for _, e := range r.service.Endpoints {
			b.endpoint(p, r.service, e)
		}
		for _, a := range r.service.VIPs {
			b.claim(p, "vips", a)
		}
	default:
		if r.policy.Scope == rbac.ScopeWorkloadSelector && !b.selected[r.name] {
			b.warnings.at(p, "", "no workload lists %q in its authorizationPolicies: a policy of scope WorkloadSelector has "+
				"no effect then", r.name)
		}
		b.principals(p, r.policy)
	}
}

// claim warns of an address that another entry has: nodes know one owner of each.
func (b *builder) claim(p place, field string, a state.NetworkAddress) {
	first, taken := b.addresses[a]
	if !taken {
		b.addresses[a] = p
		return
	}
	if first != p {
		b.warnings.at(p, field, "%s is %s's as well, in %s: nodes take it for one of the two", a, first.resource().title(),
			first.where())
	}
}

// meshAddress is a socket of a network. That of a loopback is its host's alone, which the record does not name.
type meshAddress struct {
	network string
	at      netip.AddrPort
}

// meshAddresses warns of those that another workload has, too, one of which peers do not reach: whoever listens there
// has one identity. A workload that is not reached over HBONE says by them from where it calls, which several may.
func (b *builder) meshAddresses(p place, w *state.Workload) {
	if w.Protocol != state.HBONE {
		return
	}
	for _, a := range w.MeshAddresses {
		key := meshAddress{w.Network, a}
		first, taken := b.mesh[key]
		if !taken {
			b.mesh[key] = p
			continue
		}
		if first != p {
			b.warnings.at(p, "meshAddresses", "%s is %s's as well, in %s: only one of the two can listen there, unless it is on "+
				"the loopback of two hosts", a, first.resource().title(), first.where())
		}
	}
}

// principals warns of what no peer's identity can match.
func (b *builder) principals(p place, policy *rbac.Policy) {
	for i, r := range policy.Rules {
		for k, c := range r {
			for n, m := range c {
				for j, s := range slices.Concat(m.Principals, m.NotPrincipals) {
					name := "principals"
					if j >= len(m.Principals) {
						name = "notPrincipals"
					}
					if why := neverPrincipal(s); why != "" {
						b.warnings.at(p, fmt.Sprintf("rules[%d][%d][%d].%s", i, k, n, name), "%q can never match: %s", s.Value, why)
					}
				}
			}
		}
	}
}

// principalParts is what an identity looks like to a policy: "spiffe://" is not part of it. "" stands for any text.
var principalParts = [...]string{"", "ns", "", "sa", ""}

// neverPrincipal says why no identity can match; "": one can.
func neverPrincipal(m rbac.StringMatch) string {
	const want = "want TRUSTDOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT"
	if m.Kind == rbac.Presence || m.Value == "" {
		return ""
	}
	if strings.HasPrefix(m.Value, "spiffe://") {
		return `principals are compared without "spiffe://": ` + want
	}
	parts, last := strings.Split(m.Value, "/"), len(principalParts)-1
	if len(parts) > len(principalParts) || m.Kind == rbac.Exact && len(parts) < len(principalParts) {
		return want
	}
	for i, part := range parts {
		at, cut := i, false // cut: the text may begin or end within this part
		switch m.Kind {
		case rbac.Prefix:
			cut = i == len(parts)-1
		case rbac.Suffix:
			at, cut = last-len(parts)+1+i, i == 0
		}
		fixed := principalParts[at]
		switch {
		case fixed == "" && (part != "" || cut):
		case fixed == "":
			return want + ", none of them empty"
		case part == fixed:
		case cut && m.Kind == rbac.Prefix && strings.HasPrefix(fixed, part):
		case cut && m.Kind == rbac.Suffix && strings.HasSuffix(fixed, part):
		default:
			return want
		}
	}
	return ""
}

func (b *builder) service(k state.ServiceKey) *state.Service {
	if p, ok := b.names[k.String()]; ok {
		return p.resource().service
	}
	return nil
}

// gateway warns of a destination by hostname that does not exist. One by address may well be outside of the mesh.
func (b *builder) gateway(p place, field string, g *state.GatewayAddress) {
	if g == nil || g.Host.Hostname == "" || b.service(g.Host) != nil || b.hostname(g.Host) {
		return
	}
	b.warnings.at(p, field, "there is no service or workload %q", g.Host)
}

// hostname reports whether a workload has this namespaced hostname.
func (b *builder) hostname(k state.ServiceKey) bool {
	if b.hostnames == nil {
		b.hostnames = make(map[state.ServiceKey]struct{})
		for _, p := range b.order {
			if w := p.resource().workload; w != nil && w.Hostname != "" {
				b.hostnames[state.ServiceKey{Namespace: w.Namespace, Hostname: w.Hostname}] = struct{}{}
			}
		}
	}
	_, ok := b.hostnames[k]
	return ok
}

// endpoint turns an endpoint that a service was given into an entry of its workload.
func (b *builder) endpoint(p place, s *state.Service, e state.Endpoint) {
	var w *state.Workload
	if q, ok := b.names[e.UID]; ok {
		w = q.resource().workload
	}
	key := s.Key()
	switch {
	case w == nil:
		b.warnings.at(p, "endpoints", "there is no workload %q: left out", e.UID)
		return
	case slices.ContainsFunc(w.Services, func(x state.WorkloadService) bool { return x.Service == key }):
		return // its own claim wins
	case e.Status != w.Status:
		allowAll := s.LoadBalancer != nil && s.LoadBalancer.HealthPolicy == state.AllowAll
		if e.Status == state.Unhealthy && !allowAll {
			b.warnings.at(p, "endpoints", "%q is %v here and %v as a workload: left out", e.UID, e.Status, w.Status)
			return
		}
		b.warnings.at(p, "endpoints", "%q is %v here and %v as a workload: nodes go by the workload", e.UID, e.Status,
			w.Status)
	}
	if b.extra == nil {
		b.extra = make(map[string][]state.WorkloadService)
	}
	b.extra[e.UID] = append(b.extra[e.UID], state.WorkloadService{Service: key, Ports: e.Ports})
}

// assemble makes the snapshot.
func (b *builder) assemble(prev *snapshot) *snapshot {
	if prev == nil {
		prev = &snapshot{addresses: &table{}, policies: &table{}}
	}
	s := &snapshot{version: prev.version + 1, nodes: make(map[string]*nodeIndex)}
	addresses := make([]*resource, 0, len(b.names))
	policies := make([]*resource, 0, len(b.policies))
	for _, p := range b.order {
		r := p.resource()
		if r.policy != nil {
			policies = append(policies, r)
			continue
		}
		if r.service != nil {
			s.services++
		} else {
			s.workloads++
			if more := b.extra[r.name]; len(more) > 0 {
				if r = b.withServices(p, r, more, prev.addresses.get(r.name)); r == nil {
					continue
				}
			}
			s.place(r)
		}
		addresses = append(addresses, r)
	}
	s.addresses, s.policies = makeTable(addresses, prev.addresses), makeTable(policies, prev.policies)
	if prev.version > 0 && s.addresses.shards == prev.addresses.shards && s.policies.shards == prev.policies.shards {
		return prev
	}
	s.published = time.Now()
	return s
}

// withServices is a workload with further services; old itself if that is what it is.
func (b *builder) withServices(p place, r *resource, more []state.WorkloadService, old *resource) *resource {
	w := *r.workload
	w.Services = append(slices.Clone(w.Services), more...)
	next, err := newResource(r.name, EncodeWorkload(&w))
	if err != nil {
		b.errors.at(p, "", "%v", err)
		return nil
	}
	next.workload = &w
	if n := next.size(); n > b.limit {
		b.errors.at(p, "services",
			"with the services that name it the workload takes %d bytes on the wire, more than the %d of one message", n,
			b.limit)
		return nil
	}
	if old != nil && old.version == next.version {
		return old
	}
	return next
}

// place enters a workload under its node.
func (s *snapshot) place(r *resource) {
	w := r.workload
	if w.Node == "" {
		return
	}
	n := s.nodes[w.Node]
	if n == nil {
		n = &nodeIndex{identities: make(map[identity.ID]struct{})}
		s.nodes[w.Node] = n
	}
	n.workloads = append(n.workloads, r)
	n.identities[w.Identity()] = struct{}{}
}
