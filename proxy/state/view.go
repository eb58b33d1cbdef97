package state

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"ztun/proxy/rbac"
)

// View is the mesh at one moment. It never changes, may be read by any number
// of goroutines, and a nil View is an empty one. Lookups do not allocate.
//
// Addresses are expected in canonical form (netip.Addr.Unmap).
type View struct {
	workloads table[string, *Workload]
	byAddr    table[NetworkAddress, *Workload]
	byInfo    table[WorkloadInfo, *Workload]
	byCaller  table[Caller, *Workload]
	byName    table[ServiceKey, *Workload] // workloads with a hostname

	services table[ServiceKey, *Service]
	byVIP    table[NetworkAddress, []*Service] // in the order of insertion
	byCIDR   table[NetworkPrefix, []*Service]  // by masked prefix
	bits4    []uint8                           // IPv4 prefix lengths in byCIDR, longest first
	bits6    []uint8
	wild     []uint8                       // labels after the "*" of wildcard hostnames, most first
	byHost   table[string, []*Service]     // by hostKey
	staged   table[ServiceKey, []Endpoint] // of services that do not exist

	policies table[string, *rbac.Policy]
	byNS     table[string, []*rbac.Policy] // "" holds the GLOBAL ones; sorted by key

	version uint64
}

// Version counts the Builds of a Builder, from 1. A nil View has version 0.
func (v *View) Version() uint64 {
	if v == nil {
		return 0
	}
	return v.version
}

// Counts returns how many workloads, services and policies there are.
func (v *View) Counts() (workloads, services, policies int) {
	if v == nil {
		return 0, 0, 0
	}
	return v.workloads.n, v.services.n, v.policies.n
}

// Empty reports whether nothing is known: as before the first state has come.
func (v *View) Empty() bool {
	w, s, p := v.Counts()
	return w+s+p == 0
}

// WorkloadByUID returns the workload or nil.
func (v *View) WorkloadByUID(uid string) *Workload {
	if v == nil {
		return nil
	}
	w, _ := v.workloads.get(uid)
	return w
}

// WorkloadByAddr returns the workload that has the address, or nil. Workloads
// on their host's network are not found. Where several claim an address, pods
// win over others, then HBONE over plain ones, then the last inserted.
func (v *View) WorkloadByAddr(network string, ip netip.Addr) *Workload {
	if v == nil {
		return nil
	}
	w, _ := v.byAddr.get(NetworkAddress{network, ip})
	return w
}

// WorkloadByInfo returns the node's workload with this name, namespace and
// service account, or nil. Workloads of other nodes are not found, unless the
// Builder knows no node name.
func (v *View) WorkloadByInfo(i WorkloadInfo) *Workload {
	if v == nil {
		return nil
	}
	w, _ := v.byInfo.get(i)
	return w
}

// WorkloadByCaller returns the workload that calls from a host's address, or nil. Of several which are one to their
// certificates, it is the one that WorkloadByAddr would prefer.
func (v *View) WorkloadByCaller(c Caller) *Workload {
	if v == nil {
		return nil
	}
	w, _ := v.byCaller.get(c)
	return w
}

// WorkloadByNSHost returns the workload with this namespace and hostname, or
// nil.
func (v *View) WorkloadByNSHost(ns, host string) *Workload {
	if v == nil {
		return nil
	}
	w, _ := v.byName.get(ServiceKey{ns, host})
	return w
}

// EndpointWorkload returns the workload of an endpoint, or nil.
func (v *View) EndpointWorkload(e *Endpoint) *Workload {
	if e.Workload != nil {
		return e.Workload
	}
	return v.WorkloadByUID(e.UID)
}

// ServiceByNSHost returns the service with this namespace and hostname, or nil.
func (v *View) ServiceByNSHost(ns, host string) *Service {
	if v == nil {
		return nil
	}
	s, _ := v.services.get(ServiceKey{ns, host})
	return s
}

// ServiceByHost returns the service with this hostname that a client in
// clientNS means: that of its own namespace; else a canonical one (the last);
// else the first. Services that are not visible from clientNS do not count; ""
// sees everything.
func (v *View) ServiceByHost(host, clientNS string) *Service {
	return v.ServiceByHostPreferring(host, clientNS, "")
}

// ServiceByHostPreferring is ServiceByHost with one more step: after a canonical
// service, one of the preferred namespace ("": none) goes before the first.
func (v *View) ServiceByHostPreferring(host, clientNS, preferred string) *Service {
	if v == nil {
		return nil
	}
	return choose(v.ServicesByHost(host), clientNS, preferred)
}

