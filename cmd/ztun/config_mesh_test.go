package main

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// writeMesh writes a mesh configuration where ztunnel looks for it, in a new working directory.
func writeMesh(t *testing.T, text string) {
	t.Helper()
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.MkdirAll("etc/istio/config", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("etc/istio/config/mesh", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// The mesh's defaultConfig is read; PROXY_CONFIG wins over it value by value, its metadata key by key; the
// process's own variables win over both (checklist 5).
func TestSourcesAndPrecedence(t *testing.T) {
	writeMesh(t, `
trustDomain: ignored
defaultConfig:
  discoveryAddress: mesh.example:15012
  proxyAdminPort: 15100
  statsPort: 15120
  concurrency: 3
  tracing: {zipkin: {address: ignored}}
  proxyMetadata:
    ISTIO_META_A: mesh
    B: mesh
    C: mesh
    ISTIO_META_DNS_CAPTURE: "false"
`)
	off := []string{"XDS_ADDRESS", "-"}
	c := load(t, off...)
	if c.XDS.Address != "https://mesh.example:15012" || c.Admin.Port != 15100 || c.Admin.StatsPort != 15120 ||
		c.Process.WorkerThreads != 3 || c.DNS.Proxy {
		t.Errorf("from the mesh: %+v", c)
	}
	if want := map[string]string{"A": "mesh", "B": "mesh", "C": "mesh", "DNS_CAPTURE": "false"}; !maps.Equal(
		c.Self.Metadata, want) {
		t.Errorf("metadata %v", c.Self.Metadata)
	}
	own := append(off, "PROXY_CONFIG",
		`{"discoveryAddress": "own.example", "statsPort": 15220, "proxyMetadata": {"B": "own", "ISTIO_META_C": "own"}}`)
	c = load(t, own...)
	if c.XDS.Address != "https://own.example" || c.Admin.Port != 15100 || c.Admin.StatsPort != 15220 {
		t.Errorf("PROXY_CONFIG over mesh: %+v", c)
	}
	c = load(t, append(own, "XDS_ADDRESS", "env.example:1", "ISTIO_META_C", "env", "ISTIO_META_DNS_CAPTURE", "TRUE",
		"ISTIO_META_D", "")...)
	if want := map[string]string{"A": "mesh", "B": "own", "C": "env", "D": "", "DNS_CAPTURE": "TRUE"}; !maps.Equal(
		c.Self.Metadata, want) || !c.DNS.Proxy {
		t.Errorf("environment over both: %v, DNS %v", c.Self.Metadata, c.DNS.Proxy)
	}
	if c.XDS.Address != "https://env.example:1" {
		t.Errorf("XDS_ADDRESS over discoveryAddress: %s", c.XDS.Address)
	}
	if c := load(t, append(own, "XDS_ADDRESS", "")...); c.XDS.Address != "" {
		t.Errorf("XDS_ADDRESS= over discoveryAddress: %s", c.XDS.Address)
	}
	if c := load(t, append(own, "ZTUN_MESH_CONFIG", "")...); c.Admin.Port != 15000 {
		t.Errorf("no mesh configuration wanted, and yet one is read: %d", c.Admin.Port)
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte("defaultConfig: {proxyAdminPort: 15300}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if c := load(t, "ZTUN_MESH_CONFIG", other); c.Admin.Port != 15300 {
		t.Errorf("ZTUN_MESH_CONFIG: %d", c.Admin.Port)
	}
}

// A wrong source is named, with the line.
func TestBadSources(t *testing.T) {
	for _, tc := range []struct{ mesh, proxy, name, says string }{
		{"defaultConfig: {proxyAdminPort: x}", "", "ZTUN_MESH_CONFIG", "line 1"},
		{"a: [", "", "ZTUN_MESH_CONFIG", "yaml"},
		{"defaultConfig: {discoveryAddress: 'http://istiod:15010'}", "", "ZTUN_MESH_CONFIG", "TLS only"},
		{strings.Repeat("#", maxMeshConfig+1), "", "ZTUN_MESH_CONFIG", "larger than 4 MiB"},
		{"", "discoveryAddress: http://istiod", "PROXY_CONFIG", "TLS only"},
		{"", "proxyAdminPort: 70000", "PROXY_CONFIG", "70000"},
		{"", "statsPort: '15020'", "PROXY_CONFIG", "uint16"},
		{"", "- a", "PROXY_CONFIG", "cannot unmarshal"},
		{"", "proxyMetadata:\n  DNS_CAPTURE: true", "PROXY_CONFIG", "line 2: proxyMetadata.DNS_CAPTURE: want a string"},
		{"", "proxyMetadata: {A: 1}", "PROXY_CONFIG", "quotes"},
		{"", "proxyMetadata: {A: {b: c}}", "PROXY_CONFIG", "want a string"},
		{"", "proxyMetadata: [a]", "PROXY_CONFIG", "want a map"},
		{"", "{}0", "PROXY_CONFIG", "more than one document"},
		{"", "statsPort: 1\n---\nstatsPort: 2", "PROXY_CONFIG", "more than one document"},
		// checklist 12
		{"", "proxyMetadata: {ISTIO_META_DNS_PROXY_ADDR: not-an-address}", "ISTIO_META_DNS_PROXY_ADDR", "localhost:PORT"},
	} {
		writeMesh(t, tc.mesh)
		_, err := loadConfig(env("PROXY_CONFIG", tc.proxy, "XDS_ADDRESS", "-"))
		var ce *configError
		if !errors.As(err, &ce) || ce.name != tc.name || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%q %q: %v", tc.mesh[:min(len(tc.mesh), 80)], tc.proxy, err)
		}
	}
}

func TestProxyConfigTexts(t *testing.T) {
	for _, text := range []string{"", " ", "{}", "null", "proxyMetadata:", "proxyMetadata: {}", "unknown: {a: [1]}",
		"{\n\t\"statsPort\": 15020\n}", "proxyMetadata: {A: 2026-11-23, B: '', C: \"true\"}"} {
		if _, err := parseProxyConfig(text); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	p, err := parseProxyConfig("x: &d {A: a}\nproxyMetadata: *d\n")
	if err != nil || p.ProxyMetadata["A"] != "a" {
		t.Errorf("anchor: %v %v", p, err)
	}
	p, err = parseProxyConfig("proxyMetadata: {ISTIO_META_A: with, A: without}")
	if m := proxyMetadata(p.ProxyMetadata, nil); err != nil || m["A"] != "with" || len(m) != 1 {
		t.Errorf("prefix: %v %v", m, err)
	}
}

// DNS is on unless DNS_CAPTURE is there and is not true, in whatever case (spec controlplane 1.2).
func TestDNSCapture(t *testing.T) {
	for value, want := range map[string]bool{"-": true, "true": true, "TRUE": true, "false": false, "": false,
		"yes": false} {
		if c := load(t, "ISTIO_META_DNS_CAPTURE", value); c.DNS.Proxy != want {
			t.Errorf("%q: %v", value, c.DNS.Proxy)
		}
	}
	for value, want := range map[string]string{"localhost:53": "localhost:53", "127.0.0.2:5353": "127.0.0.2:5353",
		"[::1]:53": "[::1]:53"} {
		if c := load(t, "ISTIO_META_DNS_PROXY_ADDR", value); c.DNS.Addr != want {
			t.Errorf("%q: %q", value, c.DNS.Addr)
		}
	}
	if c := load(t, "XDS_ON_DEMAND", "true", "ISTIO_META_DNS_CAPTURE", "false"); !c.XDS.OnDemand {
		t.Error("on demand without DNS")
	}
}

// FuzzProxyConfig: no text makes it crash, and what it takes for metadata are strings that it takes again.
func FuzzProxyConfig(f *testing.F) {
	for _, s := range []string{
		"discoveryAddress: a:1\nproxyAdminPort: 1\nstatsPort: 2\nconcurrency: 3\nproxyMetadata:\n  A: b\n",
		`{"proxyMetadata": {"A": "true"}}`,
		"proxyMetadata: {A: true}", "x: &d {A: a}\nproxyMetadata: *d", "proxyMetadata: {<<: {A: b}}", "a: &a [*a]", "{",
		"{}0", "a: 1\n---\nb: 2", "\xff", "proxyMetadata: {? [a] : b}",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseProxyConfig(s)
		if err != nil {
			return
		}
		over := p.over(proxyConfig{ProxyMetadata: metadataMap{"base": "x"}})
		if _, ok := over.ProxyMetadata["base"]; !ok {
			t.Fatalf("%q loses the base's metadata", s)
		}
		for k, v := range p.ProxyMetadata {
			if over.ProxyMetadata[k] != v {
				t.Fatalf("%q: %q", s, k)
			}
		}
		parseMeshConfig([]byte("defaultConfig:\n  " + strings.ReplaceAll(s, "\n", "\n  ")))
	})
}
