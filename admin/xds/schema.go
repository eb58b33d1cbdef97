package xds

import (
	"slices"
	"strings"

	"ztun/admin/suggest"
)

// Field is one key of a map in a workload file.
type Field struct {
	Name     string
	Required bool
	Type     string   // as the documentation calls it
	Default  string   // what an absent optional key means, in YAML
	Allowed  []string // the only values, if there are but some
	Example  string   // in YAML, on one line; of another meaning than Default
	Meaning  string
}

// Object is one kind of map in a workload file. It is what the reader goes by: a key that is not among Fields is
// unknown, and a required one that is absent is missing. docs/mesh-files.md is written from it.
type Object struct {
	Name    string // workload
	Meaning string
	Loose   bool // unknown keys are passed over, as ztunnel does
	Fields  []Field
}

func (o *Object) names() []string {
	out := make([]string, len(o.Fields))
	for i := range o.Fields {
		out[i] = o.Fields[i].Name
	}
	return out
}

func (o *Object) knows(key string) bool {
	return slices.ContainsFunc(o.Fields, func(f Field) bool { return f.Name == key })
}

func (o *Object) required() (out []string) {
	for _, f := range o.Fields {
		if f.Required {
			out = append(out, f.Name)
		}
	}
	return out
}

// unknown is the text for a key that the object does not have: what may have been meant, or else what there is.
func (o *Object) unknown(key string) string {
	names := o.names()
	if hint := suggest.DidYouMean(key, names); hint != "" {
		return "unknown key" + hint
	}
	slices.Sort(names)
	return "unknown key; a " + o.Name + " has " + strings.Join(names, ", ")
}

var fileObject = Object{Name: "file", Meaning: "The whole file. `{}` says that nothing exists.", Fields: []Field{
	{Name: "workloads", Type: "list of [workload](#workload)", Default: "[]",
		Meaning: "pods and other processes with addresses",
		Example: `[{namespace: shop, workloadIps: ["10.1.0.2"], services: {}}]`},
	{Name: "services", Type: "list of [service](#service)", Default: "[]",
		Meaning: "names and virtual addresses in front of workloads",
		Example: `[{name: stock, namespace: shop, hostname: stock.shop.svc.cluster.local, vips: ["/10.96.0.10"], ports: {80: 8080}}]`},
	{Name: "policies", Type: "list of [policy](#policy)", Default: "[]", Meaning: "who may connect to whom",
		Example: `[{name: none, namespace: shop, scope: Namespace, action: Deny, dryRun: false, rules: [[]]}]`},
}}

