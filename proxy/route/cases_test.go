package route_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"ztun/admin/xds"
	"ztun/proxy/identity"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// caseFile is the schema of testdata/*.yaml, explained in testdata/README.md.
type caseFile struct {
	isMirror bool
	About    string
	Listed   bool
	World    yaml.Node
	Outbound []struct {
		Case      string
		Mirrored  *bool
		Network   string
		From      string
		As        string
		To        string
		Resolve   *[]string
		Go        *string
		Address   *string
		Authority *string
		Hostname  string
		Workload  *string
		Upstream  *string
		Service   *string
		Accept    *[]string
		Inner     *[]string
		Refused   string
		Missed    *string
		Shares    map[string]string
	}
	Inbound []struct {
		Case          string
		Mirrored      *bool
		At            string
		Address       string
		Network       string
		Authority     string
		ForwardedHost string `yaml:"forwarded-host"`
		Delivers      string
		Service       *string
		Proxy         *string
		Status        int
		Refused       *string
		Missed        *string
	}
	Passthrough []struct {
		Case     string
		Mirrored *bool
		At       string
		To       string
		Delivers string
		Service  *string
		Refused  string
	}
}

// loadWorld makes a View of a case file's world.
func loadWorld(t *testing.T, f *caseFile) (*state.View, map[string]*state.Workload) {
	t.Helper()
	text, err := yaml.Marshal(&f.World)
	if err != nil {
		t.Fatal(err)
	}
	l, err := xds.ParseLocal(text)
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]*state.Workload)
	for _, w := range l.Workloads {
		w.Unlisted = !f.Listed
		byName[w.Name] = w
	}
	return l.View(""), byName
}

func TestCases(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no case files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var f caseFile
			dec := yaml.NewDecoder(bytes.NewReader(data))
			dec.KnownFields(true)
			if err := dec.Decode(&f); err != nil {
				t.Fatal(err)
			}
			f.run(t)
			t.Run("mirrored", func(t *testing.T) {
				var root yaml.Node
				if err := yaml.Unmarshal(data, &root); err != nil {
					t.Fatal(err)
				}
				(&mirror{v4: map[string]string{}}).node(&root)
				f := caseFile{isMirror: true}
				if err := root.Decode(&f); err != nil {
					t.Fatal(err)
				}
				f.run(t)
			})
		})
	}
}

func (f *caseFile) run(t *testing.T) {
	v, byName := loadWorld(t, f)
	f.outbound(t, v, byName)
	f.inbound(t, v, byName)
	f.passthrough(t, v, byName)
}

// skip reports whether a row says that it has no counterpart in the mirror, and this is the mirror.
func (f *caseFile) skip(mirrored *bool) bool { return f.isMirror && mirrored != nil && !*mirrored }

// mirror turns a case file around: every IPv4 address becomes an IPv6 address and the other way round. What
// holds for one family has to hold for the other.
type mirror struct{ v4 map[string]string }

var (
	v6Text = regexp.MustCompile(`(\[?)((?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4})*)?::[0-9a-f:]*[0-9a-f])(\]?)`)
	v4Text = regexp.MustCompile(`\b(\d+\.\d+\.\d+\.\d+)\b(:\d+\b)?(/\d+)?`)
)

func (m *mirror) node(n *yaml.Node) {
	for _, c := range n.Content {
		m.node(c)
	}
	if n.Kind != yaml.ScalarNode {
		return
	}
	switch n.Value {
	case "IPv4":
		n.Value = "IPv6"
		return
	case "IPv6":
		n.Value = "IPv4"
		return
	}
	// First hide the new IPv4 addresses, lest they are turned back.
	text := v6Text.ReplaceAllStringFunc(n.Value, func(s string) string {
		s = strings.Trim(s, "[]")
		if m.v4[s] == "" {
			m.v4[s] = fmt.Sprintf("100_64_0_%d", len(m.v4)+1)
		}
		return m.v4[s]
	})
	text = v4Text.ReplaceAllStringFunc(text, func(s string) string {
		part := v4Text.FindStringSubmatch(s)
		a := netip.MustParseAddr(part[1]).As16()
		copy(a[:12], []byte{0xfd, 0x99, 11: 0})
		six := netip.AddrFrom16(a).String()
		if part[1] == "127.0.0.1" {
			six = "::1"
		}
		switch {
		case part[2] != "":
			return "[" + six + "]" + part[2]
		case part[3] != "":
			bits, _ := strconv.Atoi(part[3][1:])
			return six + "/" + strconv.Itoa(96+bits)
		}
		return six
	})
	n.SetString(strings.ReplaceAll(text, "100_64_0_", "100.64.0."))
	if text == n.Value && n.Style == 0 {
		n.Tag = "" // untouched numbers and booleans stay what they were
	}
}

