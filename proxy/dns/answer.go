package dns

import (
	"net/netip"
	"strings"

	"github.com/miekg/dns"

	"ztun/proxy/state"
)

// Options is what Answer needs to know besides the mesh.
type Options struct {
	// ClusterDomain is the suffix of Kubernetes' names; "" means cluster.local.
	ClusterDomain string
	// PreferredNamespace wins among services of one hostname after the client's
	// own and a canonical one; "" none.
	PreferredNamespace string
	// IPv6 allows AAAA records.
	IPv6 bool
	// SearchDomains are what the pod's resolver appends to names, in its order;
	// nil means the three that Kubernetes gives to a pod.
	SearchDomains []string
	// ExtraSearch are further ones, after those.
	ExtraSearch []string
	// Shuffle orders the addresses of an answer, as rand.Shuffle does; nil leaves
	// them in the order of the View.
	Shuffle func(n int, swap func(i, j int))
}

// normalized is o as Answer works with it.
func (o Options) normalized() Options {
	o.ClusterDomain = normal(o.ClusterDomain)
	if o.ClusterDomain == "" {
		o.ClusterDomain = "cluster.local"
	}
	o.SearchDomains, o.ExtraSearch = normalAll(o.SearchDomains), normalAll(o.ExtraSearch)
	return o
}

// normalAll leaves nil nil, and its argument as it is.
func normalAll(names []string) (out []string) {
	if names != nil {
		out = make([]string, 0, len(names))
	}
	for _, n := range names {
		out = append(out, normal(n))
	}
	return out
}

// Decision is what becomes of a query.
type Decision struct {
	// Forward: the mesh has nothing to say, ask elsewhere. The rest is unset.
	Forward bool
	// Rcode is NOERROR, or an error, whose reply has no records.
	Rcode int
	// Owner is the name, in lower case and with its final dot, that has Addrs; or
	// that has none, if there are none.
	Owner string
	// Alias, if not "", is the name asked for, of which Owner is the canonical name.
	Alias string
	// Addrs are of the family that was asked for.
	Addrs []netip.Addr
	// Pointer, if not "", is what the PTR record of Owner says.
	Pointer string
	// Serial is of the SOA record of a negative answer.
	Serial uint32
	// Result is ztunnel's word for it in the log.
	Result string
}

// What a Decision's Result says.
const (
	resultSuccess   = "success"
	resultNoRecords = "no records"
	resultFamily    = "service does not support this record type"
)

// Answer decides what becomes of a query that client sends, from what view knows.
// It reads no clock and asks nobody; only Options.Shuffle may be random.
//
// Source: ztunnel's algorithm, spec controlplane 5.3. A message that is not a
// query, or asks for anything but addresses of class IN, is to be forwarded; one
// that does not ask exactly one question is an error. Names that mean the same
// everywhere are answered before the mesh is asked (special.go).
func Answer(view *state.View, client *state.Workload, o *Options, q *dns.Msg) Decision {
	if q.Opcode != dns.OpcodeQuery {
		return Decision{Forward: true}
	}
	if len(q.Question) != 1 {
		return Decision{Rcode: dns.RcodeServerFailure}
	}
	question := q.Question[0]
	if d, ok := special(question, o.IPv6); ok {
		if rcode := ednsError(q); rcode != dns.RcodeSuccess {
			return Decision{Rcode: rcode}
		}
		return d
	}
	v6 := question.Qtype == dns.TypeAAAA
	if !v6 && question.Qtype != dns.TypeA || question.Qclass != dns.ClassINET && question.Qclass != dns.ClassANY {
		return Decision{Forward: true}
	}
	n := o.normalized()
	name := normal(question.Name)
	s, a := find(view, client.Namespace, &n, name)
	if s == nil {
		return Decision{Forward: true}
	}
	if rcode := ednsError(q); rcode != dns.RcodeSuccess {
		return Decision{Rcode: rcode}
	}
	d := Decision{Owner: dns.Fqdn(name), Serial: uint32(view.Version())}
	if v6 && !n.IPv6 || v6 && s.IPFamilies == state.FamiliesIPv4 || !v6 && s.IPFamilies == state.FamiliesIPv6 {
		d.Result = resultFamily
		return d
	}
	if d.Addrs = addresses(view, client, s, v6); len(d.Addrs) == 0 {
		d.Result = resultNoRecords
		return d
	}
	if n.Shuffle != nil {
		n.Shuffle(len(d.Addrs), func(i, j int) { d.Addrs[i], d.Addrs[j] = d.Addrs[j], d.Addrs[i] })
	}
	if a.stripped != "" && !strings.HasPrefix(s.Hostname, "*.") {
		d.Alias, d.Owner = d.Owner, dns.Fqdn(a.stripped)
	}
	d.Result = resultSuccess
	return d
}

