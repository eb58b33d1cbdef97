package state

import (
	"cmp"
	"net/netip"
	"slices"

	"ztun/proxy/identity"
	"ztun/proxy/rbac"
)

// Builder collects what is known of the mesh and publishes Views. It belongs to
// one goroutine. What is inserted must not be changed afterwards.
//
// The cost of an update and the Build after it is that of what the update
// touches: see the package's remarks on sharing.
type Builder struct {
	node string

	workloads editor[string, *Workload]
	byAddr    claims[NetworkAddress]
	byInfo    claims[WorkloadInfo]
	byCaller  claims[Caller]
	byName    claims[ServiceKey]

	services editor[ServiceKey, *Service]
	byVIP    editor[NetworkAddress, []*Service]
	byCIDR   editor[NetworkPrefix, []*Service]
	byHost   editor[string, []*Service]
	staged   editor[ServiceKey, []Endpoint]
	bits4    [33]int  // how many entries of byCIDR have this prefix length
	bits6    [129]int //
	wild     [128]int // how many services have a wildcard hostname with so many labels after the "*"

	policies editor[string, *rbac.Policy]
	byNS     editor[string, []*rbac.Policy]

	given   map[ServiceKey]givenService // services as inserted
	seq     uint64
	backers map[ServiceKey][]*Workload // who lists a service, sorted by UID
	dirty   map[ServiceKey]struct{}    // services whose endpoints Build has to make anew

	version uint64
}

// givenService is a service as inserted. Its number, which it keeps when it is
// replaced, orders it among those that share an address or a name with it.
type givenService struct {
	*Service
	seq uint64
}

// NewBuilder returns an empty Builder for a node. With node "" the workloads of
// all nodes are found by WorkloadByInfo.
func NewBuilder(node string) *Builder {
	return &Builder{
		node:      node,
		workloads: newEditor[string, *Workload](sumString),
		byAddr:    newClaims(sumAddr),
		byInfo:    newClaims(sumInfo),
		byCaller:  newClaims(sumCaller),
		byName:    newClaims(sumService),
		services:  newEditor[ServiceKey, *Service](sumService),
		byVIP:     newEditor[NetworkAddress, []*Service](sumAddr),
		byCIDR:    newEditor[NetworkPrefix, []*Service](sumPrefix),
		byHost:    newEditor[string, []*Service](sumString),
		staged:    newEditor[ServiceKey, []Endpoint](sumService),
		policies:  newEditor[string, *rbac.Policy](sumString),
		byNS:      newEditor[string, []*rbac.Policy](sumString),
		given:     make(map[ServiceKey]givenService),
		backers:   make(map[ServiceKey][]*Workload),
		dirty:     make(map[ServiceKey]struct{}),
	}
}

// InsertWorkload adds a workload, or replaces the one with its UID.
func (b *Builder) InsertWorkload(w *Workload) {
	b.RemoveWorkload(w.UID)
	b.workloads.set(w.UID, w)
	if w.NetworkMode != HostNetwork {
		for i, ip := range w.Addresses {
			if !slices.Contains(w.Addresses[:i], ip) {
				b.byAddr.add(NetworkAddress{w.Network, ip}, w)
			}
		}
	}
	if b.local(w) {
		b.byInfo.add(w.Info(), w)
	}
	for _, c := range w.callers() {
		b.byCaller.add(c, w)
	}
	if w.Hostname != "" {
		b.byName.add(ServiceKey{w.Namespace, w.Hostname}, w)
	}
	for i := range w.Services {
		k := w.Services[i].Service
		l := b.backers[k]
		if at, found := findUID(l, w.UID); !found { // a service listed twice counts once
			b.backers[k] = slices.Insert(l, at, w)
		}
		b.dirty[k] = struct{}{}
	}
}

// RemoveWorkload removes a workload and its endpoints; false if there is none.
func (b *Builder) RemoveWorkload(uid string) bool {
	w, ok := b.workloads.get(uid)
	if !ok {
		return false
	}
	b.workloads.del(uid)
	if w.NetworkMode != HostNetwork {
		for i, ip := range w.Addresses {
			if !slices.Contains(w.Addresses[:i], ip) {
				b.byAddr.remove(NetworkAddress{w.Network, ip}, w)
			}
		}
	}
	if b.local(w) {
		b.byInfo.remove(w.Info(), w)
	}
	for _, c := range w.callers() {
		b.byCaller.remove(c, w)
	}
	if w.Hostname != "" {
		b.byName.remove(ServiceKey{w.Namespace, w.Hostname}, w)
	}
	for i := range w.Services {
		k := w.Services[i].Service
		l := b.backers[k]
		if at, found := findUID(l, uid); found {
			if l = slices.Delete(l, at, at+1); len(l) == 0 {
				delete(b.backers, k)
			} else {
				b.backers[k] = l
			}
		}
		b.dirty[k] = struct{}{}
	}
	return true
}