// ServicesByHost returns all services with this hostname, whatever its case (RFC
// 4343), in the order of insertion. The slice is the View's own: not to be
// changed.
func (v *View) ServicesByHost(host string) []*Service {
	if v == nil {
		return nil
	}
	l, _ := v.byHost.get(hostKey(host))
	return l
}

// WildcardLabels returns how many labels follow the "*" in wildcard hostnames,
// each number once, the largest first. Not to be changed.
func (v *View) WildcardLabels() []uint8 {
	if v == nil {
		return nil
	}
	return v.wild
}

// wildcardLabels is the number of labels after the "*" of a hostname, at most
// 127, which no name exceeds (RFC 1035 section 2.3.4).
func wildcardLabels(host string) (n int, ok bool) {
	if !strings.HasPrefix(host, "*.") {
		return 0, false
	}
	return min(strings.Count(host, "."), 127), true
}

// ServicesByWildcard is ServicesByHost of "*" and suffix, which begins with a
// dot, without putting the two together.
func (v *View) ServicesByWildcard(suffix string) []*Service {
	if v == nil {
		return nil
	}
	l, _ := v.byHost.get(strings.ToLower(suffix))
	return l
}

// hostKey is a hostname in lower case; that of "*.acme.test" is ".acme.test", a
// part of every name that it stands for, so that looking for it allocates nothing.
func hostKey(host string) string {
	host = strings.ToLower(host)
	switch {
	case strings.HasPrefix(host, "*."):
		return host[1:]
	case strings.HasPrefix(host, "."): // no hostname, and not to be taken for one
		return "." + host
	}
	return host
}

// ServiceByVIP returns the service that a client in clientNS reaches by an
// address: one with exactly this VIP, chosen as by ServiceByHost; else one whose
// range contains it, chosen by (own namespace, longest prefix, canonical), the
// first inserted among equals. Nil if there is none.
func (v *View) ServiceByVIP(network string, ip netip.Addr, clientNS string) *Service {
	if v == nil {
		return nil
	}
	if l, ok := v.byVIP.get(NetworkAddress{network, ip}); ok {
		if s := choose(l, clientNS, ""); s != nil {
			return s
		}
	}
	return v.serviceByCIDR(network, ip, clientNS)
}

func (v *View) serviceByCIDR(network string, ip netip.Addr, clientNS string) *Service {
	lengths := v.bits4
	if ip.Is6() {
		lengths = v.bits6
	}
	var best *Service
	bestRank := -1
	for _, bits := range lengths {
		p, err := ip.Prefix(int(bits))
		if err != nil {
			continue
		}
		l, _ := v.byCIDR.get(NetworkPrefix{network, p})
		for _, s := range l {
			if !s.VisibleFrom(clientNS) {
				continue
			}
			// Lexicographic: own namespace, prefix length (at most 128), canonical.
			rank := int(bits) << 1
			if clientNS != "" && s.Namespace == clientNS {
				rank |= 1 << 16
			}
			if s.Canonical {
				rank |= 1
			}
			if rank > bestRank {
				best, bestRank = s, rank
			}
		}
	}
	return best
}

// choose picks one of the services that share a name or an address.
func choose(l []*Service, ns, preferred string) *Service {
	var own, canonical, pref, first *Service
	for _, s := range l {
		if !s.VisibleFrom(ns) {
			continue
		}
		if ns != "" && s.Namespace == ns && (own == nil || s.Canonical || !own.Canonical) {
			own = s
		}
		if s.Canonical {
			canonical = s
		}
		if pref == nil && preferred != "" && s.Namespace == preferred {
			pref = s
		}
		if first == nil {
			first = s
		}
	}
	return cmp.Or(own, canonical, pref, first)
}

// FindAddress says what an address is: a workload, else a service as seen from
// ns ("" sees everything), else neither.
func (v *View) FindAddress(network string, ip netip.Addr, ns string) (*Workload, *Service) {
	if w := v.WorkloadByAddr(network, ip); w != nil {
		return w, nil
	}
	return nil, v.ServiceByVIP(network, ip, ns)
}

// FindNSHost says what a namespaced hostname is: a service, else a workload,
// else neither.
func (v *View) FindNSHost(ns, host string) (*Workload, *Service) {
	if s := v.ServiceByNSHost(ns, host); s != nil {
		return nil, s
	}
	return v.WorkloadByNSHost(ns, host), nil
}

