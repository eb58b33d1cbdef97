package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"ztun/proxy/identity"
)

// TestDumpGolden: testdata/certificates.json is the "certificates" of a real ztunnel's config_dump (samples/
// config_dump-a.json). The same certificates must come out byte for byte.
func TestDumpGolden(t *testing.T) {
	want, err := os.ReadFile("testdata/certificates.json")
	if err != nil {
		t.Fatal(err)
	}
	var states []stateJSON
	if err := json.Unmarshal(want, &states); err != nil {
		t.Fatal(err)
	}
	certs := func(in []certJSON) (out []*x509.Certificate) {
		for _, c := range in {
			text, err := base64.StdEncoding.DecodeString(c.PEM)
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(text)
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, cert)
		}
		return out
	}
	var dump []CertState
	for _, s := range states {
		dump = append(dump, CertState{s.Identity, s.State, certs(s.CertChain), certs(s.RootCerts)})
	}
	got, err := json.MarshalIndent(dump, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(append(got, '\n'), want) {
		t.Errorf("got\n%s", got)
	}
	// And the sample's own leaf is what identity makes of it.
	if got, ok := identity.First(dump[0].Chain[0]); !ok || got != id("a") {
		t.Error(got)
	}
}

func TestDump(t *testing.T) {
	f := &fakeSigner{}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		must(t, m, "b")
		f.set(errDown)
		if _, err := m.Certificate(t.Context(), id("c")); err == nil {
			t.Fatal("no error")
		}
		f.latency = time.Second
		m.Prefetch(id("a"))
		synctest.Wait()
		var got []string
		for _, s := range m.Dump() {
			b, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			if s.State != "Available" {
				got = append(got, string(b))
			} else {
				got = append(got, s.Identity.String())
			}
		}
		want := []string{
			`{"certChain":[],"identity":"spiffe://cluster.local/ns/default/sa/a","rootCerts":[],"state":"Initializing"}`,
			"spiffe://cluster.local/ns/default/sa/b",
			`{"certChain":[],"identity":"spiffe://cluster.local/ns/default/sa/c","rootCerts":[],"state":"Unavailable: signing gRPC error (Unavailable): CA is down"}`,
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	})
}