// callers are what w calls as, each once.
func (w *Workload) callers() (all []Caller) {
	for _, a := range w.MeshAddresses {
		c := Caller{a.Addr(), w.Namespace, w.ServiceAccount}
		if !slices.Contains(all, c) {
			all = append(all, c)
		}
	}
	return all
}

func (b *Builder) local(w *Workload) bool { return b.node == "" || w.Node == b.node }

func findUID(l []*Workload, uid string) (int, bool) {
	return slices.BinarySearchFunc(l, uid, func(w *Workload, uid string) int { return cmp.Compare(w.UID, uid) })
}

// InsertService adds a service, or replaces the one with its key. Its endpoints
// are those that it brings along and those of the workloads that list it,
// whether they came before or come later.
func (b *Builder) InsertService(s *Service) {
	g, ok := b.given[s.Key()]
	if !ok {
		b.seq++
		g.seq = b.seq
	}
	g.Service = s
	b.given[s.Key()] = g
	b.dirty[s.Key()] = struct{}{}
}

// RemoveService removes a service; false if there is none. Its endpoints become
// staged.
func (b *Builder) RemoveService(k ServiceKey) bool {
	if _, ok := b.given[k]; !ok {
		return false
	}
	delete(b.given, k)
	b.dirty[k] = struct{}{}
	return true
}

// InsertPolicy adds a policy, or replaces the one with its key.
func (b *Builder) InsertPolicy(p *rbac.Policy) {
	b.RemovePolicy(p.Key)
	b.policies.set(p.Key, p)
	ns, indexed := policyIndex(p)
	if !indexed {
		return
	}
	l, _ := b.byNS.get(ns)
	at, _ := slices.BinarySearchFunc(l, p.Key, func(p *rbac.Policy, key string) int { return cmp.Compare(p.Key, key) })
	b.byNS.set(ns, slices.Insert(slices.Clone(l), at, p))
}

// Policy is the policy of a key as inserted last, nil if there is none.
func (b *Builder) Policy(key string) *rbac.Policy {
	p, _ := b.policies.get(key)
	return p
}

// RemovePolicy removes a policy; false if there is none.
func (b *Builder) RemovePolicy(key string) bool {
	p, ok := b.policies.get(key)
	if !ok {
		return false
	}
	b.policies.del(key)
	if ns, indexed := policyIndex(p); indexed {
		l, _ := b.byNS.get(ns)
		setOrDelete(&b.byNS, ns, without(l, p))
	}
	return true
}

// policyIndex returns the namespace under which a policy applies; "" is all.
// A namespace policy without a namespace would otherwise turn into a global one.
func policyIndex(p *rbac.Policy) (ns string, indexed bool) {
	switch p.Scope {
	case rbac.ScopeGlobal:
		return "", true
	case rbac.ScopeNamespace:
		return p.Namespace, p.Namespace != ""
	}
	return "", false
}

// Build publishes what is known now. The Builder may be used further.
func (b *Builder) Build() *View {
	// In the order of insertion, not of the map: the first or last of services
	// that share an address matters.
	keys := make([]ServiceKey, 0, len(b.dirty))
	for k := range b.dirty {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(x, y ServiceKey) int {
		return cmp.Compare(b.given[x].seq, b.given[y].seq)
	})
	for _, k := range keys {
		b.rebuild(k)
	}
	clear(b.dirty)
	b.version++
	v := &View{
		workloads: b.workloads.freeze(),
		byAddr:    b.byAddr.best.freeze(),
		byInfo:    b.byInfo.best.freeze(),
		byCaller:  b.byCaller.best.freeze(),
		byName:    b.byName.best.freeze(),
		services:  b.services.freeze(),
		byVIP:     b.byVIP.freeze(),
		byCIDR:    b.byCIDR.freeze(),
		byHost:    b.byHost.freeze(),
		staged:    b.staged.freeze(),
		policies:  b.policies.freeze(),
		byNS:      b.byNS.freeze(),
		version:   b.version,
	}
	v.bits4 = lengths(b.bits4[:])
	v.bits6 = lengths(b.bits6[:])
	v.wild = lengths(b.wild[:])
	return v
}

// lengths lists the lengths in use, longest first.
func lengths(count []int) []uint8 {
	var l []uint8
	for bits := len(count) - 1; bits >= 0; bits-- {
		if count[bits] > 0 {
			l = append(l, uint8(bits))
		}
	}
	return l
}

// rebuild brings one service, or the staged endpoints in its place, up to date.
func (b *Builder) rebuild(k ServiceKey) {
	old, _ := b.services.get(k)
	given := b.given[k].Service
	if given == nil {
		if old != nil {
			b.unindex(old)
		}
		setOrDelete(&b.staged, k, b.endpoints(k, nil))
		return
	}
	s := *given
	s.Endpoints = b.endpoints(k, given)
	s.SANs = parseSANs(given.SubjectAltNames)
	s.seq = b.given[k].seq
	s.uniform = uniform(&s)
	b.staged.del(k)
	b.index(old, &s)
}

