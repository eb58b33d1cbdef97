package identity

import "strings"

// scheme is the only URI scheme of an identity; Istio knows no other form (spec/dataplane.md section 0).
const scheme = "spiffe://"

// ID is a workload's SPIFFE identity as Istio shapes it: spiffe://TrustDomain/ns/Namespace/sa/ServiceAccount.
// It is comparable: use it as a map key, compare with ==. Fields are case-sensitive and may be empty (as in ztunnel);
// they never contain a slash when the ID came from Parse.
type ID struct{ TrustDomain, Namespace, ServiceAccount string }

// String is the SPIFFE URI of the ID. Of the zero ID it is "spiffe:///ns//sa/", which Parse accepts.
func (id ID) String() string {
	return scheme + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}

// IsZero reports whether nothing is known: the ID of a peer without a certificate.
func (id ID) IsZero() bool { return id == ID{} }

// MarshalText makes an ID the string of its URI in JSON and logs.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText is the opposite of MarshalText. Its error is a *ParseError.
func (id *ID) UnmarshalText(b []byte) (err error) {
	*id, err = Parse(string(b))
	return err
}

// Parse reads a SPIFFE URI by ztunnel's rule: the literal prefix "spiffe://", then exactly five parts separated by
// slashes, the second "ns", the fourth "sa". Empty parts are accepted, a trailing slash is not, nothing is unescaped
// or folded to lower case. Its error is a *ParseError.
func Parse(s string) (ID, error) {
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return ID{}, &ParseError{Text: s}
	}
	td, rest, ok1 := strings.Cut(rest, "/")
	key1, rest, ok2 := strings.Cut(rest, "/")
	ns, rest, ok3 := strings.Cut(rest, "/")
	key2, sa, ok4 := strings.Cut(rest, "/")
	if !ok1 || !ok2 || !ok3 || !ok4 || key1 != "ns" || key2 != "sa" || strings.Contains(sa, "/") {
		return ID{}, &ParseError{Text: s}
	}
	return ID{TrustDomain: td, Namespace: ns, ServiceAccount: sa}, nil
}

// Join lists ids with commas, in order: the form of pool keys and of Appendix B's error texts.
func Join(ids []ID) string {
	switch len(ids) {
	case 0:
		return ""
	case 1:
		return ids[0].String()
	}
	var b strings.Builder
	for i, id := range ids {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(id.String())
	}
	return b.String()
}
