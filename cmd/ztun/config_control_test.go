package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestControlPlaneAddress(t *testing.T) { // checklist 2, 3, 4
	for _, tc := range []struct{ xds, ca, kubernetes, wantXDS, wantCA string }{
		{"-", "-", "-", "https://localhost:15012", "https://localhost:15012"},
		{"-", "-", "10.96.0.1", "https://istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012"},
		{"-", "-", "", "https://istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012"},
		{"", "-", "10.96.0.1", "", "https://istiod.istio-system.svc:15012"},
		{"istiod.x.svc:15012", "ca.y", "-", "https://istiod.x.svc:15012", "https://ca.y"},
		{"https://[::1]:15012", "127.0.0.1:15012/", "-", "https://[::1]:15012", "https://127.0.0.1:15012/"},
	} {
		c := load(t, "XDS_ADDRESS", tc.xds, "CA_ADDRESS", tc.ca, "KUBERNETES_SERVICE_HOST", tc.kubernetes,
			"LOCAL_CA_DIR", "-")
		if c.XDS.Address != tc.wantXDS || c.CA.Address != tc.wantCA {
			t.Errorf("%+v: %s, %s", tc, c.XDS.Address, c.CA.Address)
		}
	}
}

// Workloads come from a file, a control plane, or both; certificates from exactly one place.
func TestSourcesOfKnowledge(t *testing.T) {
	if c := load(t, "XDS_ADDRESS", "-", "LOCAL_XDS_PATH", "-"); c.XDS.Address == "" || c.XDS.LocalPath != "" {
		t.Errorf("xDS alone: %+v", c)
	}
	if c := load(t, "XDS_ADDRESS", "-"); c.XDS.Address == "" || c.XDS.LocalPath == "" {
		t.Errorf("both: %+v", c)
	}
	if c := load(t, "LOCAL_XDS_PATH", "-", "LOCAL_XDS", "{}"); c.XDS.Address != "" || c.XDS.LocalInline != "{}" {
		t.Errorf("inline: %+v", c)
	}
	if c := load(t, "LOCAL_CA_DIR", "-", "FAKE_CA", "true", "CA_ADDRESS", "istiod:15012"); c.CA.Address != "" ||
		!c.CA.Fake {
		t.Errorf("FAKE_CA: %+v", c)
	}
	if c := load(t, "CA_ADDRESS", ""); c.CA.Address != "" || c.CA.LocalDir == "" {
		t.Errorf("LOCAL_CA_DIR: %+v", c)
	}
	for _, tc := range []struct{ name, says string }{{"XDS_ADDRESS", "LOCAL_XDS_PATH"}, {"CA_ADDRESS", "ztun ca init"}} {
		_, err := loadConfig(env("LOCAL_XDS_PATH", map[bool]string{true: "-", false: "/w"}[tc.name == "XDS_ADDRESS"],
			"LOCAL_CA_DIR", "-", "CA_ADDRESS", ""))
		var ce *configError
		if !errors.As(err, &ce) || ce.name != tc.name || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("no source for %s: %v", tc.name, err)
		}
	}
}