var workloadObject = Object{Name: "workload", Meaning: "One pod, or another process that has an address.",
	Fields: []Field{
		{Name: "uid", Type: "string", Default: `""`, Example: "demo//v1/Pod/shop/front-1",
			Meaning: "what tells workloads apart; unique, so at most one may be without"},
		{Name: "name", Type: "string", Default: `""`, Example: "front-1",
			Meaning: "name of the pod: that of `ztun pod add --name`"},
		{Name: "namespace", Required: true, Type: "string", Example: "shop", Meaning: "namespace of the pod"},
		{Name: "serviceAccount", Type: "string", Default: `""`, Example: "front",
			Meaning: "with namespace and trustDomain the identity: spiffe://cluster.local/ns/shop/sa/front; under `ztun " +
				"control` `default` if absent"},
		{Name: "trustDomain", Type: "string", Default: `""`, Example: "cluster.local",
			Meaning: "trust domain of the identity; that of the CA if absent"},
		{Name: "workloadIps", Required: true, Type: "list of IP addresses", Example: `["10.1.0.2", "fd00:1::2"]`,
			Meaning: "addresses of the workload; `[]` for one that is reached by hostname alone"},
		{Name: "node", Type: "string", Default: `""`, Example: "n1",
			Meaning: "NODE_NAME of the node that the pod runs on; only that node gets its certificate"},
		{Name: "protocol", Type: "string", Default: "TCP", Allowed: []string{"TCP", "HBONE"}, Example: "HBONE",
			Meaning: "HBONE: peers tunnel to it with mutual TLS, as to every pod of ztun; TCP: it is reached in plaintext"},
		{Name: "services", Required: true, Type: "map of namespace/hostname to a map of port to port",
			Example: `{"shop/front.shop.svc.cluster.local": {80: 8080}}`,
			Meaning: "the services that the workload is an endpoint of, and for each service port the workload's own; `{}` " +
				"for " +
				"none"},
		{Name: "status", Type: "string", Default: "Healthy", Allowed: []string{"Healthy", "Unhealthy"}, Example: "Unhealthy",
			Meaning: "whether services send connections to it"},
		{Name: "capacity", Type: "number", Default: "1", Example: "3", Meaning: "weight among the endpoints of a service"},
		{Name: "authorizationPolicies", Type: "list of namespace/name", Default: "[]", Example: `["shop/front-only"]`,
			Meaning: "the policies of scope WorkloadSelector that hold for it"},
		{Name: "waypoint", Type: "[gateway](#gateway)", Default: "null",
			Example: `{destination: "/10.1.0.9", hboneMtlsPort: 15008}`,
			Meaning: "the waypoint that connections to the workload go through"},
		{Name: "locality", Type: "[locality](#locality)", Default: "null", Example: `{region: eu, zone: eu-1, subzone: ""}`,
			Meaning: "where it is, for load balancing"},
		{Name: "network", Type: "string", Default: `""`, Example: "edge",
			Meaning: "its network; one that differs from the node's NETWORK is reached through networkGateway"},
		{Name: "networkGateway", Type: "[gateway](#gateway)", Default: "null",
			Example: `{destination: "edge/203.0.113.1", hboneMtlsPort: 15008}`,
			Meaning: "the way into its network from others"},
		{Name: "meshAddresses", Type: "list of address:port", Default: "[]", Example: `["192.0.2.7:15018", "[fd00::7]:15018"]`,
			Meaning: "where HBONE for the workload arrives if not at port 15008 of its addresses, one of each family at " +
				"most (ztun's own: ztunnel calls port 15008); its own HBONE is taken to come from these addresses, also where " +
				"protocol is TCP and nothing arrives there"},
		{Name: "networkMode", Type: "string", Default: "Standard", Allowed: []string{"Standard", "HostNetwork"},
			Example: "HostNetwork",
			Meaning: "HostNetwork: its addresses are its node's; it is not found by address"},
		{Name: "hostname", Type: "string", Default: `""`, Example: "db.example.com",
			Meaning: "name to resolve for a workload without addresses"},
		{Name: "applicationTunnel", Type: "[application tunnel](#application-tunnel)", Default: "null",
			Example: `{protocol: PROXY, port: 15088}`,
			Meaning: "how the workload wants its inbound connections"},
		{Name: "nativeTunnel", Type: "true or false", Default: "false", Example: "true",
			Meaning: "the workload speaks HBONE itself"},
		{Name: "workloadName", Type: "string", Default: `""`, Example: "front",
			Meaning: "name of its deployment, for log and metrics"},
		{Name: "workloadType", Type: "string", Default: `""`, Example: "deployment",
			Meaning: "kind of that: deployment, job, ..."},
		{Name: "canonicalName", Type: "string", Default: `""`, Example: "front",
			Meaning: "name of the application, for metrics"},
		{Name: "canonicalRevision", Type: "string", Default: `""`, Example: "v1",
			Meaning: "version of the application, for metrics"},
		{Name: "clusterId", Type: "string", Default: `""`, Example: "Kubernetes",
			Meaning: "its cluster; under `ztun control` `Kubernetes` if absent"},
	}}

