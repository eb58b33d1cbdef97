package main

import (
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// row is one line of the help: two spaces, the name, the default, the meaning, in columns.
var row = regexp.MustCompile(`^  ([A-Z][A-Z0-9_]+\*?) +(.*)$`)

// The table of the help and of README.md are one: same rows, same order, same words.
func TestHelpIsReadme(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	var readme, help []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z][A-Z0-9_]+\\*?)` \\| (.*) \\|$").FindAllStringSubmatch(string(b), -1) {
		def, meaning, _ := strings.Cut(m[2], "|")
		readme = append(readme, squeeze(m[1]+" "+strings.Trim(strings.TrimSpace(def), "`")+" "+meaning))
	}
	for line := range strings.Lines(helpTable()) {
		help = append(help, squeeze(line))
	}
	for i := range max(len(readme), len(help)) {
		at := func(rows []string) string {
			if i < len(rows) {
				return rows[i]
			}
			return "(no row)"
		}
		if at(readme) != at(help) {
			t.Fatalf("row %d: README.md has\n%s\nthe help\n%s", i, at(readme), at(help))
		}
	}
}

// The shape of the help: aligned columns of which none is empty for a whole table, no row twice.
func TestHelpShape(t *testing.T) {
	column, seen := 0, map[string]bool{}
	lines := strings.Split(strings.TrimSuffix(helpTable(), "\n"), "\n")
	all := append(names(variables(&Config{}, &loader{c: &Config{}})), names2(patterns(&Config{}, &loader{c: &Config{}}))...)
	if len(lines) != len(all) || len(lines) < 70 {
		t.Fatalf("%d lines for %d rows", len(lines), len(all))
	}
	for i, line := range lines {
		m := row.FindStringSubmatch(line)
		if m == nil || m[1] != all[i].name || seen[m[1]] {
			t.Fatalf("line %d: %q", i, line)
		}
		seen[m[1]] = true
		if !strings.HasSuffix(line, "  "+all[i].help) || all[i].help == "" || strings.Contains(all[i].help, "|") || strings.Contains(all[i].help, "  ") {
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
	}{{[]string{"version"}, 0}, {[]string{"help"}, 0}, {[]string{"proxy", "--help"}, 0}, {[]string{"nonsense"}, 1}, {[]string{"version", "nonsense"}, 1}} {
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