func TestRootSources(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	pem := "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"
	remote := []string{"XDS_ADDRESS", "-", "LOCAL_CA_DIR", "-"}
	c := load(t, remote...)
	if len(c.Warnings) != 2 || !strings.Contains(c.Warnings[0], "XDS_ROOT_CA") || c.XDS.Roots.File != "" ||
		c.XDS.Roots.PEM != nil || c.XDS.Roots.System {
		t.Errorf("nothing mounted: %+v %q", c.XDS.Roots, c.Warnings)
	}
	c = load(t, append(remote, "XDS_ROOT_CA", "SYSTEM", "CA_ROOT_CA", pem)...)
	if !c.XDS.Roots.System || string(c.CA.Roots.PEM) != pem || c.CA.Roots.System || len(c.Warnings) != 0 {
		t.Errorf("SYSTEM and PEM: %+v %+v %q", c.XDS.Roots, c.CA.Roots, c.Warnings)
	}
	if err := os.MkdirAll("var/run/secrets/istio", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(defaultRoots, []byte(pem), 0o644); err != nil {
		t.Fatal(err)
	}
	if c = load(t, remote...); c.XDS.Roots.File != defaultRoots || c.CA.Roots.File != defaultRoots ||
		len(c.Warnings) != 0 {
		t.Errorf("mounted: %+v %q", c.XDS.Roots, c.Warnings)
	}
}

func TestToken(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if c := load(t); c.Control.Token.File != "" || c.Control.Token.Literal != "" {
		t.Errorf("nothing mounted: %q %q", c.Control.Token.File, c.Control.Token.Literal)
	}
	if c := load(t, "AUTH_TOKEN", "abc.def\n"); c.Control.Token.Literal != "abc.def" || c.Control.Token.File != "" ||
		len(c.Warnings) != 0 {
		t.Errorf("literal: %q %q", c.Control.Token.File, c.Control.Token.Literal)
	}
	if c := load(t, "AUTH_TOKEN", "/no/such/token"); c.Control.Token.Literal != "/no/such/token" || len(c.Warnings) != 1 {
		t.Errorf("a path that is not there: %q %q", c.Control.Token.Literal, c.Warnings)
	}
	if err := os.MkdirAll("var/run/secrets/tokens", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(defaultToken, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c := load(t); c.Control.Token.File != defaultToken {
		t.Errorf("mounted: %q", c.Control.Token.File)
	}
	if c := load(t, "AUTH_TOKEN", ""); c.Control.Token.File != "" || c.Control.Token.Literal != "" {
		t.Errorf("none wanted: %q %q", c.Control.Token.File, c.Control.Token.Literal)
	}
}

func TestHeaders(t *testing.T) { // checklist 14
	c := load(t, "XDS_HEADER_FOO_BAR", "v", "XDS_HEADER_X-Y.Z", "", "CA_HEADER_Authorization", "Basic a=b")
	if want := [][2]string{{"foo_bar", "v"}, {"x-y.z", ""}}; !slices.Equal(c.XDS.Headers, want) {
		t.Errorf("xDS: %q", c.XDS.Headers)
	}
	if want := [][2]string{{"authorization", "Basic a=b"}}; !slices.Equal(c.CA.Headers, want) {
		t.Errorf("CA: %q", c.CA.Headers)
	}
}

func TestMetadata(t *testing.T) { // checklist 13, 20
	c := load(t, "ISTIO_META_CLUSTER_ID", "c1", "CLUSTER_ID", "c2", "ISTIO_METAJSON_LABELS", `{"a":1}`,
		"ISTIO_METAJSON_BAD", "{", "ISTIO_METAJSON_NULL", "null")
	if c.Node.ClusterID != "c1" || c.Self.Metadata["CLUSTER_ID"] != "c1" || len(c.Self.Metadata) != 1 {
		t.Errorf("cluster %q, metadata %v", c.Node.ClusterID, c.Self.Metadata)
	}
	if string(c.Self.MetaJSON["LABELS"]) != `{"a":1}` || string(c.Self.MetaJSON["NULL"]) != "null" ||
		len(c.Self.MetaJSON) != 2 ||
		len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "ISTIO_METAJSON_BAD") {
		t.Errorf("JSON %s, warnings %q", c.Self.MetaJSON, c.Warnings)
	}
	if !json.Valid(c.Self.MetaJSON["LABELS"]) {
		t.Error("what is kept is not JSON")
	}
}

// ZTUN_CONTROL_CREDENTIALS stands in for whatever the specific variables do not say.
func TestControlCredentials(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	set := []string{"ZTUN_CONTROL_CREDENTIALS", dir, "XDS_ADDRESS", "-", "LOCAL_CA_DIR", "-"}
	broken := func(says string) {
		t.Helper()
		if _, err := loadConfig(env(set...)); err == nil || !strings.Contains(err.Error(), says) ||
			!strings.Contains(err.Error(), "ZTUN_CONTROL_CREDENTIALS") {
			t.Errorf("%v, want %q", err, says)
		}
	}
	broken("root-cert.pem")
	root := file("root-cert.pem")
	broken("neither a token")
	cert := file("cert-chain.pem")
	broken("only one of")
	key := file("key.pem")
	c := load(t, set...)
	if c.XDS.Roots.File != root || c.CA.Roots.File != root || c.Control.Token.File != "" || c.Control.Cert != cert ||
		c.Control.Key != key || c.Control.Dir != dir || len(c.Warnings) != 0 {
		t.Errorf("certificate only: %+v", c)
	}
	token := file("token")
	if c := load(t, set...); c.Control.Token.File != token || c.Control.Cert != cert {
		t.Errorf("all: %+v", c)
	}
	c = load(t, append(set, "XDS_ROOT_CA", "SYSTEM", "AUTH_TOKEN", "t", "ZTUN_CONTROL_CERT", "/c", "ZTUN_CONTROL_KEY",
		"/k")...)
	if !c.XDS.Roots.System || c.XDS.Roots.File != "" || c.CA.Roots.File != root || c.Control.Token.Literal != "t" ||
		c.Control.Token.File != "" || c.Control.Cert != "/c" || c.Control.Key != "/k" {
		t.Errorf("specific variables: %+v", c)
	}
}

// TestDeliberate: a daemon that was told nothing at all does not begin.
func TestDeliberate(t *testing.T) {
	for _, tc := range []struct {
		env  []string
		want bool
	}{
		{nil, false},
		{[]string{"ZTUN_MTU", "1400"}, false},
		{[]string{"NODE_NAME", "n1"}, true},
		{[]string{"XDS_ADDRESS", "https://istiod:15012"}, true},
		{[]string{"PROXY_CONFIG", "discoveryAddress: istiod:15012"}, true},
		{[]string{"LOCAL_XDS_PATH", "world.yaml"}, true},
		{[]string{"KUBERNETES_SERVICE_HOST", "10.0.0.1"}, true},
	} {
		c, err :=
			loadConfig(env(append([]string{"LOCAL_XDS_PATH", "-", "LOCAL_CA_DIR", "-", "XDS_ADDRESS", "-"}, tc.env...)...))
		if err != nil {
			t.Errorf("%q: %v", tc.env, err)
			continue
		}
		if err := c.deliberate(); (err == nil) != tc.want {
			t.Errorf("%q: %v", tc.env, err)
		}
	}
}
