package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"ztun/proxy/identity"
)

// TestRequestShape: checklist 125.
func TestRequestShape(t *testing.T) {
	key, der, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	public, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() || !public.Equal(key.Public()) ||
		req.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		t.Errorf("key %T, signature %v", req.PublicKey, req.SignatureAlgorithm)
	}
	if string(req.RawSubject) != "\x30\x00" {
		t.Errorf("subject %x", req.RawSubject)
	}
	if len(req.Extensions) != 1 || !req.Extensions[0].Critical || len(req.URIs) != 1 ||
		req.URIs[0].String() != id("a").String() {
		t.Errorf("extensions %+v, URIs %v", req.Extensions, req.URIs)
	}
	other, _, err := NewRequest(id("a"))
	if err != nil || key.(*ecdsa.PrivateKey).Equal(other) {
		t.Error("the key is not fresh")
	}
	if _, _, err := NewRequest(id("ä")); err == nil {
		t.Error("an identity that is not ASCII got a SAN")
	}
}

func TestLocalSign(t *testing.T) {
	l := NewFake()
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	chain, roots, err := l.Sign(t.Context(), id("a"), csr, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	leaf, now := chain[0], time.Now()
	same(t, "notBefore", leaf.NotBefore, now.Add(-2*time.Minute))
	same(t, "notAfter", leaf.NotAfter, now.Add(time.Hour))
	if len(chain) != 1 || len(roots) != 1 || string(leaf.RawSubject) != "\x30\x00" || leaf.IsCA ||
		!leaf.BasicConstraintsValid {
		t.Errorf("%+v", leaf)
	}
	if got, ok := identity.First(leaf); !ok || got != id("a") || len(identity.URIs(leaf.Extensions)) != 1 {
		t.Errorf("identity %v", got)
	}
	for _, ext := range leaf.Extensions {
		if ext.Id.Equal([]int{2, 5, 29, 17}) && !ext.Critical {
			t.Error("the SAN must be critical beside an empty subject")
		}
	}
	pool := x509.NewCertPool()
	pool.AddCert(roots[0])
	for _, u := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{u}}); err != nil {
			t.Error(err)
		}
	}
	if again, _, _ := l.Sign(t.Context(), id("a"), csr, time.Hour); again[0].SerialNumber.Cmp(leaf.SerialNumber) == 0 {
		t.Error("a serial number twice")
	}

	// Never longer than the CA lives.
	if chain, _, err = l.Sign(t.Context(), id("a"), csr, 1<<63-1); err != nil || chain[0].NotAfter.After(l.cert.NotAfter) {
		t.Errorf("%v, %v", chain, err)
	}
	if _, _, err := l.Sign(t.Context(), id("a"), csr, time.Millisecond); err == nil {
		t.Error("a certificate without life")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.Sign(ctx, id("a"), csr, time.Hour); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestBadRequests: the local CA signs nothing but the shape it makes itself.
func TestBadRequests(t *testing.T) {
	l := NewFake()
	san, err := identity.SANExtension(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	lax := san
	lax.Critical = false
	make := func(key crypto.Signer, tmpl *x509.CertificateRequest) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	exts := func(e ...pkix.Extension) *x509.CertificateRequest {
		return &x509.CertificateRequest{ExtraExtensions: e}
	}
	good := make(p256, exts(san))
	broken := append([]byte(nil), good...)
	broken[len(broken)-1] ^= 1
	_, other, err := NewRequest(id("b"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		csr  []byte
		want string
	}{
		"nothing":   {nil, "certificate request: "},
		"garbage":   {[]byte("garbage"), "certificate request: "},
		"signature": {broken, "certificate request: "},
		"P-384":     {make(p384, exts(san)), "not on P-256"},
		"RSA":       {make(rsaKey, exts(san)), "not on P-256"},
		"subject": {
			make(p256, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}, ExtraExtensions: []pkix.Extension{san}}),
			"subject is not empty"},
		"no SAN":       {make(p256, exts()), "the one extension"},
		"SAN not crit": {make(p256, exts(lax)), "the one extension"},
		"CA please": {
			make(p256, exts(san, pkix.Extension{Id: []int{2, 5, 29, 19}, Value: []byte{0x30, 3, 1, 1, 0xff}})),
			"the one extension"},
		"DNS": {
			make(p256, &x509.CertificateRequest{DNSNames: []string{"x"}, IPAddresses: []net.IP{{1, 2, 3, 4}}}),
			"the one extension"},
		"another's":       {other, "did not find expected SAN: spiffe://cluster.local/ns/default/sa/a"},
		"trailing bytes":  {append(append([]byte(nil), good...), 0), "certificate request: "},
		"identity's case": {make(p256, exts(mustSAN(t, id("A")))), "did not find expected SAN"},
	} {
		if chain, _, err := l.Sign(t.Context(), id("a"), c.csr, time.Hour); err == nil ||
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", name, chain, err)
		}
	}
	if _, _, err := l.Sign(t.Context(), id("a"), good, time.Hour); err != nil {
		t.Error(err)
	}
}

