package control

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/securitypb"
	"ztun/admin/pb/workloadpb"
)

// fullYAML says everything that the schema knows.
const fullYAML = `
workloads:
- uid: c1//Pod/shop/stock-1
  name: stock-1
  namespace: shop
  trustDomain: td
  serviceAccount: stock
  network: edge
  workloadName: stock
  workloadType: job
  canonicalName: stock
  canonicalRevision: v2
  hostname: stock.example
  node: node-b
  clusterId: c1
  workloadIps: ["10.9.0.3", "fd00:9::3"]
  protocol: HBONE
  networkMode: Standard
  status: Unhealthy
  nativeTunnel: true
  capacity: 3
  applicationTunnel: {protocol: PROXY, port: 8081}
  locality: {region: r1, zone: z1, subzone: s1}
  authorizationPolicies: ["shop/front-only", "shop/other"]
  waypoint: {destination: "shop/wp.host", hboneMtlsPort: 15008}
  networkGateway: {destination: "edge/10.0.0.200", hboneMtlsPort: 15009}
  meshAddresses: ["192.0.2.7:15018", "[fd00:9::7]:15019"]
  services:
    "shop/stock.host": {80: 8080, 443: 8443}
    "shop/other.host": {}
- uid: plain
  namespace: shop
  workloadIps: []
  capacity: 0
  networkMode: HostNetwork
  applicationTunnel: {protocol: NONE}
  services: {}
services:
- name: stock
  namespace: shop
  hostname: stock.host
  vips: ["/10.200.0.7", "edge/fd00::8"]
  cidrVips: [{network: edge, cidr: "10.201.0.7/24"}]
  ports: {80: 8080, 81: 0}
  canonical: true
  visibility: Namespace
  ipFamilies: IPv6
  subjectAltNames: ["spiffe://td/ns/a/sa/b"]
  waypoint: {destination: "shop/wp.host", hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: {destination: "/10.0.0.9", hboneMtlsPort: 1}, weight: 7}]
  loadBalancer: {mode: Failover, routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], healthPolicy: AllowAll}
- {name: n, namespace: shop, hostname: n.host, vips: [], ports: {}, loadBalancer: {mode: Standard, routingPreferences: [], healthPolicy: OnlyHealthy}}
policies:
- name: front-only
  namespace: shop
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - principals: [!Exact a, !Prefix b]
        notPrincipals: [!Suffix c, !Presence []]
        namespaces: [!Exact d]
        notNamespaces: [!Exact e]
    - - destinationPorts: [8080, 1]
        notDestinationPorts: [2]
        sourceIps: [10.0.0.0/8]
        notSourceIps: ["fd00::/8"]
        destinationIps: [10.0.0.1/32]
        notDestinationIps: [0.0.0.0/0]
      - serviceAccounts: [{namespace: f, serviceAccount: g}]
        notServiceAccounts: [{namespace: h, serviceAccount: i}]
  - - - {}
- {name: all, namespace: shop, scope: Global, action: Allow, dryRun: false, rules: []}
`

