package xds

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

func parse(t *testing.T, text string) *Local {
	t.Helper()
	l, err := ParseLocal([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Every key of the schema.
func TestSchema(t *testing.T) {
	data, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got := parse(t, string(data))
	pfx, ip := netip.MustParsePrefix, netip.MustParseAddr
	gw := &state.GatewayAddress{Addr: state.NetworkAddress{Network: "edge", Addr: ip("10.9.0.9")}, Port: 15009}
	wp := &state.GatewayAddress{Host: state.ServiceKey{Namespace: "shop", Hostname: "wp.svc"}, Port: 15008}
	want := &Local{
		Workloads: []*state.Workload{{
			UID: "dev//Pod/shop/stock-1", Name: "stock-1", Namespace: "shop", TrustDomain: "cluster.local",
			ServiceAccount: "stock",
			Network:        "edge", WorkloadName: "stock", WorkloadType: "job", CanonicalName: "stock", CanonicalRevision: "1",
			Hostname: "stock.example.com", Node: "node-b", ClusterID: "dev", Locality: state.Locality{Region: "r1", Zone: "z1"},
			Addresses: []netip.Addr{ip("10.9.0.3"), ip("fd00:9::3")},
			Services: []state.WorkloadService{{
				Service: state.ServiceKey{Namespace: "shop", Hostname: "stock.svc"},
				Ports:   state.PortMap{{Service: 80, Target: 8080}, {Service: 443, Target: 8443}},
			}},
			AuthorizationPolicies: []string{"shop/front-only"}, Waypoint: wp, NetworkGateway: gw, Capacity: 3,
			MeshAddresses: []netip.AddrPort{netip.MustParseAddrPort("10.9.0.7:15018"),
				netip.MustParseAddrPort("[fd00:9::7]:15019")},
			Tunnel:   state.ApplicationTunnel{Protocol: state.TunnelProxy, Port: 15088},
			Protocol: state.HBONE, NetworkMode: state.HostNetwork, Status: state.Unhealthy, NativeTunnel: true, Unlisted: true,
		}, {
			Namespace: "shop", Capacity: 1, Unlisted: true,
		}},
		Services: []*state.Service{{
			Name: "stock", Namespace: "shop", Hostname: "stock.svc",
			VIPs:              []state.NetworkAddress{{Addr: ip("10.200.0.7")}, {Network: "edge", Addr: ip("fd00::8")}},
			CIDRVIPs:          []state.NetworkPrefix{{Prefix: pfx("10.201.0.0/24")}},
			Ports:             state.PortMap{{Service: 80, Target: 0}, {Service: 443, Target: 8443}},
			SubjectAltNames:   []string{"spiffe://cluster.local/ns/shop/sa/stock"},
			Waypoint:          gw,
			WeightedWaypoints: []state.WeightedWaypoint{{Destination: *wp, Weight: 90}},
			LoadBalancer: &state.LoadBalancer{Mode: state.LBFailover, HealthPolicy: state.AllowAll,
				Preferences: []state.Scope{state.ScopeNetwork, state.ScopeRegion, state.ScopeZone, state.ScopeSubzone,
					state.ScopeNode, state.ScopeCluster}},
			IPFamilies: state.FamiliesIPv4, Canonical: true, Visibility: state.NamespaceOnly,
			Endpoints: []state.Endpoint{{UID: "other", Ports: state.PortMap{{Service: 80, Target: 81}}, Status: state.Healthy}},
		}},
		Policies: []*rbac.Policy{{
			Key: "shop/front-only", Name: "front-only", Namespace: "shop", Scope: rbac.ScopeWorkloadSelector, Action: rbac.Allow,
			DryRun: true,
			Rules: []rbac.Rule{{
				{{
					Namespaces: []rbac.StringMatch{{Kind: rbac.Exact, Value: "a"}, {Kind: rbac.Prefix, Value: "b"},
						{Kind: rbac.Suffix, Value: "c"}, {Kind: rbac.Presence}},
					NotNamespaces:     []rbac.StringMatch{{Kind: rbac.Exact, Value: "1"}},
					Principals:        []rbac.StringMatch{{Kind: rbac.Exact, Value: "cluster.local/ns/shop/sa/front"}},
					NotPrincipals:     []rbac.StringMatch{{Kind: rbac.Presence}},
					SourceIPs:         []netip.Prefix{pfx("10.0.0.0/8")},
					NotSourceIPs:      []netip.Prefix{pfx("10.0.0.1/32")},
					DestinationIPs:    []netip.Prefix{pfx("fd00::/8")},
					NotDestinationIPs: []netip.Prefix{pfx("fd00::1/64")},
				}},
				{{DestinationPorts: []uint16{8080}}, {NotDestinationPorts: []uint16{1}},
					{ServiceAccounts: []rbac.ServiceAccount{{Namespace: "shop", Name: "front"}},
						NotServiceAccounts: []rbac.ServiceAccount{{Namespace: "shop", Name: "back"}}}, {}},
			}, {}},
		}},
	}
	opts := cmp.Options{cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(state.Service{}, rbac.Policy{}),
		cmp.Comparer(func(a, b netip.Addr) bool {
			return a == b
		}), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	// The same from JSON: what we dump can be read back.
	var first, second bytes.Buffer
	if err := WriteStatic(&first, got); err != nil {
		t.Fatal(err)
	}
	again := parse(t, first.String())
	if diff := cmp.Diff(want, again, opts); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	if err := WriteStatic(&second, again); err != nil || first.String() != second.String() {
		t.Errorf("written again: %v\n%s", err, cmp.Diff(first.String(), second.String()))
	}
	golden(t, "testdata/full.json", first.Bytes())
}

// golden compares with a file; UPDATE_GOLDEN=1 writes it.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-file +got), UPDATE_GOLDEN=1 rewrites it:\n%s", file, diff)
	}
}

func TestEmptyFile(t *testing.T) {
	l := parse(t, "{}")
	if len(l.Workloads)+len(l.Services)+len(l.Policies) != 0 {
		t.Errorf("%+v", l)
	}
	parse(t, "workloads:\nservices: []\npolicies: ~\n")
}

const (
	workloadHead = "workloads:\n- name: w\n  namespace: n\n  workloadIps: [10.0.0.1]\n  services: {}\n"
	serviceHead  = "services:\n- name: s\n  namespace: n\n  hostname: h\n  vips: []\n  ports: {}\n"
	policyHead   = "policies:\n- name: p\n  namespace: n\n  scope: Namespace\n  action: Deny\n  dryRun: false\n  " +
		"rules:\n  - - - "
)

func TestErrors(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"no content", "", `the file is empty ("{}" says that nothing exists)`},
		{"comments only", "# soon\n", `the file is empty ("{}" says that nothing exists)`},
		{"not YAML", "workloads:\n- {\n", "line 2: not YAML: did not find expected node content"},
		{"bad indentation deep in a block", workloadHead + "   node: x\n  protocol: HBONE\n",
			"line 6: not YAML: did not find expected key"},
		{"open quote", workloadHead + "  node: \"x\n  protocol: HBONE\n", "line 6: not YAML: found unexpected end of stream"},
		{"unknown alias", workloadHead + "  node: *x\n", "line 6: not YAML: unknown anchor 'x' referenced"},
		{"tab", "workloads:\n\t- x\n", "line 2: not YAML: found character that cannot start any token"},
		{"two documents", "{}\n---\n{}\n", "line 2: a second document starts here; only one is read"},
		{"not a map", "- a\n", "line 1: want a map, found a list"},
		{"unknown section", "{}\nfoo: 1", "line 2: not YAML: did not find expected <document start>"},
		{"unknown top key", "workload: []\n", `line 1: workload: unknown key; did you mean "workloads"?`},
		{"not a list", "workloads: {}\n", "line 1: workloads: want a list, found a map"},
		{"unknown key", workloadHead + "  waypiont: x\n",
			`line 6: workloads[0].waypiont: unknown key; did you mean "waypoint"?`},
		{"key twice", workloadHead + "  name: v\n", "line 6: workloads[0].name: given twice (first on line 2)"},
		{"missing keys", "workloads:\n- name: w\n",
			`line 2: workloads[0]: "namespace" is missing; line 2: workloads[0]: "workloadIps" is missing; line 2: workloads[0]: "services" is missing`},
		{"null for a required key", "workloads:\n- {namespace: n, workloadIps: ~, services: {}}\n",
			`line 2: workloads[0].workloadIps: needs a value`},
		{"null entry", "workloads:\n-\n", "line 2: workloads[0]: want a map, found nothing"},
		{"a number as name", workloadHead + "  node: 1\n",
			"line 6: workloads[0].node: want a string, found the number 1 (put it in quotes)"},
		{"a bool as name", workloadHead + "  node: true\n",
			"line 6: workloads[0].node: want a string, found true (put it in quotes)"},
		{"a list as name", workloadHead + "  node: []\n", "line 6: workloads[0].node: want a string, found a list"},
		{"a tag as name", workloadHead + "  node: !x y\n", `line 6: workloads[0].node: want a string, found !x "y"`},
		{"protocol", workloadHead + "  protocol: hbone\n",
			`line 6: workloads[0].protocol: want one of TCP, HBONE, found "hbone"`},
		{"null protocol", workloadHead + "  protocol:\n", `line 6: workloads[0].protocol: want a string, found nothing`},
		{"address", "workloads:\n- {namespace: n, workloadIps: [10.0.0.256], services: {}}\n",
			`line 2: workloads[0].workloadIps[0]: want an IP address, found "10.0.0.256"`},
		{"empty address", "workloads:\n- {namespace: n, workloadIps: [\"\"], services: {}}\n",
			`line 2: workloads[0].workloadIps[0]: want an IP address, found ""`},
		{"address with zone", "workloads:\n- {namespace: n, workloadIps: [fe80::1%eth0], services: {}}\n",
			`line 2: workloads[0].workloadIps[0]: want an IP address, found "fe80::1%eth0"`},
		{"service without slash", "workloads:\n- {namespace: n, workloadIps: [], services: {s: {}}}\n",
			`line 2: workloads[0].services.s: want namespace/hostname as key`},
		{"port name", "workloads:\n- {namespace: n, workloadIps: [], services: {n/s: {http: 80}}}\n",
			`line 2: workloads[0].services["n/s"].http: want a port number as key`},
		{"port range", "workloads:\n- {namespace: n, workloadIps: [], services: {n/s: {80: 65536}}}\n",
			`line 2: workloads[0].services["n/s"].80: want a number from 0 to 65535, found the number 65536`},
		{"port twice", "workloads:\n- {namespace: n, workloadIps: [], services: {n/s: {80: 1, 080: 2}}}\n",
			`line 2: workloads[0].services["n/s"]: a port is given twice`},
		{"capacity", workloadHead + "  capacity: -1\n",
			`line 6: workloads[0].capacity: want a number from 0 to 4294967295, found the number -1`},
		{"locality", workloadHead + "  locality: {region: r}\n",
			`line 6: workloads[0].locality: "zone" is missing; line 6: workloads[0].locality: "subzone" is missing`},
		{"gateway without port", workloadHead + "  waypoint: {destination: a/b}\n",
			`line 6: workloads[0].waypoint: "hboneMtlsPort" is missing`},
		{"gateway destination", workloadHead + "  waypoint: {destination: ab, hboneMtlsPort: 1}\n",
			`line 6: workloads[0].waypoint.destination: want network/ip or namespace/hostname, found "ab"`},
		{"tunnel", workloadHead + "  applicationTunnel: {port: 1}\n",
			`line 6: workloads[0].applicationTunnel: "protocol" is missing`},
		{"bool", workloadHead + "  nativeTunnel: yes\n",
			`line 6: workloads[0].nativeTunnel: want true or false, found "yes"`},
		{"uid twice", "workloads:\n- {uid: u, namespace: n, workloadIps: [], services: {}}\n- {uid: u, namespace: n, " +
			"workloadIps: [], services: {}}\n",
			`line 3: workloads[1]: uid "u" already used on line 2`},
		{"service twice", serviceHead + "- {name: t, namespace: n, hostname: h, vips: [], ports: {}}\n",
			`line 7: services[1]: namespace and hostname "n/h" already used on line 2`},
		{"service without ports", "services:\n- {name: s, namespace: n, hostname: h, vips: []}\n",
			`line 2: services[0]: "ports" is missing`},
		{"vip without network", "services:\n- {name: s, namespace: n, hostname: h, vips: [10.0.0.1], ports: {}}\n",
			`line 2: services[0].vips[0]: want network/ip (/10.0.0.1 in the default network), found "10.0.0.1"`},
		{"cidr", serviceHead + "  cidrVips: [{network: \"\", cidr: 10.0.0.0/33}]\n",
			`line 7: services[0].cidrVips[0].cidr: want an address range like 10.0.0.0/8, found "10.0.0.0/33"`},
		{"half a balancer", serviceHead + "  loadBalancer: {mode: Strict}\n",
			`line 7: services[0].loadBalancer: "routingPreferences" is missing; line 7: services[0].loadBalancer: "healthPolicy" is missing`},
		{"scope of preference",
			serviceHead + "  loadBalancer: {mode: Strict, routingPreferences: [Rack], healthPolicy: AllowAll}\n",
			`line 7: services[0].loadBalancer.routingPreferences[0]: want one of Region, Zone, Subzone, Node, Cluster, Network, found "Rack"`},
		{"endpoint uid", serviceHead + "  endpoints: {u: {workloadUid: v, port: {}, status: Healthy}}\n",
			`line 7: services[0].endpoints.u.workloadUid: want the same uid as the key, "u"`},
		{"policy without dryRun", "policies:\n- {name: p, namespace: n, scope: Global, action: Deny, rules: []}\n",
			`line 2: policies[0]: "dryRun" is missing`},
		{"policy scope", "policies:\n- {name: p, namespace: n, scope: Mesh, action: Deny, rules: [], dryRun: false}\n",
			`line 2: policies[0].scope: want one of Global, Namespace, WorkloadSelector, found "Mesh"`},
		{"misspelt constraint", policyHead + "destinationPort: [1]\n",
			`line 8: policies[0].rules[0][0][0].destinationPort: unknown key; did you mean "destinationPorts"?`},
		{"misspelt account", policyHead + "serviceAccounts: [{namespace: a, serviceAcount: b}]\n",
			`line 8: policies[0].rules[0][0][0].serviceAccounts[0].serviceAcount: unknown key; did you mean "serviceAccount"?; line 8: policies[0].rules[0][0][0].serviceAccounts[0]: "serviceAccount" is missing`},
		{"plain string match", policyHead + "principals: [x]\n",
			`line 8: policies[0].rules[0][0][0].principals[0]: want !Exact x, !Prefix x, !Suffix x or !Presence [], found "x"`},
		{"unknown tag", policyHead + "principals: [!Regex x]\n",
			`line 8: policies[0].rules[0][0][0].principals[0]: want !Exact x, !Prefix x, !Suffix x or !Presence [], found !Regex "x"`},
		{"unknown kind", policyHead + "principals: [{Regex: x}]\n",
			`line 8: policies[0].rules[0][0][0].principals[0].Regex: unknown key; a string match has Exact, Prefix, Presence, Suffix`},
		{"two kinds", policyHead + "principals: [{Exact: x, Prefix: y}]\n",
			`line 8: policies[0].rules[0][0][0].principals[0]: want !Exact x, !Prefix x, !Suffix x or !Presence [], found a map`},
		{"presence of something", policyHead + "principals: [!Presence x]\n",
			`line 8: policies[0].rules[0][0][0].principals[0]: Presence takes no value: !Presence []`},
		{"exactly a list", policyHead + "principals: [!Exact [x]]\n",
			`line 8: policies[0].rules[0][0][0].principals[0]: want a string after !Exact`},
		{"exactly nothing", policyHead + "principals: [{Exact: }]\n",
			`line 8: policies[0].rules[0][0][0].principals[0].Exact: needs a value`},
		{"range in policy", policyHead + "sourceIps: [10.0.0.1]\n",
			`line 8: policies[0].rules[0][0][0].sourceIps[0]: want an address range like 10.0.0.0/8, found "10.0.0.1"`},
		{"null match", policyHead + "\n",
			`line 8: policies[0].rules[0][0][0]: want a map, found nothing ({} is a match without conditions, which never holds)`},
		{"null port", policyHead + "destinationPorts: [~]\n",
			`line 8: policies[0].rules[0][0][0].destinationPorts[0]: want a port number, found nothing`},
		{"merge key", workloadHead + "  <<: {node: x}\n",
			`line 6: workloads[0].<<: unknown key; a workload has applicationTunnel, authorizationPolicies, canonicalName, canonicalRevision, capacity, clusterId, hostname, ` +
				`locality, meshAddresses, name, namespace, nativeTunnel, network, networkGateway, networkMode, node, protocol, serviceAccount, services, status, trustDomain, uid, ` +
				`waypoint, workloadIps, workloadName, workloadType`},
	} {
		l, err := ParseLocal([]byte(tt.text))
		if err == nil {
			t.Errorf("%s: no error, %+v", tt.name, l)
		} else if err.Error() != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, err, tt.want)
		}
	}
}

