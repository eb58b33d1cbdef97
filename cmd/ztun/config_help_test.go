package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// row is one line of the help: two spaces, the name, the default, the meaning, in columns.
var row = regexp.MustCompile(`^  ([A-Z][A-Z0-9_]+\*?) +(.*)$`)

var updatePage = flag.Bool("update-page", false, "write docs/configuration.md anew")

// docs/configuration.md is what the program's own table makes.
func TestConfigurationPage(t *testing.T) {
	const page = "../../docs/configuration.md"
	if *updatePage {
		if err := os.WriteFile(page, []byte(configurationPage()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(b), "\n"), strings.Split(configurationPage(), "\n")); diff != "" {
		t.Errorf("docs/configuration.md is not the program's table; write it by -update-page (-page +program):\n%s", diff)
	}
}

// configurationPage is docs/configuration.md: the same table, for readers.
func configurationPage() string {
	var b strings.Builder
	b.WriteString("# Configuration\n\n" +
		"Environment variables of `ztun proxy`; those without `ZTUN_` are ztunnel's own. A bad value, or one that does not " +
		"apply to a\n" +
		"TUN-based proxy, is one line that names the variable and says why, and exit code 2. `ztun proxy --help` prints " +
		"the same table.\n\n" +
		"A variable wins over `PROXY_CONFIG`, and that over the `defaultConfig` of the mesh configuration file. Booleans " +
		"are `true` or\n" +
		"`false`, numbers decimal, durations `1h30m`, `100ms`, `1m + 30s`, `10 * 1m` or seconds; set to nothing is a " +
		"value, not the\n" +
		"default. A control plane is on unless `XDS_ADDRESS` is set to nothing: to run from files alone, set it so.\n\n" +
		"This page is written by `go test ./cmd/ztun -run ConfigurationPage -update-page` from the program's own table.\n\n" +
		"| variable | default | meaning |\n|---|---|---|\n")
	c := &Config{}
	l := &loader{c: c}
	for _, v := range variables(c, l) {
		def := v.def
		if def != "" {
			def = "`" + def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", v.name, def, v.help)
	}
	for _, p := range patterns(c, l) {
		fmt.Fprintf(&b, "| `%s*` | | %s |\n", p.prefix, p.help)
	}
	return b.String()
}

// The shape of the help: aligned columns of which none is empty for a whole table, no row twice.
func TestHelpShape(t *testing.T) {
	column, seen := 0, map[string]bool{}
	lines := strings.Split(strings.TrimSuffix(helpTable(), "\n"), "\n")
	all := append(names(variables(&Config{}, &loader{c: &Config{}})),
		names2(patterns(&Config{}, &loader{c: &Config{}}))...)
	if len(lines) != len(all) || len(lines) < 70 {
		t.Fatalf("%d lines for %d rows", len(lines), len(all))
	}
	for i, line := range lines {
		m := row.FindStringSubmatch(line)
		if m == nil || m[1] != all[i].name || seen[m[1]] {
			t.Fatalf("line %d: %q", i, line)
		}
		seen[m[1]] = true
		if !strings.HasSuffix(line, "  "+all[i].help) || all[i].help == "" || strings.Contains(all[i].help, "|") ||
			strings.Contains(all[i].help, "  ") {
			t.Errorf("%s: meaning %q", m[1], line)
		}
		at := utf8.RuneCountInString(strings.TrimSuffix(line, all[i].help))
		if column == 0 {
			column = at
		}
		if at != column {
			t.Errorf("%s: its meaning stands in column %d, not %d", m[1], at, column)
		}
		if !strings.HasPrefix(strings.TrimLeft(line[2+len(m[1]):], " "), all[i].def) {
			t.Errorf("%s: no default %q in %q", m[1], all[i].def, line)
		}
	}
}

type helpRow struct{ name, def, help string }

func names(vs []variable) (rows []helpRow) {
	for _, v := range vs {
		rows = append(rows, helpRow{v.name, v.def, v.help})
	}
	return rows
}

func names2(ps []pattern) (rows []helpRow) {
	for _, p := range ps {
		rows = append(rows, helpRow{p.prefix + "*", "", p.help})
	}
	return rows
}

// Every variable of ztunnel's table (spec controlplane 1.2, dataplane) has its row.
func TestHelpHasZtunnelsVariables(t *testing.T) {
	have := map[string]bool{}
	for _, v := range variables(&Config{}, &loader{c: &Config{}}) {
		have[v.name] = true
	}
	for _, name := range strings.Fields(`ENABLE_PROXY ISTIO_META_DNS_CAPTURE ISTIO_META_DNS_PROXY_ADDR HTTP2_STREAM_WINDOW_SIZE HTTP2_CONNECTION_WINDOW_SIZE
		HTTP2_FRAME_SIZE POOL_MAX_STREAMS_PER_CONNECTION POOL_UNUSED_RELEASE_TIMEOUT UNSTABLE_ENABLE_SOCKS5 NETWORK NODE_NAME PROXY_MODE PROXY_WORKLOAD_INFO
		ISTIO_META_CLUSTER_ID CLUSTER_ID CLUSTER_DOMAIN CA_ADDRESS CA_ROOT_CA XDS_ROOT_CA ALT_CA_HOSTNAME ALT_XDS_HOSTNAME XDS_ADDRESS PREFERED_SERVICE_NAMESPACE
		SECRET_TTL LOCAL_XDS_PATH LOCAL_XDS XDS_ON_DEMAND FAKE_CA AUTH_TOKEN CONNECTION_TERMINATION_DEADLINE TERMINATION_GRACE_PERIOD_SECONDS ZTUNNEL_WORKER_THREADS
		ENABLE_ORIG_SRC INPOD_UDS INPOD_PORT_REUSE PACKET_MARK KEEPALIVE_TIME KEEPALIVE_INTERVAL KEEPALIVE_RETRIES KEEPALIVE_ENABLED USER_TIMEOUT_ENABLED
		LOCALHOST_APP_TUNNEL POD_NAMESPACE SERVICE_ACCOUNT POD_NAME TRUST_DOMAIN IPV6_ENABLED CRL_PATH ENABLE_RESPONSE_BAGGAGE RUST_LOG LOG_FORMAT
		AUTHZ_POLICY_INFO_LOGGING COMPLIANCE_POLICY TLS12_ENABLED INSTANCE_IP ISTIO_META_ISTIO_VERSION ZTUNNEL_CPU_LIMIT ZTUNNEL_RESOURCE_CPU_LIMIT
		ZTUNNEL_RESOURCE_CPU_REQUEST KUBERNETES_SERVICE_HOST PROXY_CONFIG`) {
		if !have[name] {
			t.Errorf("%s is not explained", name)
		}
	}
}

// Commands and their exit codes (spec controlplane 9.1, checklist 97).
func TestCommands(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
	}{{[]string{"version"}, 0}, {[]string{"help"}, 0}, {[]string{"proxy", "--help"}, 0}, {[]string{"nonsense"}, 1},
		{[]string{"version", "nonsense"}, 1}} {
		root := rootCommand()
		root.SetArgs(tc.args)
		root.SetOut(io.Discard)
		code := 0
		if err := root.Execute(); err != nil {
			code = exitCode(err)
		}
		if code != tc.code {
			t.Errorf("%v: exit code %d, want %d", tc.args, code, tc.code)
		}
	}
	if code := exitCode(&configError{"X", "", io.EOF}); code != 2 {
		t.Errorf("a bad configuration: exit code %d", code)
	}
}
