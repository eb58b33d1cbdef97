package control

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/workloadpb"
	"ztun/proxy/identity"
	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// readDir reads files as a source would and prints the problems.
func readDir(t *testing.T, files map[string]string, limit int) (s *snapshot, errors, warnings string) {
	t.Helper()
	r := &reader{root: t.TempDir(), trustDomain: "cluster.local"}
	for name, text := range files {
		path := filepath.Join(r.root, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte(text), 0o644))
	}
	list, problems := r.read()
	s, e, w := build(list, nil, "cluster.local", limit, map[string]bool{"n": true})
	for _, p := range problems {
		p.Text = strings.ReplaceAll(p.Text, r.root, "ROOT")
		e.add(p)
	}
	return s, lines(e), lines(w)
}

func lines(r report) string {
	var l []string
	for _, p := range r.list {
		l = append(l, p.String())
	}
	return strings.Join(l, "\n")
}

const service = "services: [{name: s, namespace: ns, hostname: s.host, vips: [], ports: {}}]\n"

func TestProblems(t *testing.T) {
	for _, test := range []struct {
		name             string
		files            map[string]string
		errors, warnings string
	}{
		{"good", map[string]string{"a.yaml": "{}", "sub/b.yml": service, "sub/sub/c.json": `{"policies": []}`,
			"README.md": "no", ".hidden.yaml": "[", ".git/x.yaml": "["}, "", ""},
		{"nothing", map[string]string{"README.md": "no"},
			`no *.yaml, *.yml or *.json file in ROOT (a file with "{}" in it says that nothing exists)`, ""},
		{"every file is checked", map[string]string{"a.yaml": "workloads:\n- {uid: u}\n", "b/b.yaml": "services: x",
			"c.yaml": "", "d.yaml": "a: [\n"},
			"a.yaml:2: workloads[0]: \"namespace\" is missing\n" +
				"a.yaml:2: workloads[0]: \"workloadIps\" is missing\n" +
				"a.yaml:2: workloads[0]: \"services\" is missing\n" +
				"b/b.yaml:1: services: want a list, found \"x\"\n" +
				"c.yaml: the file is empty (\"{}\" says that nothing exists)\n" +
				"d.yaml:1: not YAML: did not find expected node content", ""},
		{"repeated over files", map[string]string{
			"a.yaml": workloadsYAML("x:10.0.0.1:n", "y:10.0.0.2:n") + service +
				"policies:\n- {name: p, namespace: ns, scope: Global, action: Allow, dryRun: false, rules: []}\n",
			"b.yaml": "\n" + service + "policies:\n\n- {name: p, namespace: ns, scope: Global, action: Deny, dryRun: false, " +
				"rules: []}\n" + workloadsYAML("z:10.0.0.1:n", "y:10.0.0.2:n")},
			"b.yaml:8: workloads[1]: workload \"u/y\" is already in a.yaml:3\n" +
				"b.yaml:2: services[0]: service \"ns/s.host\" is already in a.yaml:4\n" +
				"b.yaml:5: policies[0]: policy \"ns/p\" is already in a.yaml:6", ""},
		{"a workload named as a service",
			map[string]string{"a.yaml": service + strings.ReplaceAll(workloadsYAML("x:10.0.0.1:n"), "u/x", "ns/s.host")},
			`a.yaml:1: services[0]: service "ns/s.host" is already in a.yaml:3`, ""},
		{"nameless", map[string]string{"a.yaml": "workloads:\n- {namespace: ns, workloadIps: [], services: {}}\n" +
			"services:\n- {name: s, namespace: n/s, hostname: h, vips: [], ports: {}}\n- {name: s, namespace: n, hostname: " +
			"'', vips: [], ports: {}}\n" +
			"policies:\n- {name: '', namespace: ns, scope: Global, action: Allow, dryRun: false, rules: []}\n"},
			"a.yaml:2: workloads[0].uid: is missing: it is the workload's name for the nodes, like " +
				"\"cluster//Pod/namespace/name\"\n" +
				"a.yaml:4: services[0]: namespace \"n/s\" and hostname \"h\": want a hostname, and no slash in either\n" +
				"a.yaml:5: services[1]: namespace \"n\" and hostname \"\": want a hostname, and no slash in either\n" +
				"a.yaml:7: policies[0].name: is missing", ""},
		{"too large for a message", map[string]string{"a.yaml": strings.ReplaceAll(workloadsYAML("x:10.0.0.1:n"), "name: x",
			"name: "+strings.Repeat("x", 5000))},
			`a.yaml:2: workloads[0]: takes 5176 bytes on the wire, more than the 4096 of one message`, ""},
		{"references to nothing", map[string]string{"a.yaml": `
workloads:
- {uid: u, namespace: ns, workloadIps: [], hostname: gw.host, services: {ns/gone.host: {}}}
- uid: v
  namespace: ns
  trustDomain: other
  workloadType: replicaset
  workloadIps: []
  services: {}
  authorizationPolicies: [ns/gone, ns/all]
  waypoint: {destination: ns/wp.host, hboneMtlsPort: 1}
  networkGateway: {destination: ns/gw.host, hboneMtlsPort: 1}
services:
- name: s
  namespace: ns
  hostname: s.host
  vips: []
  ports: {}
  waypoint: {destination: /10.0.0.1, hboneMtlsPort: 1}
  weightedWaypoints: [{destination: {destination: ns/wp2.host, hboneMtlsPort: 1}, weight: 1}]
  endpoints: {gone: {workloadUid: gone, port: {}, status: Healthy}}
policies:
- {name: all, namespace: ns, scope: Global, action: Allow, dryRun: false, rules: []}
`}, "",
			`a.yaml:3: workloads[0].services: there is no service "ns/gone.host"
a.yaml:4: workloads[1].trustDomain: "other" is not the CA's "cluster.local": v gets no certificate
a.yaml:4: workloads[1].workloadType: "replicaset" is not one of deployment, cronjob, pod, job: sent as deployment
a.yaml:4: workloads[1].authorizationPolicies: there is no policy "ns/gone": nodes hold connections to v for a while and then decide without it, or refuse them with ZTUN_UNKNOWN_POLICY=deny
a.yaml:4: workloads[1].authorizationPolicies: policy "ns/all" is not of scope WorkloadSelector
a.yaml:4: workloads[1].waypoint: there is no service or workload "ns/wp.host"
a.yaml:14: services[0].weightedWaypoints: there is no service or workload "ns/wp2.host"
a.yaml:14: services[0].endpoints: there is no workload "gone": left out`},
		{"policies without effect", map[string]string{"a.yaml": `
workloads:
- {uid: u, namespace: ns, workloadIps: [], services: {}, authorizationPolicies: [ns/used]}
policies:
- {name: used, namespace: ns, scope: WorkloadSelector, action: Allow, dryRun: false, rules: []}
- {name: unused, namespace: ns, scope: WorkloadSelector, action: Deny, dryRun: false, rules: []}
- {name: all, namespace: ns, scope: Namespace, action: Deny, dryRun: false, rules: []}
- name: p
  namespace: ns
  scope: Global
  action: Deny
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/ns/sa/x, !Exact "spiffe://cluster.local/ns/ns/sa/x", !Prefix cluster.local/ns/n, !Presence []]
    - - notPrincipals: [!Exact ns/x, !Suffix /sa/x]
`}, "",
			`a.yaml:6: policies[1]: no workload lists "ns/unused" in its authorizationPolicies: a policy of scope WorkloadSelector has no effect then
a.yaml:8: policies[3].rules[0][0][0].principals: "spiffe://cluster.local/ns/ns/sa/x" can never match: principals are compared without "spiffe://": want TRUSTDOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT
a.yaml:8: policies[3].rules[0][1][0].notPrincipals: "ns/x" can never match: want TRUSTDOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT`},
		{"mesh addresses of two", map[string]string{"a.yaml": `
workloads:
- {uid: v, namespace: ns, workloadIps: [10.0.0.1], protocol: HBONE, meshAddresses: ["192.0.2.7:15018", "[fd00::7]:15018"], services: {}}
- {uid: w, namespace: ns, workloadIps: [10.0.0.2], protocol: HBONE, meshAddresses: ["192.0.2.7:15019", "[fd00::7]:15018"], services: {}}
- {uid: x, namespace: ns, workloadIps: [10.0.0.3], protocol: HBONE, network: other, meshAddresses: ["192.0.2.7:15018"], services: {}}
- {uid: y, namespace: ns, workloadIps: [10.0.0.4], protocol: TCP, meshAddresses: ["192.0.2.7:15018"], services: {}}
`}, "",
			`a.yaml:4: workloads[1].meshAddresses: [fd00::7]:15018 is workload "v"'s as well, in a.yaml:3: only one of the two can listen there, unless it is on the loopback of two hosts`},
		{"addresses of two", map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:n", "y:10.0.0.2:n"), "b.yaml": `
workloads:
- {uid: v, namespace: ns, workloadIps: [10.0.0.2, 10.0.0.3], services: {}}
- {uid: w, namespace: ns, network: other, workloadIps: [10.0.0.3], services: {}}
- {uid: h1, namespace: ns, networkMode: HostNetwork, workloadIps: [10.9.0.1], services: {}}
- {uid: h2, namespace: ns, networkMode: HostNetwork, workloadIps: [10.9.0.1], services: {}}
services:
- {name: s, namespace: ns, hostname: s.host, vips: [/10.0.0.3, /10.1.0.1], ports: {}}
- {name: t, namespace: ns, hostname: t.host, vips: [/10.1.0.1, other/10.1.0.1], ports: {}}
`}, "",
			`b.yaml:3: workloads[0].workloadIps: /10.0.0.2 is workload "u/y"'s as well, in a.yaml:3: nodes take it for one of the two
b.yaml:8: services[0].vips: /10.0.0.3 is workload "v"'s as well, in b.yaml:3: nodes take it for one of the two
b.yaml:9: services[1].vips: /10.1.0.1 is service "ns/s.host"'s as well, in b.yaml:8: nodes take it for one of the two`},
		{"unknown nodes", map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:n", "y:10.0.0.2:typo")}, "",
			`a.yaml:3: workloads[1].node: no node "typo" has joined: nobody serves u/y or gets its certificate`},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, errors, warnings := readDir(t, test.files, 4096)
			equal(t, "errors", "\n"+errors, "\n"+test.errors)
			equal(t, "warnings", "\n"+warnings, "\n"+test.warnings)
			if test.name != "nothing" { // the directory's own problems do not keep build from building
				equal(t, "a snapshot", s != nil, test.errors == "")
			}
		})
	}
}

