package rbac

import (
	"net/netip"

	"ztun/proxy/identity"
)

// Scope says which workloads a policy applies to.
type Scope uint8

// The scopes, with the numbers of istio.security.Scope.
const (
	ScopeGlobal           Scope = 0 // every workload
	ScopeNamespace        Scope = 1 // the workloads of the policy's namespace
	ScopeWorkloadSelector Scope = 2 // the workloads that list the policy by key
)

// String returns the name used in config_dump and in the local file.
func (s Scope) String() string {
	switch s {
	case ScopeGlobal:
		return "Global"
	case ScopeNamespace:
		return "Namespace"
	case ScopeWorkloadSelector:
		return "WorkloadSelector"
	}
	return "Unknown"
}

// Action is what a matching policy does.
type Action uint8

// The actions, with the numbers of istio.security.Action.
const (
	Allow Action = 0
	Deny  Action = 1
)

// String returns the name used in config_dump and in the local file.
func (a Action) String() string {
	switch a {
	case Allow:
		return "Allow"
	case Deny:
		return "Deny"
	}
	return "Unknown"
}

// Policy is one istio.security.Authorization. It is immutable once evaluated
// or handed to a state.Builder.
type Policy struct {
	Key       string // the name under which it was received, "namespace/name"; unique
	Name      string
	Namespace string
	Scope     Scope
	Action    Action
	DryRun    bool   // evaluated and reported, never enforced
	Rules     []Rule // OR; none: the policy never matches

	missing bool // stands for a policy that is not loaded; see Missing
}

// Rule is an AND of clauses; without clauses it matches everything.
type Rule []Clause

// Clause is an OR of matches; without matches it is true.
type Clause []Match

// StringKind is the way a StringMatch compares.
type StringKind uint8

// The kinds. The zero value is none of them and matches nothing.
const (
	Exact    StringKind = iota + 1 // equal
	Prefix                         // starts with
	Suffix                         // ends with
	Presence                       // not empty
)

// String returns the name used in config_dump and in the local file.
func (k StringKind) String() string {
	switch k {
	case Exact:
		return "Exact"
	case Prefix:
		return "Prefix"
	case Suffix:
		return "Suffix"
	case Presence:
		return "Presence"
	}
	return "Unknown"
}

// StringMatch compares a string, case-sensitively.
type StringMatch struct {
	Kind  StringKind
	Value string // unused by Presence
}

// ServiceAccount names a service account in whatever trust domain.
type ServiceAccount struct {
	Namespace string
	Name      string
}

// Field names one of the twelve lists of a Match.
type Field uint16

// The fields, as a set.
const (
	FieldNamespaces Field = 1 << iota
	FieldNotNamespaces
	FieldPrincipals
	FieldNotPrincipals
	FieldSourceIPs
	FieldNotSourceIPs
	FieldDestinationIPs
	FieldNotDestinationIPs
	FieldDestinationPorts
	FieldNotDestinationPorts
	FieldServiceAccounts
	FieldNotServiceAccounts
)

// Match constrains a connection. Values within a list are alternatives; the
// lists are combined by AND: every positive list that is not empty needs a hit,
// no negative list may have one. A Match of which every list is empty is false.
//
// Compared are: namespaces with the peer's namespace ("" without identity);
// principals with the peer's identity without "spiffe://"; service accounts
// with the peer's namespace and service account in any trust domain; source IPs
// with the TCP peer; destination IPs and ports with the next hop, that is the
// application's port and never 15008. Without an identity the positive identity
// lists miss (Presence included) and the negative ones hold.
type Match struct {
	Namespaces, NotNamespaces             []StringMatch
	Principals, NotPrincipals             []StringMatch
	SourceIPs, NotSourceIPs               []netip.Prefix
	DestinationIPs, NotDestinationIPs     []netip.Prefix
	DestinationPorts, NotDestinationPorts []uint16
	ServiceAccounts, NotServiceAccounts   []ServiceAccount

	// Invalid is the set of lists that lost an entry because it could not be
	// understood. Such a list is never "not given", and the lost entry is decided
	// against the connection; see the package's decisions.
	Invalid Field
}

// Question is what is known of a connection when it is judged.
type Question struct {
	Src   netip.Addr     // the TCP peer (for HBONE the tunnel's)
	Dst   netip.AddrPort // the next hop: the application, or its tunnel port
	ID    identity.ID    // the peer's identity, if HasID
	HasID bool
	// SrcUnknown: Src is not the peer's own, something on the way has rewritten it.
	// Lists of source addresses are then undecided: no hit for certain, and possibly
	// one, as with entries that were lost (Match.Invalid).
	SrcUnknown bool
}

// Missing returns the policy that stands for a key that a workload lists and
// that is not loaded: it decides nothing, and a verdict names it (Verdict.Missing).
func Missing(key string) *Policy {
	return &Policy{Key: key, Name: key, Scope: ScopeWorkloadSelector, missing: true}
}

// IsMissing reports whether p was made by Missing.
func (p *Policy) IsMissing() bool { return p.missing }