func (f *caseFile) outbound(t *testing.T, v *state.View, byName map[string]*state.Workload) {
	for _, c := range f.Outbound {
		if f.skip(c.Mirrored) {
			continue
		}
		t.Run(c.Case, func(t *testing.T) {
			src := byName[c.From]
			if src == nil {
				t.Fatalf("no workload %q", c.From)
			}
			ip := src.Addresses[0]
			if c.As != "" {
				ip = netip.MustParseAddr(c.As)
			}
			shares := make(map[string]*big.Rat)
			enumerate(t, func(rand func(uint64) uint64) func(*big.Rat) {
				dst, missed := netip.MustParseAddrPort(c.To), ""
				d, err := route.Decision{}, route.CheckOutbound(dst, route.IllegalPorts(true))
				if err == nil {
					d, err = decide(t, v, route.Question{Network: c.Network, Source: src, SrcIP: ip, Dst: dst, Rand: rand,
						Missed: &missed})
				}
				check(t, "missed", c.Missed, missed)
				if err == nil && c.Resolve != nil {
					var addrs []netip.Addr
					for _, a := range *c.Resolve {
						addrs = append(addrs, netip.MustParseAddr(a))
					}
					d, err = d.Resolved(addrs, rand)
				}
				if err != nil {
					if err.Error() != c.Refused {
						t.Errorf("refused: %v, want %q", err, c.Refused)
					}
					return func(*big.Rat) {}
				}
				if c.Refused != "" {
					t.Errorf("%+v, want %q", d, c.Refused)
				}
				check(t, "go", c.Go, goes(d))
				check(t, "address", c.Address, addrText(d.Actual))
				check(t, "authority", c.Authority, d.Authority())
				check(t, "workload", c.Workload, workloadName(d.Workload))
				check(t, "upstream", c.Upstream, workloadName(d.Upstream))
				check(t, "service", c.Service, serviceName(d.Service))
				checkIDs(t, "accept", c.Accept, d.SANs())
				checkIDs(t, "inner", c.Inner, d.FinalSANs)
				if d.Hostname != c.Hostname {
					t.Errorf("hostname: %q, want %q", d.Hostname, c.Hostname)
				}
				return func(p *big.Rat) { add(shares, workloadName(d.Upstream), p) }
			})
			if c.Shares != nil {
				got := make(map[string]string)
				for name, p := range shares {
					got[name] = p.RatString()
				}
				if diff := cmp.Diff(c.Shares, got); diff != "" {
					t.Errorf("shares (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func (f *caseFile) inbound(t *testing.T, v *state.View, byName map[string]*state.Workload) {
	for _, c := range f.Inbound {
		if f.skip(c.Mirrored) {
			continue
		}
		t.Run("in: "+c.Case, func(t *testing.T) {
			w := byName[c.At]
			if w == nil {
				t.Fatalf("no workload %q", c.At)
			}
			at := w.Addresses[0]
			if c.Address != "" {
				at = netip.MustParseAddr(c.Address)
			}
			missed := ""
			d, err := route.Inbound(v, route.InboundQuestion{Missed: &missed, Local: w, LocalAddr: at, Network: c.Network,
				Authority: c.Authority, ForwardedHost: c.ForwardedHost, Illegal: route.IllegalPorts(false)})
			check(t, "missed", c.Missed, missed)
			if err != nil {
				var re *route.Error
				if !errors.As(err, &re) {
					t.Fatalf("%T", err)
				}
				if c.Refused == nil || *c.Refused != err.Error() || re.Status() != c.Status {
					t.Errorf("%d %v, want %d", re.Status(), err, c.Status)
				}
				return
			}
			if c.Refused != nil {
				t.Fatalf("%+v, want %q", d, *c.Refused)
			}
			check(t, "delivers", &c.Delivers, d.App.String())
			check(t, "service", c.Service, serviceName(d.Service))
			check(t, "proxy", c.Proxy, d.ProxyDst.String())
			if c.Proxy == nil && d.Tunnel == state.TunnelProxy {
				t.Error("a PROXY header that is not expected")
			}
		})
	}
}

func (f *caseFile) passthrough(t *testing.T, v *state.View, byName map[string]*state.Workload) {
	for _, c := range f.Passthrough {
		if f.skip(c.Mirrored) {
			continue
		}
		t.Run("plaintext: "+c.Case, func(t *testing.T) {
			w := byName[c.At]
			if w == nil {
				t.Fatalf("no workload %q", c.At)
			}
			d, err := route.Passthrough(v, route.PassthroughQuestion{Local: w, Dst: netip.MustParseAddrPort(c.To),
				Illegal: route.IllegalPorts(false)})
			if err != nil || c.Refused != "" {
				if err == nil || err.Error() != c.Refused {
					t.Errorf("%+v, %v, want %q", d, err, c.Refused)
				}
				return
			}
			check(t, "delivers", &c.Delivers, d.App.String())
			check(t, "service", c.Service, serviceName(d.Service))
		})
	}
}

func check(t *testing.T, what string, want *string, got string) {
	t.Helper()
	if want != nil && *want != got {
		t.Errorf("%s: %q, want %q", what, got, *want)
	}
}

func checkIDs(t *testing.T, what string, want *[]string, got []identity.ID) {
	t.Helper()
	if want == nil {
		return
	}
	var ids []string
	for _, id := range got {
		ids = append(ids, id.String())
	}
	if !slices.Equal(*want, ids) {
		t.Errorf("%s: %q, want %q", what, ids, *want)
	}
}

func goes(d route.Decision) string {
	if d.Passthrough() {
		return "passthrough"
	}
	return d.Protocol.String()
}

func addrText(a netip.AddrPort) string {
	if !a.Addr().IsValid() {
		return "invalid:" + strconv.Itoa(int(a.Port()))
	}
	return a.String()
}

func workloadName(w *state.Workload) string {
	if w == nil {
		return "none"
	}
	return w.Name
}

func serviceName(s *state.Service) string {
	if s == nil {
		return "none"
	}
	return s.Hostname
}

// enumerate calls f once for every combination of random choices. What f
// returns is called with the combination's probability.
func enumerate(t testing.TB, f func(rand func(n uint64) uint64) func(p *big.Rat)) {
	type choice struct{ value, n uint64 }
	var path []choice
	for runs := 0; ; runs++ {
		if runs > 100_000 {
			t.Fatal("too many combinations")
		}
		depth := 0
		done := f(func(n uint64) uint64 {
			if n == 0 {
				t.Fatal("asked for a number below 0")
			}
			if depth == len(path) {
				path = append(path, choice{0, n})
			}
			c := path[depth]
			if c.n != n {
				t.Fatalf("not repeatable: %d choices, then %d", c.n, n)
			}
			depth++
			return c.value
		})
		p := big.NewRat(1, 1)
		for _, c := range path {
			p.Mul(p, big.NewRat(1, int64(c.n)))
		}
		done(p)
		for len(path) > 0 && path[len(path)-1].value+1 == path[len(path)-1].n {
			path = path[:len(path)-1]
		}
		if len(path) == 0 {
			return
		}
		path[len(path)-1].value++
	}
}

func add(m map[string]*big.Rat, key string, p *big.Rat) {
	if m[key] == nil {
		m[key] = new(big.Rat)
	}
	m[key].Add(m[key], p)
}