// TestNeverPrincipal holds what check says of a pattern to what the policy engine does with it.
func TestNeverPrincipal(t *testing.T) {
	var ids []identity.ID
	for _, text := range []string{"cluster.local/ns/shop/sa/front", "a/ns/b/sa/c", "ns/ns/sa/sa/ns", "x.y/ns/sa/sa/sa"} {
		id, err := identity.Parse("spiffe://" + text)
		check(t, err)
		ids = append(ids, id)
	}
	matches := func(m rbac.StringMatch) bool {
		p := &rbac.Policy{Key: "ns/p", Name: "p", Namespace: "ns", Action: rbac.Deny,
			Rules: []rbac.Rule{{{{Principals: []rbac.StringMatch{m}}}}}}
		for _, id := range ids {
			if !rbac.Evaluate([]*rbac.Policy{p}, rbac.Question{ID: id, HasID: true}).Allowed {
				return true
			}
		}
		return false
	}
	for _, kind := range []rbac.StringKind{rbac.Exact, rbac.Prefix, rbac.Suffix, rbac.Presence} {
		for _, id := range ids {
			text := strings.TrimPrefix(id.String(), "spiffe://")
			for i := range len(text) + 1 {
				for j := i; j <= len(text); j++ {
					m := rbac.StringMatch{Kind: kind, Value: text[i:j]}
					if why := neverPrincipal(m); why != "" && matches(m) {
						t.Fatalf("%v %q matches, and check says: %s", kind, m.Value, why)
					}
				}
			}
		}
	}
	for _, m := range []rbac.StringMatch{
		{Kind: rbac.Exact, Value: "shop/front"}, {Kind: rbac.Exact, Value: "cluster.local/ns/shop"},
		{Kind: rbac.Exact, Value: "cluster.local/ns/shop/sa/"},
		{Kind: rbac.Exact, Value: "cluster.local/ns/shop/sa/front/x"},
		{Kind: rbac.Exact, Value: "cluster.local/sa/shop/ns/front"}, {Kind: rbac.Exact, Value: "*"},
		{Kind: rbac.Prefix, Value: "spiffe://"}, {Kind: rbac.Prefix, Value: "cluster.local/shop"},
		{Kind: rbac.Prefix, Value: "/ns/"}, {Kind: rbac.Prefix, Value: "a/ns/b/sb"},
		{Kind: rbac.Suffix, Value: "shop/front"}, {Kind: rbac.Suffix, Value: "/sa/"},
		{Kind: rbac.Suffix, Value: "x/b/sa/front"},
	} {
		if why := neverPrincipal(m); why == "" || matches(m) {
			t.Errorf("%v %q: %q", m.Kind, m.Value, why)
		}
	}
}