// Every field has its number of the spec's tables (the names are those of the .proto files, which test/istio compares
// with Istio's): checklist 41 for Clause.matches, 39 and 40 for defaults and lengths, seen from the server.
func TestEncode(t *testing.T) {
	l := parse(t, fullYAML)
	for i, want := range []string{`workload {
		uid: "c1//Pod/shop/stock-1" name: "stock-1" namespace: "shop" trust_domain: "td" service_account: "stock" network: "edge"
		workload_name: "stock" workload_type: JOB canonical_name: "stock" canonical_revision: "v2" hostname: "stock.example"
		node: "node-b" cluster_id: "c1" addresses: "\n\t\000\003" addresses: "\375\000\000\t\000\000\000\000\000\000\000\000\000\000\000\003"
		tunnel_protocol: HBONE status: UNHEALTHY native_tunnel: true capacity { value: 3 } application_tunnel { protocol: PROXY port: 8081 }
		locality { region: "r1" zone: "z1" subzone: "s1" } authorization_policies: "shop/front-only" authorization_policies: "shop/other"
		waypoint { hostname { namespace: "shop" hostname: "wp.host" } hbone_mtls_port: 15008 }
		network_gateway { address { network: "edge" address: "\n\000\000\310" } hbone_mtls_port: 15009 }
		extensions { name: "ztun.mesh-address" config { [type.googleapis.com/istio.workload.GatewayAddress] {
			address { address: "\300\000\002\007" } hbone_mtls_port: 15018 } } }
		extensions { name: "ztun.mesh-address" config { [type.googleapis.com/istio.workload.GatewayAddress] {
			address { address: "\375\000\000\t\000\000\000\000\000\000\000\000\000\000\000\007" } hbone_mtls_port: 15019 } } }
		services { key: "shop/stock.host" value { ports { service_port: 80 target_port: 8080 } ports { service_port: 443 target_port: 8443 } } }
		services { key: "shop/other.host" value {} }
	}`, `workload { uid: "plain" namespace: "shop" network_mode: HOST_NETWORK capacity {} application_tunnel {} }`} {
		compare(t, EncodeWorkload(l.Workloads[i]), &workloadpb.Address{}, want)
	}
	for i, want := range []string{`service {
		name: "stock" namespace: "shop" hostname: "stock.host"
		addresses { address: "\n\310\000\007" } addresses { network: "edge" address: "\375\000\000\000\000\000\000\000\000\000\000\000\000\000\000\010" }
		addresses { network: "edge" address: "\n\311\000\007" length: 24 }
		ports { service_port: 80 target_port: 8080 } ports { service_port: 81 } canonical: true visibility: NAMESPACE ip_families: IPV6_ONLY
		subject_alt_names: "spiffe://td/ns/a/sa/b" waypoint { hostname { namespace: "shop" hostname: "wp.host" } hbone_mtls_port: 15008 }
		weighted_waypoints { destination { address { address: "\n\000\000\t" } hbone_mtls_port: 1 } weight: 7 }
		load_balancing { mode: FAILOVER routing_preference: [NETWORK, REGION, ZONE, SUBZONE, NODE, CLUSTER] health_policy: ALLOW_ALL }
	}`, `service { name: "n" namespace: "shop" hostname: "n.host" load_balancing {} }`} {
		compare(t, EncodeService(l.Services[i]), &workloadpb.Address{}, want)
	}
	for i, want := range []string{`
		name: "front-only" namespace: "shop" scope: WORKLOAD_SELECTOR action: DENY dry_run: true
		rules {
			clauses { matches { principals { exact: "a" } principals { prefix: "b" } not_principals { suffix: "c" } not_principals { presence {} }
				namespaces { exact: "d" } not_namespaces { exact: "e" } } }
			clauses {
				matches { destination_ports: [8080, 1] not_destination_ports: 2 source_ips { address: "\n\000\000\000" length: 8 }
					not_source_ips { address: "\375\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000" length: 8 }
					destination_ips { address: "\n\000\000\001" length: 32 } not_destination_ips { address: "\000\000\000\000" } }
				matches { service_accounts { namespace: "f" serviceAccount: "g" } not_service_accounts { namespace: "h" serviceAccount: "i" } }
			}
		}
		rules { clauses { matches {} } }`, `name: "all" namespace: "shop"`} {
		compare(t, EncodePolicy(l.Policies[i]), &securitypb.Authorization{}, want)
	}
}

func compare(t *testing.T, got, want proto.Message, text string) {
	t.Helper()
	check(t, prototext.Unmarshal([]byte(text), want))
	if !proto.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", prototext.Format(got), prototext.Format(want))
	}
}

// Over xDS an omitted field has xDS's meaning: of the trust domain it is the CA's.
func TestDefaults(t *testing.T) {
	f := &file{local: parse(t, "workloads: [{uid: u, namespace: n, workloadIps: [], services: {}}]")}
	check(t, f.encode("example.org"))
	w := f.local.Workloads[0]
	if w.TrustDomain != "example.org" || w.ServiceAccount != "default" || w.ClusterID != "Kubernetes" {
		t.Fatal(w)
	}
	got := &workloadpb.Address{}
	check(t, proto.Unmarshal(f.encoded[0].payload, got))
	compare(t, got, &workloadpb.Address{}, `workload { uid: "u" namespace: "n" trust_domain: "example.org" }`)
	// What equals the default of the wire is left out.
	g :=
		&file{
			local: parse(t,
				"workloads: [{uid: u, namespace: n, trustDomain: cluster.local, serviceAccount: default, clusterId: Kubernetes, "+
					"workloadType: deployment, workloadIps: [], services: {}}]")}
	check(t, g.encode("example.org"))
	check(t, proto.Unmarshal(g.encoded[0].payload, got))
	compare(t, got, &workloadpb.Address{}, `workload { uid: "u" namespace: "n" }`)
}

// The version is the unpadded lower-case hex of the payload's xxhash, as istiod's.
func TestVersion(t *testing.T) {
	r, err := newResource("", &workloadpb.Address{})
	check(t, err)
	equal(t, "xxhash64 of nothing", r.version, "ef46db3751d8e999")
	if _, err := newResource("x", &workloadpb.Service{Name: "\xff"}); err == nil ||
		!strings.Contains(err.Error(), "UTF-8") {
		t.Fatal(err)
	}
}