// At most maxProblems are reported, and the rest of the file is still read.
func TestManyErrors(t *testing.T) {
	_, err := ParseLocal([]byte("workloads:\n" + strings.Repeat("- {}\n", 100)))
	fe, ok := err.(*FileError)
	if !ok || len(fe.Problems) != maxProblems {
		t.Errorf("%v", err)
	}
}

// Aliases work, but do not multiply without bound.
func TestAliases(t *testing.T) {
	l := parse(t, "workloads:\n- {uid: a, namespace: &ns shop, workloadIps: &ips [10.0.0.1], services: {}}\n- {uid: b, "+
		"namespace: *ns, workloadIps: *ips, services: {}}\n")
	if l.Workloads[1].Namespace != "shop" || len(l.Workloads[1].Addresses) != 1 {
		t.Errorf("%+v", l.Workloads[1])
	}
	bomb := "policies:\n- name: p\n  namespace: n\n  scope: Global\n  action: Deny\n  dryRun: false\n  rules:\n" +
		"  - &r\n    - &c\n      - &m {principals: &l [" + strings.Repeat("!Exact x,", 300) + "]}\n" +
		strings.Repeat("      - *m\n", 300) + strings.Repeat("    - *c\n", 300) + strings.Repeat("  - *r\n", 300)
	_, err := ParseLocal([]byte(bomb))
	if err == nil || !strings.Contains(err.Error(), "aliases") {
		t.Errorf("%v", err)
	}
}