var localityObject = Object{Name: "locality", Meaning: "A place, from large to small.", Loose: true, Fields: []Field{
	{Name: "region", Required: true, Type: "string", Example: "eu", Meaning: "region"},
	{Name: "zone", Required: true, Type: "string", Example: "eu-1", Meaning: "zone within the region"},
	{Name: "subzone", Required: true, Type: "string", Example: "rack-7", Meaning: `subzone within the zone; "" for none`},
}}

var tunnelObject = Object{Name: "application tunnel", Meaning: "How a workload wants its inbound connections.",
	Fields: []Field{
		{Name: "protocol", Required: true, Type: "string", Allowed: []string{"NONE", "PROXY"}, Example: "PROXY",
			Meaning: "PROXY: with a header of the PROXY protocol, version 2, in front; NONE: as they are"},
		{Name: "port", Type: "port", Default: "0", Example: "15088",
			Meaning: "port that they all go to; 0: the one that was asked for"},
	}}

var gatewayObject = Object{Name: "gateway", Meaning: "A waypoint, or the gateway of a network.", Fields: []Field{
	{Name: "destination", Required: true, Type: "network/address or namespace/hostname",
		Example: `shop/waypoint.shop.svc.cluster.local`,
		Meaning: "an address (`/10.1.0.9` in the default network) or the name of a service"},
	{Name: "hboneMtlsPort", Required: true, Type: "port", Example: "15008", Meaning: "its port for HBONE"},
}}

var serviceObject = Object{Name: "service",
	Meaning: "A name and virtual addresses in front of workloads, which say themselves that they belong to it.",
	Fields: []Field{
		{Name: "name", Required: true, Type: "string", Example: "stock", Meaning: "name of the service"},
		{Name: "namespace", Required: true, Type: "string", Example: "shop", Meaning: "its namespace"},
		{Name: "hostname", Required: true, Type: "string", Example: "stock.shop.svc.cluster.local",
			Meaning: "its whole name, which pods resolve; unique in the namespace"},
		{Name: "vips", Required: true, Type: "list of network/address", Example: `["/10.96.0.10", "/fd96::10"]`,
			Meaning: "virtual addresses, with nothing before the slash in the default network; `[]` for none"},
		{Name: "ports", Required: true, Type: "map of port to port", Example: "{80: 8080}",
			Meaning: "service port, and port of the endpoints that do not say otherwise (0: none)"},
		{Name: "subjectAltNames", Type: "list of strings", Default: "[]",
			Example: `["spiffe://cluster.local/ns/shop/sa/stock"]`,
			Meaning: "identities that endpoints may have besides their own"},
		{Name: "loadBalancer", Type: "[load balancer](#load-balancer)", Default: "null",
			Example: "{mode: Failover, routingPreferences: [Region, Zone], healthPolicy: OnlyHealthy}",
			Meaning: "which endpoints are preferred"},
		{Name: "waypoint", Type: "[gateway](#gateway)", Default: "null",
			Example: `{destination: "/10.1.0.9", hboneMtlsPort: 15008}`,
			Meaning: "the waypoint that connections to the service go through"},
		{Name: "weightedWaypoints", Type: "list of [weighted waypoint](#weighted-waypoint)", Default: "[]",
			Example: `[{destination: {destination: "/10.1.0.9", hboneMtlsPort: 15008}, weight: 90}]`,
			Meaning: "several waypoints, each with a share"},
		{Name: "cidrVips", Type: "list of [address range](#address-range)", Default: "[]",
			Example: `[{network: "", cidr: 10.97.0.0/24}]`,
			Meaning: "ranges that all belong to the service"},
		{Name: "ipFamilies", Type: "string", Default: "null", Allowed: []string{"Dual", "IPv4", "IPv6"}, Example: "IPv4",
			Meaning: "families of the addresses that names resolve to and endpoints are reached at; any if absent"},
		{Name: "canonical", Type: "true or false", Default: "false", Example: "true",
			Meaning: "wins over others with the same hostname or address"},
		{Name: "visibility", Type: "string", Default: "Public", Allowed: []string{"Public", "Namespace"},
			Example: "Namespace",
			Meaning: "Namespace: pods of other namespaces do not see it"},
		{Name: "endpoints", Type: "map of workload uid to [endpoint](#endpoint)", Default: "{}",
			Example: `{demo//v1/Pod/shop/stock-1: {workloadUid: demo//v1/Pod/shop/stock-1, port: {80: 8080}, status: Healthy}}`,
			Meaning: "endpoints by uid, as /config_dump prints them; what the workloads' own services say comes on top"},
	}}

