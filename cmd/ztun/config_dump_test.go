package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sampleConfig is the config section of a real ztunnel's dump (samples/config_dump-a.json).
func sampleConfig(t *testing.T) map[string]any {
	t.Helper()
	b, err := os.ReadFile("../../docs/samples/config_dump-a.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct{ Config map[string]any }
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	return d.Config
}

func jsonOf(t *testing.T, v any) (text []byte, back map[string]any) {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	return text, back
}

// keysOf lists the keys of an object in their order in the text.
func keysOf(t *testing.T, text []byte) (keys []string) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(text))
	for depth, key := 0, false; ; {
		tok, err := d.Token()
		if err != nil {
			return keys
		}
		switch tok {
		case json.Delim('{'), json.Delim('['):
			depth++
			key = depth == 1
			continue
		case json.Delim('}'), json.Delim(']'):
			depth--
		default:
			if depth == 1 && key {
				keys = append(keys, tok.(string))
				key = false
				continue
			}
		}
		key = depth == 1
	}
}

// The same settings give the same dump as a real ztunnel: keys, their order, types, values. What differs
// differs for a reason.
func TestDumpIsZtunnels(t *testing.T) {
	c := load(t, "NODE_NAME", "n1", "LOCAL_CA_DIR", "-", "FAKE_CA", "true", "ISTIO_META_DNS_CAPTURE", "true",
		"UNSTABLE_ENABLE_SOCKS5", "true",
		"ENABLE_ORIG_SRC", "true", "PACKET_MARK", "1337", "ZTUNNEL_WORKER_THREADS", "2")
	c.Self.Args = "proxy ztunnel"
	text, got := jsonOf(t, c.dump())
	want := sampleConfig(t)

	// A set there, in no order; here in order.
	slices.SortFunc(want["illegalPorts"].([]any), func(a, b any) int { return int(a.(float64) - b.(float64)) })
	// The only mode here, and what only the other one has.
	want["proxyMode"], want["proxyWorkloadInformation"] = "Shared", nil
	// What the machine has: whether ::1 can be bound, and resolv.conf, which is compared below.
	for _, k := range []string{"adminAddr", "dnsProxyAddr"} {
		want[k].(map[string]any)["Localhost"].([]any)[0] = c.loopbackIPv6()
	}
	cfg, opts := want["dnsResolverCfg"], want["dnsResolverOpts"]
	want["dnsResolverCfg"], want["dnsResolverOpts"] = got["dnsResolverCfg"], got["dnsResolverOpts"]
	// Ours alone.
	want["ztun"] = got["ztun"]
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("ztunnel's - and ours +:\n%s", d)
	}
	if keys := keysOf(t, text); !slices.IsSorted(keys) || len(keys) != len(want) {
		t.Errorf("%d keys, want %d, in the alphabet's order: %q", len(keys), len(want), keys)
	}

	r := parseResolvConf("# comment\nnameserver 192.0.2.53\nnameserver nonsense\noptions edns0 trust-ad\n")
	_, resolver := jsonOf(t, map[string]any{"cfg": r.servers(), "opts": r.options(true)})
	if d := cmp.Diff(map[string]any{"cfg": cfg, "opts": opts}, resolver); d != "" {
		t.Errorf("resolver: ztunnel's - and ours +:\n%s", d)
	}
}

// What the sample has off, on.
func TestDumpOfEverything(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("root.pem", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	c := load(t, "XDS_ADDRESS", "istiod:15012", "XDS_ROOT_CA", "root.pem", "CA_ROOT_CA", "SYSTEM", "LOCAL_CA_DIR", "-",
		"XDS_HEADER_A", "b", "CA_HEADER_C", "d",
		"AUTH_TOKEN", "hunter2", "POD_NAMESPACE", "ns", "POD_NAME", "n", "SERVICE_ACCOUNT", "sa", "ISTIO_META_DNS_CAPTURE",
		"false", "ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:53",
		"XDS_ON_DEMAND", "true", "ALT_XDS_HOSTNAME", "x", "ALT_CA_HOSTNAME", "y", "CRL_PATH", "/crl",
		"PREFERED_SERVICE_NAMESPACE", "p", "IPV6_ENABLED", "false",
		"SECRET_TTL", "1m500ms", "XDS_HEADER_B", "", "LOCALHOST_APP_TUNNEL", "false")
	text, got := jsonOf(t, c.dump())
	for k, want := range map[string]string{
		"xdsAddress": `"https://istiod:15012"`, "caAddress": `"https://localhost:15012"`,
		"xdsRootCert": `{"File":"root.pem"}`, "caRootCert": `"Default"`,
		"xdsHeaders": `[["a","b"],["b",""]]`, "caHeaders": `[["c","d"]]`,
		"ztunnelIdentity": `"spiffe://cluster.local/ns/ns/sa/sa"`,
		"ztunnelWorkload": `{"name":"n","namespace":"ns","serviceAccount":"sa"}`, "dnsProxy": "false",
		"dnsProxyAddr": `{"SocketAddr":"127.0.0.1:53"}`,
		"xdsOnDemand":  "true", "altXdsHostname": `"x"`, "altCaHostname": `"y"`, "crlPath": `"/crl"`,
		"preferedServiceNamespace": `"p"`, "requireOriginalSource": "null",
		"statsAddr": `{"SocketAddr":"0.0.0.0:15020"}`, "inboundAddr": `"0.0.0.0:15008"`,
		"secretTtl": `{"nanos":500000000,"secs":60}`, "illegalPorts": "[15001,15006,15008]",
		"socks5Addr": "null", "adminAddr": `{"Localhost":[false,15000]}`, "localhostAppTunnel": "false",
	} {
		if b, _ := json.Marshal(got[k]); string(b) != want {
			t.Errorf("%s: %s, want %s", k, b, want)
		}
	}
	if strings.Contains(string(text), "hunter2") {
		t.Error("the dump shows the token")
	}
}

func TestParseResolvConf(t *testing.T) {
	r := parseResolvConf("domain d\nsearch a.b c\nnameserver ::1\nnameserver\nnameserver 1.1.1.1 # x\noptions ndots:5 " +
		"timeout:x attempts:3 timeout:-1\nsearch e f\n\x00\xff")
	if got := fmt.Sprint(r); got != fmt.Sprint(resolver{nameservers: []string{"::1", "1.1.1.1"}, domain: "d",
		search: []string{"e", "f"}, ndots: 5, timeout: 5, attempts: 3}) {
		t.Errorf("%s", got)
	}
	if r := parseResolvConf(""); r.search == nil || r.ndots != 1 || r.timeout != 5 || r.attempts != 2 {
		t.Errorf("%+v", r)
	}
}

func TestSearchDomains(t *testing.T) {
	r := resolver{search: []string{"istio-system.svc.cluster.local", "svc.cluster.local", "Cluster.local.",
		"corp.example.", "lab", "."}}
	if got := fmt.Sprint((&Config{Node: nodeConfig{ClusterDomain: "cluster.local"}}).searchDomains(r)); got !=
		"[corp.example lab]" {
		t.Errorf("of the daemon's resolver: %v", got)
	}
	c := &Config{Node: nodeConfig{ClusterDomain: "cluster.local"}}
	if err := domains(&c.DNS.Search)(" a.example. ,,b"); err != nil || fmt.Sprint(c.searchDomains(r)) != "[a.example b]" {
		t.Errorf("configured: %v, %v", c.searchDomains(r), err)
	}
	if domains(&c.DNS.Search)("a b") == nil || domains(&c.DNS.Search)("http://a") == nil {
		t.Error("no domain is taken for one")
	}
}
