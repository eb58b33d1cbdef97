package xds

import (
	"flag"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var updatePage = flag.Bool("update-page", false, "write docs/mesh-files.md anew")

// within says where in a file a map of each kind stands, in flow style.
var within = map[string]string{
	"file":               `%s`,
	"workload":           `{workloads: [%s]}`,
	"locality":           `{workloads: [{namespace: n, workloadIps: [], services: {}, locality: %s}]}`,
	"application tunnel": `{workloads: [{namespace: n, workloadIps: [], services: {}, applicationTunnel: %s}]}`,
	"gateway":            `{workloads: [{namespace: n, workloadIps: [], services: {}, waypoint: %s}]}`,
	"service":            `{services: [%s]}`,
	"address range":      `{services: [{name: s, namespace: n, hostname: h, vips: [], ports: {}, cidrVips: [%s]}]}`,
	"endpoint":           `{services: [{name: s, namespace: n, hostname: h, vips: [], ports: {}, endpoints: {demo//v1/Pod/shop/stock-1: %s}}]}`,
	"weighted waypoint":  `{services: [{name: s, namespace: n, hostname: h, vips: [], ports: {}, weightedWaypoints: [%s]}]}`,
	"load balancer":      `{services: [{name: s, namespace: n, hostname: h, vips: [], ports: {}, loadBalancer: %s}]}`,
	"policy":             `{policies: [%s]}`,
	"match":              `{policies: [{name: p, namespace: n, scope: Global, action: Deny, dryRun: false, rules: [[[%s]]]}]}`,
	"service account":    `{policies: [{name: p, namespace: n, scope: Global, action: Deny, dryRun: false, rules: [[[{serviceAccounts: [%s]}]]]}]}`,
	"string match":       `{policies: [{name: p, namespace: n, scope: Global, action: Deny, dryRun: false, rules: [[[{principals: [%s]}]]]}]}`,
}

// written makes a file with one map of the given kind, in which the keys have the given values.
func written(o *Object, keys []string, value map[string]string) string {
	parts := make([]string, len(keys))
	for i, k := range keys {
		parts[i] = k + ": " + value[k]
	}
	return fmt.Sprintf(within[o.Name], "{"+strings.Join(parts, ", ")+"}")
}

// The schema says what the reader does: each key is taken with its example, which means something; without a key that
// is required there is an error, without another one what its default says; and where there are but some values,
// those are it.
func TestSchemaIsTheReaders(t *testing.T) {
	all := schema()
	if len(all) != len(within) {
		t.Fatalf("%d kinds of maps, %d tested", len(all), len(within))
	}
	for _, o := range all {
		example := map[string]string{}
		for _, f := range o.Fields {
			example[f.Name] = f.Example
		}
		if o.Name == "string match" { // exactly one key
			seen := map[string]bool{}
			for _, f := range o.Fields {
				l := parse(t, written(o, []string{f.Name}, example))
				seen[fmt.Sprint(l.Policies[0].Rules)] = true
			}
			if len(seen) != 4 {
				t.Errorf("string matches: %v", seen)
			}
			continue
		}
		base := o.required()
		for _, f := range o.Fields {
			what := o.Name + "." + f.Name
			if f.Meaning == "" || f.Type == "" || f.Example == "" || f.Required != (f.Default == "") {
				t.Errorf("%s is not whole: %+v", what, f)
			}
			keys := base
			if f.Required {
				without := slices.DeleteFunc(slices.Clone(base), func(k string) bool { return k == f.Name })
				if _, err := ParseLocal([]byte(written(o, without, example))); err == nil ||
					!strings.Contains(err.Error(), fmt.Sprintf("%q is missing", f.Name)) {
					t.Errorf("%s is said to be required; without it: %v", what, err)
				}
			} else {
				keys = append(slices.Clone(base), f.Name)
				absent := parse(t, written(o, base, example))
				value := map[string]string{}
				for k, v := range example {
					value[k] = v
				}
				value[f.Name] = f.Default
				if l := parse(t, written(o, keys, value)); !reflect.DeepEqual(l, absent) {
					t.Errorf("%s: %s is not its default: %s", what, f.Default,
						cmp.Diff(absent, l, cmp.Exporter(func(reflect.Type) bool {
							return true
						})))
				}
				if l := parse(t, written(o, keys, example)); reflect.DeepEqual(l, absent) {
					t.Errorf("%s: its example %s changes nothing", what, f.Example)
				}
			}
			value := map[string]string{}
			for k, v := range example {
				value[k] = v
			}
			set := func(v string) string {
				if strings.HasPrefix(f.Type, "list") {
					v = "[" + v + "]"
				}
				value[f.Name] = v
				return written(o, keys, value)
			}
			for _, a := range f.Allowed {
				parse(t, set(a))
			}
			_, err := ParseLocal([]byte(set("no-such-value")))
			m := regexp.MustCompile(`want one of ([^"]*), found`).FindStringSubmatch(fmt.Sprint(err))
			var names []string
			if m != nil {
				names = strings.Split(m[1], ", ")
			}
			slices.Sort(names)
			if want := slices.Sorted(slices.Values(f.Allowed)); !slices.Equal(names, want) {
				t.Errorf("%s: the reader takes %q, the schema %q: %v", what, names, want, err)
			}
			// Misspelt it is not passed over.
			if wrong := strings.ToUpper(f.Name[:1]) + f.Name[1:]; !o.Loose {
				value[wrong] = f.Example
				_, err := ParseLocal([]byte(written(o, append(slices.Clone(base), wrong), value)))
				if want := fmt.Sprintf("unknown key; did you mean %q?", f.Name); err == nil ||
					!strings.Contains(err.Error(), want) {
					t.Errorf("%s as %s: %v, want %s", what, wrong, err, want)
				}
			}
		}
	}
}

// docs/mesh-files.md is what the reader's schema makes, and its examples are good.
func TestMeshFilesPage(t *testing.T) {
	const page = "../../docs/mesh-files.md"
	if *updatePage {
		if err := os.WriteFile(page, []byte(meshFilesPage()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(b), "\n"), strings.Split(meshFilesPage(), "\n")); diff != "" {
		t.Errorf("docs/mesh-files.md is not the schema; write it by -update-page (-page +schema):\n%s", diff)
	}
	examples := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(b), -1)
	if len(examples) < 4 {
		t.Errorf("%d examples", len(examples))
	}
	for _, e := range examples {
		parse(t, e[1])
	}
}

// meshFilesPage is docs/mesh-files.md.
func meshFilesPage() string {
	var b strings.Builder
	b.WriteString(meshFilesIntro)
	for _, o := range schema() {
		fmt.Fprintf(&b, "\n## %s\n\n%s", strings.ToUpper(o.Name[:1])+o.Name[1:], o.Meaning)
		if o.Loose {
			b.WriteString(" Unknown keys are passed over.")
		}
		b.WriteString("\n\n| key | value | default | example | meaning |\n|---|---|---|---|---|\n")
		for _, f := range o.Fields {
			def, value := "`"+f.Default+"`", f.Type
			switch {
			case f.Required:
				def = "**required**"
			case f.Default == "":
				def = ""
			}
			if len(f.Allowed) > 0 {
				value = "`" + strings.Join(f.Allowed, "`, `") + "`"
				if strings.HasPrefix(f.Type, "list") {
					value = "list of " + value
				}
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s | `%s` | %s |\n", f.Name, value, def, f.Example, f.Meaning)
		}
		if list := map[string]string{"workload": "workloads", "service": "services", "policy": "policies"}[o.Name]; list !=
			"" {
			fmt.Fprintf(&b, "\nWith every key:\n\n```yaml\n%s:\n", list)
			for i, f := range o.Fields {
				fmt.Fprintf(&b, "%s%s: %s\n", map[bool]string{true: "- ", false: "  "}[i == 0], f.Name, f.Example)
			}
			b.WriteString("```\n")
		}
	}
	return b.String()
}

const meshFilesIntro = `# The files of a mesh

Workloads, services and policies in YAML or JSON, in ztunnel's local schema. Two readers take it:

- ` + "`ztun control`" + ` reads every ` + "`*.yaml`, `*.yml` and `*.json`" + ` file below the directory ` + "`mesh`" + `, split as you like, and serves what they say together.
- ` + "`ztun proxy`" + ` reads the one file that ` + "`LOCAL_XDS_PATH`" + ` names, or the text of ` + "`LOCAL_XDS`" + `, with or without a control plane beside it.

Both follow changes. A file with a mistake changes nothing: what was good before stays in force, and the log, ` + "`ztun control check`" + ` and
` + "`ztun control status`" + ` say what is wrong, by file, line and key, and what may have been meant. ` + "`ztun control init DIR`" + ` writes an example to begin with.

This page is written by ` + "`go test ./admin/xds -run MeshFilesPage -update-page`" + ` from the table that the reader itself goes by.

` + "```yaml" + `
workloads:
- uid: demo//v1/Pod/shop/front-1       # pod front-1 on node n1
  name: front-1
  namespace: shop
  serviceAccount: front
  workloadIps: ["10.1.0.2"]
  protocol: HBONE
  node: n1
  services: {}
- uid: demo//v1/Pod/shop/stock-1       # pod stock-1 on node n2, behind a service, for front alone
  name: stock-1
  namespace: shop
  serviceAccount: stock
  workloadIps: ["10.2.0.2"]
  protocol: HBONE
  node: n2
  services: {"shop/stock.shop.svc.cluster.local": {80: 8080}}
  authorizationPolicies: ["shop/front-only"]
services:
- name: stock
  namespace: shop
  hostname: stock.shop.svc.cluster.local
  vips: ["/10.96.0.10"]
  ports: {80: 8080}
policies:
- name: front-only
  namespace: shop
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/shop/sa/front]   # one rule, one clause, one match
` + "```" + `

Strings that look like numbers or ` + "`true`" + ` need quotes. Ports are 0 to 65535. An absent optional key means its default.
`

// schema lists the maps of a workload file, the outermost first.
func schema() []*Object {
	return []*Object{
		&fileObject, &workloadObject, &localityObject, &tunnelObject, &gatewayObject, &serviceObject, &cidrObject,
		&endpointObject,
		&weightedObject, &balancerObject, &policyObject, &matchObject, &accountObject, &stringObject,
	}
}