var cidrObject = Object{Name: "address range", Meaning: "A range of virtual addresses.", Loose: true, Fields: []Field{
	{Name: "network", Required: true, Type: "string", Example: "edge", Meaning: `network; "" is the default one`},
	{Name: "cidr", Required: true, Type: "address range", Example: "10.97.0.0/24", Meaning: "the range"},
}}

var endpointObject = Object{Name: "endpoint", Meaning: "A workload behind a service, named by the service.",
	Fields: []Field{
		{Name: "workloadUid", Required: true, Type: "string", Example: "demo//v1/Pod/shop/stock-1",
			Meaning: "the same uid as the key"},
		{Name: "port", Required: true, Type: "map of port to port", Example: "{80: 8080}",
			Meaning: "service port, and the workload's own"},
		{Name: "status", Required: true, Type: "string", Allowed: []string{"Healthy", "Unhealthy"}, Example: "Unhealthy",
			Meaning: "whether connections go to it"},
	}}

var weightedObject = Object{Name: "weighted waypoint", Meaning: "A waypoint and its share.", Fields: []Field{
	{Name: "destination", Required: true, Type: "[gateway](#gateway)",
		Example: `{destination: "/10.1.0.9", hboneMtlsPort: 15008}`, Meaning: "the waypoint"},
	{Name: "weight", Required: true, Type: "number", Example: "90", Meaning: "its share, of the sum of all"},
}}

var balancerObject = Object{Name: "load balancer", Meaning: "Which endpoints of a service are preferred.",
	Fields: []Field{
		{Name: "mode", Required: true, Type: "string", Allowed: []string{"Standard", "Strict", "Failover", "Passthrough"},
			Example: "Failover",
			Meaning: "Standard: all alike; Failover: those that share most of routingPreferences, counted from the first to " +
				"the first that differs; " +
				"Strict: only those that share all; Passthrough: the address that was asked for"},
		{Name: "routingPreferences", Required: true, Type: "list of strings", Example: "[Region, Zone]",
			Allowed: []string{"Region", "Zone", "Subzone", "Node", "Cluster", "Network"},
			Meaning: "what client and endpoint are to share"},
		{Name: "healthPolicy", Required: true, Type: "string", Allowed: []string{"OnlyHealthy", "AllowAll"},
			Example: "AllowAll",
			Meaning: "AllowAll: unhealthy endpoints too"},
	}}

var policyObject = Object{Name: "policy",
	Meaning: "Who may connect to whom. A connection is refused if a Deny policy matches it, or if there are Allow " +
		"policies " +
		"for its destination and none of them matches it.", Fields: []Field{
		{Name: "name", Required: true, Type: "string", Example: "front-only",
			Meaning: "name of the policy; unique in the namespace"},
		{Name: "namespace", Required: true, Type: "string", Example: "shop", Meaning: "its namespace"},
		{Name: "scope", Required: true, Type: "string", Allowed: []string{"Global", "Namespace", "WorkloadSelector"},
			Example: "WorkloadSelector",
			Meaning: "which destinations it holds for: all, those of its namespace, or those that name it in " +
				"authorizationPolicies"},
		{Name: "action", Required: true, Type: "string", Allowed: []string{"Allow", "Deny"}, Example: "Deny",
			Meaning: "what becomes of a connection that it matches"},
		{Name: "dryRun", Required: true, Type: "true or false", Example: "true",
			Meaning: "true: it is only logged what it would have done"},
		{Name: "rules", Required: true, Type: "list of rules", Example: "[[[{destinationPorts: [8080]}]]]",
			Meaning: "three lists, one in the other: the policy matches if one of its rules does, a rule if all of its " +
				"clauses " +
				"do, a clause if one of its [matches](#match) does; `[[]]`, a rule without clauses, matches everything, `[]` " +
				"nothing"},
	}}