// ServicesOf yields the services that a workload belongs to and that exist, in
// the order in which it lists them. Nothing for an Unlisted workload.
func (v *View) ServicesOf(w *Workload) iter.Seq[*Service] {
	return func(yield func(*Service) bool) {
		if v == nil || w == nil || w.Unlisted {
			return
		}
		for i := range w.Services {
			if s, ok := v.services.get(w.Services[i].Service); ok && !yield(s) {
				return
			}
		}
	}
}

// PoliciesFor returns the policies that apply to connections to w; see
// AppendPolicies.
func (v *View) PoliciesFor(w *Workload) []*rbac.Policy { return v.AppendPolicies(nil, w) }

// AppendPolicies appends the policies that apply to connections to w: those of
// its namespace, the global ones, and those that it lists itself. A listed
// policy that is not loaded is represented by rbac.Missing (this allocates).
func (v *View) AppendPolicies(dst []*rbac.Policy, w *Workload) []*rbac.Policy {
	if w == nil {
		return dst
	}
	if v != nil {
		if w.Namespace != "" {
			l, _ := v.byNS.get(w.Namespace)
			dst = append(dst, l...)
		}
		l, _ := v.byNS.get("")
		dst = append(dst, l...)
	}
	for _, key := range w.AuthorizationPolicies {
		if p := v.Policy(key); p != nil {
			dst = append(dst, p)
		} else {
			dst = append(dst, rbac.Missing(key))
		}
	}
	return dst
}

// Policy returns a policy by key ("namespace/name"), or nil.
func (v *View) Policy(key string) *rbac.Policy {
	if v == nil {
		return nil
	}
	p, _ := v.policies.get(key)
	return p
}

// Workloads returns all workloads sorted by UID. It is made for the caller.
func (v *View) Workloads() []*Workload { return v.WorkloadsPausing(nil) }

// WorkloadsPausing is Workloads for those who must not keep the processor for the
// 60 ms that sorting 100,000 takes: pause is called every now and then.
func (v *View) WorkloadsPausing(pause func()) []*Workload {
	if v == nil {
		return nil
	}
	l := values(&v.workloads)
	slices.SortFunc(l, pausing(pause, func(a, b *Workload) int { return cmp.Compare(a.UID, b.UID) }))
	return l
}

// Services returns all services sorted by hostname, then namespace. It is made
// for the caller.
func (v *View) Services() []*Service { return v.ServicesPausing(nil) }

// ServicesPausing is to Services what WorkloadsPausing is to Workloads.
func (v *View) ServicesPausing(pause func()) []*Service {
	if v == nil {
		return nil
	}
	l := values(&v.services)
	slices.SortFunc(l, pausing(pause, func(a, b *Service) int {
		return cmp.Or(cmp.Compare(a.Hostname, b.Hostname), cmp.Compare(a.Namespace, b.Namespace))
	}))
	return l
}

// pausing calls pause, if there is one, after every 512 comparisons: some 20 us.
func pausing[T any](pause func(), compare func(a, b T) int) func(a, b T) int {
	if pause == nil {
		return compare
	}
	n := 0
	return func(a, b T) int {
		if n++; n%512 == 0 {
			pause()
		}
		return compare(a, b)
	}
}

// Policies returns all policies sorted by key. It is made for the caller.
func (v *View) Policies() []*rbac.Policy {
	if v == nil {
		return nil
	}
	l := values(&v.policies)
	slices.SortFunc(l, func(a, b *rbac.Policy) int { return cmp.Compare(a.Key, b.Key) })
	return l
}

// Staged is the endpoints of a service that does not exist.
type Staged struct {
	Service   ServiceKey
	Endpoints []Endpoint // sorted by UID, healthy or not
}

// Staged returns the endpoints whose services do not exist, sorted by
// "namespace/hostname". It is made for the caller.
func (v *View) Staged() []Staged {
	if v == nil {
		return nil
	}
	var l []Staged
	for k, eps := range v.staged.all() {
		l = append(l, Staged{k, eps})
	}
	slices.SortFunc(l, func(a, b Staged) int { return cmp.Compare(a.Service.String(), b.Service.String()) })
	return l
}

func values[K comparable, V any](t *table[K, V]) []V {
	l := make([]V, 0, t.n)
	for _, v := range t.all() {
		l = append(l, v)
	}
	return l
}