func TestManyProblems(t *testing.T) {
	var specs []string
	for i := range 500 {
		specs = append(specs, fmt.Sprintf("w%d:10.0.0.1:n", i))
	}
	r := &reader{root: t.TempDir(), trustDomain: "cluster.local"}
	for _, name := range []string{"a.yaml", "b.yaml"} {
		check(t, os.WriteFile(filepath.Join(r.root, name), []byte(workloadsYAML(specs...)), 0o644))
	}
	files, _ := r.read()
	_, errs, _ := build(files, nil, "", 1<<20, nil)
	equal(t, "counted", errs.count, 500)
	equal(t, "listed", len(errs.list), maxReported)
	equal(t, "the last of them", errs.list[99].String(),
		`b.yaml:101: workloads[99]: workload "u/w99" is already in a.yaml:101`)
}

// Endpoints that a service is given become entries of the workloads.
func TestGivenEndpoints(t *testing.T) {
	const text = `
workloads:
- {uid: u, namespace: ns, workloadIps: [], services: {}}
- {uid: own, namespace: ns, workloadIps: [], services: {ns/s.host: {80: 1111}}}
- {uid: sick, namespace: ns, workloadIps: [], services: {}, status: Unhealthy}
services:
- name: s
  namespace: ns
  hostname: s.host
  vips: []
  ports: {80: 8080}
  endpoints:
    u: {workloadUid: u, port: {80: 9090}, status: Healthy}
    own: {workloadUid: own, port: {80: 2222}, status: Healthy}
    sick: {workloadUid: sick, port: {80: 3}, status: Healthy}
- {name: t, namespace: ns, hostname: t.host, vips: [], ports: {}, endpoints: {u: {workloadUid: u, port: {}, status: Unhealthy}}}
- {name: a, namespace: ns, hostname: a.host, vips: [], ports: {}, loadBalancer: {mode: Standard, routingPreferences: [], healthPolicy: AllowAll}, endpoints: {u: {workloadUid: u, port: {}, status: Unhealthy}}}
`
	s, errors, warnings := readDir(t, map[string]string{"a.yaml": text}, 1<<20)
	equal(t, "errors", errors, "")
	equal(t, "warnings", warnings, `a.yaml:7: services[0].endpoints: "sick" is Healthy here and Unhealthy as a workload: nodes go by the workload
a.yaml:16: services[1].endpoints: "u" is Unhealthy here and Healthy as a workload: left out
a.yaml:17: services[2].endpoints: "u" is Unhealthy here and Healthy as a workload: nodes go by the workload`)
	services := func(uid string) string {
		m := &workloadpb.Address{}
		check(t, proto.Unmarshal(s.addresses.get(uid).payload, m))
		var l []string
		for _, host := range []string{"ns/a.host", "ns/s.host", "ns/t.host"} {
			if e, ok := m.GetWorkload().Services[host]; ok {
				l = append(l, fmt.Sprint(host, e.GetPorts()))
			}
		}
		return strings.ReplaceAll(strings.Join(l, " "), "  ", " ")
	}
	equal(t, "u", services("u"), "ns/a.host[] ns/s.host[service_port:80 target_port:9090]")
	equal(t, "own", services("own"), "ns/s.host[service_port:80 target_port:1111]")
	equal(t, "sick", services("sick"), "ns/s.host[service_port:80 target_port:3]")
	// The index by service knows them too.
	equal(t, "asked for", len(s.withBackers(s.resolve(typeAddress, "ns/s.host"))), 4)
}

