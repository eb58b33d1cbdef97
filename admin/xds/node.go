package xds

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Problem is one thing that is wrong with a file.
type Problem struct {
	Line int    // from 1; 0 if unknown
	Key  string // where in the document: "workloads[3].protocol"
	Text string
}

// String prints "line 12: workloads[3].protocol: text".
func (p Problem) String() string {
	s := p.Text
	if p.Key != "" {
		s = p.Key + ": " + s
	}
	if p.Line > 0 {
		s = "line " + strconv.Itoa(p.Line) + ": " + s
	}
	return s
}

// FileError is what is wrong with a file: at least one problem, in the order of
// the file, at most maxProblems.
type FileError struct{ Problems []Problem }

// Error prints all problems on one line.
func (e *FileError) Error() string {
	parts := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		parts[i] = p.String()
	}
	return strings.Join(parts, "; ")
}

// maxProblems is how many problems are reported at most.
const maxProblems = 10

// reader walks a document. It collects problems instead of stopping at the
// first.
type reader struct {
	problems []Problem
	// budget bounds how many nodes are visited: aliases let a small document
	// describe a huge one.
	budget   int
	interned map[string]string
}

// errBudget ends a walk by panic and recover within ParseLocal.
var errBudget = errors.New("document expands to too much: aliases of aliases?")

// value is a node and the way to it.
type value struct {
	r   *reader
	n   *yaml.Node
	up  *value
	key string // within up; "" in a list
	i   int    // within a list
}

func (v *value) path() string {
	if v == nil || v.up == nil {
		return ""
	}
	up := v.up.path()
	if v.key == "" {
		return fmt.Sprintf("%s[%d]", up, v.i)
	}
	if strings.ContainsAny(v.key, "./ ") {
		return up + "[" + strconv.Quote(v.key) + "]"
	}
	if up == "" {
		return v.key
	}
	return up + "." + v.key
}

func (v *value) fail(format string, args ...any) {
	if len(v.r.problems) < maxProblems {
		v.r.problems = append(v.r.problems, Problem{Line: v.n.Line, Key: v.path(), Text: fmt.Sprintf(format, args...)})
	}
}

// child makes the value of a node within v, with aliases followed.
func (v *value) child(n *yaml.Node, key string, i int) *value {
	if v.r.budget--; v.r.budget < 0 {
		panic(errBudget)
	}
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return &value{r: v.r, n: n, up: v, key: key, i: i}
}

func (v *value) null() bool { return v.n.Kind == yaml.ScalarNode && v.n.ShortTag() == "!!null" }

// describe says what a node is, for error texts.
func (v *value) describe() string {
	switch v.n.Kind {
	case yaml.MappingNode:
		return "a map"
	case yaml.SequenceNode:
		return "a list"
	}
	text := v.n.Value
	if len(text) > 60 {
		text = text[:60] + "..."
	}
	switch tag := v.n.ShortTag(); tag {
	case "!!null":
		return "nothing"
	case "!!int", "!!float":
		return "the number " + text
	case "!!bool":
		return text
	case "!!str", "!!timestamp":
		return strconv.Quote(text)
	default:
		return tag + " " + strconv.Quote(text)
	}
}

// object reads a map of the schema: it calls field for each key that is given, and reports those that the schema does
// not have and those that it requires. A null counts as an absent map, if nothing is required.
func (v *value) object(o *Object, field func(key string, x *value)) {
	v.entries(func(key string, x *value) bool {
		if o.knows(key) {
			field(key, x)
			return true
		}
		return o.Loose
	}, o.unknown)
	if required := o.required(); len(required) > 0 {
		v.require(required...)
	}
}

// table reads a map whose keys are anybody's.
func (v *value) table(entry func(key string, x *value)) {
	v.entries(func(key string, x *value) bool {
		entry(key, x)
		return true
	}, nil)
}

// entries calls field for each entry of a map. field returns false for a key that it does not know; unknown is then
// what is said of it. A null counts as an absent map.
func (v *value) entries(field func(key string, x *value) bool, unknown func(key string) string) {
	if v.null() {
		return
	}
	if v.n.Kind != yaml.MappingNode {
		v.fail("want a map, found %s", v.describe())
		return
	}
	seen := make(map[string]int, len(v.n.Content)/2)
	for i := 0; i+1 < len(v.n.Content); i += 2 {
		k := v.child(v.n.Content[i], "", i/2)
		if k.n.Kind != yaml.ScalarNode {
			k.fail("want a plain key, found %s", k.describe())
			continue
		}
		key := k.n.Value
		x := v.child(v.n.Content[i+1], key, 0)
		if line, ok := seen[key]; ok {
			(&value{r: v.r, n: k.n, up: v, key: key}).fail("given twice (first on line %d)", line)
			continue
		}
		seen[key] = k.n.Line
		if !field(key, x) {
			(&value{r: v.r, n: k.n, up: v, key: key}).fail("%s", unknown(key))
		}
	}
}

