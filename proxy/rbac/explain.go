package rbac

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Hit is what one policy says of a connection.
type Hit struct {
	Policy *Policy
	Rule   int // index of the first rule that matches, -1 if none does
}

// Explain is Evaluate, and what each policy said. Nil policies are left out.
func Explain(ps []*Policy, c Question) (Verdict, []Hit) {
	m := newMatcher(c)
	hits := make([]Hit, 0, len(ps))
	for _, p := range ps {
		if p != nil {
			hits = append(hits, Hit{p, m.first(p)})
		}
	}
	return Evaluate(ps, c), hits
}

// String says a rule in words: clauses joined by "and", matches by "or", the lists of a match by commas.
func (r Rule) String() string {
	if len(r) == 0 {
		return "everything"
	}
	clauses := make([]string, len(r))
	for i, c := range r {
		clauses[i] = c.String()
		if len(r) > 1 && len(c) > 1 {
			clauses[i] = "(" + clauses[i] + ")"
		}
	}
	return strings.Join(clauses, " and ")
}

// String says a clause in words.
func (c Clause) String() string {
	if len(c) == 0 {
		return "everything"
	}
	matches := make([]string, len(c))
	for i := range c {
		matches[i] = c[i].String()
	}
	return strings.Join(matches, " or ")
}

// String says a match in words, by the names of the local file.
func (x *Match) String() string {
	if x.empty() {
		return "nothing"
	}
	var parts []string
	list := func(name string, f Field, n int, item func(int) string) {
		if n == 0 && x.Invalid&f == 0 {
			return
		}
		items := make([]string, n, n+1)
		for i := range items {
			items[i] = item(i)
		}
		if x.Invalid&f != 0 {
			items = append(items, "an entry that was not understood")
		}
		parts = append(parts, name+" ["+strings.Join(items, " ")+"]")
	}
	strs := func(name string, f Field, l []StringMatch) {
		list(name, f, len(l), func(i int) string { return l[i].String() })
	}
	prefixes := func(name string, f Field, l []netip.Prefix) {
		list(name, f, len(l), func(i int) string { return l[i].String() })
	}
	ports := func(name string, f Field, l []uint16) {
		list(name, f, len(l), func(i int) string { return strconv.Itoa(int(l[i])) })
	}
	accounts := func(name string, f Field, l []ServiceAccount) {
		list(name, f, len(l), func(i int) string { return l[i].Namespace + "/" + l[i].Name })
	}
	strs("namespaces", FieldNamespaces, x.Namespaces)
	strs("notNamespaces", FieldNotNamespaces, x.NotNamespaces)
	strs("principals", FieldPrincipals, x.Principals)
	strs("notPrincipals", FieldNotPrincipals, x.NotPrincipals)
	accounts("serviceAccounts", FieldServiceAccounts, x.ServiceAccounts)
	accounts("notServiceAccounts", FieldNotServiceAccounts, x.NotServiceAccounts)
	prefixes("sourceIps", FieldSourceIPs, x.SourceIPs)
	prefixes("notSourceIps", FieldNotSourceIPs, x.NotSourceIPs)
	prefixes("destinationIps", FieldDestinationIPs, x.DestinationIPs)
	prefixes("notDestinationIps", FieldNotDestinationIPs, x.NotDestinationIPs)
	ports("destinationPorts", FieldDestinationPorts, x.DestinationPorts)
	ports("notDestinationPorts", FieldNotDestinationPorts, x.NotDestinationPorts)
	return strings.Join(parts, ", ")
}

// String says how and with what is compared.
func (sm StringMatch) String() string {
	switch sm.Kind {
	case Exact:
		return strconv.Quote(sm.Value)
	case Prefix:
		return fmt.Sprintf("%q...", sm.Value)
	case Suffix:
		return fmt.Sprintf("...%q", sm.Value)
	case Presence:
		return "any"
	}
	return "none"
}
