package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/netip"
	"testing"
	"time"
)

// Authority issues certificates of servers and of their clients.
type Authority struct {
	Cert *x509.Certificate
	key  crypto.Signer
}

// New makes an authority whose root is valid for an hour about now.
func New(t testing.TB) *Authority {
	t.Helper()
	tmpl := template(time.Hour)
	tmpl.Subject = pkix.Name{CommonName: "root"}
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, true, x509.KeyUsageCertSign
	c := sign(t, tmpl, nil)
	cert, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return &Authority{cert, c.PrivateKey.(crypto.Signer)}
}

// PEM is the root.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw})
}

// Issue makes a certificate for names, which may be IP addresses, until life from now.
func (a *Authority) Issue(t testing.TB, life time.Duration, names ...string) tls.Certificate {
	t.Helper()
	tmpl := template(life)
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, n := range names {
		if ip, err := netip.ParseAddr(n); err == nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip.AsSlice())
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, n)
		}
	}
	return sign(t, tmpl, a)
}

func template(life time.Duration) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), NotBefore: now.Add(-time.Hour),
		NotAfter: now.Add(life)}
}

// sign makes a key and a certificate for it; by none, it is its own root.
func sign(t testing.TB, tmpl *x509.Certificate, by *Authority) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if by == nil {
		by = &Authority{tmpl, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.Cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