// One changed workload of 20,000 leaves all shards but one as they are; an equal directory is the same snapshot.
func TestSharing(t *testing.T) {
	f := fromLocal(t, "crowd", crowd(20_000))
	one := fromLocal(t, "one", parse(t, workloadsYAML("x:10.0.0.1:n")))
	s1 := snapshotOf(t, nil, f, one)
	equal(t, "workloads", s1.workloads, 20_001)
	equal(t, "services", s1.services, 2000)
	again := fromLocal(t, "one", parse(t, workloadsYAML("x:10.0.0.1:n")))
	equal(t, "the same snapshot", snapshotOf(t, s1, f, again), s1)
	s2 := snapshotOf(t, s1, f, fromLocal(t, "one", parse(t, workloadsYAML("x:10.0.0.2:n"))))
	equal(t, "version", s2.version, 2)
	differ := 0
	for i := range s1.addresses.shards {
		if s1.addresses.shards[i] != s2.addresses.shards[i] {
			differ++
		}
	}
	equal(t, "different shards", differ, 1)
	equal(t, "policies", s1.policies.shards == s2.policies.shards, true)
}

// Only changed files are read again, and one that changes back is what it was.
func TestReaderKeeps(t *testing.T) {
	r := &reader{root: t.TempDir(), trustDomain: "cluster.local"}
	a, b := filepath.Join(r.root, "a.yaml"), filepath.Join(r.root, "b.yaml")
	check(t, os.WriteFile(a, []byte(workloadsYAML("x:10.0.0.1:n")), 0o644))
	check(t, os.WriteFile(b, []byte("{}"), 0o644))
	old := time.Now().Add(-time.Hour)
	check(t, os.Chtimes(a, old, old))
	first, _ := r.read()
	check(t, os.WriteFile(b, []byte(service), 0o644))
	second, _ := r.read()
	equal(t, "a is kept", second[0], first[0])
	equal(t, "b is not", second[1] != first[1], true)
	check(t, os.Chtimes(a, old.Add(time.Minute), old.Add(time.Minute))) // touched only
	third, _ := r.read()
	equal(t, "a is kept", third[0], first[0])
	equal(t, "b is kept", third[1], second[1])
	// A link into a hidden directory, as Kubernetes mounts volumes.
	check(t, os.Mkdir(filepath.Join(r.root, "..data"), 0o755))
	check(t, os.Rename(a, filepath.Join(r.root, "..data", "a.yaml")))
	check(t, os.Symlink(filepath.Join("..data", "a.yaml"), a))
	linked, problems := r.read()
	equal(t, "files", len(linked), 2)
	equal(t, "problems", len(problems), 0)
	check(t, os.Remove(filepath.Join(r.root, "..data", "a.yaml")))
	_, problems = r.read()
	equal(t, "a broken link", fmt.Sprint(problems), "[a.yaml: no such file or directory]")
	// The directory itself may be a link, and lead somewhere else later.
	other := t.TempDir()
	check(t, os.WriteFile(filepath.Join(other, "o.yaml"), []byte("{}"), 0o644))
	link := filepath.Join(t.TempDir(), "mesh")
	check(t, os.Symlink(r.root, link))
	l := &reader{root: link, trustDomain: "cluster.local"}
	linked, _ = l.read()
	equal(t, "first", linked[0].path, "b.yaml")
	check(t, os.Remove(link))
	check(t, os.Symlink(other, link))
	linked, problems = l.read()
	equal(t, "then", fmt.Sprint(len(linked), linked[0].path, problems), "1o.yaml[]")
}

func TestRunsOnNode(t *testing.T) {
	s, _, _ := readDir(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b") +
		"- {uid: nowhere, namespace: ns, serviceAccount: free, workloadIps: [], services: {}}\n"}, 1<<20)
	id := func(sa string) bool {
		return s.runs("node-a", (&state.Workload{TrustDomain: "cluster.local", Namespace: "ns", ServiceAccount: sa}).
			Identity())
	}
	equal(t, "own", id("sa-x"), true)
	equal(t, "another node's", id("sa-y"), false)
	equal(t, "of no node", id("free"), false)
	equal(t, "of nobody", id("nobody"), false)
	equal(t, "of a node without workloads",
		s.runs("", (&state.Workload{TrustDomain: "cluster.local", Namespace: "ns", ServiceAccount: "free"}).Identity()),
		false)
}
