package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// env is an environment that is complete, changed by pairs; a value of "-" unsets.
func env(pairs ...string) (func(string) (string, bool), func() []string) {
	m := map[string]string{"LOCAL_XDS_PATH": "/w.yaml", "LOCAL_CA_DIR": "/ca", "XDS_ADDRESS": ""}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] == "-" {
			delete(m, pairs[i])
			continue
		}
		m[pairs[i]] = pairs[i+1]
	}
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }, func() []string {
		var all []string
		for k, v := range m {
			all = append(all, k+"="+v)
		}
		return all
	}
}

func load(t *testing.T, pairs ...string) *Config {
	t.Helper()
	c, err := loadConfig(env(pairs...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDefaults(t *testing.T) { // checklist 1; not 7: PACKET_MARK serves iptables rules, of which there are none here
	c := load(t)
	if c.Proxy.HBONE.StreamWindow != 4<<20 || c.Proxy.HBONE.ConnWindow != 16<<20 || c.Proxy.HBONE.FrameSize != 1<<20 ||
		c.Proxy.PoolMaxStreams != 100 ||
		c.Proxy.PoolUnused != 5*time.Minute {
		t.Errorf("HTTP/2 defaults: %+v", c)
	}
	if c.Admin.Port != 15000 || c.Admin.StatsPort != 15020 || c.Admin.ReadinessPort != 15021 ||
		c.Process.TerminationDeadline != 5*time.Second {
		t.Errorf("ports or deadline: %+v", c)
	}
	if c.Net.KeepaliveTime != 180*time.Second || c.Net.KeepaliveRetries != 9 || !c.Net.KeepaliveEnabled ||
		c.Net.UserTimeout {
		t.Errorf("keepalive: %+v", c)
	}
	if c.State.Socket != "/var/run/ztun/ztun.sock" || c.Attach.MTU != 1500 || c.Attach.NodeTUN != "ztun-node" ||
		c.CA.TTL != 24*time.Hour {
		t.Errorf("own settings: %+v", c)
	}
	if !c.DNS.Proxy || c.DNS.Addr != "localhost:15053" || c.Proxy.SOCKS5 || c.XDS.OnDemand || c.Proxy.TLS.TLS12 ||
		c.Proxy.TLS.PQC ||
		c.Proxy.PolicyInfoLogging || !c.Proxy.LocalhostAppTunnel || c.Proxy.OriginalSource != nil {
		t.Errorf("switches: %+v", c)
	}
	if c.XDS.Address != "" || c.CA.Address != "" || c.Node.ClusterID != "Kubernetes" ||
		c.Node.ClusterDomain != "cluster.local" ||
		c.Self.TrustDomain != "cluster.local" || !c.Self.Identity.IsZero() || c.Self.Args != "proxy" {
		t.Errorf("who and where: %+v", c)
	}
	if c.Self.Metadata == nil || len(c.Self.Metadata) != 0 || len(c.Warnings) != 0 {
		t.Errorf("metadata %v, warnings %q", c.Self.Metadata, c.Warnings)
	}
}

func TestBadValuesNameTheVariable(t *testing.T) {
	for _, tc := range []struct{ name, value, says string }{
		{"IPV6_ENABLED", "True", "true or false"}, // checklist 6
		{"KEEPALIVE_ENABLED", "", "true or false"},
		{"UNSTABLE_ENABLE_SOCKS5", "yes", "true or false"},
		{"LOCALHOST_APP_TUNNEL", "", "true or false"},
		{"ENABLE_ORIG_SRC", "", "true or false"},
		{"ENABLE_ORIG_SRC", "false", "nothing to switch off"},
		{"ZTUN_STEERING", "Redirected", "redirected"},
		{"ZTUN_STEERING", "", "redirected"},
		{"INPOD_ENABLED", "1", "true or false"},
		{"XDS_ON_DEMAND", "1", "true or false"},
		{"HTTP2_STREAM_WINDOW_SIZE", "0x10", "decimal"},
		{"PACKET_MARK", "0x539", "decimal"},
		{"PACKET_MARK", "", "decimal"},
		{"HTTP2_FRAME_SIZE", "1", "from 16384"},
		{"POOL_MAX_STREAMS_PER_CONNECTION", "0", "from 1"},
		{"POOL_UNUSED_RELEASE_TIMEOUT", "soon", "no duration"},
		{"KEEPALIVE_TIME", "", "empty"},
		{"SECRET_TTL", "1s", "shorter than 10s"},
		{"PROXY_MODE", "Shared", "must be shared or dedicated"},
		{"PROXY_WORKLOAD_INFO", "a/b", "NAMESPACE/NAME/SERVICE_ACCOUNT"}, // checklist 11
		{"PROXY_WORKLOAD_INFO", "a//c", "NAMESPACE/NAME/SERVICE_ACCOUNT"},
		{"ENABLE_PROXY", "false", "TUN"},
		{"ENABLE_PROXY", "False", "true or false"},
		{"INPOD_PORT_REUSE", "false", "no port"},
		{"XDS_ADDRESS", "http://istiod:15010", "TLS only"},
		{"XDS_ADDRESS", "grpc://istiod", "not grpc"},
		{"XDS_ADDRESS", "https://", "no host"},
		{"XDS_ADDRESS", "istiod:99999", "no port"},
		{"XDS_ADDRESS", "istiod:15012/path", "host and a port"},
		{"XDS_ADDRESS", "is tiod", "URI"},
		{"CA_ADDRESS", "https://[::1", "URI"},
		{"CA_ADDRESS", "https://user:pw@istiod", "host and a port"},
		{"CA_ADDRESS", "istiod:15012", "LOCAL_CA_DIR"},
		{"XDS_ROOT_CA", "/does/not/exist.pem", "neither a file"},
		{"CA_ROOT_CA", "", "neither a file"},
		{"CA_ROOT_CA", "/", "directory"},
		{"AUTH_TOKEN", "/", "directory"},
		{"AUTH_TOKEN", "two\nlines", "header"},
		{"XDS_HEADER_", "v", "no name of gRPC metadata"},
		{"XDS_HEADER_A B", "v", "no name of gRPC metadata"},
		{"CA_HEADER_X-BIN", "v", "-bin"},
		{"CA_HEADER_GRPC-TIMEOUT", "v", "grpc-"},
		{"XDS_HEADER_TE", "v", "keep this name"},
		{"CA_HEADER_User-Agent", "v", "keep this name"},
		{"CLUSTER_ID", "é", "cannot carry"},
		{"CA_HEADER_X", "\x01", "characters"},
		{"LOCAL_XDS_PATH", "-", "workload file"},
		{"FAKE_CA", "true", "LOCAL_CA_DIR"},
		{"LOCAL_XDS", "{}", "LOCAL_XDS_PATH"}, // checklist 10
		{"PROXY_CONFIG", "{", "yaml"},
		{"COMPLIANCE_POLICY", "fips-140-2", "fips140=on"},
		{"XDS_ON_DEMAND", "true", "DNS_CAPTURE=false"},                    // checklist 9
		{"ISTIO_META_DNS_PROXY_ADDR", "not-an-address", "localhost:PORT"}, // checklist 12
		{"ISTIO_META_DNS_PROXY_ADDR", "localhost:x", "no port"},
		{"ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1", "localhost:PORT"},
		{"ZTUN_CONTROL_CERT", "/c.pem", "ZTUN_CONTROL_KEY"},
		{"ZTUN_CONTROL_CREDENTIALS", "/does/not/exist", "root-cert.pem"},
		{"ZTUN_MESH_CONFIG", "/does/not/exist", "no such file"},
		{"TERMINATION_GRACE_PERIOD_SECONDS", "-1", "whole number"},
		{"TERMINATION_GRACE_PERIOD_SECONDS", "", "whole number"},
		{"CONNECTION_TERMINATION_DEADLINE", "", "empty"},
		{"ZTUNNEL_WORKER_THREADS", "many", "percentage"},
		{"ZTUNNEL_WORKER_THREADS", "", "percentage"},
		{"ZTUNNEL_WORKER_THREADS", "101%", "percentage"},
		{"ZTUNNEL_RESOURCE_CPU_LIMIT", "0", "quantity"},
		{"ZTUNNEL_RESOURCE_CPU_LIMIT", "NaN", "quantity"},
		{"ZTUNNEL_RESOURCE_CPU_REQUEST", "inf", "quantity"},
		{"ZTUNNEL_RESOURCE_CPU_REQUEST", "1e300", "quantity"},
		{"ZTUNNEL_CPU_LIMIT", "500m", "decimal"},
		{"ZTUN_MTU", "100", "1280"},
		{"ZTUN_NODE_TUN", "a-name-that-is-too-long", "15 characters"},
		{"ZTUN_MAX_INFLIGHT", "1", "from 2"},
		{"HTTP2_CONNECTION_WINDOW_SIZE", "65535", "HTTP2_STREAM_WINDOW_SIZE"},
	} {
		t.Run(tc.name+"="+tc.value, func(t *testing.T) {
			_, err := loadConfig(env(tc.name, tc.value))
			var ce *configError
			if !errors.As(err, &ce) {
				t.Fatalf("got %v, want a configError", err)
			}
			if text := err.Error(); !strings.Contains(text+" ", tc.name) || !strings.HasPrefix(text, "invalid env var ") ||
				!strings.Contains(text, tc.says) || strings.Contains(text, "\n") {
				t.Errorf("message %q", text)
			}
		})
	}
}

func TestTerminationDeadline(t *testing.T) { // spec controlplane checklist 8
	for value, want := range map[string]time.Duration{"30": 25 * time.Second, "11": 6 * time.Second, "10": 9 * time.Second,
		"1": time.Second, "0": time.Second} {
		c, err := loadConfig(env("TERMINATION_GRACE_PERIOD_SECONDS", value))
		if err != nil || c.Process.TerminationDeadline != want {
			t.Errorf("grace %s: %v, %v; want %v", value, c.Process.TerminationDeadline, err, want)
		}
	}
	c, err := loadConfig(env("TERMINATION_GRACE_PERIOD_SECONDS", "30", "CONNECTION_TERMINATION_DEADLINE", "1s"))
	if err != nil || c.Process.TerminationDeadline != time.Second {
		t.Errorf("explicit deadline: %v, %v", c.Process.TerminationDeadline, err)
	}
}

func TestWorkerThreads(t *testing.T) { // spec controlplane 9.2, checklist 93
	two, zero := uint16(2), uint16(0)
	for _, tc := range []struct {
		explicit                       string
		concurrency                    *uint16
		limit, request, cpuLimit, cpus int
		want                           int
	}{
		{"", nil, 16, 0, 0, 64, 16},
		{"", nil, 1, 0, 0, 64, 1},
		{"", nil, 4, 8, 0, 64, 8},
		{"", nil, 0, 0, 0, 32, 8},
		{"", nil, 0, 0, 0, 4, 2},
		{"30%", nil, 0, 0, 0, 16, 5},
		{"10%", nil, 0, 0, 0, 4, 1},
		{"0", nil, 0, 0, 0, 4, 4},
		{"3", &two, 0, 0, 0, 4, 3},
		{"", &two, 0, 0, 0, 8, 2},
		{"", &zero, 0, 0, 0, 8, 8},
		{"0", nil, 0, 0, 6, 8, 6},
	} {
		got, err := workerThreads(tc.explicit, tc.concurrency, tc.limit, tc.request, tc.cpuLimit, tc.cpus)
		if err != nil || got != tc.want {
			t.Errorf("%+v: got %d, %v", tc, got, err)
		}
	}
	var n int
	for v, want := range map[string]int{"500m": 1, "2500m": 3, "1.5": 2, "2": 2} {
		if err := quantity(&n)(v); err != nil || n != want {
			t.Errorf("quantity %s: %d, %v", v, n, err)
		}
	}
}

// An unreadable secret is not repeated where others can read it, and no value fills the screen.
func TestErrorsKeepSecrets(t *testing.T) {
	for _, name := range []string{"AUTH_TOKEN", "XDS_HEADER_X", "CA_HEADER_X"} {
		_, err := loadConfig(env(name, "hunter2\x01"))
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := loadConfig(env("NODE_NAME", "n1", "PROXY_CONFIG", "{"+strings.Repeat("x", 1<<20)))
	if err == nil || len(err.Error()) > 1000 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
}

// What is not UTF-8 counts as not set (spec controlplane 1.1); "" is a value.
func TestTextOnly(t *testing.T) {
	c := load(t, "KEEPALIVE_RETRIES", "\xff", "XDS_HEADER_A", "\xff", "ISTIO_META_X", "\xff", "CLUSTER_ID", "",
		"ISTIO_META_Y", "")
	if c.Net.KeepaliveRetries != 9 || len(c.XDS.Headers) != 0 || c.Node.ClusterID != "" {
		t.Errorf("%+v", c)
	}
	if _, ok := c.Self.Metadata["X"]; ok || len(c.Self.Metadata) != 1 {
		t.Errorf("metadata %v", c.Self.Metadata)
	}
}

// A few of ztunnel's variables are on for "true" and off for everything else.
func TestExactlyTrue(t *testing.T) {
	for value, want := range map[string]struct {
		on       bool
		warnings int
	}{"true": {true, 0}, "false": {}, "": {}, "True": {false, 2}, "1": {false, 2}} {
		c := load(t, "TLS12_ENABLED", value, "AUTHZ_POLICY_INFO_LOGGING", value)
		if c.Proxy.TLS.TLS12 != want.on || c.Proxy.PolicyInfoLogging != want.on || len(c.Warnings) != want.warnings {
			t.Errorf("%q: %v %v %q", value, c.Proxy.TLS.TLS12, c.Proxy.PolicyInfoLogging, c.Warnings)
		}
	}
	if c := load(t, "COMPLIANCE_POLICY", "pqc"); !c.Proxy.TLS.PQC {
		t.Error("pqc")
	}
	if c := load(t, "COMPLIANCE_POLICY", ""); c.Proxy.TLS.PQC {
		t.Error("no policy")
	}
}

func TestPlainVariables(t *testing.T) {
	c := load(t, "UNSTABLE_ENABLE_SOCKS5", "true", "LOCALHOST_APP_TUNNEL", "false", "PREFERED_SERVICE_NAMESPACE", "p",
		"CLUSTER_DOMAIN", "d.local", "CRL_PATH", "/crl.pem", "INSTANCE_IP", "10.0.0.9", "INPOD_UDS", "/x.sock", "SECRET_TTL",
		"1h30m",
		"ALT_XDS_HOSTNAME", "x", "ALT_CA_HOSTNAME", "y", "ZTUN_CONTROL_CERT", "/c", "ZTUN_CONTROL_KEY", "/k",
		"INPOD_PORT_REUSE", "true", "PACKET_MARK", "1337")
	if !c.Proxy.SOCKS5 || c.Proxy.LocalhostAppTunnel || c.DNS.PreferredNamespace != "p" ||
		c.Node.ClusterDomain != "d.local" ||
		c.CA.CRLPath != "/crl.pem" || c.Self.InstanceIP != "10.0.0.9" || c.Attach.InpodUDS != "/x.sock" ||
		c.XDS.AltHostname != "x" ||
		c.CA.AltHostname != "y" ||
		c.Control.Cert != "/c" || c.Control.Key != "/k" || c.Net.PacketMark != 1337 {
		t.Errorf("%+v", c)
	}
	if c.CA.TTL != 5400*time.Second { // checklist 15
		t.Errorf("SECRET_TTL %v", c.CA.TTL)
	}
	if c := load(t, "ENABLE_ORIG_SRC", "true"); c.Proxy.OriginalSource == nil || !*c.Proxy.OriginalSource {
		t.Error("ENABLE_ORIG_SRC=true")
	}
}

// The proxy's own identity needs all three names (spec controlplane 1.2).
func TestOwnIdentity(t *testing.T) {
	all := []string{"POD_NAMESPACE", "istio-system", "SERVICE_ACCOUNT", "ztunnel", "POD_NAME", "zt-1"}
	c := load(t, all...)
	if c.Self.Identity.String() != "spiffe://cluster.local/ns/istio-system/sa/ztunnel" || c.Self.Pod != "zt-1" {
		t.Errorf("%v", c.Self.Identity)
	}
	if c := load(t, append(all, "TRUST_DOMAIN", "td")...); c.Self.Identity.TrustDomain != "td" {
		t.Errorf("%v", c.Self.Identity)
	}
	for _, missing := range []string{"POD_NAMESPACE", "SERVICE_ACCOUNT", "POD_NAME"} {
		if c := load(t, append(slices.Clone(all), missing, "-")...); !c.Self.Identity.IsZero() {
			t.Errorf("without %s: %v", missing, c.Self.Identity)
		}
	}
}

func TestWorkloadInfo(t *testing.T) { // checklist 11
	ns, name, sa, err := parseWorkloadInfo("a/b/c/d")
	if err != nil || ns != "a" || name != "b" || sa != "c/d" {
		t.Errorf("%q %q %q %v", ns, name, sa, err)
	}
	for _, v := range []string{"", "a", "a/b", "a//c", "//"} {
		if _, _, _, err := parseWorkloadInfo(v); err == nil {
			t.Errorf("%q is accepted", v)
		}
	}
}