// require reports the keys that a map lacks or has without a value.
func (v *value) require(keys ...string) {
	if v.n.Kind != yaml.MappingNode {
		if v.null() {
			v.fail("want a map, found nothing")
		}
		return
	}
next:
	for _, key := range keys {
		for i := 0; i+1 < len(v.n.Content); i += 2 {
			if v.n.Content[i].Value == key {
				x := v.child(v.n.Content[i+1], key, 0)
				if x.null() {
					x.fail("needs a value")
				}
				continue next
			}
		}
		v.fail("%q is missing", key)
	}
}

// list calls item for each entry. A null counts as an empty list.
func (v *value) list(item func(x *value)) {
	if v.null() {
		return
	}
	if v.n.Kind != yaml.SequenceNode {
		v.fail("want a list, found %s", v.describe())
		return
	}
	for i, n := range v.n.Content {
		item(v.child(n, "", i))
	}
}

// str reads a string; "" for null. Repeated strings share their bytes.
func (v *value) str() string {
	if v.null() {
		return ""
	}
	s, _ := v.text()
	return s
}

// text reads a string that has to be there. It reports a problem if not.
func (v *value) text() (string, bool) {
	tag := v.n.ShortTag()
	if v.n.Kind == yaml.ScalarNode && (tag == "!!str" || tag == "!!timestamp") {
		return v.r.intern(v.n.Value), true
	}
	hint := ""
	if tag == "!!int" || tag == "!!float" || tag == "!!bool" {
		hint = " (put it in quotes)"
	}
	v.fail("want a string, found %s%s", v.describe(), hint)
	return "", false
}

func (r *reader) intern(s string) string {
	if t, ok := r.interned[s]; ok {
		return t
	}
	s = strings.Clone(s)
	r.interned[s] = s
	return s
}

func (v *value) strs() (l []string) {
	v.list(func(x *value) { l = append(l, x.str()) })
	return l
}

// boolean reads true or false; false for null.
func (v *value) boolean() bool {
	if v.null() {
		return false
	}
	if v.n.Kind == yaml.ScalarNode && v.n.ShortTag() == "!!bool" {
		return strings.EqualFold(v.n.Value, "true")
	}
	v.fail("want true or false, found %s", v.describe())
	return false
}

// uint reads a decimal number of at most max; 0 for null.
func (v *value) uint(max uint64) uint64 {
	if v.null() {
		return 0
	}
	if v.n.Kind == yaml.ScalarNode && v.n.ShortTag() == "!!int" {
		n, err := strconv.ParseUint(v.n.Value, 10, 64)
		if err == nil && n <= max {
			return n
		}
	}
	v.fail("want a number from 0 to %d, found %s", max, v.describe())
	return 0
}

func (v *value) port() uint16 { return uint16(v.uint(65535)) }

// addr reads an IP address.
func (v *value) addr() netip.Addr {
	s, ok := v.text()
	if !ok {
		return netip.Addr{}
	}
	a, ok := parseIP(s)
	if !ok {
		v.fail("want an IP address, found %s", v.describe())
	}
	return a
}

// addrPort reads ADDRESS:PORT, none of them zero.
func (v *value) addrPort() netip.AddrPort {
	s, ok := v.text()
	if !ok {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 || a.Addr().IsUnspecified() || a.Addr().Zone() != "" {
		v.fail("want address:port ([address]:port with IPv6), found %s", v.describe())
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// parseIP parses an address without zone, in canonical form.
func parseIP(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// prefix reads an address range in CIDR form. Host bits may be set.
func (v *value) prefix() netip.Prefix {
	s, ok := v.text()
	if !ok {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		v.fail("want an address range like 10.0.0.0/8, found %s", v.describe())
		return netip.Prefix{}
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}

// networkAddr reads "network/ip".
func (v *value) networkAddr() (network string, ip netip.Addr) {
	s, ok := v.text()
	if !ok {
		return "", netip.Addr{}
	}
	network, rest, _ := strings.Cut(s, "/")
	ip, ok = parseIP(rest)
	if !ok {
		v.fail("want network/ip (/10.0.0.1 in the default network), found %s", v.describe())
		return "", netip.Addr{}
	}
	return v.r.intern(network), ip
}

// enum reads one of several names.
func enum[T fmt.Stringer](v *value, options ...T) (zero T) {
	s, ok := v.text()
	if !ok {
		return zero
	}
	names := make([]string, len(options))
	for i, o := range options {
		if names[i] = o.String(); names[i] == s {
			return o
		}
	}
	v.fail("want one of %s, found %s", strings.Join(names, ", "), v.describe())
	return zero
}
