package dns

import (
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// alias is a hostname that a requested name may stand for, in lower case and
// without the final dot. Names are in miekg/dns's presentation format: a dot
// within a label is "\.", so labels are found by dns.Split alone.
type alias struct {
	name string
	// stripped is the requested name less a search domain, if that is how the
	// alias came about; else "".
	stripped string
}

// aliases lists what name may stand for to a client in namespace ns, best first
// and each once: itself, its expansions within Kubernetes, and the same for what
// is left of it without each search domain that it ends with (spec 5.3).
func aliases(name, ns, clusterDomain string, search []string) []alias {
	var out []alias
	add := func(name, stripped string) {
		if !slices.ContainsFunc(out, func(a alias) bool { return a.name == name }) {
			out = append(out, alias{name, stripped})
		}
	}
	add(name, "")
	for _, e := range expansions(name, ns, clusterDomain) {
		add(e, "")
	}
	for _, d := range search {
		if rest, ok := trimDomain(name, d); ok {
			add(rest, rest)
			for _, e := range expansions(rest, ns, clusterDomain) {
				add(e, rest)
			}
		}
	}
	return out
}

// expansions completes a name to those that Kubernetes gives to services, by how
// many labels it has.
func expansions(name, ns, clusterDomain string) []string {
	labels := len(dns.Split(name))
	_, svc := trimDomain(name, "svc")
	switch {
	case labels == 1:
		return []string{name + "." + ns + ".svc." + clusterDomain}
	case labels == 2:
		return []string{name + ".svc." + clusterDomain, name + "." + ns + ".svc." + clusterDomain}
	case labels == 3 && svc:
		return []string{name + "." + clusterDomain, name + ".svc." + clusterDomain}
	case labels == 3:
		return []string{name + ".svc." + clusterDomain}
	case labels == 4 && svc:
		return []string{name + "." + clusterDomain}
	}
	return nil
}

// trimDomain cuts domain off name, of which something must be left.
func trimDomain(name, domain string) (rest string, ok bool) {
	at := len(name) - len(domain)
	if at <= 1 || domain == "" || name[at:] != domain || !slices.Contains(dns.Split(name), at) {
		return "", false
	}
	return name[:at-1], true
}

// searchDomains are those that Kubernetes writes into the resolv.conf of a pod.
func searchDomains(ns, clusterDomain string) []string {
	return []string{ns + ".svc." + clusterDomain, "svc." + clusterDomain, clusterDomain}
}

// normal is a name as it is looked up: lower case, without the final dot.
func normal(name string) string {
	if !dns.IsFqdn(name) { // "a\." ends in a label's dot
		return strings.ToLower(name)
	}
	return strings.ToLower(name[:len(name)-1])
}