var matchObject = Object{Name: "match",
	Meaning: "Conditions on a connection, all of which have to hold; in each, one of the values has to. " +
		"A match without conditions, `{}`, never holds. The conditions that begin with `not` hold if none of the values " +
		"does.",
	Fields: []Field{
		{Name: "principals", Type: "list of [string match](#string-match)", Default: "[]",
			Example: "[!Exact cluster.local/ns/shop/sa/front]",
			Meaning: "identity of the client, without spiffe://; a client without a certificate has none"},
		{Name: "notPrincipals", Type: "list of [string match](#string-match)", Default: "[]",
			Example: "[!Prefix cluster.local/ns/test/]", Meaning: "the same, not"},
		{Name: "namespaces", Type: "list of [string match](#string-match)", Default: "[]", Example: "[!Exact shop]",
			Meaning: "namespace of the client's identity"},
		{Name: "notNamespaces", Type: "list of [string match](#string-match)", Default: "[]", Example: "[!Suffix -test]",
			Meaning: "the same, not"},
		{Name: "serviceAccounts", Type: "list of [service account](#service-account)", Default: "[]",
			Example: "[{namespace: shop, serviceAccount: front}]",
			Meaning: "service account of the client's identity, whatever its trust domain"},
		{Name: "notServiceAccounts", Type: "list of [service account](#service-account)", Default: "[]",
			Example: "[{namespace: shop, serviceAccount: back}]", Meaning: "the same, not"},
		{Name: "sourceIps", Type: "list of address ranges", Default: "[]", Example: `["10.1.0.0/24", "fd00:1::/64"]`,
			Meaning: "address of the client"},
		{Name: "notSourceIps", Type: "list of address ranges", Default: "[]", Example: `["10.1.0.9/32"]`,
			Meaning: "the same, not"},
		{Name: "destinationIps", Type: "list of address ranges", Default: "[]", Example: `["10.1.0.3/32"]`,
			Meaning: "address of the destination"},
		{Name: "notDestinationIps", Type: "list of address ranges", Default: "[]", Example: `["fd00::/8"]`,
			Meaning: "the same, not"},
		{Name: "destinationPorts", Type: "list of ports", Default: "[]", Example: "[8080, 8443]",
			Meaning: "port of the destination: the pod's own, not the service's"},
		{Name: "notDestinationPorts", Type: "list of ports", Default: "[]", Example: "[22]", Meaning: "the same, not"},
	}}

var accountObject = Object{Name: "service account", Meaning: "A service account.", Fields: []Field{
	{Name: "namespace", Required: true, Type: "string", Example: "shop", Meaning: "its namespace"},
	{Name: "serviceAccount", Required: true, Type: "string", Example: "front", Meaning: "its name"},
}}

var stringObject = Object{Name: "string match",
	Meaning: "One of these, as a tag before the value (`!Exact front`, `!Presence []`), or as a map of one key " +
		"(`{Exact: front}`), " +
		"as `/config_dump` prints it. Capitals count.", Fields: []Field{
		{Name: "Exact", Type: "string", Example: "front", Meaning: "the value is this"},
		{Name: "Prefix", Type: "string", Example: "fro", Meaning: "the value begins with this"},
		{Name: "Suffix", Type: "string", Example: "ont", Meaning: "the value ends with this"},
		{Name: "Presence", Type: "nothing", Example: "[]", Meaning: "there is a value"},
	}}