func mustSAN(t *testing.T, id identity.ID) pkix.Extension {
	t.Helper()
	san, err := identity.SANExtension(id)
	if err != nil {
		t.Fatal(err)
	}
	return san
}

// TestParseChain: checklist 133 and 134, and what else a CA server may answer.
func TestParseChain(t *testing.T) {
	l := NewFake()
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	chain, _, err := l.Sign(t.Context(), id("a"), csr, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	text := func(c *x509.Certificate) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	leaf, root := text(chain[0]), text(l.cert)
	bad := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("bad")}))
	for _, c := range []struct {
		answer                []string
		chain, roots, skipped int
		err                   string
	}{
		{[]string{leaf, root}, 1, 1, 0, ""},
		{[]string{leaf, root, root}, 2, 1, 0, ""},
		{[]string{leaf, root + root}, 1, 2, 0, ""},
		{[]string{leaf, bad + root + "junk"}, 1, 1, 1, ""},
		{nil, 0, 0, 0, "chain returned from CA is empty for: spiffe://cluster.local/ns/default/sa/a"},
		{[]string{leaf}, 0, 0, 0,
			"no root certificate present in the chain returned from CA for: spiffe://cluster.local/ns/default/sa/a"},
		{[]string{leaf, bad}, 0, 0, 1,
			"no root certificate present in the chain returned from CA for: spiffe://cluster.local/ns/default/sa/a"},
		{[]string{leaf, ""}, 0, 0, 0,
			"no root certificate present in the chain returned from CA for: spiffe://cluster.local/ns/default/sa/a"},
		{[]string{"junk", root}, 0, 0, 0, "element 0 of the chain from CA is not PEM"},
		{[]string{leaf, bad, root}, 0, 0, 0, "element 1 of the chain from CA: "},
	} {
		chain, roots, skipped, err := ParseChain(id("a"), c.answer)
		if len(chain) != c.chain || len(roots) != c.roots || skipped != c.skipped {
			t.Errorf("%.20q: %d %d %d", c.answer, len(chain), len(roots), skipped)
		}
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.HasPrefix(err.Error(), c.err)) {
			t.Errorf("%.20q: %v", c.answer, err)
		}
	}
}

func FuzzSign(f *testing.F) {
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(csr)
	f.Add([]byte("junk"))
	l := NewFake()
	f.Fuzz(func(t *testing.T, csr []byte) {
		chain, _, err := l.Sign(context.Background(), id("a"), csr, time.Hour)
		if err != nil {
			return
		}
		if uris := identity.URIs(chain[0].Extensions); len(uris) != 1 || uris[0] != id("a").String() || chain[0].IsCA {
			t.Fatalf("signed %q", uris)
		}
	})
}

func FuzzParseChain(f *testing.F) {
	f.Add("", "")
	f.Add(string(fakeCert), string(fakeCert))
	f.Fuzz(func(t *testing.T, a, b string) {
		chain, roots, _, err := ParseChain(id("a"), []string{a, b})
		if (err == nil) != (len(chain) == 1 && len(roots) > 0) {
			t.Fatal(chain, roots, err)
		}
	})
}
