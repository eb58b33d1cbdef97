package identity

import (
	"crypto/fips140"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestPostQuantum: COMPLIANCE_POLICY=pqc leaves one group, on both sides, and no TLS 1.2 to go around it.
func TestPostQuantum(t *testing.T) {
	ca := newTestCA(t, "root")
	a, b := ca.issue(t, []string{uriA}, nil), ca.issue(t, []string{uriB}, nil)
	pqc := Params{PQC: true}
	classic := func(cfg *tls.Config) *tls.Config {
		cfg = cfg.Clone()
		cfg.GetConfigForClient, cfg.CurvePreferences = nil, []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384}
		return cfg
	}
	tls12 := ClientTLS(a, []ID{idB}, Params{TLS12: true})
	tls12.MaxVersion = tls.VersionTLS12
	for _, c := range []struct {
		name           string
		server, client *tls.Config
		serverErr      string // "" = accepted
		clientErr      string
	}{
		{"both", ServerTLS(b, pqc), ClientTLS(a, []ID{idB}, pqc), "", ""},
		{"server alone", ServerTLS(b, pqc), ClientTLS(a, []ID{idB}, Params{}), "", ""},
		{"client alone", ServerTLS(b, Params{}), ClientTLS(a, []ID{idB}, pqc), "", ""},
		{"classic client", ServerTLS(b, pqc), classic(ClientTLS(a, []ID{idB}, Params{})),
			"tls: no key exchanges supported by both client and server", "remote error: tls: handshake failure"},
		{"classic server", classic(ServerTLS(b, Params{})), ClientTLS(a, []ID{idB}, pqc),
			"tls: no key exchanges supported by both client and server", "remote error: tls: handshake failure"},
		{"TLS 1.2 client, although it is allowed", ServerTLS(b, Params{PQC: true, TLS12: true}), tls12,
			"tls: client offered only unsupported versions: [303]", "remote error: tls: protocol version not supported"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := shake(t, loopback, c.server, c.client)
			if c.serverErr != "" {
				if o.server == nil || o.server.Error() != c.serverErr || o.client == nil || o.client.Error() != c.clientErr {
					t.Errorf("server: %v\nclient: %v", o.server, o.client)
				}
				return
			}
			if o.server != nil || o.client != nil || o.serverState.CurveID != tls.X25519MLKEM768 ||
				o.serverState.Version != tls.VersionTLS13 {
				t.Errorf("%v, %v, %v", o.server, o.client, o.serverState.CurveID)
			}
		})
	}
}

// fipsChild is set in the environment of the test binary that runs in FIPS 140-3 mode, which can only be chosen when a
// process starts.
const fipsChild = "ZTUN_TEST_FIPS_CHILD"

// TestFIPS: with Go's own module in charge (GODEBUG=fips140=on, or only, which forbids the rest of the process
// everything else too) keys, certificates, revocation and handshakes work, with what is left of suites and groups.
func TestFIPS(t *testing.T) {
	for _, mode := range []string{"on", "only"} {
		t.Run(mode, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFIPSChild$", "-test.v", "-test.timeout=60s")
			cmd.Env = append(os.Environ(), "GODEBUG=fips140="+mode, fipsChild+"=1")
			out, err := cmd.CombinedOutput()
			for _, want := range []string{"default: TLS 1.3 X25519MLKEM768 offered [P256 P384 X25519MLKEM768]",
				"pqc: TLS 1.3 X25519MLKEM768 offered [X25519MLKEM768]", "--- PASS: TestFIPSChild"} {
				if err != nil || !strings.Contains(string(out), want) {
					t.Fatalf("%v, want %q in:\n%s", err, want, out)
				}
			}
		})
	}
}

// TestFIPSChild is TestFIPS' other half; alone it makes the same handshakes without FIPS mode.
func TestFIPSChild(t *testing.T) {
	fips := os.Getenv(fipsChild) != ""
	if fips140.Enabled() != fips {
		t.Fatalf("FIPS mode %v", fips140.Enabled())
	}
	ca := newTestCA(t, "root")
	a, b := ca.issue(t, []string{uriA}, nil), ca.issue(t, []string{uriB}, nil)
	names := map[tls.CurveID]string{tls.X25519MLKEM768: "X25519MLKEM768", tls.X25519: "X25519", tls.CurveP256: "P256",
		tls.CurveP384: "P384"}
	for name, p := range map[string]Params{"default": {}, "pqc": {PQC: true}, "TLS 1.2 allowed": {TLS12: true}} {
		p.Revocation = &Revocation{}
		p.Revocation.Replace(mustCRL(t, ca.list(t, nil)))
		server := ServerTLS(b, p).Clone()
		var hello *tls.ClientHelloInfo
		server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello = h; return nil, nil }
		o := shake(t, pipe, server, ClientTLS(a, []ID{idB}, p))
		if o.client != nil || o.server != nil {
			t.Fatal(name, o.client, o.server)
		}
		suite := o.clientState.CipherSuite // without FIPS mode and AES in hardware it may be ChaCha20
		if fips && suite != tls.TLS_AES_128_GCM_SHA256 && suite != tls.TLS_AES_256_GCM_SHA384 {
			t.Errorf("%s: suite %s", name, tls.CipherSuiteName(suite))
		}
		var groups []string
		for _, g := range hello.SupportedCurves {
			groups = append(groups, names[g])
		}
		slices.Sort(groups)
		fmt.Printf("%s: %s %s offered %v\n", name, tls.VersionName(o.clientState.Version),
			names[o.clientState.CurveID], groups)
		if fips && (slices.Contains(groups, "X25519") ||
			slices.Contains(hello.CipherSuites, tls.TLS_CHACHA20_POLY1305_SHA256)) {
			t.Errorf("%s: offered %v and suites %x", name, groups, hello.CipherSuites)
		}
		p.Revocation.Replace(mustCRL(t, ca.list(t, []*x509.Certificate{a.Leaf})))
		if o := shake(t, pipe, server, ClientTLS(a, []ID{idB}, p)); o.server == nil {
			t.Errorf("%s: a revoked client was let in", name)
		}
	}
}