// endpoints merges what a service was given with the workloads that list it. A
// workload's own claim replaces a given endpoint of its UID.
func (b *Builder) endpoints(k ServiceKey, s *Service) []Endpoint {
	backers := b.backers[k]
	var given []Endpoint
	allowAll := s == nil // staged endpoints are kept whatever their health
	if s != nil {
		given = s.Endpoints
		allowAll = s.LoadBalancer != nil && s.LoadBalancer.HealthPolicy == AllowAll
	}
	if len(given)+len(backers) == 0 {
		return nil
	}
	out := make([]Endpoint, 0, len(given)+len(backers))
	for _, e := range given {
		if _, claimed := findUID(backers, e.UID); !claimed && (allowAll || e.Status == Healthy) {
			out = append(out, e)
		}
	}
	for _, w := range backers {
		if allowAll || w.Status == Healthy {
			ports, _ := w.PortsFor(k)
			out = append(out, Endpoint{UID: w.UID, Ports: ports, Status: w.Status, Workload: w})
		}
	}
	if len(given) > 0 {
		slices.SortFunc(out, func(a, b Endpoint) int { return cmp.Compare(a.UID, b.UID) })
	}
	return out
}

// uniform reports whether an endpoint can be drawn by index; see Service.Uniform.
func uniform(s *Service) bool {
	if s.LoadBalancer != nil && s.LoadBalancer.Mode != LBStandard {
		return false
	}
	for i := range s.Endpoints {
		w := s.Endpoints[i].Workload
		if w == nil || w.Capacity != 1 || (len(w.Addresses) == 0 && w.Hostname == "") {
			return false
		}
	}
	return len(s.Endpoints) > 0
}

func parseSANs(names []string) []identity.ID {
	var ids []identity.ID
	for _, n := range names {
		if id, err := identity.Parse(n); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// index replaces old, which may be nil, by s.
func (b *Builder) index(old, s *Service) {
	if old != nil && !sameNames(old, s) {
		b.unindex(old)
		old = nil
	}
	b.services.set(s.Key(), s)
	place(&b.byHost, hostKey(s.Hostname), s)
	if n, ok := wildcardLabels(s.Hostname); ok && old == nil {
		b.wild[n]++
	}
	for _, a := range s.VIPs {
		place(&b.byVIP, a, s)
	}
	for i := range s.CIDRVIPs {
		if k, first := cidrKey(s, i); first {
			place(&b.byCIDR, k, s)
			if old == nil {
				*b.bits(k.Prefix) += 1
			}
		}
	}
}

func (b *Builder) unindex(s *Service) {
	b.services.del(s.Key())
	remove(&b.byHost, hostKey(s.Hostname), s)
	if n, ok := wildcardLabels(s.Hostname); ok {
		b.wild[n]--
	}
	for _, a := range s.VIPs {
		remove(&b.byVIP, a, s)
	}
	for i := range s.CIDRVIPs {
		if k, first := cidrKey(s, i); first {
			remove(&b.byCIDR, k, s)
			*b.bits(k.Prefix) -= 1
		}
	}
}

// cidrKey returns the key of a service's i-th range and whether it is the first
// of its ranges with it.
func cidrKey(s *Service, i int) (k NetworkPrefix, first bool) {
	k = NetworkPrefix{s.CIDRVIPs[i].Network, s.CIDRVIPs[i].Prefix.Masked()}
	for _, c := range s.CIDRVIPs[:i] {
		if c.Network == k.Network && c.Prefix.Masked() == k.Prefix {
			return k, false
		}
	}
	return k, k.Prefix.IsValid()
}

func (b *Builder) bits(p netip.Prefix) *int {
	if p.Addr().Is4() {
		return &b.bits4[p.Bits()]
	}
	return &b.bits6[p.Bits()]
}

// sameNames reports whether two versions of a service have the same index
// entries.
func sameNames(a, b *Service) bool {
	return a.Key() == b.Key() && slices.Equal(a.VIPs, b.VIPs) && slices.Equal(a.CIDRVIPs, b.CIDRVIPs)
}

// place puts s into a list of services, in the order of their numbers and in
// the place of its earlier version. Lists in tables are shared with Views and so
// never written to.
func place[K comparable](e *editor[K, []*Service], k K, s *Service) {
	l, _ := e.get(k)
	at, replace := slices.BinarySearchFunc(l, s.seq, func(s *Service, seq uint64) int { return cmp.Compare(s.seq, seq) })
	out := make([]*Service, 0, len(l)+1)
	out = append(append(out, l[:at]...), s)
	if replace {
		at++
	}
	e.set(k, append(out, l[at:]...))
}

func remove[K comparable](e *editor[K, []*Service], k K, s *Service) {
	l, _ := e.get(k)
	setOrDelete(e, k, without(l, s))
}

// without returns a copy of l without x.
func without[T comparable](l []T, x T) []T {
	return slices.DeleteFunc(slices.Clone(l), func(y T) bool { return y == x })
}

func setOrDelete[K comparable, V any](e *editor[K, []V], k K, l []V) {
	if len(l) == 0 {
		e.del(k)
		return
	}
	e.set(k, l)
}