// find returns the first service that answers to one of the name's aliases, and
// which: each alias as it is, then with its leading labels, from one to all but
// one, replaced by an asterisk. So a wildcard match of an earlier alias beats an
// exact match of a later one.
func find(view *state.View, ns string, o *Options, name string) (*state.Service, alias) {
	if name == "" {
		return nil, alias{}
	}
	search := o.SearchDomains
	if search == nil {
		search = searchDomains(ns, o.ClusterDomain)
	}
	search = append(search[:len(search):len(search)], o.ExtraSearch...)
	for _, a := range aliases(name, ns, o.ClusterDomain, search) {
		if s := choose(view.ServicesByHost(a.name), ns, o); s != nil {
			return s, a
		}
		at := dns.Split(a.name)
		for _, n := range view.WildcardLabels() { // the rest of the labels, which may be 127, need no look
			if int(n) >= len(at) {
				continue
			}
			if s := choose(view.ServicesByWildcard(a.name[at[len(at)-int(n)]-1:]), ns, o); s != nil {
				return s, a
			}
		}
	}
	return nil, alias{}
}

// choose picks among the services of one hostname, of those that a client in ns
// sees and that we can answer for: its own namespace's; a canonical one, the
// last; the preferred namespace's; the first.
func choose(l []*state.Service, ns string, o *Options) *state.Service {
	var own, canonical, preferred, first *state.Service
	for _, s := range l {
		if !s.VisibleFrom(ns) || len(s.VIPs) == 0 && !headless(s, o.ClusterDomain) {
			continue
		}
		if s.Namespace == ns {
			own = s
		}
		if s.Canonical {
			canonical = s
		}
		if o.PreferredNamespace != "" && s.Namespace == o.PreferredNamespace {
			preferred = s
		}
		if first == nil {
			first = s
		}
	}
	for _, s := range []*state.Service{own, canonical, preferred} {
		if s != nil {
			return s
		}
	}
	return first
}

// headless reports whether a service without an address of its own stands for
// its endpoints: those of Kubernetes do, others without an address (a
// ServiceEntry to be resolved by DNS) are the upstream's to resolve.
func headless(s *state.Service, clusterDomain string) bool {
	return strings.HasSuffix(strings.ToLower(s.Hostname), ".svc."+clusterDomain)
}

// addresses are those of the service that the client can use: its addresses in
// the client's network, or, if it has none at all, one of each endpoint.
func addresses(view *state.View, client *state.Workload, s *state.Service, v6 bool) []netip.Addr {
	var out []netip.Addr
	for _, vip := range s.VIPs {
		if vip.Network == client.Network && vip.Addr.Is6() == v6 {
			out = append(out, vip.Addr)
		}
	}
	if len(s.VIPs) > 0 {
		return out
	}
	for i := range s.Endpoints {
		w := view.EndpointWorkload(&s.Endpoints[i])
		if w == nil {
			continue
		}
		for _, a := range w.Addresses {
			if a.Is6() == v6 {
				out = append(out, a)
				break
			}
		}
	}
	return out
}

// ednsError is what RFC 6891 section 6.1 has us say to an OPT record: FORMERR to
// more than one, BADVERS to a version that we do not know.
func ednsError(q *dns.Msg) int {
	var opt *dns.OPT
	for _, rr := range q.Extra {
		if o, ok := rr.(*dns.OPT); ok {
			if opt != nil {
				return dns.RcodeFormatError
			}
			opt = o
		}
	}
	if opt != nil && opt.Version() != 0 {
		return dns.RcodeBadVers
	}
	return dns.RcodeSuccess
}