func FuzzParseLocal(f *testing.F) {
	for _, pattern := range []string{"testdata/*.yaml", "testdata/full.json", "../../proxy/route/testdata/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := ParseLocal(data)
		if err != nil {
			if _, ok := err.(*FileError); !ok {
				t.Fatalf("%T %v", err, err)
			}
			if s := err.Error(); s == "" || len(s) > 100_000 {
				t.Fatalf("an error of %d bytes", len(s))
			}
			return
		}
		// Whatever was accepted can be used, dumped, and read back the same.
		v := l.View("")
		var b bytes.Buffer
		for _, write := range []error{WriteWorkloads(&b, v), WriteServices(&b, v), WritePolicies(&b, v), WriteStaged(&b, v)} {
			if write != nil {
				t.Fatal(write)
			}
		}
		var first, second bytes.Buffer
		if err := WriteStatic(&first, l); err != nil {
			t.Fatal(err)
		}
		again, err := ParseLocal(first.Bytes())
		if err != nil {
			t.Fatalf("%v\n%s", err, first.Bytes())
		}
		if err := WriteStatic(&second, again); err != nil || !bytes.Equal(first.Bytes(), second.Bytes()) {
			t.Fatalf("%v: -first +second\n%s", err, cmp.Diff(first.String(), second.String()))
		}
	})
}

// TestEveryRuneSurvives: a name with any character at all is dumped and read back the same.
func TestEveryRuneSurvives(t *testing.T) {
	var names []string
	for r := rune(0); r <= 0x10010; r++ {
		if r > 0x300 && r < 0x2000 || r > 0x2100 && r < 0xfe00 { // letters, surrogates
			continue
		}
		names = append(names, "a "+string(r)+" "+string(r)+string(r)+"b")
	}
	l := &Local{}
	for i, n := range names {
		l.Workloads = append(l.Workloads, &state.Workload{UID: fmt.Sprint(i), Name: n, Namespace: "n", Capacity: 1})
	}
	var b bytes.Buffer
	if err := WriteStatic(&b, l); err != nil {
		t.Fatal(err)
	}
	if !json.Valid(b.Bytes()) {
		t.Error("not JSON")
	}
	again, err := ParseLocal(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range again.Workloads {
		if w.Name != names[i] {
			t.Errorf("%q came back as %q", names[i], w.Name)
		}
	}
}
